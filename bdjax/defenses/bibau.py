"""BI-BAU: unlearn with adversarial images that look like the backdoor's own, kept to what the network knew (blind
inversion, continual learning).

Threat model: the defender has the model and clean labelled images, no trigger; the targeted variant knows y_t. The
aim is more than a low ASR: the network shall not take the backdoor up again from a few poisoned images.

Most display equations of the text that we had are lost; what follows is rebuilt from its prose ("ours" marks a choice).
θ_b are the given weights, θ the current ones, h the penultimate features, W the head, x a clean image, y its label.

Inner step, for one image (Eq. 22, maximised over ‖x' − x‖₂ <= bound, x' in [0, 255]):

    L_adv(x') = trigger + λ1 likelihood + λ2 prior
    trigger      −CE(f_b(x'), y_t)  targeted;   +CE(f_b(x'), y)  untargeted                  (condition 1, Prop. 4.3)
    likelihood   −[α T² KL(s(f_b(x)/T) ‖ s(f(x')/T)) + (1 − α) CE(f(x'), y)]                 (Eq. 17; KL's form: ours)
    prior        cos(Δh, Δw) − ξ |cos(Δh, h(x))|,   Δh = h(x') − h(x),   Δw = W_b[r] − W[r]  (Eq. 18-21; cosines: ours)

r is y_t, or the class that f_b gives x' (ours). ξ = 1 holds the angle of Δh and h(x) at 90 degrees, ξ = 0 follows the
backdoor's features alone. By the chain rule ∂f/∂W = h(x), so Δh stands for the unlearning gradient of the head: the
prior keeps it parallel to what the backdoor task moved and orthogonal to what the clean task needs (Eq. 10-11). At the
first step Δw = 0; the cosines are guarded, and x' begins at x plus a little noise (ours), for Δh = 0 has no direction.

Outer step (Eq. 23-26; untargeted Eq. 27):

    CE(f(x), y) + CE(f(x'), y) + λ3 Σ F^c (θ − θ_b)² − λ4 min(c, Σ F^u (θ − θ_b)²)

F^c and F^u are diagonal Fishers at θ_b, means of *per-example* squared gradients of log p(y|x), over the clean images
and over the first adversarial ones, both scaled to mean one over the weights (ours). The last term, "inverse EWC,
clipped", pushes away from θ_b where the backdoor is sensitive; `inverse="reciprocal"` reads it as
+λ4 min(c, 1 / (Σ F^u (θ − θ_b)² + ε)). Targeted: images of class y_t get no x'.

Constraint set A is the likelihood and EWC, B the prior and the inverse EWC: Table 6 is four settings of two switches.
Fixed by the paper: 20 epochs, batches of 256, 20 steps of 2.0 within 25.0 in 0..255 units, whose norm's letter is lost.
L∞ here: an L2 ball of that radius leaves a BadNets victim's ASR at 73 % on GTSRB and 99 % on digits. λ, T, α, ξ, c, the
optimiser, its rate and schedule are lost as well. Chosen by ACC, ASR and R-ASR on validation images of other victims
(experiments/results/bibau_table2): statistics of their own for clean and adversarial images, a rate of 0.05 that falls
along a cosine and a gentle inverse EWC (λ4 0.01, c 100) keep R-ASR low at more ACC than a constant 0.01 does.
θ is in evaluation mode inside the ascent and in training mode in the outer step, θ_b always in evaluation mode (ours).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.defenses._blind_inversion import Static, ascender, outer, taken
from bdjax.defenses._fisher import ewc_penalty, fisher
from bdjax.defenses._pool import batches
from bdjax.defenses._smallest import ANY
from bdjax.defenses._targeted_search import KEPT, Search, TargetedSearch
from bdjax.engine import run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, learning_rates
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

_PROCEDURES: dict[str, tuple[Any, Any]] = {
    "epochs": (10, 20), "batch_size": (32, 256), "steps_per_epoch": (8, 0), "steps": (3, 20),
    "optimizer": ("adam", "sgd"),
    "learning_rate": (1e-3, 0.05), "batch_norm": ("frozen", "separate"), "ewc": (10.0, 1e-5),
    "inverse_ewc": (1.0, 0.01), "clip": (0.01, 100.0), "distillation": (0.8, 0.0), "averaging": (0.8, 0.0),
}  # fmt: skip
"""What the robust procedure and the paper's fill in."""


@dataclass(frozen=True)
class Config:
    """The procedure."""

    procedure: Literal["robust", "paper"] = "robust"
    """Ours, for models that no setting was chosen on, or the paper's; a field at None takes its value from here."""
    variant: Literal["untargeted", "targeted"] = "untargeted"
    """Ascend away from the true label, or towards `target`. In the robust procedure the untargeted variant looks for
    the target itself."""
    target: int = 0
    """y_t of the targeted variant; not used by the other."""
    preset: Literal["general", "refool", "low_orthogonality"] = "general"
    """Fills in `angle` where it is None. low_orthogonality: SIG, Narcissus, Adaptive-Blend and -Patch, whose features
    overlap with the clean task's."""
    angle: float | None = None
    """ξ, in [0, 1]; general 0.9, refool 0.5, low_orthogonality 0.1 (lost in the text; our order from its sweep)."""
    constraints_a: bool = True
    """Likelihood in the ascent and EWC in the descent."""
    constraints_b: bool = True
    """Prior in the ascent and inverse EWC in the descent."""
    epochs: int | None = None
    """Passes over the clean images, or times `steps_per_epoch` steps; robust 10, paper 20."""
    batch_size: int | None = None
    """Images a step; all of them when there are fewer. Robust 32, paper 256."""
    steps_per_epoch: int | None = None
    """Steps of θ an epoch, so that few images are no few steps; 0: one pass over the images. Robust 8, paper 0."""
    steps: int | None = None
    """PGD steps an image; robust 3, paper 20."""
    step_size: float = 2.0
    """Length of a step in units of 0..255."""
    bound: float = 25.0
    """Largest ‖x' − x‖ in units of 0..255."""
    norm: Literal["linf", "l2"] = "linf"
    """Of the step and the bound."""
    noise: float = 0.5
    """Standard deviation of the start around x, in units of 0..255."""
    step_at_triggers: float = 0.125
    """Robust: share of `step_size` and `noise` that is used where an ascent begins at a trigger, so that it does not
    undo what the trigger does."""
    likelihood: float = 0.1
    """λ1."""
    prior: float = 1.0
    """λ2."""
    ewc: float | None = None
    """λ3. Robust 10, where both distances are divided by that of all weights from zero, so that they do not grow with
    the network; paper 1e-5."""
    inverse_ewc: float | None = None
    """λ4; robust 1, paper 0.01."""
    clip: float | None = None
    """c, where the inverse EWC stops to pull; positive. Robust 0.01, paper 100."""
    inverse: Literal["negated", "reciprocal"] = "negated"
    """Form of the inverse EWC (see above)."""
    temperature: float = 2.0
    """T of the distillation; positive."""
    mixing: float = 0.5
    """α, weight of the distillation against the label; in [0, 1]."""
    optimizer: Literal["sgd", "adam"] | None = None
    """Of θ; SGD with momentum 0.9. Robust adam, paper sgd."""
    learning_rate: float | None = None
    """Of θ, at its peak; robust 1e-3, paper 0.05."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate, over all steps; cosine ends at zero."""
    distillation: float | None = None
    """Weight, in [0, 1), of the cross-entropy with θ_b's predictions on mixtures of clean images
    (:mod:`bdjax.defenses._distillation`) against that of the labels. Ours; robust 0.8, paper 0."""
    averaging: float | None = None
    """Share of the running mean of θ that a step keeps, in [0, 1); the mean is returned. Robust 0.8, paper 0: θ."""
    batch_norm: Literal["separate", "batch", "frozen"] | None = None
    """Statistics in the outer step: the clean images' and the adversarial ones' own (the running ones follow the clean
    ones), those of both together, or θ_b's, which stay. Robust frozen, paper separate."""
    fisher_cap: float = 100.0
    """Largest entry of a Fisher whose mean is one. Ours: a few weights stand 1e4 times above the mean, and SGD with
    momentum diverges on the quadratic of EWC once 2 λ3 entry learning_rate > 3.8."""
    fisher_batch: int = 32
    """Images whose gradients are held at once."""

    def __post_init__(self) -> None:
        if self.angle is None:
            angles = {"general": 0.9, "refool": 0.5, "low_orthogonality": 0.1}
            object.__setattr__(self, "angle", angles[self.preset])
        for name, values in _PROCEDURES.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.procedure == "paper"])
        _check(self)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn what adversarial images of the victim have in common with its backdoor.

    Args:
      config: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the order of the images and the starts of the ascent.

    Returns: the cleaned variables; the watch is shown them, and a few adversarial images less their clean ones
      (float32 [4, H, W, C]), after each epoch.
    Raises InputError for a target that is no class, a class without a clean image, a loss that is not finite.
    """
    settings: Any = config  # every None was filled in by its procedure
    model, total = victim.model, len(view.labels)
    _check_data(config, model, np.asarray(view.labels))
    size = batch_of(settings.batch_size, total, "clean images")
    targeted = None
    if config.procedure == "robust":
        targeted = TargetedSearch(Search(), victim, view, jax.random.fold_in(key, 99), "BI-BAU")
    static = _static(config, targeted)
    original = jax.tree.map(jnp.array, {"params": victim.variables["params"], "stats": victim.variables["batch_stats"]})
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "original": original,
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
        "starts": _starts(model, targeted),
    }
    shared["fisher"] = _fishers(settings, static, victim, view, original, shared, size, jax.random.fold_in(key, 0))
    state = {"params": jax.tree.map(jnp.copy, original["params"]), "stats": jax.tree.map(jnp.copy, original["stats"])}
    state["opt"] = direction(settings.optimizer, 0.9).init(state["params"])
    state["mean"] = jax.tree.map(jnp.copy, state["params"])
    step, number = outer(model, static), settings.steps_per_epoch or total // size
    rates = learning_rates(settings.schedule, settings.learning_rate, settings.epochs * number)
    for epoch in range(settings.epochs):
        epoch_key = jax.random.fold_in(key, epoch + 1)
        split = _batches(total, size, number, targeted, epoch_key)
        whole = {"rate": jnp.asarray(rates[epoch * number : (epoch + 1) * number])}
        tick = partial(view.callback.on_progress, f"BI-BAU epoch {epoch + 1} of {settings.epochs}")
        state, metrics = run_epoch(step, state, split, whole, shared, tick=tick)
        check_finite(metrics["loss"], whole["rate"], epoch * number, "outer loss", "defense.learning_rate")
        variables = jax.tree.map(jnp.copy, {"params": state["mean"], "batch_stats": state["stats"]})
        if targeted is not None and not targeted.nothing_small:
            targeted.refresh(variables, jax.random.fold_in(epoch_key, 2))
            shared["starts"] = _starts(model, targeted)
        some = slice(0, min(4, total))
        shown = to_float(view.images[some])
        found = ascender(model, static)(
            {"params": state["params"], "stats": state["stats"]}, original, shown, shared["labels"][some],
            jax.random.split(epoch_key, len(shown)), taken(shared["starts"], jnp.full(len(shown), -1)),
            shared["hyper"],
        )  # fmt: skip
        means = {name: value.mean() for name, value in metrics.items()}
        view.callback.on_round_end(epoch + 1, variables, perturbation=found - shown, **means)
    return variables


def _starts(model: Model, targeted: TargetedSearch | None) -> tuple[jax.Array, jax.Array]:
    """Where ascents begin: at the image, or at triggers to suspicious classes; [K, H, W, 1] and [K, H, W, C]."""
    kept, deltas = jnp.ones((1, *model.shape[:2], 1)), jnp.zeros((1, *model.shape))
    if targeted is None:
        return kept, deltas
    of_search = targeted.triggers(1.2)
    return jnp.concatenate([kept, of_search[0]]), jnp.concatenate([deltas, of_search[1]])


def _fishers(
    config: Any, static: Static, victim: Victim, view: DefenderView, original: Any, shared: Any, size: int, key: Key
) -> dict[str, Any]:
    """The two Fishers, and the distance of all weights from zero that theirs is divided by (1 in the paper's)."""
    nothing = jax.tree.map(jnp.zeros_like, original["params"])
    found: dict[str, Any] = {"clean": nothing, "unlearning": nothing, "scale": jnp.ones(2)}
    of_fisher = (config.fisher_batch, config.fisher_cap)
    if config.constraints_a:
        found["clean"] = fisher(victim.model, victim.variables, view.images, view.labels, *of_fisher)
    if config.constraints_b:
        ascend = ascender(victim.model, static)
        which = taken(shared["starts"], jnp.arange(size) % len(shared["starts"][0]))
        made = [
            np.asarray(ascend(original, original, images, labels, keys, which, shared["hyper"]))
            for images, labels, keys in _pieces(view, size, key)
        ]
        images = np.concatenate(made)[: len(view.labels)]
        found["unlearning"] = fisher(victim.model, victim.variables, images, view.labels, *of_fisher)
    if config.procedure == "robust":
        sizes = [ewc_penalty(nothing, original["params"], found[name]) for name in ("clean", "unlearning")]
        found["scale"] = 1 / jnp.maximum(jnp.stack(sizes), 1e-12)
    return found


def _batches(total: int, size: int, number: int, targeted: TargetedSearch | None, key: Key) -> dict[str, jax.Array]:
    """Of one epoch, each [number, size]: images, the key of each, and where its ascent begins (0: at the image).

    With a search a share of each batch is of the suspicious classes.
    """
    order = batches(jax.random.fold_in(key, 0), total, size, number)
    kept, starts = round(KEPT * size), 1 if targeted is None else 1 + targeted.number
    of_targets = None if targeted is None else targeted.of_targets(jax.random.fold_in(key, 3), (number, kept))
    if of_targets is not None:
        order = jnp.concatenate([order[:, kept:], of_targets], 1)
    return {
        "index": jnp.asarray(order),
        "start": jax.random.split(jax.random.fold_in(key, 1), (number, size)),
        "which": jnp.broadcast_to(jnp.arange(size) % starts, order.shape),
        "other": jax.random.randint(jax.random.fold_in(key, 4), (number, size), 0, total),
    }


_DYNAMIC = (
    "step_size", "bound", "noise", "likelihood", "prior", "ewc", "inverse_ewc", "clip", "temperature", "mixing",
    "angle", "averaging", "distillation", "step_at_triggers",
)  # fmt: skip


def _static(config: Config, targeted: TargetedSearch | None = None) -> Static:
    values = {name: getattr(config, name) for name in Static._fields if name != "distils"}
    values["distils"] = bool(config.distillation)
    if targeted is not None and config.variant == "untargeted" and targeted.goal != ANY:
        values |= {"variant": "targeted", "target": targeted.goal}
    return Static(**values)


def _pieces(view: DefenderView, size: int, key: Key) -> list[tuple[jax.Array, jax.Array, Key]]:
    """All images in pieces of `size`, the last filled up with its own last image, and a key each."""
    keys, total = jax.random.split(key, len(view.labels)), len(view.labels)
    places = [np.minimum(np.arange(begin, begin + size), total - 1) for begin in range(0, total, size)]
    return [(to_float(view.images[at]), jnp.asarray(view.labels[at]), keys[at]) for at in places]


def _check_data(config: Config, model: Model, labels: np.ndarray) -> None:
    if config.variant == "targeted" and config.target >= model.classes:
        raise InputError(
            f"defense.target={config.target}, but the labels go from 0 to {model.classes - 1}. Use --defense.target."
        )
    if missing := sorted(set(range(model.classes)) - set(labels.tolist())):
        raise InputError(
            f"no clean image of class {', '.join(map(str, missing))} among the defender's {len(labels)}: what BI-BAU "
            "must keep of it cannot be told. Use a larger --split.size."
        )


def _check(config: Config) -> None:
    check_fields(
        config,
        "defense",
        (("epochs", "batch_size", "steps", "fisher_batch"), "at least 1", lambda v: v >= 1),
        (("steps_per_epoch",), "zero or more", lambda v: v >= 0),
        (("step_size", "bound", "clip", "temperature", "learning_rate", "fisher_cap"), "positive", lambda v: v > 0),
        (
            ("noise", "step_at_triggers", "likelihood", "prior", "ewc", "inverse_ewc", "target"),
            "zero or more",
            lambda v: v >= 0,
        ),
        (("angle", "mixing"), "in [0, 1]", lambda v: 0 <= v <= 1),
        (("averaging", "distillation"), "in [0, 1)", lambda v: 0 <= v < 1),
    )
