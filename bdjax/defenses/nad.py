"""NAD: distill the attention maps of a fine-tuned copy of the victim into the victim.

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li and X. Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021, arXiv:2101.05930.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

The teacher is the victim θ_b after a few epochs of fine-tuning. The student starts from θ_b and learns both the labels
and the teacher's attention, at L feature maps F_l [H, W, C] inside the network:

    min_θ  mean CE(f_θ(x), y) + Σ_l β_l mean (A(F_l(x; θ)) - A(F_l(x; θ_teacher)))²
    A(F) = Σ_c |F_c|² / (‖Σ_c |F_c|²‖_2 + 1e-6),     the norm over the positions of one image

The second mean is over images and positions, which is why β is large. The teacher runs in evaluation mode on the same
crops. The defaults are the release's, for both networks: SGD with Nesterov momentum; learning rate 0.1 in the
first two epochs, 0.01 up to the 20th and 1e-4 after it; β = 500, 1000, 1000 for the three groups of its WideResNet.

Deviations:
- The release selects the "best" epoch by the attack success rate on test images. Here the last epoch is returned (the
  run may return to an earlier one by validation accuracy).
- The release does not specify the maps of other networks. By default these are the last maps of the last three spatial
  resolutions above 1x1 (`layers` names others). BackdoorBench uses the map after global pooling, whose attention is
  constant.
- For a transformer, the tokens are the positions; a feature vector is treated as a map with one channel (ours).
- Images are cropped; flips (wrong for traffic signs, see `augment`) and cut-outs of 3 pixels are left out.
- Every epoch is divided into batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import (
    descend,
    equal_batches,
    hyper_arrays,
    image_arrays,
    round_reporter,
    run_epochs,
    training_state,
    variables_of,
)
from bdjax.engine import augment, parallel
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """Fine-tuning of the teacher, and distillation."""

    teacher_epochs: int = 10
    """Epochs of fine-tuning the teacher on the clean images."""
    epochs: int = 20
    """Epochs of distillation."""
    batch_size: int = 64
    """Images per step, at most."""
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    """β_l, one for each map; where the network has fewer maps, the last ones apply."""
    layers: tuple[str, ...] = ()
    """Names of the feature maps that are matched, as many as `betas`; empty: chosen by resolution."""
    rates: tuple[float, ...] = (0.1, 0.01, 1e-4)
    """Learning rates of SGD, for teacher and student."""
    begins: tuple[int, ...] = (0, 2, 20)
    """The epoch from which each of `rates` applies, ascending from 0."""
    momentum: float = 0.9
    """Nesterov momentum, in [0, 1)."""
    weight_decay: float = 1e-4
    """Coefficient of the L2 term added to the gradient."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("teacher_epochs", "epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("betas",), "one or more numbers, each zero or more", lambda v: v and all(beta >= 0 for beta in v)),
            (("rates",), "one or more positive numbers", lambda v: v and all(rate > 0 for rate in v)),
            (("begins",), "epochs in ascending order from 0", lambda v: v and v[0] == 0 and list(v) == sorted(set(v))),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("weight_decay",), "zero or more", lambda v: v >= 0),
        )
        for name, other in (("begins", "rates"), ("layers", "betas")):
            if (values := getattr(self, name)) and len(values) != len(getattr(self, other)):
                raise InputError(
                    f"defense.{name} has {len(values)} entries and defense.{other} {len(getattr(self, other))}. "
                    "Give equally many of both."
                )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Fine-tune a teacher, then distill its attention into the victim.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the student's variables and both
        losses after each epoch of distillation.
      key: random key that shuffles and augments the images.

    Returns:
      The student's variables.

    Raises:
      InputError: when a layer does not exist, when the batch size or the number of images is smaller than the number
        of devices, or when the loss becomes NaN or infinite.
    """
    model = victim.model
    names = config.layers or default_layers(model, victim.variables, len(config.betas))
    _check_layers(names, model, victim.variables)
    number, size = equal_batches(config.batch_size, len(view.labels))
    constants: dict[str, Any] = {
        **image_arrays(view.images, view.labels),
        "betas": jnp.asarray(config.betas[-len(names) :], jnp.float32),
        **hyper_arrays(config, ("momentum", "weight_decay")),
    }
    teacher = run_epochs(
        _step(model, config.augment, ()), training_state(victim.variables, "nesterov"), constants,
        _learning_rates(config, config.teacher_epochs, number), size, jax.random.fold_in(key, 0),
        partial(view.callback.on_progress, "NAD, the teacher"), field="defense.rates",
    )  # fmt: skip
    constants["teacher"] = variables_of(teacher)

    state = run_epochs(
        _step(model, config.augment, tuple(names)), training_state(victim.variables, "nesterov"), constants,
        _learning_rates(config, config.epochs, number), size, jax.random.fold_in(key, 1),
        partial(view.callback.on_progress, "NAD, the student"), round_reporter(view.callback), field="defense.rates",
    )  # fmt: skip
    return variables_of(state)


def attention(feature: jax.Array) -> jax.Array:
    """Attention A(F) of a feature of each image.

    Args:
      feature: maps [N, H, W, C], tokens [N, T, C], or vectors [N, D], whose values are the positions.

    Returns:
      float32 [N, positions].
    """
    feature = feature.astype(jnp.float32)
    mass = (feature**2).sum(-1).reshape(len(feature), -1) if feature.ndim > 2 else feature**2
    # the derivative of the norm at 0 is NaN without the inner where
    square = (mass**2).sum(-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return mass / (norm + 1e-6)


def default_layers(model: Model, variables: Variables, count: int) -> tuple[str, ...]:
    """Choose the feature maps to match: the last map of each of the last `count` spatial resolutions.

    Maps and tokens with more than one position are considered, or vectors where there are none. Of a network with a
    single resolution, `count` evenly spaced maps are chosen.

    Args:
      model: the classifier.
      variables: variables of the model.
      count: number of maps, at most.

    Returns:
      The names of the maps, in network order.
    """
    shapes = _feature_shapes(model, variables)
    spatial = {name: int(np.prod(shape[1:-1])) for name, shape in shapes.items() if len(shape) > 2}
    spatial = {name: positions for name, positions in spatial.items() if positions > 1}
    if not spatial:
        return tuple(shapes)[-count:]
    last, smallest = {}, max(spatial.values())
    for name, positions in spatial.items():
        if positions <= smallest:  # up-sampled maps are skipped
            smallest = positions
            last[positions] = name
    layers = tuple(last.values())
    if len(layers) == 1:
        maps = tuple(spatial)
        return tuple(dict.fromkeys(maps[max(0, round((i + 1) * len(maps) / count) - 1)] for i in range(count)))
    return layers[-count:]


def _feature_shapes(model: Model, variables: Variables) -> dict[str, tuple[int, ...]]:
    """Return the shape of every feature of the model for a batch of one image, without running it."""
    shapes: dict[str, tuple[int, ...]] = {}

    def run(variables: Variables, images: Any) -> None:
        shapes.update({name: value.shape for name, value in model.apply(variables, images)[1].items()})

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *model.shape), jnp.float32))
    return shapes


def _check_layers(names: tuple[str, ...], model: Model, variables: Variables) -> None:
    """Raise InputError when the model has no features, or none of one of the names."""
    known = _feature_shapes(model, variables)
    if not known:
        raise InputError(
            f"model {model.name!r} exposes no feature maps, which NAD compares. Use a model of bdjax.models."
        )
    for name in names:
        if name not in known:
            raise InputError(
                f"defense.layers has {name!r}, but the features of model {model.name!r} are {', '.join(known)}. "
                "Name some of these, or leave defense.layers empty to have them chosen."
            )


def _learning_rates(config: Config, epochs: int, number: int) -> np.ndarray:
    """Return the learning rate of every step, float32 [epochs, number], with `number` batches per epoch."""
    index = np.searchsorted(config.begins, np.arange(epochs), side="right") - 1
    return np.repeat(np.asarray(config.rates, np.float32)[index][:, None], number, 1)


@lru_cache(maxsize=16)
def _step(model: Model, policy: str, names: tuple[str, ...]) -> Callable:
    """Return one step of the student (of the teacher where `names` is empty), in the engine's form."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]
        teacher_features = model.apply(constants["teacher"], images)[1] if names else {}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, features, stats = model.apply(variables, images, True, batch["dropout"], axis)
            clean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            distances = [
                ((attention(features[name]) - attention(teacher_features[name])) ** 2).mean() for name in names
            ]
            distance = (constants["betas"] * jnp.stack(distances)).sum() if distances else jnp.float32(0)
            value = clean + distance
            return value, (stats, {"loss": value, "clean_loss": clean, "attention_loss": distance})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        after = descend(
            state, gradient, stats, "nesterov", per_step["rate"], constants["momentum"], constants["weight_decay"]
        )  # fmt: skip
        return after, metrics

    return step
