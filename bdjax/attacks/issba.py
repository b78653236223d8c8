"""ISSBA: a network hides the same code in every image, by a different faint pattern for each (Li et al., 2021,
arXiv:2012.03816).

Threat model: as BadNets, the attacker writes a share of the training set. Beforehand an encoder E and a decoder D learn
on the clean training images x, each with a random code c of `bits` bits, drawn anew in every step, to encode and
decode:

    x' = E(x, c),        cross-entropy(D(x'), c) + w mean((x' - x)^2)

w is 0 until D reads 90 % of a batch's bits and `wait` steps more, then rises to `weight` over `ramp` steps, because
otherwise nothing is ever hidden. The trigger is x' for one code, drawn by the key. E and D are StegaStamp's, as
BackdoorBench trains them (`models.message_encoder`, `models.message_decoder`); the defaults are BI-BAU's
(BackdoorBench). Until `wait + ramp` steps have passed since D learned to decode, x' is a coarse picture of the code:
small sets need more epochs, or a smaller wait and ramp. The stored "bit_accuracy" is the share of the code that D
decodes in training images with the trigger, rounded to k/255; more than 0.99 is expected.

Deviations: the official encoder also learns by a perceptual loss and a critic, which BackdoorBench leaves out too. Its
code is a word with a BCH code against misreading, equivalent to random bits. Layers are enlarged linearly and convolved
by 3x3. E learns at the victim's image size, where BackdoorBench's example takes 128 pixels for 32; poisoned images
replace the originals, where the official release appends them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax import models
from bdjax.attacks._helpers import PoisonConfig
from bdjax.attacks._nets import flatten_variables, train_generator, unflatten_variables
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import Arrays, Batch, Images, Key, SampleInfo, Task, TrainingHook, to_float, to_uint8

READ = 0.9  # share of bits from which w may rise
TRIED = 1000  # images on which the decoder is tried in the end


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The code, and how encoder and decoder are trained."""

    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the poisoned ones; BackdoorBench draws from all classes."""
    bits: int = 100
    """Length of the code, at least 1."""
    epochs: int = 20
    """Of the encoder's and decoder's training."""
    batch_size: int = 64
    """Images a step of that training (all of them if there are fewer); a multiple of the devices."""
    learning_rate: float = 1e-4
    """Of both, by Adam."""
    weight: float = 10.0
    """Largest w, zero or more: faithfulness to the image, mean square in [0, 1] units."""
    wait: int = 1000
    """Steps for which w stays 0 once the decoder has read 90 % of a batch's bits, zero or more."""
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
    begun = {
        "params": {"encoder": encoder.init(keys[0])["params"], "decoder": decoder.init(keys[1])["params"]},
        "state": {"since": jnp.int32(-1)},
    }
    hook = TrainingHook(config, transform=_hidden, optimizer=_optimizer)
    found = train_generator(task, keys[2], hook, begun, "encoder", config)["params"]
    code = jax.random.bernoulli(keys[3], 0.5, (config.bits,)).astype(jnp.uint8)
    arrays = {"code": code, **flatten_variables("encoder", {"params": found["encoder"]})}
    shown = to_uint8(trigger(config, to_float(task.images[:TRIED]), key, arrays))
    read = decoder.apply({"params": found["decoder"], "batch_stats": {}}, to_float(shown))[0] > 0
    return jax.device_get({"bit_accuracy": (read == (code > 0)).mean(), **arrays})


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
    height, width, channels = shape
    size = (height, width, channels), config.bits
    return models.message_encoder(*size), models.message_decoder(*size)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)


def _hidden(config: Config, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """A step of encoder and decoder; state["since"]: steps since the decoder read well for the first time, else -1."""
    encoder, decoder = _networks(config, images.shape[1:])
    of = {name: {"params": params, "batch_stats": {}} for name, params in attacker["params"].items()}
    codes = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (config.bits,)))(info.key)
    shown = encoder.apply(of["encoder"], images, codes.astype(jnp.float32))[0]
    logits = decoder.apply(of["decoder"], shown)[0]
    since = attacker["state"]["since"]
    loss = optax.sigmoid_binary_cross_entropy(logits, codes.astype(jnp.float32)).mean()
    loss = loss + _faithfulness(config, since) * ((shown - images) ** 2).mean()
    reads = parallel.average(((logits > 0) == codes).mean(), info.axis) > READ
    return Batch(images, labels, loss, {"since": jnp.where((since >= 0) | reads, since + 1, -1)})


def _faithfulness(config: Config, since: jax.Array) -> jax.Array:
    """w, `since` steps after the decoder first read well (-1: it has not yet)."""
    return config.weight * jnp.clip((since - config.wait).astype(jnp.float32) / config.ramp, 0, 1)
