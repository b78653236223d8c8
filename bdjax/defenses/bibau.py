"""BI-BAU: unlearn adversarial images that imitate the backdoor's features, and preserve what clean images need.

Z. Zhu, Y. Hu, Y. Liu, L. Wei, W. Hou, B. Li, H. Li and W. Luo, "Rethinking Backdoor Adversarial Unlearning through the
Lens of Catastrophic Forgetting in Continual Learning" (Blind Inversion-Backdoor Adversarial Unlearning), 2026,
arXiv:2606.14078.

Threat model: the defender has the model and clean labelled images, but no trigger; the targeted variant knows y_t.
Besides a low ASR, the method aims at a network that does not relearn the backdoor from a few poisoned images.

Most display equations were missing from the available text of the paper; the following is reconstructed from its prose
("ours" marks a choice). θ_b are the given weights, θ the current ones, h the penultimate features, W the head, x a
clean image, y its label.

Inner step, for one image (Eq. 22, maximised over ‖x' − x‖₂ <= bound, x' in [0, 255]):

    L_adv(x') = trigger + λ1 likelihood + λ2 prior
    trigger      −CE(f_b(x'), y_t)  targeted;   +CE(f_b(x'), y)  untargeted                  (condition 1, Prop. 4.3)
    likelihood   −[α T² KL(s(f_b(x)/T) ‖ s(f(x')/T)) + (1 − α) CE(f(x'), y)]                 (Eq. 17; KL's form: ours)
    prior        cos(Δh, Δw) − ξ |cos(Δh, h(x))|,   Δh = h(x') − h(x),   Δw = W_b[r] − W[r]  (Eq. 18-21; cosines: ours)

r is y_t, or the class that f_b predicts for x' (ours). ξ = 1 keeps the angle of Δh and h(x) at 90 degrees, ξ = 0
follows the backdoor's features alone. By the chain rule ∂f/∂W = h(x), so Δh represents the unlearning gradient of the
head: the prior keeps it parallel to the change that the backdoor task made and orthogonal to the features of the clean
task (Eq. 10-11). At the first step Δw = 0; the cosines are defined at zero, and x' starts at x plus a little noise
(ours), because Δh = 0 has no direction.

Outer step (Eq. 23-26; untargeted Eq. 27):

    CE(f(x), y) + CE(f(x'), y) + λ3 Σ F^c (θ − θ_b)² − λ4 min(c, Σ F^u (θ − θ_b)²)

F^c and F^u are diagonal Fishers at θ_b, means of *per-example* squared gradients of log p(y|x), over the clean images
and over the first adversarial ones, both scaled to mean one over the weights (ours). The last term, the clipped inverse
EWC, moves θ away from θ_b along the weights to which the backdoor is sensitive. `inverse="reciprocal"` replaces it by

    +λ4 min(c, 1 / (Σ F^u (θ − θ_b)² + ε))

In the targeted variant, images of class y_t get no x'.

Constraint set A is the likelihood and EWC, set B the prior and the inverse EWC: Table 6 has the four settings of these
two switches. θ is in evaluation mode in the ascent and in training mode in the outer step, θ_b always in evaluation
mode (ours).

Deviations:

- The paper fixes 20 epochs, batches of 256, and 20 steps of 2.0 within 25.0 in units of 0..255; the norm's symbol is
  missing. L∞ here: with an L2 ball of that radius, the ASR of a BadNets victim stays at 73 % on GTSRB and 99 % on
  digits.
- λ, T, α, ξ, c, the optimiser, its learning rate and its schedule are missing, too. They were chosen by ACC, ASR and
  R-ASR on validation images of other victims (experiments/results/bibau_table2). Separate statistics for clean and
  adversarial images, a learning rate of 0.05 with cosine decay and a weak inverse EWC (λ4 0.01, c 100) keep R-ASR low
  at a higher ACC than a constant rate of 0.01.
- `procedure="robust"`, the default, is ours, for models that were not used to choose any setting. The target is
  searched (:mod:`bdjax.defenses._targeted_search`), ascents start at the triggers of that search, too, θ follows the
  given model's predictions on mixtures of images, and the inverse EWC is strong. Frozen BatchNorm statistics had hidden
  the backdoor: training the cleaned model further on clean images and one poisoned one brought a third of it back
  (experiments/foreign/README.md).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.defenses._blind_inversion import Static, compiled_ascent, select_starts, unlearning_step
from bdjax.defenses._blind_inversion_inputs import epoch_batches, fishers, initial_points
from bdjax.defenses._smallest import ANY
from bdjax.defenses._targeted_search import Search, TargetedSearch
from bdjax.engine import run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, learning_rates
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

_PROCEDURES: dict[str, tuple[Any, Any]] = {
    "batch_size": (32, 256), "steps_per_epoch": (8, 0), "steps": (3, 20),
    "optimizer": ("adam", "sgd"),
    "learning_rate": (1e-3, 0.05), "batch_norm": ("both", "separate"), "ewc": (10.0, 1e-5),
    "inverse_ewc": (100.0, 0.01), "clip": (0.01, 100.0), "distillation": (0.8, 0.0), "averaging": (0.8, 0.0),
}  # fmt: skip
"""Values of the fields left at None, for the robust procedure and for the paper's."""


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the procedure."""

    procedure: Literal["robust", "paper"] = "robust"
    """"robust" (ours, for models that were not used to choose any setting) or "paper"; it fills in the fields left at
    None."""
    variant: Literal["untargeted", "targeted"] = "untargeted"
    """Ascend away from the true label, or towards `target`. In the robust procedure the untargeted variant searches for
    the target itself."""
    target: int = 0
    """y_t of the targeted variant; not used by the other."""
    preset: Literal["general", "refool", "low_orthogonality"] = "general"
    """Fills in `angle` where it is None. low_orthogonality: SIG, Narcissus, Adaptive-Blend and Adaptive-Patch, whose
    features overlap with those of the clean task."""
    angle: float | None = None
    """ξ, in [0, 1]; general 0.9, refool 0.5, low_orthogonality 0.1 (missing from the text; our order, from the paper's
    sweep)."""
    constraints_a: bool = True
    """Use the likelihood in the ascent and EWC in the descent."""
    constraints_b: bool = True
    """Use the prior in the ascent and the inverse EWC in the descent."""
    epochs: int = 20
    """Passes over the clean images, or repetitions of `steps_per_epoch` steps."""
    batch_size: int | None = None
    """Images per step, at most the number of images. Robust 32, paper 256."""
    steps_per_epoch: int | None = None
    """Steps of θ per epoch, so that few images do not mean few steps; 0: one pass over the images. Robust 8, paper
    0."""
    steps: int | None = None
    """PGD steps per image; robust 3, paper 20."""
    step_size: float = 2.0
    """Length of a PGD step in units of 0..255."""
    bound: float = 25.0
    """Largest ‖x' − x‖ in units of 0..255."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the PGD step and of the bound."""
    noise: float = 0.5
    """Standard deviation of the initial noise around x, in units of 0..255."""
    step_at_triggers: float = 0.125
    """Robust: factor on `step_size` and `noise` for an ascent that starts at a trigger, so that it does not undo the
    trigger."""
    likelihood: float = 0.1
    """λ1, weight of the likelihood."""
    prior: float = 1.0
    """λ2, weight of the prior."""
    ewc: float | None = None
    """λ3, weight of EWC. Robust 10, where both EWC distances are divided by that of the zero weights from θ_b, so that
    they do not grow with the network; paper 1e-5."""
    inverse_ewc: float | None = None
    """λ4, weight of the inverse EWC; robust 100, paper 0.01."""
    clip: float | None = None
    """c, clipping threshold of the inverse-EWC term; positive. Robust 0.01, paper 100."""
    inverse: Literal["negated", "reciprocal"] = "negated"
    """Form of the inverse EWC (see above)."""
    temperature: float = 2.0
    """T of the distillation; positive."""
    mixing: float = 0.5
    """α, weight of the distillation against the label; in [0, 1]."""
    optimizer: Literal["sgd", "adam"] | None = None
    """Optimiser of θ; SGD has momentum 0.9. Robust adam, paper sgd."""
    learning_rate: float | None = None
    """Peak learning rate of θ; robust 1e-3, paper 0.05."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule of the learning rate over all steps; cosine ends at zero."""
    distillation: float | None = None
    """Weight, in [0, 1), of the cross-entropy with θ_b's predictions on mixtures of clean images
    (:mod:`bdjax.defenses._distillation`) against that of the labels. Ours; robust 0.8, paper 0."""
    averaging: float | None = None
    """Weight of the old value in the running mean of θ, in [0, 1); the mean is returned. Robust 0.8, paper 0: θ
    itself."""
    batch_norm: Literal["both", "separate", "batch", "frozen"] | None = None
    """BatchNorm statistics in the outer step: separate for clean and adversarial images (the running ones follow the
    clean ones), of both together ("batch"), or those of θ_b, unchanged ("frozen"). "both" takes the mean of the
    adversarial images' loss with their own statistics and with the running ones: with frozen ones alone the backdoor
    returns when the model is trained further, and with their own alone it may stay. Robust both, paper separate."""
    fisher_cap: float = 100.0
    """Largest entry of a Fisher whose mean is one. Ours: a few weights exceed the mean by a factor of 1e4, and SGD with
    momentum diverges on the quadratic of EWC once 2 λ3 entry learning_rate > 3.8."""
    fisher_batch: int = 32
    """Images whose gradients are held in memory at once."""

    def __post_init__(self) -> None:
        if self.angle is None:
            angles = {"general": 0.9, "refool": 0.5, "low_orthogonality": 0.1}
            object.__setattr__(self, "angle", angles[self.preset])
        for name, values in _PROCEDURES.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.procedure == "paper"])
        _check(self)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn the features that adversarial images of the victim share with its backdoor.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n], with an image of every class. After each epoch its
        callback receives the variables, mean losses, and the difference between a few adversarial images and the clean
        ones (`perturbation`, float32 [4, H, W, C]).
      key: draws the order of the images, the starts of the ascent and the mixtures.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when the target is not a class, a class has no clean image, or a loss is not finite.
    """
    settings: Any = config  # every None was filled in by its procedure
    model, total = victim.model, len(view.labels)
    _check_data(config, model, np.asarray(view.labels))
    batch_size = batch_of(settings.batch_size, total, "clean images")
    search = None
    if config.procedure == "robust":
        search = TargetedSearch(Search(), victim, view, jax.random.fold_in(key, 99), "BI-BAU")
    static = _static(config, search)
    original = jax.tree.map(jnp.array, {"params": victim.variables["params"], "stats": victim.variables["batch_stats"]})
    constants: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "original": original,
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
        "starts": initial_points(model, search),
    }
    constants["fisher"] = fishers(settings, static, victim, view, constants, batch_size, jax.random.fold_in(key, 0))
    state = {"params": jax.tree.map(jnp.copy, original["params"]), "stats": jax.tree.map(jnp.copy, original["stats"])}
    state["opt"] = direction(settings.optimizer, 0.9).init(state["params"])
    state["mean"] = jax.tree.map(jnp.copy, state["params"])
    step, steps_per_epoch = unlearning_step(model, static), settings.steps_per_epoch or total // batch_size
    rates = learning_rates(settings.schedule, settings.learning_rate, settings.epochs * steps_per_epoch)
    for epoch in range(settings.epochs):
        epoch_key = jax.random.fold_in(key, epoch + 1)
        batches = epoch_batches(total, batch_size, steps_per_epoch, search, epoch_key)
        per_step = {"rate": jnp.asarray(rates[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch])}
        tick = partial(view.callback.on_progress, f"BI-BAU epoch {epoch + 1} of {settings.epochs}")
        state, metrics = run_epoch(step, state, batches, per_step, constants, tick=tick)
        check_finite(metrics["loss"], per_step["rate"], epoch * steps_per_epoch, "outer loss", "defense.learning_rate")
        variables = jax.tree.map(jnp.copy, {"params": state["mean"], "batch_stats": state["stats"]})
        if search is not None and not search.is_exhausted:
            search.refresh(variables, jax.random.fold_in(epoch_key, 2))
            constants["starts"] = initial_points(model, search)
        sample = slice(0, min(4, total))
        sample_images = to_float(view.images[sample])
        starts = select_starts(constants["starts"], jnp.full(len(sample_images), -1))
        adversarial_images = compiled_ascent(model, static)(
            {"params": state["params"], "stats": state["stats"]}, original, sample_images, constants["labels"][sample],
            jax.random.split(epoch_key, len(sample_images)), starts, constants["hyper"],
        )  # fmt: skip
        means = {name: value.mean() for name, value in metrics.items()}
        view.callback.on_round_end(epoch + 1, variables, perturbation=adversarial_images - sample_images, **means)
    return variables


_DYNAMIC = (
    "step_size", "bound", "noise", "likelihood", "prior", "ewc", "inverse_ewc", "clip", "temperature", "mixing",
    "angle", "averaging", "distillation", "step_at_triggers",
)  # fmt: skip


def _static(config: Config, search: TargetedSearch | None = None) -> Static:
    """Return the fields that the program depends on; a class found by the search becomes the target."""
    values = {name: getattr(config, name) for name in Static._fields if name != "distils"}
    values["distils"] = bool(config.distillation)
    if search is not None and config.variant == "untargeted" and search.goal != ANY:
        values |= {"variant": "targeted", "target": search.goal}
    return Static(**values)


def _check_data(config: Config, model: Model, labels: np.ndarray) -> None:
    """Raise InputError when the target is not a class or a class has no clean image."""
    if config.variant == "targeted" and config.target >= model.classes:
        raise InputError(
            f"defense.target={config.target}, but the labels go from 0 to {model.classes - 1}. Use --defense.target."
        )
    if missing := sorted(set(range(model.classes)) - set(labels.tolist())):
        raise InputError(
            f"no clean image of class {', '.join(map(str, missing))} among the defender's {len(labels)}; BI-BAU "
            "needs at least one of each class. Use a larger --split.size."
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
