"""Hypergradient solvers side by side on one victim: accuracy, cost, and what a round of I-BAU makes of it.

All solve the linear system of I-BAU's first step (same θ, δ, images); the reference solves it in float64.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import hypergrad
from bdjax.config import SplitConfig, stage_key, to_json
from bdjax.defenses import ibau
from bdjax.engine import parallel
from bdjax.engine.clock import Clock
from bdjax.errors import InputError
from bdjax.pipelines.context import Context
from bdjax.pipelines.environment import environment
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.opening import EvaluationSource, open_artifact
from bdjax.pipelines.solver_reference import Reference, flat, gradient_of, reference_of
from bdjax.types import DefenderView, Model, Victim

DEFAULT = (
    "none", "one_step", "fixed_point", "neumann", "cg", "cg:10", "normal_cg", "gmres", "bicgstab", "minres",
    "nystrom:10", "unrolled", "unrolled_remat",
)  # fmt: skip
"""Solvers that are compared; NAME:RIDGE adds RIDGE times the identity to H in that solver alone."""
_LONGEST = 600  # seconds: a round that would take longer is left away


@dataclass(frozen=True)
class ComparisonRequest:
    """Solvers to compare on one victim."""

    victim: Path
    """Directory that `bdjax train` wrote."""
    solvers: tuple[str, ...] = DEFAULT
    """Names of :data:`bdjax.hypergrad.SOLVERS`, each with an optional `:RIDGE`."""
    iterations: tuple[int, ...] = (5, 20)
    """Values of K, iterations of a solver."""
    config: ibau.Config = field(default_factory=lambda: ibau.Config(schedule="release"))
    """I-BAU's; its solver fields are replaced, its ridge belongs to the reference."""
    split: SplitConfig | None = None
    """The defender's images."""
    seed: int | None = None
    """Of the defense; None: the victim's."""
    dataset: str | None = None
    """Where the data set lies now, if it has moved."""
    rounds: tuple[int, ...] | None = None
    """Values of K at which the victim is also cleaned by one round of I-BAU and measured; None: all of them."""
    test_size: int = 0
    """Measure on the first so many held-out images; 0: all."""
    repeats: int = 3
    """Timed calls of each hypergradient, of which the median counts (compilation is measured apart)."""


def compare(request: ComparisonRequest, context: Context | None = None) -> dict[str, Any]:
    """Compare solvers, at every K, on the hypergradient of I-BAU's first step with a float64 reference.

    Args:
      request: victim, solvers, measurements.
      context: devices, progress.

    Returns:
      JSON values {"problem": {"reference", ...}, "rows", "before", ...}; rates are fractions, sizes bytes.

    Raises:
      InputError: for an unknown solver or a K below one, before anything is computed.
    """
    context, config, victim = context or Context(), request.config, Path(request.victim)
    solvers, iterations, repeats = request.solvers, request.iterations, request.repeats
    plan = [
        _parse(spec, k)
        for spec in solvers
        for k in (iterations if hypergrad.iterates(spec.partition(":")[0]) else iterations[:1])
    ]
    artifact = open_artifact(
        victim, "ibau", config, split=request.split, seed=request.seed, source=EvaluationSource(request.dataset)
    )
    experiment, evaluation, view = artifact.experiment, artifact.evaluation, artifact.view()
    if request.test_size:
        evaluation.shorten(request.test_size)
    model, variables = artifact.victim.model, artifact.victim.variables
    key = stage_key(experiment.seed, "defense")
    problem = ibau.problem(config, artifact.victim, view, key)
    context.tick("reference", 0, 1)
    reference = reference_of(artifact.victim, config, problem, context.tick)
    direct = flat(gradient_of(model, problem, variables["params"], hypergrad.solver("none", 1))[0])
    rows = []
    for number, (spec, solve) in enumerate(plan):
        context.tick("solvers", number, len(plan))
        row = {"solver": spec, "iterations": solve.iterations, "ridge": float(solve.ridge)}
        solve = dataclasses.replace(solve, step=config.solver_step, ridge=solve.ridge + config.ridge)
        row |= _measure(model, problem, variables["params"], solve, reference, direct, repeats)
        if request.rounds is None or solve.iterations in request.rounds:
            row |= _round(row, artifact.victim, view, key, config, solve, evaluation)
        rows.append(row)
    context.tick("solvers", len(plan), len(plan))
    return {
        "kind": "solver_comparison",
        **{name: artifact.manifest[name] for name in ("model", "hash", "seed")},
        "attack": experiment.attack,
        "dataset": artifact.data.name,
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


def _measure(
    model: Model, problem: ibau.Problem, params: Any, solve: hypergrad.Solver, reference: Reference, direct: Any,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    clock = Clock()
    gradient, solution, program = gradient_of(model, problem, params, solve)
    compiling = clock.read()[1]
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(problem.delta, params, problem.arrays))
        seconds.append(time.perf_counter() - begin)
    memory = program.memory_analysis()  # type: ignore[attr-defined]
    found = flat(gradient)
    exact = reference.gradient - direct  # the indirect term alone
    residual = float("nan") if solution is None else reference.residual(flat(solution), float(solve.ridge))
    return {
        "cosine": _cosine(found, reference.gradient),
        "relative_error": float(np.linalg.norm(found - reference.gradient) / np.linalg.norm(reference.gradient)),
        "cosine_indirect": _cosine(found - direct, exact),
        "relative_error_indirect": float(np.linalg.norm(found - direct - exact) / np.linalg.norm(exact)),
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


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 0 else float("nan")
