"""The demo on ten seeds: BadNets on scikit-learn's digits, removed by I-BAU.

    bdjax sweep experiments/ibau/demo.py
    bdjax report runs/ibau/demo --markdown

Measures ACC and ASR before and after, seed by seed.

Setting: `bdjax.config.demo`. 1,000 training images of 32x32, 20 % poisoned with a white 4x4 square, target 8;
398 test images are the defender's (a fifth of them judges), the other 399 are evaluated. I-BAU has its defaults.

Time: about 60 seconds of CPU a cell on 2 CPU cores. To expect: ACC about 98 and ASR about 99 before; ACC at most
1 point lower and ASR at most 3 after, on every seed (experiments/results/demo).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from bdjax.config import FitConfig, demo
from bdjax.pipelines.experiment_options import SMOKE, Cell, ExperimentOptions

TITLE = "The demo, seed by seed"
SEEDS = tuple(range(10))
DEMO = {"dataset": "digits", "model": "cnn", "epochs": 15}


@dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of the demo; it is small, so that the scales paper and cpu are the same."""

    SCALES: ClassVar = {"paper": DEMO, "cpu": DEMO, "smoke": SMOKE}


def cells(options: Options) -> list[Cell]:
    """The one cell."""
    experiment = replace(demo(), dataset=options.dataset, model=options.model, fit=FitConfig(epochs=options.epochs))
    remark = f"victim trained {options.epochs} of 15 epochs" if options.epochs != 15 else ""
    return [Cell(f"{options.dataset}, BadNets", experiment, scale=remark)]
