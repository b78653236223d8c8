"""The trigger inversion of BTI-DBF: a generator that changes the backdoor features of images and keeps the benign ones.

X. Xu, K. Huang, Y. Li, Z. Qin and K. Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024. With h = feat(x) the input of the last dense layer [D], f = head(h), and MSE a mean over
all elements of a batch, each round has three steps:

    1. a mask   m = tanh(u) / (2 + 1e-7) + ½ in [0, 1]^D, with u ~ N(0, 1) drawn anew in every round:
                min_u CE(head(m h), y) - CE(head((1 - m) h), y)                          (not bounded below)
    2. G        a U-Net. With h' = feat(G(x)):
                min_G  MSE(x, G(x))                   while MSE(x, G(x)) > 0.3 or MSE(m h, m h') > 3
                       -MSE((1-m) h, (1-m) h') + 0.01 MSE(m h, m h')      otherwise
                       + CE(f(G(x)), t)                                   from the second round on
    3. t        the class that f(G(x + 0.03 N(0, 1))) predicts most often, in the first round

Before the first round G is pretrained to copy its input: min_G CE(softmax f(x), softmax f(G(x))) + MSE(h, h') +
c MSE(x, G(x)), where c is 100 while the last MSE is above 0.1, and 0.01 below. As in the release, this cross-entropy
takes probabilities where logits belong, which makes it weak. Optimisers: Adam, 1e-3 for G, with moments kept over all
rounds, and 0.01 for u. Steps 1 and 2 use a copy of the model; step 1 runs in training mode and moves the copy's
BatchNorm statistics, step 2 uses them as they then are.

**Deviations** from the release: h is the input of the last dense layer, a vector; the release uses the last map before
pooling, which models here do not expose. G has fewer blocks where images are too small for four. Dropout is off in
step 1. The release's script for inversion alone changes the BatchNorm statistics of the model it inspects; here they
are always a copy's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._inversion_steps import _copying, _inverting, _masking, chosen_of, generator_of, mask_of
from bdjax.defenses._tuning import begin, equal_batches, model_of, passes, shown_to
from bdjax.engine import predict
from bdjax.errors import check_fields
from bdjax.models import head, unet
from bdjax.types import DefenderView, Images, Key, Variables, Victim, to_float


@dataclass(frozen=True)
class InversionConfig:
    """Hyper-parameters of the inversion, and of the rounds around it."""

    rounds: int = 5
    """Rounds of inversion, each followed by training of the model."""
    batch_size: int = 128
    """Images per step, at most."""
    pretrain_epochs: int = 50
    """Passes over the images in which the generator learns to copy them."""
    mask_epochs: int = 20
    """Passes in which the mask is trained, in every round."""
    generator_epochs: int = 30
    """Passes in which the generator is trained, in every round."""
    mask_rate: float = 0.01
    """Learning rate of Adam for the mask."""
    generator_rate: float = 1e-3
    """Learning rate of Adam for the generator."""
    image_bound: float = 0.3
    """Mean squared change of a pixel, in units of [0, 1], above which the generator learns to copy."""
    feature_bound: float = 3.0
    """Mean squared change of the benign features above which it does so, too."""
    benign: float = 0.01
    """Weight of the change of the benign features in the generator's loss."""
    noise: float = 0.03
    """Standard deviation of the Gaussian noise added to images in step 3, in units of [0, 1]."""
    width: int = 32
    """Channels of the first block of the generator."""
    downs: int = 4
    """Down-sampling blocks of the generator."""
    early_stop: bool = False
    """Stop at the first later round that finds another target than the first round."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        counts = ("rounds", "batch_size", "mask_epochs", "generator_epochs", "width", "downs")
        check_fields(
            self,
            "defense",
            (counts, "at least 1", lambda v: v >= 1),
            (("mask_rate", "generator_rate"), "positive", lambda v: v > 0),
            (
                ("pretrain_epochs", "image_bound", "feature_bound", "benign", "noise"), "zero or more",
                lambda v: v >= 0,
            ),
        )  # fmt: skip


_DYNAMIC = ("image_bound", "feature_bound", "benign")


class Inversion:
    """The generator G, trained further in every round."""

    def __init__(self, config: InversionConfig, victim: Victim, view: DefenderView, key: Key) -> None:
        """Pretrain the generator to copy images. Raises InputError for a model without a dense layer "head"."""
        self._config, self._model, self._view = config, victim.model, view
        head(victim.variables["params"])
        self._number, self._size = equal_batches(config.batch_size, len(view.labels))
        net = unet(victim.model.shape, config.width, config.downs)
        self._apply = generator_of(victim.model.shape, config.width, config.downs)
        self._state = begin(net.init(jax.random.fold_in(key, 0)), "adam")
        self._shared: dict[str, Any] = {
            "images": jnp.asarray(view.images),
            "labels": jnp.asarray(view.labels),
            "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
        }
        self.target: int | None = None
        """The class found in the first round."""
        self._train(
            _copying(victim.model, self._apply, config.augment), {"model": _plain(victim.variables)},
            config.pretrain_epochs, jax.random.fold_in(key, 1), "the generator copies",
        )  # fmt: skip

    @property
    def generator(self) -> Any:
        """The parameters of G."""
        return self._state["params"]

    def refresh(self, variables: Variables, key: Key, what: str) -> int:
        """Run steps 1 to 3 on a model, and return the class that its predictions on G's images agree on most often.

        Args: variables: of the model; key: draws mask, batches and noise; what: name of the round, for the watch.
        """
        config, model = self._config, self._model
        size = head(variables["params"]).shape[0]
        copy = _plain(variables)
        state = {"params": jax.random.normal(jax.random.fold_in(key, 0), (size,)), "batch_stats": copy["batch_stats"]}
        state = begin(state, "adam")
        state = passes(
            _masking(model, config.augment), state, {**self._shared, "model": copy},
            np.full((config.mask_epochs, self._number), config.mask_rate), self._size, jax.random.fold_in(key, 1),
            partial(self._view.callback.on_progress, f"{what}, the mask"),
            what="loss of the mask", field="defense.mask_rate",
        )  # fmt: skip
        more = {
            "model": {**copy, "batch_stats": state["batch_stats"]},
            "mask": mask_of(state["params"]),
            "target": jnp.int32(self.target or 0),
            "pull": jnp.float32(self.target is not None),
        }
        self._train(
            _inverting(model, self._apply, config.augment),
            more,
            config.generator_epochs,
            jax.random.fold_in(key, 2),
            f"{what}, G",
        )
        target = self._called(variables, jax.random.fold_in(key, 3))
        if self.target is None:
            self.target = target
        return target

    def changed(self, images: Any) -> Images:
        """G(x) of images (stored or float [N, H, W, C]): float32 of the same shape, not clipped."""
        return self._apply(self.generator, to_float(images))

    def _train(self, step: Callable, more: dict[str, Any], epochs: int, key: Key, what: str) -> None:
        self._state = passes(
            step, self._state, {**self._shared, **more},
            np.full((epochs, self._number), self._config.generator_rate), self._size, key,
            partial(self._view.callback.on_progress, what),
            what="loss of the generator", field="defense.generator_rate",
        )  # fmt: skip

    def _called(self, variables: Variables, key: Key) -> int:
        images, counts = self._view.images, np.zeros(self._model.classes)
        for begun in range(0, len(images), self._size):
            at = np.arange(begun, begun + self._size)
            part = to_float(images[np.minimum(at, len(images) - 1)])  # the last piece is filled up, for one shape
            noise = self._config.noise * jax.random.normal(jax.random.fold_in(key, begun), part.shape)
            called = predict(self._model, variables, np.asarray(self.changed(part + noise)))
            counts += np.bincount(called[at < len(images)], minlength=self._model.classes)
        return int(np.argmax(counts))


def alternate(
    config: Any, victim: Victim, view: DefenderView, key: Key, name: str, make: Callable, state: Any, shared: Any
) -> Variables:
    """Alternate between inverting the backdoor and training the model; return the model's variables.

    Args:
      config: an InversionConfig with, for the training, `epochs`, `learning_rate`, and the `fraction` of a batch that
        passes through G; name: of the method, for the watch.
      make: `make(model, G, augment, fraction, images in a batch)` is the step of the training, in the engine's form.
      state: as of `passes`; shared: what the step gets beside images, labels and the parameters of G ("generator").

    After each epoch of training the watch is shown the model, G(x) - x of four images (`perturbation`), and the class
    that G's images are most often predicted as (`suspected`).
    """
    inversion = Inversion(config, victim, view, jax.random.fold_in(key, 0))
    number, size = equal_batches(config.batch_size, len(view.labels))
    generator = generator_of(victim.model.shape, config.width, config.downs)
    step = make(victim.model, generator, config.augment, config.fraction, size)
    shared = {**shared, "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels)}
    rates, shown = np.full((config.epochs, number), config.learning_rate), to_float(view.images[:4])
    for round_ in range(config.rounds):
        own, what = jax.random.fold_in(key, round_ + 1), f"{name} round {round_ + 1} of {config.rounds}"
        target = inversion.refresh(model_of(state), jax.random.fold_in(own, 0), what)
        if config.early_stop and target != inversion.target:
            break
        after = shown_to(
            view.callback, round_ * config.epochs, perturbation=inversion.changed(shown) - shown,
            suspected=np.array([target], np.int32),
        )  # fmt: skip
        state = passes(
            step, state, {**shared, "generator": inversion.generator}, rates, size, jax.random.fold_in(own, 1),
            partial(view.callback.on_progress, f"{what}, unlearning"), after,
            more=partial(chosen_of, config.fraction, number, size),
        )  # fmt: skip
    return model_of(state)


def _plain(variables: Variables) -> dict[str, Any]:
    return {name: jax.tree.map(jnp.array, variables[name]) for name in ("params", "batch_stats")}
