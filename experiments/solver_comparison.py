"""Hypergradient solvers on I-BAU's own problem: error, cost, and one round of the defense, on backdoored networks.

    BDJAX_CIFAR10=npz:cifar10.npz BDJAX_MNIST=npz:mnist.npz python experiments/solver_comparison.py [mnist] [cifar10]

Victims: small VGG, BadNets (20 %, target 8) and a blended checkerboard (10 %, target 0), 3 seeds each; trained here,
or found, in OUT/victims. For each: the first θ step of I-BAU with δ held to norm 10, batches of 10, 50 ascent steps;
H of one batch of 10 images, its reference dense in float64; then one round (50 θ steps) with each solver at K = 5,
measured on 2,000 held-out images. Batches of 10, not I-BAU's 100, keep the dense reference to minutes.

Last, Theorem 1 of I-BAU on the first MNIST victim: the error of the hypergradient against inner steps T and solver
steps K, where a penalty makes g strongly convex (the theorem's setting) and with I-BAU's own penalty of 0.001.

Time: about an hour on 2 CPU cores, besides the victims (a quarter of an hour an epoch of all). A finished victim is
not computed again. To expect: no solver without a ridge comes near the reference; see experiments/results.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets, hypergrad
from bdjax.config import Experiment, stage_key
from bdjax.defenses import ibau
from bdjax.engine import FitConfig
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.opening import EvaluationSource, open_artifact
from bdjax.pipelines.solver_comparison import DEFAULT, ComparisonRequest, compare
from bdjax.pipelines.training import train, victim_directory
from bdjax.reports import solvers as report

OUT = Path(os.environ.get("OUT", "runs/solver_comparison"))
SEEDS = (0, 1, 2)
CONFIG = ibau.Config(schedule="release", norm_bound=10.0, batch_size=10, inner_steps=50, outer_steps=50)
EPOCHS = {
    ("mnist", "badnets"): 1,
    ("mnist", "image_trigger"): 1,
    ("cifar10", "badnets"): 6,
    ("cifar10", "image_trigger"): 2,
}
SOLVERS = {
    "mnist": DEFAULT,
    "cifar10": ("none", "one_step", "fixed_point", "cg", "cg:10", "minres", "nystrom:10", "unrolled"),
}


def main(datasets: list[str]) -> None:
    """Compare on every victim of `datasets`, then write summary.md and theorem.json into OUT."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    for dataset in datasets:
        for seed in SEEDS:
            for attack in ("badnets", "image_trigger"):
                one(dataset, attack, seed)
    found = sorted(OUT.glob("*/solvers.json"))
    text = report.summary([json.loads(path.read_text()) for path in found])
    checkpoint.write_text(OUT / "summary.md", text)
    if "mnist" in datasets:
        theorem(victim_of("mnist", "badnets", 0))


def victim_of(dataset: str, attack: str, seed: int) -> Path:
    """The victim's directory, trained unless it is there."""
    spec = os.environ.get(f"BDJAX_{dataset.upper()}", f"tfds:{dataset}")
    fit = FitConfig(epochs=EPOCHS[dataset, attack])
    experiment = Experiment(attack, None, spec, "small_vgg", seed, fit=fit)
    data = datasets.load(spec)
    return train(experiment, victim_directory(experiment, data.fingerprint, OUT / "victims"), data=data)


def one(dataset: str, attack: str, seed: int) -> None:
    """Compare on one victim and write solvers.json and solvers.png."""
    directory = OUT / f"{dataset}-{attack}-{seed}"
    if (directory / "solvers.json").exists():
        return
    spec = os.environ.get(f"BDJAX_{dataset.upper()}")
    request = ComparisonRequest(
        victim_of(dataset, attack, seed), SOLVERS[dataset], (5, 20), CONFIG, dataset=spec, rounds=(5,), test_size=2000
    )
    result = compare(request, Context(1))
    directory.mkdir(parents=True, exist_ok=True)
    report.draw(result, directory / "solvers.png")
    checkpoint.write_text(directory / "solvers.json", json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{directory}\n{report.table(result)}\n\n")
    sys.stdout.flush()


def theorem(directory: Path) -> None:
    """Relative error of the hypergradient after T inner and K fixed-point steps, for two penalties."""
    artifact = open_artifact(directory, "ibau", CONFIG, source=EvaluationSource(os.environ.get("BDJAX_MNIST")))
    model, params = artifact.victim.model, artifact.victim.variables["params"]
    problem = ibau.problem(CONFIG, artifact.victim, artifact.view(), stage_key(0, "defense"))
    rows = []
    for penalty, step in ((20.0, 1 / 60), (0.001, 0.1)):
        hyper = {**problem.arrays["shared"]["hyper"], "penalty": jnp.float32(penalty)}
        arrays = {**problem.arrays, "shared": {**problem.arrays["shared"], "hyper": hyper}}
        rows += _errors(problem._replace(arrays=arrays), model, params, penalty, step)
    checkpoint.write_text(OUT / "theorem.json", json.dumps(rows, indent=1) + "\n")


def _errors(problem: ibau.Problem, model: Any, params: Any, penalty: float, step: float) -> list[dict[str, Any]]:
    @jax.jit
    def descend(delta: Any, arrays: Any) -> tuple[Any, Any]:
        gradient = jax.grad(problem.build(model, arrays)[0])(delta, params)
        return delta - step * gradient, jnp.linalg.norm(gradient)

    def gradient_at(delta: Any, name: str, iterations: int) -> np.ndarray:
        solve = hypergrad.solver(name, iterations, step)
        program = jax.jit(lambda d, a: hypergrad.hypergradient(*problem.build(model, a), d, params, solve)[1])
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(program(delta, problem.arrays))])

    points, delta = {}, jnp.zeros_like(problem.delta)
    for t in range(1, 401):
        delta, slope = descend(delta, problem.arrays)
        if t in (1, 2, 5, 10, 20, 50, 400):
            points[t] = (delta, float(slope))
    exact = gradient_at(points[400][0], "lu", 1)
    return [
        {"penalty": penalty, "step": step, "T": t, "K": k, "inner_gradient_norm": slope,
         "relative_error": float(np.linalg.norm(gradient_at(at, "fixed_point", k) - exact) / np.linalg.norm(exact))}
        for t, (at, slope) in points.items()
        for k in (1, 2, 5, 8)
    ]  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:] or ["mnist", "cifar10"])
