"""Hypergradient solvers on I-BAU's own problem: error, cost, and one round of the defense, on backdoored networks.

    bdjax sweep experiments/ibau/solvers.py --datasets mnist=npz:mnist.npz,cifar10=npz:cifar10.npz

Measures, for each victim: the first θ step of I-BAU with δ held to norm 10, batches of 10, 50 ascent steps; H of one
batch of 10 images, its reference dense in float64; then one round (50 θ steps) with each solver at K = 5, on 2,000
held-out images. Means and deviations over the seeds: runs/ibau/solvers/summary.md; `bdjax solvers VICTIM` draws a
comparison. Theorem 1 of I-BAU is in theorem1.py.

Victims: small VGG, BadNets (20 %, target 8) and a blended checkerboard (10 %, target 0), three seeds each; 1 epoch on
MNIST, 6 and 2 on CIFAR-10. The scales paper and cpu are the same: no paper has these numbers.

Time: about an hour on 2 CPU cores, besides the victims (a quarter of an hour an epoch of all). To expect: no solver
without a ridge comes near the reference; see experiments/results/solver_comparison.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bdjax.pipelines.experiment_options import SMOKE, Cell, CellResult, SeveralDatasets
from bdjax.pipelines.solver_comparison import DEFAULT
from bdjax.pipelines.stages import SolverComparison
from bdjax.reports import solvers as report

from ._solver_victims import CONFIG, SOURCES, victim_of

TITLE = "Hypergradient solvers on I-BAU's problem"
SEEDS = (0, 1, 2)
SOLVERS = {
    "mnist": DEFAULT,
    "cifar10": ("none", "one_step", "fixed_point", "cg", "cg:10", "minres", "nystrom:10", "unrolled"),
}
FULL = {
    "model": "small_vgg",
    "steps": CONFIG.inner_steps,
    "attacks": ("badnets", "image_trigger"),
    "iterations": (5, 20),
}


@dataclass(frozen=True)
class Options(SeveralDatasets):
    """Options of the comparison."""

    attacks: tuple[str, ...] = ()
    """Attacks of the victims; default: the scale's."""
    solvers: tuple[str, ...] = ()
    """Solvers, each with an optional :RIDGE; default: on MNIST all, on CIFAR-10 eight."""
    iterations: tuple[int, ...] = ()
    """Values of K, iterations of a solver; default: the scale's."""
    steps: int = 0
    """Ascent steps before the hypergradient, and θ steps of the round; default (0): the scale's."""

    SOURCES: ClassVar = SOURCES
    SCALES: ClassVar = {
        "paper": FULL,
        "cpu": FULL,
        "smoke": {
            **SMOKE,
            "steps": 2,
            "datasets": ("mnist",),
            "attacks": ("badnets",),
            "solvers": ("fixed_point",),
            "iterations": (5,),
        },
    }


def cells(options: Options) -> list[Cell]:
    """A victim of each data set and attack, and the comparison on it."""
    config = dataclasses.replace(CONFIG, inner_steps=options.steps, outer_steps=options.steps)
    return [
        Cell(
            label=f"{dataset}, {attack}",
            experiment=victim_of(dataset, attack, source, options.model, options.epochs),
            scale=f"digits, {options.steps} steps" if options.scale == "smoke" else "",
            stages=(
                SolverComparison(
                    options.solvers or SOLVERS[dataset], options.iterations, config, rounds=(5,), test_size=2000
                ),
            ),
        )
        for dataset, source in options.sources.items()
        for attack in options.attacks
    ]


def summarise(results: Sequence[CellResult]) -> str:
    """Means and deviations over the seeds of every data set and attack."""
    return report.summary([dict(result.stages["solvers"]) for result in results])
