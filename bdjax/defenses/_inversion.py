"""The inversion of BTI-DBF: a generator of images whose backdoor features move and whose benign ones stay (Xu et al.,
ICLR 2024).

With h = feat(x) what the last dense layer sees [D] and f = head(h), mean squares (MSE) over all elements of a batch:

    1. a mask   m = tanh(u) / (2 + 1e-7) + ½ in [0, 1]^D, u ~ N(0, 1), anew in every round:
                min_u CE(head(m h), y) - CE(head((1 - m) h), y)                          (not bounded below)
    2. G        a U-Net that the images begin to pass unchanged, and then, with h' = feat(G(x)),
                min_G  MSE(x, G(x))                   while that is above 0.3 or MSE(m h, m h') above 3
                       -MSE((1-m) h, (1-m) h') + 0.01 MSE(m h, m h')      otherwise
                       + CE(f(G(x)), t)                                   from the second round on
    3. t        what most images are called: the mode of f(G(x + 0.03 N(0, 1))), of the first round

Before the first round G is trained to copy: min_G CE(softmax f(x), softmax f(G(x))) + MSE(h, h') + c MSE(x, G(x)),
where c is 100 while the last mean is above 0.1, and 0.01 below. That cross-entropy takes probabilities for logits, as
in the release, which makes it weak. Adam 1e-3 for G, its moments kept for all rounds, and 0.01 for u. Steps 1 and 2
see a copy of the model, whose BatchNorm statistics step 1 moves (it is in training mode there) and step 2 takes as they
are.

**Deviations** from the release: h is what the last dense layer sees, a vector, where the release's is the last map
before pooling, for the models here are not cut in two; G has fewer blocks where images are too small for four; dropout
is off in step 1. The copy is a copy: the release's script for inversion alone changes the statistics of the model that
it inspects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment
from bdjax.defenses._tuning import begin, descend, equal_batches, model_of, passes
from bdjax.engine import parallel, predict
from bdjax.errors import check_fields
from bdjax.models import head, penultimate, unet
from bdjax.types import DefenderView, Images, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class InversionConfig:
    """The inversion, and what the rounds around it share."""

    rounds: int = 5
    """Times that the mask and the generator are trained, each followed by unlearning."""
    batch_size: int = 128
    """Images a step, at most."""
    pretrain_epochs: int = 50
    """Passes over the images by which the generator learns to copy them."""
    mask_epochs: int = 20
    """Passes of the mask, in every round."""
    generator_epochs: int = 30
    """Passes of the generator, in every round."""
    mask_rate: float = 0.01
    """Learning rate of the mask, of Adam."""
    generator_rate: float = 1e-3
    """Learning rate of the generator, of Adam."""
    image_bound: float = 0.3
    """Mean square of the change of a pixel above which the generator learns to copy, in units of [0, 1]."""
    feature_bound: float = 3.0
    """The same for the benign features."""
    benign: float = 0.01
    """Weight of the benign features."""
    noise: float = 0.03
    """Standard deviation of what is added to images when the target is looked for."""
    width: int = 32
    """Channels of the generator's first block."""
    downs: int = 4
    """Its blocks."""
    early_stop: bool = False
    """End when the target that a later round finds is not the first round's."""
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
    """The generator, which round after round is trained on."""

    def __init__(self, config: InversionConfig, victim: Victim, view: DefenderView, key: Key) -> None:
        """Train the generator to copy images. Raises InputError for a model without a layer "head"."""
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
        """Steps 1 to 3 for the model as it is; returns the class that most images with G's change are called.

        Args: what: names the round, to the watch.
        """
        config, model = self._config, self._model
        size = head(variables["params"]).shape[0]
        copy = _plain(variables)
        state = {"params": jax.random.normal(jax.random.fold_in(key, 0), (size,)), "batch_stats": copy["batch_stats"]}
        state = begin(state, "adam")
        state = passes(
            _masking(model, config.augment), state, {**self._shared, "model": copy},
            np.full((config.mask_epochs, self._number), config.mask_rate), self._size, jax.random.fold_in(key, 1),
            partial(self._view.watch.tick, f"{what}, the mask"), lambda *_: None, what="loss of the mask",
            field="defense.mask_rate",
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
        found = self._called(variables, jax.random.fold_in(key, 3))
        if self.target is None:
            self.target = found
        return found

    def changed(self, images: Any) -> Images:
        """G of images (stored or float [N, H, W, C]), float32, not bounded."""
        return self._apply(self.generator, to_float(images))

    def _train(self, step: Callable, more: dict[str, Any], epochs: int, key: Key, what: str) -> None:
        self._state = passes(
            step, self._state, {**self._shared, **more},
            np.full((epochs, self._number), self._config.generator_rate), self._size, key,
            partial(self._view.watch.tick, what), lambda *_: None, what="loss of the generator",
            field="defense.generator_rate",
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
    config: Any, victim: Victim, view: DefenderView, key: Key, name: str, step: Callable, state: Any, shared: Any
) -> Variables:
    """Invert, and train the model by `step`, by turns; return its variables.

    Args:
      config: an InversionConfig with the `epochs`, the `fraction` of a batch that is G's, and the `learning_rate` of
        the training; name: of the method, to the watch.
      step, state: as of `passes`; shared: what `step` gets beside images, labels and the parameters of G ("generator").

    The watch is shown, after each epoch of training, the model, G's changes of four images (`perturbation`), and the
    class that most of its images are called (`suspected`).
    """
    inversion = Inversion(config, victim, view, jax.random.fold_in(key, 0))
    number, size = equal_batches(config.batch_size, len(view.labels))
    shared = {**shared, "images": jnp.asarray(view.images), "labels": jnp.asarray(view.labels)}
    rates, shown = np.full((config.epochs, number), config.learning_rate), to_float(view.images[:4])
    for round_ in range(config.rounds):
        own, what = jax.random.fold_in(key, round_ + 1), f"{name} round {round_ + 1} of {config.rounds}"
        found = inversion.refresh(model_of(state), jax.random.fold_in(own, 0), what)
        if config.early_stop and found != inversion.target:
            break
        beside = {"perturbation": inversion.changed(shown) - shown, "suspected": np.array([found], np.int32)}

        def after(
            epoch: int, state: Any, metrics: Any, before: int = round_ * config.epochs, more: Any = beside
        ) -> None:
            view.watch.observe(before + epoch, model_of(state), **metrics, **more)

        state = passes(
            step, state, {**shared, "generator": inversion.generator}, rates, size, jax.random.fold_in(own, 1),
            partial(view.watch.tick, f"{what}, unlearning"), after,
            partial(chosen_of, config.fraction, number, size),
        )  # fmt: skip
    return model_of(state)


def mask_of(values: jax.Array) -> jax.Array:
    """m of u, in [0, 1]."""
    return jnp.tanh(values) / (2 + 1e-7) + 0.5


def classify(params: Any, features: jax.Array) -> jax.Array:
    """The last dense layer: logits of what it sees [N, D]."""
    return features @ head(params) + params["head"].get("bias", 0)


def features_of(
    model: Model, variables: Variables, images: Images, train: bool = False, keys: Any = None, axis: str | None = None
) -> tuple[jax.Array, Any]:
    """(what the last dense layer sees, float32 [N, D]; the statistics)."""
    _, features, stats = model.apply(variables, images, train, keys, axis)
    return penultimate(features).astype(jnp.float32), stats


def mixed(generator: Callable, params: Any, images: Images, chosen: jax.Array, most: int) -> Images:
    """The batch with G's images in the places that are chosen, bool [B], at most `most` of them."""
    at = jnp.nonzero(chosen, size=most, fill_value=len(images))[0]
    made = jax.lax.stop_gradient(generator(params, images[jnp.minimum(at, len(images) - 1)]))
    return images.at[at].set(made, mode="drop")


def chosen_of(share: float, number: int, size: int, key: Key) -> dict[str, jax.Array]:
    """Which places of each batch get G's images: int(share size) + 1 of them, bool "chosen" [number, size].

    They are spread evenly: which image stands where is drawn anyway, and so every device has as many.
    """
    count = min(int(share * size + 1e-9) + 1, size)
    steps = np.arange(size + 1) * count // size
    return {"chosen": jnp.broadcast_to(jnp.asarray(steps[1:] > steps[:-1]), (number, size))}


def most_of(share: float, size: int, axis: str | None) -> int:
    """How many places of :func:`chosen_of` this device's part of a batch can have, `size` being the whole batch."""
    count = min(int(share * size + 1e-9) + 1, size)
    return -(-count // parallel.size(axis))


@lru_cache(maxsize=16)
def generator_of(shape: tuple[int, int, int], width: int, downs: int) -> Callable:
    """G as (params, images [N, H, W, C]) -> images; one object per shape and size."""
    net = unet(shape, width, downs)
    return jax.jit(lambda params, images: net.apply({"params": params, "batch_stats": {}}, images)[0])


def _plain(variables: Variables) -> dict[str, Any]:
    return {name: jax.tree.map(jnp.array, variables[name]) for name in ("params", "batch_stats")}


def _mse(first: jax.Array, second: jax.Array) -> jax.Array:
    return ((first - second) ** 2).mean()


@lru_cache(maxsize=16)
def _copying(model: Model, generator: Callable, policy: str) -> Callable:
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        given, was = model.apply(shared["model"], images)[:2]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            made = generator(params, images)
            logits, features, _ = model.apply(shared["model"], made)
            predicted = optax.softmax_cross_entropy(jax.nn.softmax(given), jax.nn.softmax(logits)).mean()
            moved = _mse(*(penultimate(f).astype(jnp.float32) for f in (was, features)))
            image = _mse(images, made)
            weight = jnp.where(parallel.average(image, axis) > 0.1, 100.0, 0.01)
            value = predicted + moved + jax.lax.stop_gradient(weight) * image
            return value, {"loss": value, "image": image}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", whole["rate"]), metrics

    return step


@lru_cache(maxsize=16)
def _masking(model: Model, policy: str) -> Callable:
    """A step of u on a copy of the model, in training mode."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels, params = shared["labels"][split["index"]], shared["model"]["params"]
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        features, stats = features_of(model, variables, images, True, None, axis)
        value, gradient = jax.value_and_grad(mask_loss)(state["params"], params, features, labels)
        value, gradient = parallel.average((value, gradient), axis)
        return descend(state, gradient, stats, "adam", whole["rate"]), {"loss": value}

    return step


def mask_loss(values: jax.Array, params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
    """What step 1 minimises over u [D], for features [N, D]."""
    mask = mask_of(values)
    kept, rest = (classify(params, part * features) for part in (mask, 1 - mask))
    each = optax.softmax_cross_entropy_with_integer_labels
    return each(kept, labels).mean() - each(rest, labels).mean()


@lru_cache(maxsize=16)
def _inverting(model: Model, generator: Callable, policy: str) -> Callable:
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        mask, hyper = shared["mask"], shared["hyper"]
        was = features_of(model, shared["model"], images)[0]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            made = generator(params, images)
            logits, features, _ = model.apply(shared["model"], made)
            now = penultimate(features).astype(jnp.float32)
            benign, backdoor = _mse(mask * was, mask * now), _mse((1 - mask) * was, (1 - mask) * now)
            image = _mse(images, made)
            far = parallel.average((image, benign), axis)
            copy = (far[0] > hyper["image_bound"]) | (far[1] > hyper["feature_bound"])
            value = jnp.where(copy, image, hyper["benign"] * benign - backdoor)
            wanted = jnp.full(len(images), shared["target"])
            value += shared["pull"] * optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
            return value, {"loss": value, "image": image, "benign": benign, "backdoor": backdoor}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", whole["rate"]), metrics

    return step
