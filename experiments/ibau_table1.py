"""I-BAU, Table 1: the BadNets row on CIFAR-10 (Zeng et al., ICLR 2022).

    bdjax sweep experiments/ibau_table1.py --dataset npz:cifar10.npz --epochs 6
    bdjax report runs/ibau_table1 --markdown

Setting: small VGG, 20 % poisoned, target 8; the first 5,000 test images are the defender's, the other 5,000 are
evaluated. The paper states Adam with learning rate 0.05 for the victim, at which it does not train here; this uses
1e-3. The paper stops I-BAU at the round whose ACC is nearest to the best baseline's; the table shows the last of the
release's five rounds, result.json every round.

Time: a victim takes 50 x 2 minutes on 2 CPU cores, a round of I-BAU about one minute.
To expect: ACC 84.94 and ASR 98.28 before, ACC 83.35 and ASR 12.30 after (the paper counts target-class images in the
ASR, which alone gives about 10 %).
"""

from bdjax.config import Experiment, FitConfig, SplitConfig
from bdjax.defenses import ibau
from bdjax.pipelines.experiment_options import Cell, ExperimentOptions

TITLE = "I-BAU Table 1, BadNets, CIFAR-10"
SEEDS = (0, 1, 2)
PAPER = {
    "paper": "ibau",
    "table": "1",
    "dataset": "CIFAR-10",
    "model": "simplified VGG",
    "attack": "BadNets",
    "defense": "I-BAU",
}


def cells(options: ExperimentOptions) -> list[Cell]:
    """The release's notebook, which projects the perturbation, and its script, which does not."""
    notebook = ibau.Config(schedule="release", norm_bound=10.0)
    return [
        _cell("BadNets, δ projected to norm 10 (the release's notebook)", notebook, options),
        _cell("BadNets, δ not projected (the release's script)", ibau.Config(schedule="release"), options),
    ]


def _cell(label: str, config: ibau.Config, options: ExperimentOptions) -> Cell:
    smoke = options.scale == "smoke"
    epochs = options.epochs or (1 if smoke else 50)
    remarks = [f"victim trained {epochs} of 50 epochs"] * (epochs != 50) + ["digits"] * smoke
    return Cell(
        label=label,
        experiment=Experiment(
            attack="badnets",
            defense="ibau",
            dataset=options.dataset or ("digits" if smoke else "tfds:cifar10"),
            model=options.model or ("cnn" if smoke else "small_vgg"),
            defense_config=config,
            fit=FitConfig(epochs=epochs),
            split=SplitConfig(source="test", size=100 if smoke else 5000, order="given", validation=0.0),
        ),
        paper=PAPER,
        scale="; ".join(remarks),
    )
