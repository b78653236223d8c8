"""Names of the weights of CLIP: OpenAI's, which are the reference here, OpenCLIP's and Hugging Face's.

OpenCLIP has OpenAI's names; models with a text encoder of their own put "text." before those of the text encoder.
Hugging Face has other names, and separate matrices for query, key and value.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bdjax.interop import names
from bdjax.interop._tensors import Refused, Tensor

NAMES = ("openai", "open_clip", "hugging_face")
FIRST = {"openai": "visual.conv1.weight", "hugging_face": "vision_model.embeddings.patch_embedding.weight"}
"""A tensor by which the names are recognised."""
IGNORED = re.compile(
    r"(.*\.)?(position_ids|attn_mask|num_batches_tracked)|input_resolution|context_length|vocab_size|"
    r"text\.(cls_emb|pad_id)"
)
"""Tensors that do not influence the embeddings."""
_PARTS = ("query", "key", "value")
_WHOLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
}
"""Beginning of a name at Hugging Face -> at OpenAI."""
_INNER = (
    (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."), (".self_attn.out_proj.", ".attn.out_proj."),
)  # fmt: skip
_PROJECTIONS = ("text_projection", "visual.proj")  # transposed at Hugging Face


def to_openai(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Rename tensors to OpenAI's names, and join the matrices of attention layers.

    Args:
      tensors: by the names in the file, without a prefix.
      form: one of NAMES.

    Returns:
      The tensors by OpenAI's names; those that need no counterpart are left out.

    Raises:
      Refused: when an attention layer is incomplete.
    """
    needed = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    if form != "hugging_face":
        return {name.removeprefix("text."): tensor for name, tensor in needed.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in needed.items():
        if ".self_attn.q_proj." in name:
            renamed[_to_openai(name.replace(".self_attn.q_proj.", ".attn.in_proj_"))] = _joined(needed, name)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            renamed[_to_openai(name)] = _transposed(tensor) if _to_openai(name) in _PROJECTIONS else tensor
    return renamed


def from_openai(arrays: Mapping[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    """Rename arrays from OpenAI's names; the inverse of :func:`to_openai`.

    Args:
      arrays: by OpenAI's names.
      form: one of NAMES.

    Returns:
      The arrays by the names of `form`.
    """
    if form != "hugging_face":
        return dict(arrays)
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", np.split(array, 3), strict=True):
                renamed[_from_openai(name.replace(".attn.in_proj_", f".self_attn.{letter}_proj."))] = part
        else:
            renamed[_from_openai(name)] = array.T if name in _PROJECTIONS else array
    return renamed


def entry(path: tuple[str, ...], shape: tuple[int, ...]) -> names.Entry:
    """Return the counterpart of an array of the variables under OpenAI's names.

    Args:
      path: ("params", "visual" or "text", layer, leaf), or shorter for an array without a layer.
      shape: its shape.

    Returns:
      The counterpart.
    """
    if path[0] == "batch_stats":
        prefix, layer, leaf = "visual.", path[1], path[2]
    elif path[1] == "logit_scale":
        prefix, layer, leaf = "", "logit_scale", ""
    else:
        prefix = "visual." if path[1] == "visual" else ""
        layer, leaf = path[2], path[3] if len(path) > 3 else ""
    if layer == "token_embedding":
        layer = "token_embedding.weight"
    return names.entry(path, prefix + layer, leaf, shape, None, False)


def _to_openai(name: str) -> str:
    for theirs, ours in _WHOLE.items():
        if name == theirs or name.startswith(f"{theirs}."):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in _INNER:
        name = name.replace(theirs, ours)
    return name


def _from_openai(name: str) -> str:
    for theirs, ours in _WHOLE.items():
        if name == ours or name.startswith(f"{ours}."):
            name = theirs + name.removeprefix(ours)
            break
    for theirs, ours in _INNER:
        name = name.replace(ours, theirs)
    return name


def _joined(tensors: Mapping[str, Tensor], query: str) -> Tensor:
    """Join query, key and value of an attention layer along the first axis."""
    parts = [tensors.get(query.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
    for kind, part in zip(_PARTS, parts, strict=True):
        if part is None or part.shape != tensors[query].shape or not part.shape:
            raise Refused(f"the {kind} of its attention layer {query.partition('.q_proj')[0]!r} does not fit")
    complete = [part for part in parts if part is not None]
    first, *rest = complete[0].shape
    return _changed(complete[0], (3 * first, *rest), lambda: np.concatenate([part.read() for part in complete]))


def _transposed(tensor: Tensor) -> Tensor:
    return _changed(tensor, tensor.shape[::-1], lambda: tensor.read().T)


def _changed(tensor: Tensor, shape: tuple[int, ...], read: Callable[[], Any]) -> Tensor:
    return Tensor(tensor.dtype, shape, read)
