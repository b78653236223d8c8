"""AGE, Table 1: the edit and its repair with and without the trigger, on five data sets (Hsieh et al., 2024).

    bdjax sweep experiments/age/table1.py --scale cpu --dataset npz:cifar10.npz
    bdjax report runs/age/table1 --markdown

Measures ACC, ASR, CTCA and the score before and after the edit, and after its repair.

Scales: paper: ResNet-18, our 50 epochs, all data sets (--datasets mnist=npz:mnist.npz,cifar10=npz:cifar10.npz says
which and where); cpu: `cnn`, 5 epochs, CIFAR-10. The table marks smaller cells. --reading default edits half of the
numbers and estimates the statistics of batch normalisation anew, as `age` does by default, in place of half of the
layers and the paper's statistics; --sizes 512,4 are the numbers of the defender's images.

Setting: a white patch in 5 % of the images, target 2; 512 test images are the defender's, the others are evaluated. The
paper does not print how its victims are trained; ours: Adam 1e-3 falling along a cosine, batches of 128, no
augmentation. The clean model of each seed, for the score, is trained with the same recipe. For CIFAR-100 and
Tiny-ImageNet the paper's ACC is top-5, ours top-1: compare the drops alone.

Time: a victim and a clean model a data set and seed, of the small VGG 50 x 2 minutes each on 2 CPU cores; an edit is
one pass over 512 images. To expect (the paper, CIFAR-10; ASR, ACC, CTCA): before 94.53, 70.5; with the trigger 0,
65.49, 0, after repair 9.79, 59.87, 42.07; without it 0.3, 59.18, 0.14, after repair 23.09, 61.83, 55.02. At scale cpu:
experiments/results/age_table1.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from bdjax.defenses import age
from bdjax.pipelines.experiment_options import Cell, SeveralDatasets

from ._rows import NAMES, SCALES, SOURCES, WHITE, Row, cell_of

TITLE = "AGE Table 1"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Options(SeveralDatasets):
    """Options of the table."""

    reading: Literal["layers", "default"] = "layers"
    """layers: half of the layers and the paper's statistics of batch normalisation; default: the defaults of `age`."""
    sizes: tuple[int, ...] = (512,)
    """Numbers of the defender's images."""

    SOURCES: ClassVar = SOURCES
    SCALES: ClassVar = SCALES


def cells(options: Options) -> list[Cell]:
    """Every data set and size, with and without the trigger, with and without repair."""
    return [
        _cell(options, dataset, size, knows, repair)
        for dataset in options.sources
        for size in options.sizes
        for knows in (True, False)
        for repair in (False, True)
    ]


def _cell(options: Options, dataset: str, size: int, knows: bool, repair: bool) -> Cell:
    state = "+repair (lr 1e-2)" if repair else "base"
    known = "BDK" if knows else "no BDK"
    default = options.reading == "default"
    config = age.Config(backdoor_knowledge=knows, repair=repair)
    if not default:
        config = replace(config, share_of="layers", batch_norm=None)
    scale = ["ACC and CTCA are top-1, the paper's top-5"] * (dataset in ("cifar100", "tiny"))
    scale += ["half of the numbers, statistics estimated anew"] * default + [f"{size} images"] * (size != 512)
    label = f"{NAMES[dataset]}, {'with' if knows else 'without'} the trigger{', repaired' * repair}"
    row = Row(
        label + f", {size} images" * (size != 512),
        "rgba_patch",
        {"picture": "white"},
        "age",
        config,
        size,
        {"table": "1", "attack_setting": WHITE, "defense": "AGE", "defense_setting": f"{known}; 512 samples; {state}"},
        tuple(scale),
    )
    return cell_of(row, options, dataset)
