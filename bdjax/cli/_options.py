"""The flags that several commands take, as dataclasses for tyro, and how lists in flags are read. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

"""What stands in the place of an attack success rate where images got no trigger."""


@dataclass
class Common:
    """What every command takes."""

    json: bool = False
    """Make the last line of stdout the result, as one JSON object."""
    code: str = ""
    """Paths of .py files of your own, with commas between, that a directory's records name; they are executed. Without
    it nothing that a directory names is."""


@dataclass
class Device(Common):
    """What a computing command takes."""

    devices: int = 0
    """Local devices to compute on; 0: all of them."""


@dataclass
class Traced(Device):
    """What a command takes whose time is worth looking into."""

    profile: Path | None = None
    """Write a trace of what the devices do into that directory, for xprof or ui.perfetto.dev."""


@dataclass
class Cluster(Traced):
    """Several processes, on one machine or many, that train one model together: the same command in each."""

    coordinator: str = ""
    """HOST:PORT of the first process, which the others reach; needs --processes and --process."""
    processes: int = 0
    """How many there are."""
    process: int = -1
    """Which of them this is, from 0; the first one writes the results, into a directory that all can read."""
    slurm: bool = False
    """Take the three from Slurm: `srun bdjax ... --slurm`, one task a process."""


@dataclass
class OutputFlags(Cluster):
    """Where a command writes."""

    root: Path = Path("runs")
    """Results go to ROOT/HASH and victims to ROOT/victims/HASH, by the content of their configuration."""
    out: Path | None = None
    """Put this one there instead."""
    force: bool = False
    """Remove an earlier bdjax run that stands there, and run again."""


@dataclass
class Plant(OutputFlags):
    """What is attacked."""

    dataset: str = "digits"
    """digits, npz:PATH, folder:PATH or tfds:NAME."""
    model: str = "cnn"
    """Name of the classifier; see `bdjax list models`."""
    seed: int = 0
    """Everything random follows from it."""


@dataclass(kw_only=True)
class Foreign:
    """What a weight file does not always say of itself."""

    model: str | None = None
    """What the file is of (`bdjax list models`); BackdoorBench's results say it themselves."""
    classes: int | None = None
    """How many; default what the file says, else the outputs of its last layer."""
    size: str = ""
    """Of the images in pixels, 32 or 32,48 (height, width); default what the file or its weights tell, else the
    model's usual: 32 for those of CIFAR, 224 for torchvision's."""
    input_mean: str = ""
    """What the owner subtracted from images in [0, 1], by channel: 0.4914,0.4822,0.4465. BackdoorBench's own are known
    where a result names its data set."""
    input_std: str = ""
    """What the owner divided by afterwards. A network that was given 0 to 255 has 0.00392156862745098."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Which channel the network was given first."""
    layout: Literal["chw", "hwc", "cwh", "whc"] = "chw"
    """How the owner's images lay: the last two exchange height and width."""
    resize: int = 0
    """Side in pixels that the network enlarges or reduces images to before all else; 0: it does not."""
    key: str | None = None
    """Which dictionary of the file holds the weights, where several fit: of a file with averaged weights, those or the
    others."""
    ignore: str = ""
    """Tensors that the model need not have, with commas between: whole names, their ends or beginnings (neuron_mask),
    or with * and ?. A weight that torch.nn.utils.prune split is multiplied by its mask where weight_mask is ignored."""
    stem: Literal["", "plain", "max", "stride2", "stride2-max"] = ""
    """Of a residual network, which no file tells: the stride of the first convolution (1 unless it says 2), and whether
    3x3 max-pooling follows; default plain for a 3x3 convolution and stride2-max for a 7x7 one."""
    pool: str = ""
    """What stands before the last layer, which no file tells: global (one mean over all places) or the side of the
    squares that are averaged, such as 4; of a network for MNIST mean or max. Default global, and mean."""
    transform_input: bool = False
    """GoogLeNet brings its input from ImageNet's mean and std to 0.5, as torchvision's pretrained one does."""
    network: str = ""
    """Other options of the network that import lists as assumed: heads=6 or padding=same,epsilon=3."""
