"""Hypergradient solvers side by side on one victim: accuracy, cost, and what a round of I-BAU makes of it.

All solve the linear system of I-BAU's first step (same θ, δ, images); the reference solves it in float64.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from bdjax import checkpoint, datasets, hypergrad, models
from bdjax.defenses import ibau
from bdjax.engine import parallel
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.evaluation import Evaluation
from bdjax.experiment import SplitConfig, stream, to_json
from bdjax.provenance import environment
from bdjax.types import DefenderView, Model, Victim, Watch
from bdjax.victim import Context, check_fingerprint, experiment_of, load_model

DEFAULT = (
    "none", "one_step", "fixed_point", "neumann", "cg", "cg:10", "normal_cg", "gmres", "bicgstab", "minres",
    "nystrom:10", "unrolled", "unrolled_remat",
)  # fmt: skip
"""Solvers that are compared; NAME:RIDGE adds RIDGE times the identity to H in that solver alone."""
_CHUNK = 16  # columns of the dense H at a time
_LONGEST = 600  # seconds: a round that would take longer is left away


def compare(
    victim: Path,
    *,
    solvers: tuple[str, ...] = DEFAULT,
    iterations: tuple[int, ...] = (5, 20),
    config: ibau.Config | None = None,
    split: SplitConfig | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    rounds: tuple[int, ...] | None = None,
    test_size: int = 0,
    repeats: int = 3,
    context: Context | None = None,
) -> dict[str, Any]:
    """Every solver at every K on the hypergradient of I-BAU's first step, against a float64 reference.

    Args:
      victim: directory that `bdjax train` wrote.
      solvers: names of :data:`bdjax.hypergrad.SOLVERS`, each with an optional `:RIDGE`.
      iterations: values of K. config: I-BAU's, whose solver fields are replaced; its ridge belongs to the reference.
      split: the defender's images; seed: of the defense; dataset: where the data set lies now, if it has moved.
      rounds: values of K at which the victim is also cleaned by one round of I-BAU and measured; None: all of them.
      test_size: measure on the first so many held-out images; 0: all.
      repeats: timed calls of each hypergradient, of which the median counts (compilation is apart).

    Returns: JSON-able {"problem", "reference", "rows", "before", ...}; rates are fractions, sizes bytes.
    Raises InputError for an unknown solver or a K below one, before anything is computed.
    """
    context, config, victim = context or Context(), config or ibau.Config(), Path(victim)
    plan = [
        _parse(spec, k)
        for spec in solvers
        for k in (iterations if hypergrad.iterates(spec.partition(":")[0]) else iterations[:1])
    ]
    manifest = checkpoint.read_manifest(victim)
    experiment = experiment_of(manifest, "ibau", config, split, seed)
    data = datasets.load(dataset or experiment.dataset)
    check_fingerprint(manifest, data, victim)
    model, variables = load_model(manifest, victim, data)
    evaluation = Evaluation(model, data, experiment, checkpoint.read_arrays(victim, "trigger"))
    if test_size:
        evaluation.shorten(test_size)
    view = DefenderView(evaluation.clean_images, evaluation.clean_labels, Watch())
    key = stream(experiment.seed, "defense")
    suspect = Victim(model, variables)
    problem = ibau.problem(config, suspect, view, key)
    params = variables["params"]
    context.tick("reference", 0, 1)
    with _double():
        reference = _reference(suspect, config, problem, context.tick)
    direct = _flat(_hypergradient(model, problem, params, hypergrad.solver("none", 1))[0])
    rows = []
    for number, (spec, solve) in enumerate(plan):
        context.tick("solvers", number, len(plan))
        row = {"solver": spec, "iterations": solve.iterations, "ridge": float(solve.ridge)}
        solve = dataclasses.replace(solve, step=config.solver_step, ridge=solve.ridge + config.ridge)
        row |= _measure(model, problem, params, solve, reference, direct, repeats)
        if rounds is None or solve.iterations in rounds:
            row |= _round(row, suspect, view, key, config, solve, evaluation)
        rows.append(row)
    context.tick("solvers", len(plan), len(plan))
    return {
        "kind": "solver_comparison",
        **{name: manifest[name] for name in ("model", "hash", "seed")},
        "attack": experiment.attack,
        "dataset": data.name,
        "problem": {
            "n_hessian": int(np.asarray(problem.arrays["shared"]["first"]["weight"] > 0).sum()),
            "n_outer": int(np.asarray(problem.arrays["split"]["weight"] > 0).sum()),
            "dimension": int(problem.delta.size),
            "perturbation_norm": float(jnp.linalg.norm(problem.delta)),
            "reference": reference.facts,
        },
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        "n_defender": len(view.labels),
        "before": evaluation.measure(variables),
        "rows": rows,
        "repeats": repeats,
        "defense_config": to_json(config),
        "split": to_json(experiment.split),
        "env": environment(context.devices),
    }


def _parse(spec: str, iterations: int) -> tuple[str, hypergrad.Solver]:
    name, _, ridge = spec.partition(":")
    try:
        value = float(ridge) if ridge else 0.0
    except ValueError:
        raise InputError(f"solver {spec!r}: after the colon stands the ridge, a number, as in cg:10.") from None
    return spec, hypergrad.solver(name, iterations, 1.0, value)


def _hypergradient(model: Model, problem: ibau.Problem, params: Any, solve: Callable) -> tuple[Any, Any, Callable]:
    """(gradient, u, the compiled program); the report's residual is not computed, for it costs a product."""

    def run(delta: Any, params: Any, arrays: Any) -> Any:
        _, gradient, report = hypergrad.hypergradient(*problem.build(model, arrays), delta, params, solve)
        return gradient, report.solution

    program = jax.jit(run).lower(problem.delta, params, problem.arrays).compile()
    return *jax.block_until_ready(program(problem.delta, params, problem.arrays)), program


def _measure(
    model: Model, problem: ibau.Problem, params: Any, solve: hypergrad.Solver, reference: "_Reference", direct: Any,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    clock = Clock()
    gradient, solution, program = _hypergradient(model, problem, params, solve)
    compiling = clock.read()[1]
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(problem.delta, params, problem.arrays))
        seconds.append(time.perf_counter() - begin)
    memory = program.memory_analysis()  # type: ignore[attr-defined]
    flat = _flat(gradient)
    exact = reference.gradient - direct  # the indirect term alone
    residual = float("nan") if solution is None else reference.residual(_flat(solution), float(solve.ridge))
    return {
        "cosine": _cosine(flat, reference.gradient),
        "relative_error": float(np.linalg.norm(flat - reference.gradient) / np.linalg.norm(reference.gradient)),
        "cosine_indirect": _cosine(flat - direct, exact),
        "relative_error_indirect": float(np.linalg.norm(flat - direct - exact) / np.linalg.norm(exact)),
        "products": solve.products(problem.delta.size),
        "residual": residual,
        "converged": residual <= hypergrad.tolerance(problem.delta.dtype),
        "seconds": float(np.median(seconds)),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "compile_seconds": compiling,
        "peak_memory_bytes": None if memory is None else int(memory.temp_size_in_bytes + memory.output_size_in_bytes),
    }


def _round(
    row: dict[str, Any], victim: Victim, view: DefenderView, key: Any, config: ibau.Config, solve: hypergrad.Solver,
    evaluation: Evaluation,
) -> dict[str, Any]:  # fmt: skip
    """ACC and ASR after one round of I-BAU; None where it would take too long or stops with an error."""
    steps = config.outer_steps or -(-len(view.labels) // (config.batch_size or len(view.labels)))
    nothing = {"acc": None, "asr": None, "asr_with_target": None, "round_seconds": None}
    if row["seconds"] * steps > _LONGEST:
        return {**nothing, "round": f"left away: {steps} steps of {row['seconds']:.1f} s"}
    chosen = dataclasses.replace(
        config, rounds=1, solver=solve.name, solver_iterations=solve.iterations, ridge=float(solve.ridge)
    )
    clock = Clock()
    try:
        with parallel.using(1):
            cleaned = jax.block_until_ready(ibau.purify(chosen, victim, view, key))
    except InputError as error:
        return {**nothing, "round": str(error)}
    seconds = clock.read()[0]
    return {**evaluation.measure(cleaned), "round_seconds": seconds, "round": "finished"}


@contextmanager
def _double() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass
class _Reference:
    gradient: np.ndarray
    facts: dict[str, Any]
    product: Callable[[np.ndarray], np.ndarray]
    """v -> H v in float64."""
    right: np.ndarray
    """What the solvers are given, −e."""

    def residual(self, u: np.ndarray, ridge: float) -> float:
        """Of the system that a solver was asked to solve, with its own ridge."""
        return float(np.linalg.norm(self.product(u) + ridge * u - self.right) / np.linalg.norm(self.right))


def _reference(
    victim: Victim, config: ibau.Config, problem: ibau.Problem, tick: Callable[[str, int, int], None]
) -> _Reference:
    """The hypergradient in float64, up to lu's limit by a dense H, else by 2,000 MINRES steps.

    H is filled in float32 and its solution refined with float64 products until the residual is 1e-10; where that does
    not converge (a condition number beyond 1e6), H is filled in float64.
    """
    begin = time.perf_counter()
    model = models.create(victim.model.name, victim.model.shape, victim.model.classes, jnp.float64)
    shared = {**problem.arrays["shared"], "batch_stats": _cast(victim.variables["batch_stats"])}
    exact = ibau.Problem(problem.build, {**problem.arrays, "shared": shared}, problem.delta.astype(jnp.float64))
    params, shape, size = _cast(victim.variables["params"]), exact.delta.shape, exact.delta.size

    def columns_of(model: Model, delta: Any, params: Any, arrays: Any) -> Callable[[Any], np.ndarray]:
        def run(vectors: Any, delta: Any, params: Any, arrays: Any) -> Any:
            inner = problem.build(model, arrays)[0]
            product = jax.linearize(lambda d: jax.grad(inner)(d, params), delta)[1]
            return jax.vmap(lambda v: product(v.astype(delta.dtype).reshape(shape)).ravel())(vectors)

        program = jax.jit(run)
        return lambda vectors: np.asarray(program(vectors, delta, params, arrays), np.float64)

    single = columns_of(victim.model, problem.delta, victim.variables["params"], problem.arrays)
    double = columns_of(model, exact.delta, params, exact.arrays)

    def product(v: np.ndarray) -> np.ndarray:
        with _double():
            return double(v[None])[0]

    def dense(columns: Callable[[Any], np.ndarray]) -> np.ndarray:
        filled = np.zeros((size, size))
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            rows = np.zeros((_CHUNK, size))
            rows[np.arange(stop - start), np.arange(start, stop)] = 1
            filled[start:stop] = columns(rows)[: stop - start]
            tick("reference", stop, size)
        return (filled + filled.T) / 2

    right = -np.asarray(jax.jit(lambda p, a: jax.grad(exact.build(model, a)[1])(exact.delta, p))(params, exact.arrays))
    facts: dict[str, Any] = {"method": "minres, 2000 iterations, float64"}
    if size <= hypergrad.LARGEST_DENSE:
        matrix, method = dense(single), "dense, refined in float64"
        found, residual = _refined(matrix + config.ridge * np.eye(size), product, right.ravel(), config.ridge)
        if residual > 1e-8:
            matrix, method = dense(double), "dense, float64"
            found = np.linalg.solve(matrix + config.ridge * np.eye(size), right.ravel())
        values = np.linalg.eigvalsh(matrix)
        shifted = np.abs(values + config.ridge)
        facts = {
            "method": method,
            "eigenvalue_min": float(values[0]),
            "eigenvalue_max": float(values[-1]),
            "negative_eigenvalues": int((values < 0).sum()),
            "eigenvalues_below_1e-3": int((shifted < 1e-3).sum()),
            "condition": float(shifted.max() / shifted.min()),
            "contraction": float(np.abs(1 - config.solver_step * (values + config.ridge)).max()),
        }
        solve: Callable = lambda matvec, b: jnp.asarray(found.reshape(shape))  # noqa: E731
    else:
        solve = hypergrad.solver("minres", 2000, 1.0, config.ridge)
    gradient, solution, _ = _hypergradient(model, exact, params, solve)
    reference = _Reference(_flat(gradient), facts, product, right.ravel())
    facts["residual"] = reference.residual(_flat(solution), config.ridge)
    facts["seconds"] = time.perf_counter() - begin
    return reference


def _refined(
    matrix: np.ndarray, product: Callable[[np.ndarray], np.ndarray], right: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """Iterative refinement: (solution, relative residual) of the system whose exact product is `product` + ridge."""
    factors = scipy.linalg.lu_factor(matrix)
    found, missing = np.zeros_like(right), right
    for _ in range(20):
        found = found + scipy.linalg.lu_solve(factors, missing)
        missing = right - product(found) - ridge * found
        if np.linalg.norm(missing) <= 1e-10 * np.linalg.norm(right):
            break
    return found, float(np.linalg.norm(missing) / np.linalg.norm(right))


def _cast(tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 0 else float("nan")
