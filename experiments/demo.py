"""The demo on ten seeds: BadNets on scikit-learn's digits, removed by I-BAU.

    bdjax sweep experiments/demo.py
    bdjax report runs/demo_seeds --markdown

Setting: `bdjax.experiment.demo`. 1,000 training images of 32x32, 20 % poisoned with a white 4x4 square, target 8;
398 test images are the defender's, the other 399 are evaluated. The defense's fields were chosen on seeds 100 to
113, with the ASR of triggered training images.

Time: about 20 seconds a cell on 2 CPU cores. To expect: ACC about 98 and ASR about 99 before; ACC at most 3 points
lower (a mean over the seeds; a single one lost 6) and ASR about 5 after, 10 on the worst seed.
"""

from bdjax.experiment import demo
from bdjax.sweep import Cell

TITLE = "The demo, seed by seed"
SEEDS = tuple(range(10))
CELLS = (Cell("digits, BadNets", demo()),)
