"""NAD: neural attention distillation from a fine-tuned copy of the victim (Li et al., ICLR 2021).

Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li and X. Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks".

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

The teacher is the victim θ_b after a few epochs of fine-tuning. The student starts from θ_b and learns both the labels
and the teacher's attention, at L feature maps F_l [H, W, C] inside the network:

    min_θ  mean CE(f_θ(x), y) + Σ_l β_l mean (A(F_l(x; θ)) - A(F_l(x; θ_teacher)))²
    A(F) = Σ_c |F_c|² / (‖Σ_c |F_c|²‖_2 + 1e-6),     the norm over the positions of one image

The second mean is over images and positions, which is why β is large. The teacher runs in evaluation mode and sees the
same crops. The defaults are the release's, for both networks: SGD with Nesterov momentum; learning rate 0.1 in the
first two epochs, 0.01 up to the 20th and 1e-4 after it; β = 500, 1000, 1000 for the three groups of its WideResNet.

**Deviations** from the release:
- The release selects the "best" epoch by the attack success rate on test images. Here the last epoch is returned (the
  run may go back to an earlier one by validation accuracy).
- It does not say which maps to use in other networks. By default these are the last maps of the last three spatial
  resolutions above 1x1 (`layers` names others). BackdoorBench picks the map after global pooling, whose attention is
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

from bdjax.defenses._tuning import begin, descend, equal_batches, model_of, passes, shown_to
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
            (("betas",), "one or more numbers, each zero or more", lambda v: v and all(one >= 0 for one in v)),
            (("rates",), "one or more positive numbers", lambda v: v and all(one > 0 for one in v)),
            (("begins",), "epochs in ascending order from 0", lambda v: v and v[0] == 0 and list(v) == sorted(set(v))),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("weight_decay",), "zero or more", lambda v: v >= 0),
        )
        for name, other in (("begins", "rates"), ("layers", "betas")):
            if (found := getattr(self, name)) and len(found) != len(getattr(self, other)):
                raise InputError(
                    f"defense.{name} has {len(found)} entries and defense.{other} {len(getattr(self, other))}. "
                    "Give equally many of both."
                )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Fine-tune a teacher, then distill its attention into the victim.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles and augments them.
    Returns: the student's variables; the watch is shown them and both losses after each of its epochs.
    Raises InputError for an unknown layer, for fewer images than devices, and for a loss that is not finite.
    """
    model = victim.model
    names = config.layers or stages(model, victim.variables, len(config.betas))
    _check_layers(names, model, victim.variables)
    number, size = equal_batches(config.batch_size, len(view.labels))
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "betas": jnp.asarray(config.betas[-len(names) :], jnp.float32),
        "momentum": jnp.float32(config.momentum),
        "weight_decay": jnp.float32(config.weight_decay),
    }
    taught = passes(
        _step(model, config.augment, ()), begin(victim.variables, "nesterov"), shared,
        _rates(config, config.teacher_epochs, number), size, jax.random.fold_in(key, 0),
        partial(view.callback.on_progress, "NAD, the teacher"), field="defense.rates",
    )  # fmt: skip
    shared["teacher"] = model_of(taught)

    state = passes(
        _step(model, config.augment, tuple(names)), begin(victim.variables, "nesterov"), shared,
        _rates(config, config.epochs, number), size, jax.random.fold_in(key, 1),
        partial(view.callback.on_progress, "NAD, the student"), shown_to(view.callback), field="defense.rates",
    )  # fmt: skip
    return model_of(state)


def attention(feature: jax.Array) -> jax.Array:
    """A(F), float32 [N, positions], of maps [N, H, W, C], tokens [N, T, C] or vectors [N, D] (D positions)."""
    feature = feature.astype(jnp.float32)
    mass = (feature**2).sum(-1).reshape(len(feature), -1) if feature.ndim > 2 else feature**2
    # the derivative of the norm at 0 is NaN without the inner where
    square = (mass**2).sum(-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return mass / (norm + 1e-6)


def stages(model: Model, variables: Variables, count: int) -> tuple[str, ...]:
    """Names of the maps that are matched: the last map of each resolution, of these the last `count`, in network order.

    Maps and tokens with more than one position are considered, or vectors where there are none. Of a network with a
    single resolution, `count` evenly spaced maps are taken.
    """
    shapes = _shapes(model, variables)
    spatial = {name: int(np.prod(shape[1:-1])) for name, shape in shapes.items() if len(shape) > 2}
    spatial = {name: places for name, places in spatial.items() if places > 1}
    if not spatial:
        return tuple(shapes)[-count:]
    last, smallest = {}, max(spatial.values())
    for name, places in spatial.items():
        if places <= smallest:  # up-sampled maps are passed over
            smallest = places
            last[places] = name
    ends = tuple(last.values())
    if len(ends) == 1:
        even = tuple(spatial)
        return tuple(dict.fromkeys(even[max(0, round((i + 1) * len(even) / count) - 1)] for i in range(count)))
    return ends[-count:]


def _shapes(model: Model, variables: Variables) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def run(variables: Variables, images: Any) -> None:
        found.update({name: value.shape for name, value in model.apply(variables, images)[1].items()})

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, *model.shape), jnp.float32))
    return found


def _check_layers(names: tuple[str, ...], model: Model, variables: Variables) -> None:
    known = _shapes(model, variables)
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


def _rates(config: Config, epochs: int, number: int) -> np.ndarray:
    which = np.searchsorted(config.begins, np.arange(epochs), side="right") - 1
    return np.repeat(np.asarray(config.rates, np.float32)[which][:, None], number, 1)


@lru_cache(maxsize=16)
def _step(model: Model, policy: str, names: tuple[str, ...]) -> Callable:
    """One step of the student (of the teacher where `names` is empty), in the engine's form."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]
        wanted = model.apply(shared["teacher"], images)[1] if names else {}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, features, stats = model.apply(variables, images, True, split["dropout"], axis)
            clean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            far = [((attention(features[name]) - attention(wanted[name])) ** 2).mean() for name in names]
            distance = (shared["betas"] * jnp.stack(far)).sum() if far else jnp.float32(0)
            value = clean + distance
            return value, (stats, {"loss": value, "clean_loss": clean, "attention_loss": distance})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        after = descend(state, gradient, stats, "nesterov", whole["rate"], shared["momentum"], shared["weight_decay"])
        return after, metrics

    return step
