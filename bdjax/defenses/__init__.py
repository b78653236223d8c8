"""Defenses: one module per method, each with a `Config` and one function that is named after its purpose.

    purify(config, victim, view, key) -> variables

returns a cleaned model. `view` is the defender's data: clean images, and a callback that receives reports. It contains
no poisoned image. A method that also tells whether a model is backdoored, and which class the attack targets, reports
the scores by `on_detection` while it purifies; if it detects in a different way, it defines

    detect(config, victim, view, key) -> Scores

which is called after it. Methods that only detect are :mod:`bdjax.detectors`. A method that requires the true trigger
sets NEEDS_TRIGGER = True; where the user decides, NEEDS_TRIGGER is the name of the Config field that does.

A defense of the training phase defines, in place of `purify`,

    train(config, task, key) -> variables

which trains a new model: `task` has the poisoned training set, as the victim saw it, and the victim's architecture.
"""

from bdjax import registry


def without_trigger() -> list[str]:
    """Return the defenses that purify a model and, with default settings, do not require the true trigger."""
    specs = [registry.load("defenses", name) for name in registry.names("defenses")]
    return [
        spec.name for spec in specs if spec.train is None and not spec.needs_trigger(spec.Config())
    ]  # fmt: skip
