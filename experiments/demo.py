"""The demo on ten seeds: BadNets on scikit-learn's digits, removed by I-BAU.

    bdjax sweep experiments/demo.py
    bdjax report runs/demo_seeds --markdown

Setting: `bdjax.config.demo`. 1,000 training images of 32x32, 20 % poisoned with a white 4x4 square, target 8;
398 test images are the defender's (a fifth of them judges), the other 399 are evaluated. I-BAU has its defaults.

Time: about 60 seconds of CPU a cell on 2 CPU cores. To expect: ACC about 98 and ASR about 99 before; ACC at most
1 point lower and ASR at most 3 after, on every seed.
"""

from bdjax.config import demo
from bdjax.pipelines.experiment_options import Cell

TITLE = "The demo, seed by seed"
SEEDS = tuple(range(10))
CELLS = (Cell("digits, BadNets", demo()),)
