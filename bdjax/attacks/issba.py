"""ISSBA: an encoder network hides the same code in every image, by a different faint pattern for each.

Y. Li, Y. Li, B. Wu, L. Li, R. He and S. Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021,
arXiv:2012.03816.

Threat model: the attacker writes a share of the training set, as in BadNets. Beforehand an encoder E and a decoder D
are trained on the clean training images x, each with a random code c of `bits` bits, drawn anew in every step:

    x' = E(x, c),        cross-entropy(D(x'), c) + w mean((x' - x)^2)

w is 0 until D decodes 90 % of a batch's bits and for `wait` more steps, then rises to `weight` over `ramp` steps;
otherwise E never learns to hide anything. The trigger is x' for one code, drawn by the key. E and D are StegaStamp's,
as BackdoorBench trains them (`models.message_encoder`, `models.message_decoder`); the defaults are BI-BAU's
(BackdoorBench). Until `wait + ramp` steps have passed since D learned to decode, x' is a coarse picture of the code:
small sets need more epochs, or a smaller wait and ramp. The stored "bit_accuracy" is the share of the code that D
decodes in training images with the trigger, rounded to k/255; more than 0.99 is expected.

Deviations:

- The official encoder also has a perceptual loss and a critic, which BackdoorBench omits too.
- The official code is a word with a BCH error-correcting code, which is equivalent to random bits.
- Layers are upsampled linearly and convolved by 3x3.
- E is trained at the victim's image size, where BackdoorBench's example takes 128 pixels for 32.
- Poisoned images replace the originals; the official release appends them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax import models
from bdjax.attacks._generators import flatten_variables, train_generator, unflatten_variables
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import Arrays, Batch, Images, Key, SampleInfo, Task, TrainingHook, to_float, to_uint8

DECODED = 0.9  # share of bits that the decoder must read before w may rise
TEST_IMAGES = 1000  # training images on which "bit_accuracy" is measured


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The code, and the training of encoder and decoder."""

    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the poisoned ones; BackdoorBench draws from all classes."""
    bits: int = 100
    """Length of the code, at least 1."""
    epochs: int = 20
    """Epochs of the training of encoder and decoder."""
    batch_size: int = 64
    """Images per step of that training (all if there are fewer); a multiple of the number of devices."""
    learning_rate: float = 1e-4
    """Learning rate of both, by Adam."""
    weight: float = 10.0
    """Largest w, the weight of the mean squared change of the image in [0, 1] units; zero or more."""
    wait: int = 1000
    """Steps for which w stays 0 once the decoder has decoded 90 % of a batch's bits, zero or more."""
    ramp: int = 3000
    """Steps over which w then rises, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "attack",
            (("bits", "epochs", "batch_size", "ramp"), "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive and finite", lambda v: 0 < v < math.inf),
            (("weight", "wait"), "zero or more and finite", lambda v: 0 <= v < math.inf),
        )


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Train the encoder and the decoder on the clean training images.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      {"code": uint8 [bits], "bit_accuracy": float32, "encoder/...": variables of the encoder}.
    """
    encoder, decoder = _networks(config, task.model.shape)
    keys = jax.random.split(key, 4)
    attacker = {
        "params": {"encoder": encoder.init(keys[0])["params"], "decoder": decoder.init(keys[1])["params"]},
        "state": {"since": jnp.int32(-1)},
    }
    hook = TrainingHook(config, transform=_train_step, optimizer=_optimizer)
    params = train_generator(task, keys[2], hook, attacker, "encoder", config)["params"]
    code = jax.random.bernoulli(keys[3], 0.5, (config.bits,)).astype(jnp.uint8)
    arrays = {"code": code, **flatten_variables("encoder", {"params": params["encoder"]})}
    encoded = to_uint8(trigger(config, to_float(task.images[:TEST_IMAGES]), key, arrays))
    decoded = decoder.apply({"params": params["decoder"], "batch_stats": {}}, to_float(encoded))[0] > 0
    return jax.device_get({"bit_accuracy": (decoded == (code > 0)).mean(), **arrays})


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Encode the code into images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "code" and the variables of the encoder.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    encoder, _ = _networks(config, images.shape[1:])
    codes = jnp.broadcast_to(jnp.asarray(arrays["code"]).astype(jnp.float32), (len(images), config.bits))
    return encoder.apply(unflatten_variables("encoder", arrays), images, codes)[0]


def _networks(config: Config, shape: tuple[int, ...]) -> tuple[models.Generator, models.Generator]:
    """Build the encoder and the decoder for images of `shape`."""
    height, width, channels = shape
    size = (height, width, channels), config.bits
    return models.message_encoder(*size), models.message_decoder(*size)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)


def _train_step(config: Config, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """`TrainingHook.transform`: the loss of encoder and decoder; the images stay unchanged.

    state["since"]: steps since the decoder first decoded enough bits; -1 before.
    """
    encoder, decoder = _networks(config, images.shape[1:])
    variables = {name: {"params": params, "batch_stats": {}} for name, params in attacker["params"].items()}
    codes = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (config.bits,)))(info.key)
    encoded = encoder.apply(variables["encoder"], images, codes.astype(jnp.float32))[0]
    logits = decoder.apply(variables["decoder"], encoded)[0]
    since = attacker["state"]["since"]
    loss = optax.sigmoid_binary_cross_entropy(logits, codes.astype(jnp.float32)).mean()
    loss = loss + _image_weight(config, since) * ((encoded - images) ** 2).mean()
    decoded = parallel.average(((logits > 0) == codes).mean(), info.axis) > DECODED
    return Batch(images, labels, loss, {"since": jnp.where((since >= 0) | decoded, since + 1, -1)})


def _image_weight(config: Config, since: jax.Array) -> jax.Array:
    """w, `since` steps after the decoder first decoded enough bits (-1: it has not yet)."""
    return config.weight * jnp.clip((since - config.wait).astype(jnp.float32) / config.ramp, 0, 1)
