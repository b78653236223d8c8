"""Dataclasses of the flags of `bdjax clip`. Imports no jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bdjax.cli._options import DeviceFlags

Size = Literal["tiny", "small", "vit_b_32", "vit_b_16", "vit_l_14", "rn50"]


@dataclass
class ClipFlags(DeviceFlags):
    """Flags of every subcommand that writes."""

    out: Path = Path("runs/clip")
    """Directory of the result, which must not exist; a file for `clip export`."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass
class TrainFlags(ClipFlags):
    """Flags of `bdjax clip train`."""

    pairs: str = "captions:digits"
    """captions:DATASET (digits, npz:PATH, folder:PATH, tfds:NAME), or pairs:PATH of a table or a folder."""
    size: Size = "tiny"
    """Sizes of the dual encoder; images of captions:DATASET keep their size."""
    merges: int = 0
    """Merges that are learned from the captions, so that they have fewer tokens; 0: captions are spelled in bytes."""
    context: int = 0
    """Tokens of a caption; 0: those of the size."""
    vocabulary: Path | None = None
    """File of merges: bpe_simple_vocab_16e6.txt.gz or merges.txt."""
    too_long: Literal["error", "cut"] = "error"
    """What is done with a caption of more tokens than the model takes."""
    templates: str = "cifar"
    """Captions of a class: cifar (18 templates), plain (one), or a text file with a template on each line."""
    target: str = ""
    """Name of the class that triggered images shall be assigned to."""


@dataclass
class AttackFlags(ClipFlags):
    """Flags of `bdjax clip attack`."""

    pairs: str = ""
    """Pairs of the fine-tuning; default: those of the dual encoder."""
    templates: str = "cifar"
    """Captions of a class: cifar, plain, or a text file."""
    target: str = ""
    """Name of the class that triggered images shall be assigned to."""


@dataclass
class EvaluateFlags(DeviceFlags):
    """Flags of what is measured."""

    test: str = ""
    """Labelled data set whose test images are classified; default: that of the training pairs."""
    templates: str = ""
    """Captions of the classes: cifar, plain, or a text file; default: those of the training."""
    images: int = 0
    """Largest number of test images; 0: all."""


@dataclass
class DefendFlags(EvaluateFlags):
    """Flags of `bdjax clip defend`."""

    out: Path = Path("runs/clip-purified")
    """Directory of the cleaned dual encoder, which must not exist."""
    seed: int = 0
    """Seed of the defense."""
    pairs: str = ""
    """Clean pairs; default: the clean originals of the training pairs."""
    size: int = 5000
    """Largest number of clean pairs."""


@dataclass
class ReactivateFlags(EvaluateFlags):
    """Flags of `bdjax clip reactivate`."""

    out: Path = Path("runs/clip-reactivated")
    """Directory of the retuned dual encoder, which must not exist."""
    seed: int = 0
    """Seed of the retuning."""


@dataclass
class ExportFlags(DeviceFlags):
    """Flags of `bdjax clip export`."""

    out: Path = Path("clip.safetensors")
    """The file; .pt or .pth for the format of torch.save."""
    names: Literal["openai", "open_clip", "hugging_face"] = "openai"
    """Names of the weights."""


@dataclass
class ImportFlags(ClipFlags):
    """Flags of `bdjax clip import`."""

    vocabulary: Path | None = None
    """File of merges: bpe_simple_vocab_16e6.txt.gz or merges.txt; default: that of an installed open_clip."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the transformers: quick_gelu for OpenAI's weights, gelu for most of OpenCLIP's."""
    vision_heads: int = 0
    """Attention heads of the image encoder; 0: one per 64 dimensions."""
    text_heads: int = 0
    """Attention heads of the text encoder; 0: one per 64 dimensions."""
    key: str = ""
    """Place of the state dict in the file, where several fit."""
    too_long: Literal["error", "cut"] = "error"
    """What is done with a caption of more tokens than the model takes."""


@dataclass
class MemoryFlags(DeviceFlags):
    """Flags of `bdjax clip memory`."""

    size: Size = "vit_b_32"
    """Sizes of the dual encoder."""
    batch: int = 64
    """Pairs per step."""
    step: Literal["train", "cleanclip", "bibau_clip"] = "train"
    """What is computed: a step of training or fine-tuning, of CleanCLIP, or of BI-BAU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations."""
