"""Exchange of dual encoders with PyTorch: weights of CLIP under OpenAI's, OpenCLIP's and Hugging Face's names.

The sizes follow from the shapes in the file. Two facts do not: the numbers of attention heads, for which a head of 64
dimensions is assumed as in all of OpenAI's models, and the activation of the transformers.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bdjax import models
from bdjax.errors import InputError
from bdjax.interop import _clip_names, _crc, names, reader, writer
from bdjax.interop._clip_names import FIRST, NAMES
from bdjax.interop._tensors import Refused, Tensor, quote
from bdjax.io import checkpoint
from bdjax.io.files import sha256
from bdjax.models import ClipConfig
from bdjax.types import Variables

__all__ = ["NAMES", "FileFacts", "ImportedClip", "export_clip", "import_clip", "openai_arrays"]

_HEAD = 64  # dimensions of an attention head
_HEADS = {1280: 16, 1408: 16, 1664: 16}  # of OpenCLIP's largest image encoders, by width
_MAX_BLOCKS, _SHOWN = 200, 20


@dataclass(frozen=True)
class FileFacts:
    """Facts about a weight file of CLIP that its shapes do not determine."""

    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the transformers: quick_gelu for OpenAI's weights, gelu for most of OpenCLIP's."""
    vision_heads: int = 0
    """Attention heads of the image encoder; 0: one per 64 dimensions."""
    text_heads: int = 0
    """Attention heads of the text encoder; 0: one per 64 dimensions."""
    key: str = ""
    """Place of the state dict in the file, where several fit."""


class ImportedClip(NamedTuple):
    """A dual encoder from a weight file."""

    config: ClipConfig
    variables: Variables
    source: dict[str, Any]
    """JSON record of the file: name, SHA-256, format, names of the weights, place, and what was assumed."""


def import_clip(file: Path, facts: FileFacts = FileFacts()) -> ImportedClip:  # noqa: B008
    """Read the weights of a dual encoder.

    Args:
      file: a safetensors file or a file of torch.save with a state dict, bare or inside other dictionaries.
      facts: what the shapes do not determine.

    Returns:
      The dual encoder.

    Raises:
      InputError: when the file cannot be read (TorchScript archives are refused with the way out), holds no CLIP or
        several, when tensors are missing, left over or of another shape, or when a weight is NaN or infinite.
    """
    file = Path(file)
    form, value = reader.read(file)
    try:
        dicts = reader.state_dicts(value)
        place, prefix, naming, tensors = _find(file, dicts, facts.key)
        _crc.check(file)
        renamed = _clip_names.to_openai(tensors, naming)
    except Refused as refused:
        raise InputError(f"{file} is not read: {refused}.") from None
    config = config_of(file, {name: tensor.shape for name, tensor in renamed.items()}, facts)
    variables = _variables(file, config, renamed)
    source = {
        "file": file.name,
        "sha256": sha256(file),
        "format": form,
        "names": naming,
        "key": place,
        "prefix": prefix,
        "dtype": renamed["logit_scale"].dtype if naming == "openai" else next(iter(renamed.values())).dtype,
        "assumed": {"activation": config.activation, "vision_heads": config.vision_heads,
                    "text_heads": config.text_heads},
    }  # fmt: skip
    return ImportedClip(config, variables, source)


def export_clip(config: ClipConfig, variables: Variables, out: Path, form: str = "openai") -> int:
    """Write the weights of a dual encoder as float32; safetensors, or the format of torch.save for .pt and .pth.

    Args:
      config: its sizes.
      variables: its variables.
      out: path of the file; an existing file is replaced.
      form: names of the weights, one of NAMES.

    Returns:
      The number of tensors.

    Raises:
      InputError: when the names are unknown, or do not exist for this image encoder.
    """
    if form not in NAMES:
        raise InputError(f"--names must be one of {', '.join(NAMES)}, got {form!r}.")
    if form == "hugging_face" and config.vision == "resnet":
        raise InputError("Hugging Face has no CLIP with a ResNet. Use --names openai.")
    arrays = _clip_names.from_openai(openai_arrays(config, variables), form)
    checkpoint.check_space(out, sum(array.nbytes for array in arrays.values()))
    with checkpoint.atomic_file(out) as opened:
        if out.suffix in (".pt", ".pth"):
            writer.write_torch(opened, arrays)
        else:
            opened.write(writer.safetensors_bytes(arrays))
    return len(arrays)


def openai_arrays(config: ClipConfig, variables: Variables) -> dict[str, np.ndarray]:
    """Return all weights by OpenAI's names, in PyTorch's layout."""
    arrays: dict[str, np.ndarray] = {}
    for one in _entries(config):
        array: Any = variables
        for part in one.path:
            array = array[part]
        arrays[one.name] = one.to_torch(np.asarray(array))
        if one.path[-1] == "var":
            arrays[one.name.replace("running_var", names.COUNTER)] = np.zeros((), np.int64)
    return arrays


def config_of(file: Path, shapes: Mapping[str, tuple[int, ...]], facts: FileFacts) -> ClipConfig:
    """Derive the sizes of a dual encoder from the shapes of its weights under OpenAI's names.

    Args:
      file: path of the file, for messages.
      shapes: shape of each tensor.
      facts: what the shapes do not determine.

    Returns:
      The sizes.

    Raises:
      InputError: when the shapes are of no CLIP.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(found := shapes.get(name, ())) != axes or not all(found):
            raise InputError(
                f"{file} is no CLIP: its tensor {name!r} {f'is {quote(found)}' if name in shapes else 'is missing'}, "
                f"and should have {axes} axes."
            )
        return found

    (vocabulary, text_width), context = shape("token_embedding.weight", 2), shape("positional_embedding", 2)[0]
    options: dict[str, Any] = {
        "text_width": text_width,
        "text_depth": _blocks(shapes, r"transformer\.resblocks\.(\d+)\..*"),
        "text_heads": facts.text_heads or _heads(file, "text", text_width),
        "context": context,
        "vocabulary": vocabulary,
        "dimension": shape("text_projection", 2)[1],
        "activation": facts.activation,
    }
    if "visual.proj" in shapes:
        width, channels, patch, _ = shape("visual.conv1.weight", 4)
        side = patch * isqrt(max(1, shape("visual.positional_embedding", 2)[0] - 1))
        depths: tuple[int, ...] = (_blocks(shapes, r"visual\.transformer\.resblocks\.(\d+)\..*"),)
        heads = facts.vision_heads or _heads(file, "vision", width)
        options |= {"vision": "vit", "patch": patch, "vision_width": width}
    else:
        width, channels = shape("visual.conv3.weight", 4)[0], shape("visual.conv1.weight", 4)[1]
        side = 32 * isqrt(max(1, shape("visual.attnpool.positional_embedding", 2)[0] - 1))
        depths = tuple(_blocks(shapes, rf"visual\.layer{stage}\.(\d+)\..*") for stage in range(1, 5))
        heads = facts.vision_heads or _heads(file, "vision", 32 * width)
        options |= {"vision": "resnet", "vision_width": width}
    input = models.PRESETS["vit_b_32"].input if channels == 3 else None
    return ClipConfig((side, side, channels), vision_depths=depths, vision_heads=heads, input=input, **options)


def _blocks(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Return the number of consecutive blocks whose tensors match the pattern."""
    numbers = {int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name)) and len(match[1]) < 5}
    count = 0
    while count in numbers and count < _MAX_BLOCKS:
        count += 1
    return max(1, count)


def _heads(file: Path, part: str, width: int) -> int:
    """Return the usual number of heads. Raises InputError where 64 dimensions do not divide the width."""
    if part == "vision" and width in _HEADS:
        return _HEADS[width]
    if width % _HEAD:
        raise InputError(
            f"{file}: the number of attention heads of its {part} encoder does not follow from a width of {width}. "
            f"Give --{part}-heads."
        )
    return width // _HEAD


def _entries(config: ClipConfig) -> list[names.Entry]:
    """Return every array of a dual encoder with its counterpart under OpenAI's names."""
    like = jax.eval_shape(models.dual_encoder(config).init, jax.random.key(0))
    return [
        _clip_names.entry(tuple(part.key for part in path), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    ]


def _find(file: Path, dicts: Mapping[str, Mapping[str, Tensor]], key: str) -> tuple[str, str, str, dict[str, Tensor]]:
    """Return (place, prefix, names, tensors without the prefix) of the only CLIP in a file."""
    fits = []
    for place, tensors in dicts.items():
        for form, first in FIRST.items():
            for name in tensors:
                prefix = name.removesuffix(first)
                if name.endswith(first) and (not prefix or prefix.endswith(".")):
                    fits.append((place, prefix, form))
    fits = [fit for fit in fits if not key or key in (fit[0], ".".join(filter(None, (fit[0], fit[1].strip(".")))))]
    if not fits:
        has = ", ".join(quote(name) for name in list(next(iter(dicts.values()), {}))[:3]) or "no tensors by name"
        raise InputError(
            f"{file} holds no CLIP{f' under --key {key!r}' if key else ''}: no tensor is called {FIRST['openai']!r} or "
            f"{FIRST['hugging_face']!r}; there are {has}. A classifier is read by `bdjax import`."
        )
    if len(fits) > 1:
        places = ", ".join(repr(".".join(filter(None, (place, prefix.strip("."))))) for place, prefix, _ in fits)
        raise InputError(f"{file} holds several CLIPs, under {places}. Choose one with --key.")
    place, prefix, form = fits[0]
    tensors = {n.removeprefix(prefix): tensor for n, tensor in dicts[place].items() if n.startswith(prefix)}
    if form == "openai" and any(name.startswith("text.") for name in tensors):
        form = "open_clip"
    return place, prefix, form, tensors


def _variables(file: Path, config: ClipConfig, tensors: Mapping[str, Tensor]) -> Variables:
    """Read the arrays. Raises InputError when they are not those of the model."""
    wanted = {one.name: one for one in _entries(config)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes.get("logit_scale") == (1,):
        tensors = {**tensors, "logit_scale": replace(tensors["logit_scale"], shape=())}
        shapes["logit_scale"] = ()
    lines = [
        f"{quote(name)}: needs {quote(wanted[name].shape) if name in wanted else 'nothing'}, "
        f"has {quote(shapes[name]) if name in shapes else 'nothing'}"
        for name in sorted(wanted.keys() | shapes.keys())
        if name not in wanted or shapes.get(name) != wanted[name].shape
    ]
    if lines:
        more = f"\n... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise InputError(f"{file} does not fit a CLIP of its sizes:\n" + "\n".join(lines[:_SHOWN]) + more)
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, one in wanted.items():
        with np.errstate(over="ignore"):
            array = tensors[name].read().astype(np.float32).reshape(one.shape)
        if not np.isfinite(array).all() or (one.path[-1] == "var" and (array < 0).any()):
            raise InputError(f"{file} is not read: tensor {quote(name)} contains NaN, Inf or a negative variance.")
        parent = variables
        for folder in one.path[:-1]:
            parent = parent.setdefault(folder, {})
        parent[one.path[-1]] = np.array(one.to_bdjax(array), order="C")
    return variables


def source_digest(config: ClipConfig, source: Mapping[str, Any]) -> str:
    """Return the hash that identifies an imported dual encoder: its file, the place in it, and its sizes."""
    return hashlib.sha256(repr((source["sha256"], source["key"], source["prefix"], config)).encode()).hexdigest()
