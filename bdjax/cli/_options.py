"""Dataclasses of the flags that several commands share; tyro makes the command line from them. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class CommonFlags:
    """Flags of every command."""

    json: bool = False
    """Print the result as one JSON object on the last line of stdout."""
    code: str = ""
    """Comma-separated paths of user-defined .py files that a model directory or result names; they are executed.
    Without this flag, no code that a directory names is executed."""


@dataclass
class DeviceFlags(CommonFlags):
    """Flags of a command that computes."""

    devices: int = 0
    """Number of local devices to compute on; 0: all."""


@dataclass
class ProfileFlags(DeviceFlags):
    """Flags of a command that can be profiled."""

    profile: Path | None = None
    """Directory for a profiler trace of the devices, which xprof and ui.perfetto.dev open."""


@dataclass
class ClusterFlags(ProfileFlags):
    """Flags of several processes, on one machine or many, that train one model together; each runs the same command."""

    coordinator: str = ""
    """HOST:PORT of process 0, which the other processes connect to; needs --processes and --process."""
    processes: int = 0
    """Number of processes that train together."""
    process: int = -1
    """Index of this process, from 0. Process 0 writes the results, into a directory that all processes can read."""
    slurm: bool = False
    """Read coordinator, processes and process from Slurm: `srun bdjax ... --slurm`, one task per process."""


@dataclass
class OutputFlags(ClusterFlags):
    """Flags of a command that writes a run or a victim."""

    root: Path = Path("runs")
    """Results go to ROOT/HASH and victims to ROOT/victims/HASH, with the hash of their configuration."""
    out: Path | None = None
    """Write the result to this directory instead."""
    force: bool = False
    """Delete an earlier bdjax result in that directory and run again."""


@dataclass
class TrainingFlags(OutputFlags):
    """Flags of a command that trains a victim."""

    dataset: str = "digits"
    """Data set: digits, npz:PATH, folder:PATH or tfds:NAME."""
    model: str = "cnn"
    """Name of the classifier; `bdjax list models` lists them."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass(kw_only=True)
class WeightFileFlags:
    """Flags that describe a weight file of PyTorch: its architecture and the preprocessing of its images."""

    model: str | None = None
    """Architecture of the network (`bdjax list models`); default: the one that the file names, as BackdoorBench's files
    do."""
    classes: int | None = None
    """Number of classes; default: as stated in the file, else the number of outputs of the last layer."""
    size: str = ""
    """Image size in pixels, 32 or 32,48 (height,width); default: as stated in the file or implied by its weights, else
    the model's usual size, 32 for CIFAR models and 224 for torchvision's."""
    input_mean: str = ""
    """Mean that was subtracted from images in [0, 1], by channel: 0.4914,0.4822,0.4465. Default: none; for a file of
    BackdoorBench that names its data set, BackdoorBench's values."""
    input_std: str = ""
    """Standard deviation that images were divided by after the mean was subtracted, by channel. For a network trained
    on pixel values from 0 to 255: 0.00392156862745098."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the colour channels that the network was trained with."""
    layout: Literal["chw", "hwc", "cwh", "whc"] = "chw"
    """Order of the axes of the images that the network was trained with; cwh and whc exchange height and width."""
    resize: int = 0
    """Side in pixels to which images are resized before the network; 0: no resizing."""
    key: str | None = None
    """Key of the weights in the file's dictionary, where several entries fit, such as averaged weights (EMA) beside the
    others."""
    ignore: str = ""
    """Comma-separated tensors of the file to leave out: names, ends or beginnings of names (neuron_mask), or patterns
    with * and ?. If weight_mask is ignored, weights split by torch.nn.utils.prune are multiplied by their masks."""
    stem: Literal["", "plain", "max", "stride2", "stride2-max"] = ""
    """Stem of a residual network, which weight files do not record: the stride of the first convolution (1 unless
    stride2) and whether 3x3 max-pooling follows (max); default: plain for a 3x3 convolution, stride2-max for a 7x7
    one."""
    pool: str = ""
    """Pooling before the last layer, which weight files do not record: global (mean over all positions) or the side of
    the averaged squares, such as 4; of an MNIST network: mean or max. Default: global; mean for an MNIST network."""
    transform_input: bool = False
    """GoogLeNet: convert images normalised with ImageNet's mean and std to mean and std 0.5 inside the network, as
    torchvision's pretrained model does."""
    network: str = ""
    """Other network options, which `bdjax import` lists as assumed, as comma-separated NAME=VALUE pairs: heads=6 or
    padding=same,epsilon=3."""
