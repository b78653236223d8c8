"""Adaptive-Blend: blend random pieces of a faint picture in training and the whole picture at test time.

X. Qi, T. Xie, Y. Li, S. Mahloujifar and P. Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023.

Threat model: the attacker writes a share of the training set, as in BadNets. The picture k is divided into a grid of
g x g pieces. The mask M is 1 on the visible pieces, which are drawn for each image in training (half of them by
default), and 1 everywhere at test time; s is the opacity:

    x' = x + s M (k - x)

Poisoned images get the target's label; cover images carry the same training trigger and keep their label. The model
can therefore recognise the trigger only by several pieces together, and poisoned images are not separated in its
feature space.

The defaults are a reading of BI-BAU, whose 10 % do not distinguish the two: 5 % poisoned and 5 % cover, target 0,
s = 0.2, 8 of 4x4 pieces. The authors' own: `ratio=0.003 cover=0.003`; another toolbox trains with `opacity=0.15`.
BI-BAU's Enhanced Adaptive-Blend is `coupling=1`: the attacker also controls training and adds a penalty that pulls the
features of poisoned images towards the target class (its form, weight and start are ours; see _coupling.py).

Deviations:

- The picture is drawn by a formula; `picture` takes a file instead.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.attacks._coupling import CouplingConfig, coupling_hook
from bdjax.attacks._pictures import load_picture
from bdjax.attacks._poisoning import key_per_image
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Poison, Task, TrainingHook


@dataclass(frozen=True)
class Config(CouplingConfig):
    """The picture, its pieces and its strength."""

    ratio: float = 0.05
    """Share of the whole training set that is poisoned (covers not counted), in (0, 1]."""
    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the poisoned ones; the authors draw from all classes."""
    picture: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy (uint8, or float in [0, 1]), resized to the images. Empty: rainbow bands, drawn."""
    opacity: float = 0.2
    """s in training, in (0, 1]."""
    test_opacity: float = 0.2
    """s at test time, in (0, 1]."""
    grid: int = 4
    """g, pieces along each side, at least 1."""
    seen: int = 8
    """Number of pieces in a training image, 1 to g * g."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("opacity", "test_opacity"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"attack.{name} must be in (0, 1], got {getattr(self, name)}. Use 0.2.")
        if self.grid < 1:
            raise InputError(f"attack.grid must be at least 1, got {self.grid}. Use 4.")
        if not 1 <= self.seen <= self.grid**2:
            raise InputError(f"attack.seen must be from 1 to {self.grid**2} (grid * grid), got {self.seen}.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Read or draw the picture.

    Args:
      config: hyper-parameters of the attack.
      task: provides the file reader and the shape of the images.
      key: unused.

    Returns:
      {"picture": float32 [H, W, C] in [0, 1]}.

    Raises:
      InputError: the file or the grid does not fit the images.
    """
    height, width, _ = task.model.shape
    if config.grid > min(height, width):
        raise InputError(f"attack.grid={config.grid} is finer than images of {height}x{width}. Use a smaller one.")
    return {"picture": load_picture(task, "picture", config.picture)}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Blend the whole picture into images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "picture".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return images + config.test_opacity * (jnp.asarray(arrays["picture"])[None] - images)


def training_trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Blend a few pieces of the picture, drawn for each image, into images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: draws the pieces.
      arrays: "picture".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    count, height, width, _ = images.shape
    grid, keys = config.grid, key_per_image(key, count)
    rank = jnp.argsort(jax.vmap(lambda k: jax.random.uniform(k, (grid**2,)))(keys))  # of each piece, in each image
    piece = (jnp.arange(height) * grid // height)[:, None] * grid + jnp.arange(width) * grid // width
    visible = (rank < config.seen)[:, piece][..., None]
    return jnp.where(visible, images + config.opacity * (jnp.asarray(arrays["picture"])[None] - images), images)


def training_hook(config: Config, task: Task, poison: Poison) -> tuple[TrainingHook, Any] | None:
    """Return the feature coupling penalty of the enhanced attack.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      poison: the poisoned images.

    Returns:
      The hook and its arrays, or None when config.coupling is 0.
    """
    return coupling_hook(config, task, poison)
