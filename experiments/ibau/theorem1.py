"""I-BAU, Theorem 1: the error of the hypergradient against inner steps T and solver steps K (Zeng et al., ICLR 2022).

    bdjax sweep experiments/ibau/theorem1.py --dataset npz:mnist.npz

Measures the relative error of fixed-point hypergradients against a dense solve at T = 400, on the BadNets victim of
MNIST of solvers.py (small VGG, 1 epoch, 10 images), where a penalty makes g strongly convex (the theorem's setting) and
with I-BAU's own penalty of 0.001.

Time: some minutes on 2 CPU cores, besides the victim. To expect: with the strong penalty the error falls geometrically
in K down to a floor that T sets; with I-BAU's own it does not fall (experiments/results/solver_comparison).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import hypergrad
from bdjax.config import stage_key
from bdjax.defenses import ibau
from bdjax.pipelines.context import Context
from bdjax.pipelines.experiment_options import SMOKE, Cell, CellResult, ExperimentOptions
from bdjax.pipelines.opening import open_artifact

from ._solver_victims import CONFIG, SOURCES, victim_of

TITLE = "I-BAU Theorem 1, MNIST"
SEEDS = (0,)
PENALTIES = ((20.0, 1 / 60), (0.001, 0.1))
"""Penalty of I-BAU and the step of descent and solver; the first makes the inner problem strongly convex."""


@dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of the theorem; the scales paper and cpu are the same."""

    steps: tuple[int, ...] = ()
    """Values of T, ascending; the dense reference is made at the last one. Default: the scale's."""
    iterations: tuple[int, ...] = ()
    """Values of K; default: the scale's."""

    SCALES: ClassVar = {
        scale: {
            "dataset": SOURCES["mnist"],
            "model": "small_vgg",
            "epochs": 1,
            "steps": (1, 2, 5, 10, 20, 50, 400),
            "iterations": (1, 2, 5, 8),
        }
        for scale in ("paper", "cpu")
    } | {"smoke": {**SMOKE, "steps": (1, 2), "iterations": (1,)}}


@dataclass(frozen=True)
class Theorem:
    """The stage that measures the errors."""

    steps: tuple[int, ...]
    iterations: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the stage."""
        return "theorem"

    def run(self, model: Path, seed: int, context: Context) -> Mapping[str, Any]:
        """Relative errors of the hypergradient after T inner and K fixed-point steps, for two penalties.

        Args:
          model: directory of the victim.
          seed: of the defense.
          context: not used.

        Returns:
          {"rows": one for each penalty, T and K}.
        """
        artifact = open_artifact(model, "ibau", CONFIG)
        network, params = artifact.victim.model, artifact.victim.variables["params"]
        problem = ibau.problem(CONFIG, artifact.victim, artifact.view(), stage_key(seed, "defense"))
        rows: list[dict[str, Any]] = []
        for penalty, step in PENALTIES:
            hyper = {**problem.arrays["shared"]["hyper"], "penalty": jnp.float32(penalty)}
            arrays = {**problem.arrays, "shared": {**problem.arrays["shared"], "hyper": hyper}}
            errors = self._errors(problem._replace(arrays=arrays), network, params, step)
            rows += [{"penalty": penalty, "step": step, **row} for row in errors]
        return {"rows": rows}

    def _errors(self, problem: ibau.Problem, model: Any, params: Any, step: float) -> list[dict[str, Any]]:
        @jax.jit
        def descend(delta: Any, arrays: Any) -> tuple[Any, Any]:
            gradient = jax.grad(problem.build(model, arrays)[0])(delta, params)
            return delta - step * gradient, jnp.linalg.norm(gradient)

        def gradient_at(delta: Any, name: str, iterations: int) -> np.ndarray:
            solve = hypergrad.solver(name, iterations, step)
            program = jax.jit(lambda d, a: hypergrad.hypergradient(*problem.build(model, a), d, params, solve)[1])
            return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(program(delta, problem.arrays))])

        points, delta = {}, jnp.zeros_like(problem.delta)
        for t in range(1, self.steps[-1] + 1):
            delta, slope = descend(delta, problem.arrays)
            if t in self.steps:
                points[t] = (delta, float(slope))
        exact = gradient_at(delta, "lu", 1)
        scale = np.linalg.norm(exact)
        return [
            {
                "T": t,
                "K": k,
                "inner_gradient_norm": slope,
                "relative_error": float(np.linalg.norm(gradient_at(at, "fixed_point", k) - exact) / scale),
            }
            for t, (at, slope) in points.items()
            for k in self.iterations
        ]


def cells(options: Options) -> list[Cell]:
    """The one victim, and the errors on it."""
    experiment = victim_of("mnist", "badnets", options.dataset, options.model, options.epochs)
    remark = f"digits, T = {options.steps[-1]}" if options.scale == "smoke" else ""
    stage = Theorem(options.steps, options.iterations)
    return [Cell("mnist, badnets", experiment, scale=remark, stages=(stage,))]


def summarise(results: Sequence[CellResult]) -> str:
    """The errors: a row for each penalty and T, a column for each K."""
    rows = [row for result in results for row in result.stages["theorem"]["rows"]]
    counts = sorted({row["K"] for row in rows})
    lines = [
        f"| penalty, T | {' | '.join(f'K = {k}' for k in counts)} | norm of ∇g |",
        f"|---|{'--:|' * (len(counts) + 1)}",
    ]
    for penalty, t in dict.fromkeys((row["penalty"], row["T"]) for row in rows):
        chosen = [row for row in rows if (row["penalty"], row["T"]) == (penalty, t)]
        errors = [np.mean([row["relative_error"] for row in chosen if row["K"] == k]) for k in counts]
        slope = np.mean([row["inner_gradient_norm"] for row in chosen])
        lines.append(f"| {penalty:g}, T = {t} | {' | '.join(f'{error:.1e}' for error in errors)} | {slope:.3f} |")
    return "\n".join(lines) + "\n"
