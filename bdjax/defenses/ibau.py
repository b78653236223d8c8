"""I-BAU: unlearn a backdoor by a minimax game over a universal perturbation, with the implicit hypergradient.

Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial Unlearning of Backdoors via Implicit
Hypergradient", ICLR 2022, arXiv:2110.03735.

Threat model: the defender has the model and clean labelled images, but no trigger and no target label.

    min_θ max_{‖δ‖ <= C} H(δ, θ),   H = (1/n) Σ CE(f_θ(x_i + δ), y_i)                               (Eq. 1)

One round ascends δ from zero, projects it once onto the L2 ball, and then steps θ along the implicit hypergradient of
the outer loss (Eq. 2-3; :mod:`bdjax.hypergrad`). With g = −CE + penalty ‖δ‖² and the fixed-point solver with step η,
this is v = Σ_{j<K} (I − η ∇²_δδ g)^j ∂E/∂δ, ∇ψ = ∂E/∂θ − η ∇²_θδ g v.

There are four schedules; a field left at None takes its schedule's value.

- "release" is what the authors' code runs, "paper" is Algorithm 1. They differ in much more than constants, so every
  difference is a field.
- "fast" (ours) is the release's procedure in ten short rounds of ten ascent and ten θ steps, each on the next ten
  batches of 64 images.
- "targeted" (ours, the default) is for models that were not used to choose any setting. One ascent finds one kind of
  maximum, and with the release's the backdoor often remains (experiments/foreign). Here δ consists of several triggers:
  the smallest perturbations that send images to a suspicious class, from several starts, and the smallest such patches,
  each put on its share of a batch (see :mod:`bdjax.defenses._targeted`). θ follows the hypergradient with all of them
  as δ, and the victim's predictions on clean images.

Deviations:

- At least one image of a batch is patched. In the release `int(0.01 B)` is zero below 100 images, which disables the
  indirect term.
- A last, smaller batch is padded with weight zero.
- The reported ASR is measured on held-out images; the release patches the unlearning images.
- Algorithm 1 gives no T; it is 10 here. With its constants the map is not a contraction: on the digits of the demo,
  `schedule="paper"` preserves accuracy for four rounds, and the classifier is destroyed by the eighth (outer_lr and
  solver_step are the fields to lower).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import _targeted, _targeted_search
from bdjax.defenses._batch import draw_patched, sequential_batches
from bdjax.defenses._bilevel import Static, bilevel, bilevel_steps
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.hypergrad import check
from bdjax.types import DefenderView, Key, Model, Variables, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters. A field that lists values by schedule takes its schedule's value when None."""

    schedule: Literal["targeted", "release", "paper", "fast"] = "targeted"
    """Several targeted triggers, the official release's procedure, Algorithm 1, or the release's procedure in short
    rounds. With "targeted", `inner_labels`, `inner_data`, `inner_optimizer`, `inner_lr`, `norm_bound`, `clamp`,
    `hessian_data`, `outer_optimizer`, `batch_norm` and `products` have no effect."""
    rounds: int | None = None
    """Rounds, each of which computes δ anew; targeted at most 10 and 3 more (see :mod:`bdjax.defenses._targeted`),
    release 5 (default of its script), paper 100 (its GTSRB tables), fast 10."""
    batch_size: int | None = None
    """Images per batch, in file order (targeted: at random); 0: all images. Release 100, paper 0, else 64."""
    inner_labels: Literal["predicted", "true"] | None = None
    """Labels whose loss the ascent increases; release predicted (by the current θ), paper true."""
    inner_data: Literal["batch", "all"] | None = None
    """Data of one ascent step; release one batch, paper all images."""
    inner_steps: int | None = None
    """Ascent steps T; 0: one per batch. Release 0, else 10."""
    inner_optimizer: Literal["sgd", "adam"] | None = None
    """Optimiser of δ, restarted in each round; sgd in both (the release's GTSRB notebook: adam, inner_lr 1)."""
    inner_lr: float | None = None
    """Step size α; release 10, paper 0.1."""
    penalty: float | None = None
    """Weight of ‖δ‖² in g; release 0.001, paper 0."""
    norm_bound: float | None = None
    """C, L2 bound of δ in pixel units of [0, 1], imposed once after the ascent; inf: none. Release and fast inf, as in
    the release's script (its notebooks use 10, with which most backdoors remain in other models), paper 10."""
    clamp: bool | None = None
    """Clip x + δ to [0, 1]; release no (CIFAR-10; its GTSRB notebook clips), paper yes."""
    patched_fraction: float | None = None
    """Fraction of a batch that carries δ in the outer loss (at least one image); targeted 0.4, release 0.01, paper
    1."""
    outer_steps: int | None = None
    """Steps of θ per δ, cycling through the batches; 0: one per batch. Release 0, paper 1, else 10."""
    hessian_data: Literal["first_batch", "same_batch"] | None = None
    """Batch of the inner objective in the hypergradient; release the first batch, paper that of the outer loss."""
    outer_optimizer: Literal["adam", "sgd"] | None = None
    """Optimiser of θ, kept across rounds; release adam, paper sgd."""
    outer_lr: float | None = None
    """Step size β; release 1e-3, paper 0.1."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorm statistics: the stored ones (as in the release, which runs in evaluation mode; scale and shift are
    trained), or those of the batch."""
    solver: str = "fixed_point"
    """Solver of the hypergradient: a name in docs/solvers.md, or the path of a .py file with solve(matvec, b)."""
    solver_iterations: int | None = None
    """K; targeted 2, else 5. With fixed_point, K − 1 Hessian-vector products, because the first iteration multiplies
    zero."""
    solver_step: float | None = None
    """η of fixed_point, neumann, one_step and unrolled; unrelated to inner_lr in the release. Targeted 0.01, because
    with 0.1 its triggers make the map diverge and accuracy falls; else 0.1."""
    ridge: float = 0.0
    """Multiple of the identity that is added to the inner Hessian."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the network inside the inner objective of the hypergradient, and thus of the Hessian-vector products;
    the ascent and the outer loss are not affected. bfloat16 changes the indirect term by a few percent."""
    perturbations: int = 4
    """Targeted: number of perturbations that are unlearned together."""
    patches: int = 2
    """Targeted: number of patches (a mask and a pattern) that are unlearned with them; where more classes are
    suspicious, one for each. 0: none."""
    distillation: float = 0.8
    """Targeted: weight, in [0, 1], of the cross-entropy with the given model's predictions on clean images."""

    def __post_init__(self) -> None:
        schedules = {
            "release": dict(
                rounds=5, batch_size=100, inner_labels="predicted", inner_data="batch", inner_steps=0,
                inner_optimizer="sgd", inner_lr=10.0, penalty=0.001, norm_bound=math.inf, clamp=False,
                patched_fraction=0.01, outer_steps=0, hessian_data="first_batch", outer_optimizer="adam", outer_lr=1e-3,
                solver_iterations=5, solver_step=0.1,
            ),
            "paper": dict(
                rounds=100, batch_size=0, inner_labels="true", inner_data="all", inner_steps=10,
                inner_optimizer="sgd", inner_lr=0.1, penalty=0.0, norm_bound=10.0, clamp=True, patched_fraction=1.0,
                outer_steps=1, hessian_data="same_batch", outer_optimizer="sgd", outer_lr=0.1,
                solver_iterations=5, solver_step=0.1,
            ),
        }  # fmt: skip
        schedules["fast"] = schedules["release"] | dict(
            rounds=10, batch_size=64, inner_steps=10, outer_steps=10,
        )  # fmt: skip
        schedules["targeted"] = schedules["fast"] | dict(
            rounds=10, clamp=True, patched_fraction=0.4, solver_iterations=2, solver_step=0.01
        )
        for name, value in schedules[self.schedule].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check(self)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn the universal perturbations to which the victim is sensitive.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each round its callback receives the variables and
        δ (`perturbation`, float32 [1, H, W, C]).
      key: draws which images of a batch are patched.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when the loss or the hypergradient is not finite.
    """
    settings: Any = config  # every None was filled in by its schedule
    if config.schedule == "targeted":
        return _unlearn_targeted(settings, victim, view, key)
    batches, constants = _prepare(config, victim, view)
    inner_step, outer_step = bilevel_steps(victim.model, _static(config))
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction(settings.outer_optimizer).init(state["params"])
    for round_ in range(settings.rounds):
        tick = partial(view.callback.on_progress, f"I-BAU round {round_ + 1} of {settings.rounds}")
        inner_constants = {**constants, "params": state["params"]}
        delta = _ascend(settings, inner_step, victim.model.shape, batches, inner_constants, tick, round_)
        outer_batches = _outer_batches(settings, batches, jax.random.fold_in(key, round_), round_)
        state, metrics = run_epoch(outer_step, state, outer_batches, {}, {**constants, "delta": delta}, tick=tick)
        steps_before = round_ * len(outer_batches["index"])
        check_finite(metrics["loss"], settings.outer_lr, steps_before, "unlearning loss", "defense.outer_lr")
        solver_fields = "defense.solver_iterations or solver_step"
        check_finite(metrics["norm"], settings.outer_lr, steps_before, "hypergradient", solver_fields)
        variables = {"params": state["params"], "batch_stats": constants["batch_stats"]}
        view.callback.on_round_end(round_ + 1, variables, perturbation=delta)
    return variables


def _unlearn_targeted(config: Any, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Run the targeted schedule."""
    rounds = _targeted.Rounds(
        "I-BAU", config.rounds, config.outer_steps or 1, config.batch_size or len(view.labels), config.outer_lr,
        "defense.outer_lr", config.patched_fraction, config.distillation, solver=config.solver,
        solver_iterations=config.solver_iterations, solver_step=config.solver_step, ridge=config.ridge,
        penalty=config.penalty,
    )  # fmt: skip
    search = _targeted_search.Search(
        refresh_steps=config.inner_steps or 1, starts=config.perturbations, patches=config.patches
    )
    return _targeted.unlearn(rounds, search, victim, view, key)


class Problem(NamedTuple):
    """The bilevel problem of one θ step."""

    build: Callable[[Model, Any], tuple[Callable, Callable]]
    """`build(model, arrays) -> (g, E)`, the inner objective and the outer loss, both functions (δ, θ) -> scalar."""
    arrays: Any
    """Images, labels, statistics and hyper-parameters; they are arguments of a program, not constants in it."""
    delta: jax.Array
    """δ, float32 [1, H, W, C], after the ascent of the first round."""


def problem(config: Config, victim: Victim, view: DefenderView, key: Key) -> Problem:
    """Return the bilevel problem of :func:`purify`'s first θ step on one device, to compare solvers on it.

    It does not depend on the solver or on `products`; the losses compute in the dtype of the model given to `build`.

    Args:
      config: the hyper-parameters; any schedule but "targeted".
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws which images of a batch are patched.

    Returns:
      The problem.

    Raises:
      InputError: for the targeted schedule.
    """
    if config.schedule == "targeted":
        raise InputError("solvers are compared on one δ: use --defense.schedule release, paper or fast.")
    settings: Any = config
    with parallel.using(1):
        batches, constants = _prepare(config, victim, view)
        static = _static(config)._replace(products="float32")
        inner_constants = {**constants, "params": victim.variables["params"]}
        tick = partial(view.callback.on_progress, "inner ascent")
        inner_step = bilevel_steps(victim.model, static)[0]
        delta = _ascend(settings, inner_step, victim.model.shape, batches, inner_constants, tick)
    outer_batches = _outer_batches(settings, batches, jax.random.fold_in(key, 0))
    arrays = {"shared": constants, "split": jax.tree.map(lambda leaf: leaf[0], outer_batches)}
    return Problem(lambda model, a: bilevel(model, static, a["shared"], a["split"], None), arrays, delta)


def _prepare(config: Any, victim: Victim, view: DefenderView) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Return the batches, and the constants of all steps."""
    batches = sequential_batches(len(view.labels), config.batch_size or len(view.labels), parallel.count())
    constants = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "first": jax.tree.map(lambda leaf: leaf[0], {name: batches[name] for name in _BATCH_ARRAYS}),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
        "batch_stats": victim.variables["batch_stats"],
    }
    return batches, constants


def _outer_batches(config: Any, batches: dict[str, jax.Array], key: Key, round_: int = 0) -> dict[str, jax.Array]:
    """Return the batches of a round's θ steps, and which of their images are patched: arrays [steps, padded size]."""
    count, batch_size = len(batches["index"]), int(batches["images"][0])
    positions = _batch_positions(round_, config.outer_steps or count, count)
    outer_batches = {name: batches[name][positions] for name in _BATCH_ARRAYS}
    outer_batches["patched"] = draw_patched(
        outer_batches["weight"], batch_size, max(1, int(config.patched_fraction * batch_size)), key
    )
    return outer_batches


_DYNAMIC = ("inner_lr", "penalty", "outer_lr", "solver_step", "ridge")  # other values compile nothing new
_BATCH_ARRAYS = ("index", "weight")


def _static(config: Config) -> Static:
    return Static(**{name: getattr(config, name) for name in Static._fields})


def _batch_positions(round_: int, steps: int, count: int) -> np.ndarray:
    """Return which of `count` batches a round uses; each round continues where the previous one ended."""
    return (round_ * steps + np.arange(steps)) % count


def _ascend(
    config: Any, step: Callable, shape: tuple, batches: Any, constants: Any, tick: Callable, round_: int = 0
) -> jax.Array:
    """Compute δ, float32 [1, H, W, C], of one round: T steps from zero, then one projection."""
    count = len(batches["index"])
    batches_per_step = count if config.inner_data == "all" else 1  # batches that a step sums over
    steps = (config.inner_steps or count) * batches_per_step
    positions = _batch_positions(round_ if batches_per_step == 1 else 0, steps, count)
    per_step = {
        "steps": jnp.arange(1, steps + 1) % batches_per_step == 0,
        # the weights of a batch sum to one; in a full pass each batch is weighted by its number of images
        "share": batches["images"][positions] / batches["images"].sum() if batches_per_step > 1 else jnp.ones(steps),
    }
    delta = jnp.zeros((1, *shape))
    state = {"delta": delta, "opt": direction(config.inner_optimizer).init(delta), "gathered": jnp.zeros_like(delta)}
    inner_batches = {name: batches[name][positions] for name in _BATCH_ARRAYS}
    delta = run_epoch(step, state, inner_batches, per_step, constants, tick=tick)[0]["delta"]
    return delta * jnp.minimum(1, config.norm_bound / jnp.maximum(jnp.linalg.norm(delta), 1e-12))


def _check(config: Config) -> None:
    check_fields(
        config,
        "defense",
        (("rounds",), "at least 1", lambda v: v >= 1),
        (("batch_size", "inner_steps", "outer_steps", "penalty", "ridge"), "zero or more", lambda v: v >= 0),
        (("inner_lr", "outer_lr", "solver_step", "norm_bound"), "positive", lambda v: v > 0),
        (("patched_fraction",), "in (0, 1]", lambda v: 0 < v <= 1),
    )
    try:
        check(config.solver, config.solver_iterations or 0, config.solver_step or 0.0, config.ridge)
    except InputError as error:
        raise InputError(f"defense.solver={config.solver}: {error}") from None
