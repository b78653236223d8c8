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
takes probabilities where logits belong, which makes it weak. The optimiser is Adam, with learning rate 1e-3 for G,
whose moments carry over from round to round, and 0.01 for u. Steps 1 and 2 use a copy of the model; step 1 runs in
training mode and updates the copy's BatchNorm statistics, which step 2 uses.

Deviations:
- h is the input of the last dense layer, a vector; the release uses the last map before pooling, which models here do
  not expose.
- G has fewer blocks where images are too small for four.
- Dropout is off in step 1.
- The release's script for inversion alone changes the BatchNorm statistics of the model that it inspects; here only
  those of a copy change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._inversion_steps import (
    choose_positions,
    copy_step,
    feature_mask,
    generator_function,
    inversion_step,
    mask_step,
)
from bdjax.defenses._tuning import (
    copy_variables,
    equal_batches,
    hyper_arrays,
    image_arrays,
    round_reporter,
    run_epochs,
    training_state,
    variables_of,
)
from bdjax.engine import predict
from bdjax.errors import check_fields
from bdjax.models import head, unet
from bdjax.types import DefenderView, Images, Key, Variables, Victim, to_float


@dataclass(frozen=True)
class InversionConfig:
    """Hyper-parameters of the inversion and of its rounds."""

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
    """Mean squared change of the benign features above which it does so as well."""
    benign: float = 0.01
    """Weight of the change of the benign features in the generator's loss."""
    noise: float = 0.03
    """Standard deviation of the Gaussian noise added to images in step 3, in units of [0, 1]."""
    width: int = 32
    """Channels of the first block of the generator."""
    downs: int = 4
    """Down-sampling blocks of the generator."""
    early_stop: bool = False
    """Stop at the first later round that finds a different target from the first round."""
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
    """The generator G, trained further in every round.

    Attributes:
      target: the class found in the first round; None before it.
    """

    def __init__(self, config: InversionConfig, victim: Victim, view: DefenderView, key: Key) -> None:
        """Pretrain the generator to copy images.

        Args:
          config: hyper-parameters of the inversion.
          victim: the model whose backdoor is inverted first.
          view: clean images and labels; its callback receives the progress.
          key: random key that initialises the generator and draws the batches.

        Raises:
          InputError: when the model has no dense layer "head", or when the loss becomes NaN or infinite.
        """
        self._config, self._model, self._view = config, victim.model, view
        head(victim.variables["params"])
        self._number, self._size = equal_batches(config.batch_size, len(view.labels))
        net = unet(victim.model.shape, config.width, config.downs)
        self._apply = generator_function(victim.model.shape, config.width, config.downs)
        self._state = training_state(net.init(jax.random.fold_in(key, 0)), "adam")
        self._constants: dict[str, Any] = {
            **image_arrays(view.images, view.labels),
            "hyper": hyper_arrays(config, _DYNAMIC),
        }
        self.target: int | None = None
        self._train(
            copy_step(victim.model, self._apply, config.augment), {"model": copy_variables(victim.variables)},
            config.pretrain_epochs, jax.random.fold_in(key, 1), "the generator copies",
        )  # fmt: skip

    @property
    def generator(self) -> Any:
        """The parameters of G."""
        return self._state["params"]

    def refresh(self, variables: Variables, key: Key, stage: str) -> int:
        """Run steps 1 to 3 on a model.

        Args:
          variables: of the model.
          key: random key that draws the mask, the batches and the noise.
          stage: name of the round, for progress.

        Returns:
          The class that the model predicts most often for the generator's images.

        Raises:
          InputError: when a loss becomes NaN or infinite.
        """
        config, model = self._config, self._model
        size = head(variables["params"]).shape[0]
        copy = copy_variables(variables)
        state = {"params": jax.random.normal(jax.random.fold_in(key, 0), (size,)), "batch_stats": copy["batch_stats"]}
        state = training_state(state, "adam")
        state = run_epochs(
            mask_step(model, config.augment), state, {**self._constants, "model": copy},
            np.full((config.mask_epochs, self._number), config.mask_rate), self._size, jax.random.fold_in(key, 1),
            partial(self._view.callback.on_progress, f"{stage}, the mask"),
            loss_name="loss of the mask", field="defense.mask_rate",
        )  # fmt: skip
        constants = {
            "model": {**copy, "batch_stats": state["batch_stats"]},
            "mask": feature_mask(state["params"]),
            "target": jnp.int32(self.target or 0),
            "pull": jnp.float32(self.target is not None),
        }
        self._train(
            inversion_step(model, self._apply, config.augment), constants, config.generator_epochs,
            jax.random.fold_in(key, 2), f"{stage}, G",
        )  # fmt: skip
        target = self._most_predicted(variables, jax.random.fold_in(key, 3))
        if self.target is None:
            self.target = target
        return target

    def generate(self, images: Any) -> Images:
        """Return G(x) of images (stored or float [N, H, W, C]): float32 of the same shape, not clipped."""
        return self._apply(self.generator, to_float(images))

    def _train(self, step: Callable, constants: dict[str, Any], epochs: int, key: Key, stage: str) -> None:
        """Train the generator further by a step that needs `constants` besides images, labels and "hyper"."""
        self._state = run_epochs(
            step, self._state, {**self._constants, **constants},
            np.full((epochs, self._number), self._config.generator_rate), self._size, key,
            partial(self._view.callback.on_progress, stage),
            loss_name="loss of the generator", field="defense.generator_rate",
        )  # fmt: skip

    def _most_predicted(self, variables: Variables, key: Key) -> int:
        """Return the class that the model predicts most often for G(x + noise)."""
        images, counts = self._view.images, np.zeros(self._model.classes)
        for start in range(0, len(images), self._size):
            at = np.arange(start, start + self._size)
            part = to_float(images[np.minimum(at, len(images) - 1)])  # the last part is padded, for one shape
            noise = self._config.noise * jax.random.normal(jax.random.fold_in(key, start), part.shape)
            predicted = predict(self._model, variables, np.asarray(self.generate(part + noise)))
            counts += np.bincount(predicted[at < len(images)], minlength=self._model.classes)
        return int(np.argmax(counts))


def alternate(
    config: Any, victim: Victim, view: DefenderView, key: Key, name: str, make_step: Callable, state: Any,
    constants: Any,
) -> Variables:  # fmt: skip
    """Alternate between inverting the backdoor and training the model.

    Args:
      config: an InversionConfig with the further fields `epochs`, `learning_rate`, and `fraction`, the share of a batch
        that passes through G.
      victim: the model to purify.
      view: clean images and labels. After each epoch of training, its callback receives the model, G(x) - x of four
        images (`perturbation`), and the class that is predicted most often for G's images (`suspected`).
      key: random key that draws the masks, the batches and the generator.
      name: name of the method, for progress.
      make_step: `make_step(model, G, augment, fraction, images in a batch)` returns the training step in the engine's
        form.
      state: the training state of the model.
      constants: entries that the step needs besides images, labels and the parameters of G ("generator").

    Returns:
      The variables of the trained model.

    Raises:
      InputError: when the model has no dense layer "head", when the batch size or the number of images is smaller than
        the number of devices, or when a loss becomes NaN or infinite.
    """
    inversion = Inversion(config, victim, view, jax.random.fold_in(key, 0))
    number, size = equal_batches(config.batch_size, len(view.labels))
    generator = generator_function(victim.model.shape, config.width, config.downs)
    step = make_step(victim.model, generator, config.augment, config.fraction, size)
    constants = {**constants, **image_arrays(view.images, view.labels)}
    rates, examples = np.full((config.epochs, number), config.learning_rate), to_float(view.images[:4])
    for round_ in range(config.rounds):
        round_key, stage = jax.random.fold_in(key, round_ + 1), f"{name} round {round_ + 1} of {config.rounds}"
        target = inversion.refresh(variables_of(state), jax.random.fold_in(round_key, 0), stage)
        if config.early_stop and target != inversion.target:
            break
        report = round_reporter(
            view.callback, round_ * config.epochs, perturbation=inversion.generate(examples) - examples,
            suspected=np.array([target], np.int32),
        )  # fmt: skip
        state = run_epochs(
            step, state, {**constants, "generator": inversion.generator}, rates, size, jax.random.fold_in(round_key, 1),
            partial(view.callback.on_progress, f"{stage}, unlearning"), report,
            extra_batch=partial(choose_positions, config.fraction, number, size),
        )  # fmt: skip
    return variables_of(state)
