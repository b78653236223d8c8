"""I-BAU: unlearn a backdoor by a minimax game over a universal perturbation (Zeng et al., ICLR 2022).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

    min_θ max_{‖δ‖ <= C} H(δ, θ),   H = (1/n) Σ CE(f_θ(x_i + δ), y_i)                               (Eq. 1)

One round: ascend δ from zero, project it once onto the L2 ball, then step θ along the implicit
hypergradient of the outer loss (Eq. 2-3; :mod:`bdjax.hypergrad`). With g = −CE + penalty ‖δ‖² and the
fixed-point solver at step η this is v = Σ_{j<K} (I − η ∇²_δδ g)^j ∂E/∂δ, ∇ψ = ∂E/∂θ − η ∇²_θδ g v.

`schedule="release"` is what the authors' code runs; `schedule="paper"` is Algorithm 1. They differ in much
more than constants, so every difference is a field; a field left at None takes its schedule's value. Two are ours.
"fast" is the release's in ten short rounds of ten ascent and ten θ steps, each on the next ten batches of 64 images.
"targeted", the default, was made for models that no setting was chosen on: one ascent finds one kind of maximum, and
with the release's the backdoor often stays (experiments/foreign). Here δ are several perturbations: the smallest ones
that send images to a suspicious class, from several starts, and the smallest patches that do, each put on its share of
a batch (see :mod:`bdjax.defenses._targeted`). θ follows the hypergradient with all of them as δ and, on clean images,
the victim.

Deviations from the release: at least one image of a batch is patched (`int(0.01 B)` is none below 100
images, which silences the indirect term); a last, smaller batch is padded with weight zero; the reported
ASR is of held-out images (the release patches the unlearning images). Algorithm 1 gives no T: 10 here.
Its constants do not make the map a contraction: on the digits of the demo `schedule="paper"` holds accuracy for four
rounds and has lost the classifier by the eighth (outer_lr and solver_step are the fields to lower).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses import _targeted, _targeted_search
from bdjax.defenses._batch import in_order, patched
from bdjax.defenses._bilevel import Static, bilevel, losses
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.hypergrad import check, hypergradient, solver
from bdjax.types import DefenderView, Key, Model, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The procedure. A field that says "release ..., paper ..." takes its schedule's value when None."""

    schedule: Literal["targeted", "release", "paper", "fast"] = "targeted"
    """Several targeted perturbations, the official release's procedure, Algorithm 1, or the release's in short rounds.
    In a targeted one `inner_labels`, `inner_data`, `inner_optimizer`, `inner_lr`, `norm_bound`, `clamp`,
    `hessian_data`, `outer_optimizer`, `batch_norm` and `products` have no effect."""
    rounds: int | None = None
    """Times that δ is found anew; targeted at most 10 and 3 more (see
    :mod:`bdjax.defenses._targeted`), release 5 (script default), paper 100 (its GTSRB tables), fast
    10."""
    batch_size: int | None = None
    """Images a batch, in their given order (targeted: drawn); 0: all in one. Release 100, paper 0, else 64."""
    inner_labels: Literal["predicted", "true"] | None = None
    """Labels that the ascent moves away from; release predicted (by the current θ), paper true."""
    inner_data: Literal["batch", "all"] | None = None
    """What one ascent step sees; release one batch, paper all images."""
    inner_steps: int | None = None
    """Ascent steps T; 0: one for each batch. Release 0, else 10."""
    inner_optimizer: Literal["sgd", "adam"] | None = None
    """Of δ, started anew each round; sgd in both (the release's GTSRB notebook: adam, inner_lr 1)."""
    inner_lr: float | None = None
    """Step α; release 10, paper 0.1."""
    penalty: float | None = None
    """Weight of ‖δ‖² in g; release 0.001, paper 0."""
    norm_bound: float | None = None
    """C, L2 bound of δ in pixel units of [0, 1], imposed once after the ascent; inf: none. Release and fast inf, as in
    the release's script (its notebooks use 10, with which most backdoors survive on other models), paper 10."""
    clamp: bool | None = None
    """Clip x + δ to [0, 1]; release no (CIFAR-10; its GTSRB notebook clips), paper yes."""
    patched_fraction: float | None = None
    """Share of a batch that carries δ in the outer loss (at least one image); targeted 0.4, release 0.01, paper 1."""
    outer_steps: int | None = None
    """θ steps on one δ, cycling through the batches; 0: one for each batch. Release 0, paper 1, else 10."""
    hessian_data: Literal["first_batch", "same_batch"] | None = None
    """Which batch the inner objective in the hypergradient is of; release the first, paper the outer one."""
    outer_optimizer: Literal["adam", "sgd"] | None = None
    """Of θ, kept across rounds; release adam, paper sgd."""
    outer_lr: float | None = None
    """Step β; release 1e-3, paper 0.1."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """Statistics: the stored ones (the release runs in eval mode; scale and shift are trained), or the batch's."""
    solver: str = "fixed_point"
    """Of the hypergradient: a name in docs/solvers.md, or the path of a .py file with solve(matvec, b)."""
    solver_iterations: int | None = None
    """K; targeted 2, else 5. With fixed_point, K − 1 Hessian-vector products: the first iteration multiplies zero."""
    solver_step: float | None = None
    """η of fixed_point, neumann, one_step and unrolled; unrelated to inner_lr in the release. Targeted 0.01, for with
    0.1 its perturbations make the map diverge and accuracy falls; else 0.1."""
    ridge: float = 0.0
    """Multiple of the identity added to the inner Hessian."""
    products: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in inside the inner objective of the hypergradient, hence in the products with its
    Hessian; the ascent and the outer loss are not touched. bfloat16 changes the indirect term by a few percent."""
    perturbations: int = 4
    """Targeted: perturbations that are unlearned together."""
    patches: int = 2
    """Targeted: patches (a mask and a pattern) that are unlearned beside them."""
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
    """Unlearn whatever universal perturbation turns the victim.

    Args:
      config: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws which images of a batch are patched.

    Returns: the cleaned variables; the watch is shown them and δ (float32 [1, H, W, C]) after each round.
    """
    settings: Any = config  # every None was filled in by its schedule
    if config.schedule == "targeted":
        return _unlearn_targeted(settings, victim, view, key)
    batches, shared = _prepared(config, victim, view)
    inner, outer = _steps(victim.model, _static(config))
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction(settings.outer_optimizer).init(state["params"])
    for round_ in range(settings.rounds):
        tick = partial(view.callback.on_progress, f"I-BAU round {round_ + 1} of {settings.rounds}")
        own = {**shared, "params": state["params"]}
        delta = _ascend(settings, inner, victim.model.shape, batches, own, tick, round_)
        split = _outer_batches(settings, batches, jax.random.fold_in(key, round_), round_)
        state, metrics = run_epoch(outer, state, split, {}, {**shared, "delta": delta}, tick=tick)
        at = round_ * len(split["index"])
        check_finite(metrics["loss"], settings.outer_lr, at, "unlearning loss", "defense.outer_lr")
        check_finite(
            metrics["norm"], settings.outer_lr, at, "hypergradient", "defense.solver_iterations or solver_step"
        )
        variables = {"params": state["params"], "batch_stats": shared["batch_stats"]}
        view.callback.on_round_end(round_ + 1, variables, perturbation=delta)
    return variables


def _unlearn_targeted(config: Any, victim: Victim, view: DefenderView, key: Key) -> Variables:
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
    """The bilevel problem of one θ step: `build(model, arrays) -> (g, E)`, both (δ, θ) -> scalar, and δ."""

    build: Callable[[Model, Any], tuple[Callable, Callable]]
    arrays: Any
    """Images, labels, statistics and hyper-parameters: arguments of a program, not constants in it."""
    delta: jax.Array
    """float32 [1, H, W, C], after the first round's ascent."""


def problem(config: Config, victim: Victim, view: DefenderView, key: Key) -> Problem:
    """The bilevel problem of :func:`purify`'s first θ step, on one device, for comparing solvers on it.

    Nothing in it depends on the solver or on `products`; the losses compute in the dtype of the model given to build.
    Raises InputError for the targeted schedule.
    """
    if config.schedule == "targeted":
        raise InputError("solvers are compared on one δ: use --defense.schedule release, paper or fast.")
    settings: Any = config
    with parallel.using(1):
        batches, shared = _prepared(config, victim, view)
        static = _static(config)._replace(products="float32")
        start = {**shared, "params": victim.variables["params"]}
        tick = partial(view.callback.on_progress, "inner ascent")
        delta = _ascend(settings, _steps(victim.model, static)[0], victim.model.shape, batches, start, tick)
    split = _outer_batches(settings, batches, jax.random.fold_in(key, 0))
    arrays = {"shared": shared, "split": jax.tree.map(lambda leaf: leaf[0], split)}
    return Problem(lambda model, a: bilevel(model, static, a["shared"], a["split"], None), arrays, delta)


def _prepared(config: Any, victim: Victim, view: DefenderView) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The batches, and what every step shares."""
    batches = in_order(len(view.labels), config.batch_size or len(view.labels), parallel.count())
    shared = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "first": jax.tree.map(lambda leaf: leaf[0], {name: batches[name] for name in _SPLIT}),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
        "batch_stats": victim.variables["batch_stats"],
    }
    return batches, shared


def _outer_batches(config: Any, batches: dict[str, jax.Array], key: Key, round_: int = 0) -> dict[str, jax.Array]:
    """The batches of a round's θ steps, and which of their images are patched: each [steps, padded size]."""
    number, size = len(batches["index"]), int(batches["images"][0])
    which = _turn(round_, config.outer_steps or number, number)
    split = {name: batches[name][which] for name in _SPLIT}
    split["patched"] = patched(split["weight"], size, max(1, int(config.patched_fraction * size)), key)
    return split


_DYNAMIC = ("inner_lr", "penalty", "outer_lr", "solver_step", "ridge")  # other values compile nothing new
_SPLIT = ("index", "weight")


def _static(config: Config) -> Static:
    return Static(**{name: getattr(config, name) for name in Static._fields})


@lru_cache(maxsize=32)
def _steps(model: Model, static: Static) -> tuple[Callable, Callable]:
    """The inner and the outer step, in the engine's form (see :mod:`bdjax.engine.parallel`)."""
    entropy, g = losses(model, static)

    def inner(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        """Gather this batch's gradient; step δ when the last batch of a step is in."""
        labels, params = None, shared["params"]
        if static.inner_labels == "predicted":
            labels = entropy(jnp.zeros_like(state["delta"]), params, shared, split, axis)[1].argmax(-1)
        value, gradient = jax.value_and_grad(g)(state["delta"], params, shared, split, axis, labels)
        value, gradient = parallel.total((value, gradient), axis)
        gathered = state["gathered"] + gradient * whole["share"]
        update, opt = direction(static.inner_optimizer).update(gathered, state["opt"])
        delta = state["delta"] - shared["hyper"]["inner_lr"] * update
        stepped = {"delta": delta, "opt": opt, "gathered": jnp.zeros_like(gathered)}
        waiting = {**state, "gathered": gathered}
        return jax.tree.map(partial(jnp.where, whole["steps"]), stepped, waiting), {"g": value}

    def outer(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        """One hypergradient step of θ."""
        hyper = shared["hyper"]
        value, gradient, _ = hypergradient(
            *bilevel(model, static, shared, split, axis),
            shared["delta"],
            state["params"],
            solver(static.solver, static.solver_iterations, hyper["solver_step"], hyper["ridge"]),
            partial(parallel.total, axis=axis),
        )
        update, opt = direction(static.outer_optimizer).update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - hyper["outer_lr"] * u, state["params"], update)
        return {"params": params, "opt": opt}, {"loss": value, "norm": optax.tree.norm(gradient)}

    return inner, outer


def _turn(round_: int, steps: int, number: int) -> np.ndarray:
    """Which of `number` batches the steps of a round take: they go on where the round before ended."""
    return (round_ * steps + np.arange(steps)) % number


def _ascend(
    config: Any, step: Callable, shape: tuple, batches: Any, shared: Any, tick: Callable, round_: int = 0
) -> jax.Array:
    """δ float32 [1, H, W, C] of this round: T steps from zero, then one projection."""
    number = len(batches["index"])
    passes = number if config.inner_data == "all" else 1  # batches that one step gathers
    total = (config.inner_steps or number) * passes
    which = _turn(round_ if passes == 1 else 0, total, number)
    whole = {
        "steps": jnp.arange(1, total + 1) % passes == 0,
        # a batch's weights sum to one; over a full pass each batch counts by its images
        "share": batches["images"][which] / batches["images"].sum() if passes > 1 else jnp.ones(total),
    }
    delta = jnp.zeros((1, *shape))
    state = {"delta": delta, "opt": direction(config.inner_optimizer).init(delta), "gathered": jnp.zeros_like(delta)}
    split = {name: batches[name][which] for name in _SPLIT}
    delta = run_epoch(step, state, split, whole, shared, tick=tick)[0]["delta"]
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
