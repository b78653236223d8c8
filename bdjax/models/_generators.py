"""Networks other than classifiers that attacks and defenses train, for images of any H, W and C."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.models import _layers
from bdjax.types import Images, Key, Variables


class Generator(NamedTuple):
    """A network as two pure functions, float32 throughout."""

    init: Callable[[Key], Variables]
    """`init(key) -> variables`."""
    apply: Callable[..., tuple[jax.Array, Any]]
    """`apply(variables, *inputs, weight=None, axis_name=None) -> (output, batch_stats)`. With `weight`, float32 [N] of
    0 and 1, batch statistics are used, over the inputs of weight 1 on all devices of `axis_name`."""


@lru_cache
def autoencoder(shape: tuple[int, int, int], channels: int, width: int, downs: int) -> Generator:
    """Autoencoder of the input-aware attack: images [N, H, W, C] -> values in [0, 1], [N, H, W, channels].

    Each down-sampling block has two convolutions and 2x2 max-pooling, with `width` channels in the first block and
    twice as many in each next one; after one further convolution, each up-sampling block has linear up-sampling and
    two convolutions. Convolutions are 3x3 without bias, with batch normalisation (decay 0.95) and ReLU; the last one
    has tanh(x) / 2 + 1/2 instead. No skip connections.

    Args:
      shape: (H, W, C) of the images.
      channels: number of output channels.
      width: channels of the first block.
      downs: number of down-sampling blocks.

    Returns:
      The network.
    """
    return _generator(_Autoencoder(channels, width, downs), (shape,))


@lru_cache
def message_encoder(shape: tuple[int, int, int], bits: int) -> Generator:
    """StegaStamp's encoder: images [N, H, W, C] and codes [N, bits] in {0, 1} -> images in [0, 1] that hide the codes.

    A dense layer maps the code to 16x16xC, which is up-sampled to H x W and concatenated with the image. A U-Net with
    convolutions of 32, 32, 64, 128 and 256 channels, all but the first of stride 2, and a sigmoid at the end.
    """
    return _generator(_MessageEncoder(), (shape, (bits,)))


@lru_cache
def message_decoder(shape: tuple[int, int, int], bits: int) -> Generator:
    """StegaStamp's decoder: images [N, H, W, C] of :func:`message_encoder` -> a logit for every bit, [N, bits].

    Seven convolutions of 32 to 128 channels, five of them of stride 2, and dense layers of 512 and `bits` units.
    """
    return _generator(_MessageDecoder(bits), (shape,))


@lru_cache
def sampler(values: int, noise: int, hidden: int) -> Generator:
    """Generator of MESA's triggers: noise [N, noise] -> values in [0, 1], [N, values].

    Four dense layers. The noise is split into four parts; each layer's input is the output before it and the next part.
    The first three layers have `hidden` units without bias, batch normalisation (decay 0.95) and LeakyReLU 0.2; the
    last has a sigmoid.

    Args:
      values: number of outputs.
      noise: length of the noise vector.
      hidden: units of the hidden layers.

    Returns:
      The network.
    """
    return _generator(_Sampler(values, hidden), ((noise,),))


@lru_cache
def unet(shape: tuple[int, int, int], width: int, downs: int) -> Generator:
    """U-Net (Ronneberger et al., MICCAI 2015): images [N, H, W, C] -> unbounded images of the same shape.

    Each down-sampling block has two 3x3 convolutions and 2x2 max-pooling, with `width` channels in the first block and
    twice as many in each next one, as long as two pixels per side remain; after two further convolutions, each
    up-sampling block has a transposed 2x2 convolution, a skip connection and two 3x3 convolutions; the last layer is a
    1x1 convolution. Each 3x3 convolution has instance normalisation (without scale and shift) and LeakyReLU 0.01.

    Args:
      shape: (H, W, C) of the images.
      width: channels of the first block.
      downs: largest number of down-sampling blocks.

    Returns:
      The network.
    """
    return _generator(_Unet(width, downs), (shape,))


def _generator(net: Any, shapes: tuple[tuple[int, ...], ...]) -> Generator:
    return Generator(jax.jit(partial(_init, net, shapes)), partial(_apply, net))


def _init(net: Any, shapes: tuple[tuple[int, ...], ...], key: Key) -> Variables:
    variables = net.init(key, *(jnp.zeros((1, *shape), jnp.float32) for shape in shapes))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _apply(
    net: Any, variables: Variables, *inputs: Any, weight: jax.Array | None = None, axis_name: str | None = None
) -> tuple[jax.Array, Any]:
    if weight is None:
        return net.apply(variables, *inputs), variables["batch_stats"]
    out, state = net.clone(axis_name=axis_name).apply(variables, *inputs, weight, mutable=["batch_stats"])
    return out, state.get("batch_stats", {})


class _Norm(nn.Module):
    """Batch normalisation of [N, ..., C] over the inputs of weight 1; without any, the statistics do not change."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        if weight is None:
            statistics = mean.value, var.value
        else:
            mask, axes = weight.reshape(-1, *(1,) * (x.ndim - 1)), tuple(range(x.ndim - 1))
            sums = (x * mask).sum(axes), (x**2 * mask).sum(axes), weight.sum() * math.prod(x.shape[1:-1])
            first, second, count = sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)
            first, second = first / jnp.maximum(count, 1), second / jnp.maximum(count, 1)
            statistics = first, jnp.maximum(second - first**2, 0)
            share = jnp.where(count > 0, jnp.float32(0.05), 0)
            mean.value, var.value = (
                (1 - share) * old.value + share * new for old, new in zip((mean, var), statistics, strict=True)
            )
        return (x - statistics[0]) * jax.lax.rsqrt(statistics[1] + 1e-5) * scale + bias


class _Autoencoder(nn.Module):
    channels: int
    width: int
    downs: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Images, weight: jax.Array | None = None) -> jax.Array:
        def block(x: jax.Array, channels: int) -> jax.Array:
            return _Norm(self.axis_name)(_layers.conv(channels, jnp.float32)(x), weight)

        sizes, widths = [], [self.width * 2**step for step in range(self.downs)]
        for channels in widths:
            x = nn.relu(block(nn.relu(block(x, channels)), channels))
            sizes.append(x.shape[1:3])
            x = _layers.max_pool(x)
        x = nn.relu(block(x, widths[-1]))
        for step in reversed(range(self.downs)):
            x = nn.relu(block(_resize(x, sizes[step]), widths[step]))
            x = nn.relu(block(x, widths[step - 1])) if step else block(x, self.channels)
        return jnp.tanh(x) / 2 + 0.5


class _Unet(nn.Module):
    width: int
    downs: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Images, weight: jax.Array | None = None) -> jax.Array:
        def double(x: jax.Array, features: int) -> jax.Array:
            for _ in range(2):
                x = _layers.conv(features, jnp.float32, bias=True)(x)
                mean, var = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
                x = nn.leaky_relu((x - mean) * jax.lax.rsqrt(var + 1e-5), 0.01)
            return x

        channels, features = x.shape[3], self.width
        skips: list[jax.Array] = []
        while len(skips) < self.downs and (min(x.shape[1:3]) >= 4 or not skips):
            skips.append(double(x, features))
            x, features = _layers.max_pool(skips[-1]), 2 * features
        x = double(x, features)
        for skip in reversed(skips):
            features //= 2
            x = _depth_to_space(nn.Dense(4 * features)(x))
            if x.shape[1:3] != skip.shape[1:3]:  # pooling dropped the last row or column of an odd side
                x = _resize(x, skip.shape[1:3])
            x = double(jnp.concatenate([skip, x], -1), features)
        return nn.Dense(channels)(x)


class _MessageEncoder(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Images, codes: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        count, height, width, channels = images.shape
        code = nn.relu(nn.Dense(16 * 16 * channels, kernel_init=nn.initializers.he_normal())(codes))
        code = _resize(code.reshape(count, 16, 16, channels), (height, width))
        skips = [jnp.concatenate([images, code], -1)]
        for features in (32, 32, 64, 128, 256):
            stride = 1 if len(skips) == 1 else 2
            skips.append(nn.relu(_layers.conv(features, jnp.float32, stride=stride, bias=True)(skips[-1])))
        x = skips.pop()
        for features in (128, 64, 32, 32):
            skip = skips.pop()
            x = nn.relu(_layers.conv(features, jnp.float32, bias=True)(_resize(x, skip.shape[1:3])))
            skip = jnp.concatenate([skip, x, *(skips if len(skips) == 1 else [])], -1)
            x = nn.relu(_layers.conv(features, jnp.float32, bias=True)(skip))
        x = nn.relu(_layers.conv(32, jnp.float32, bias=True)(x))
        return nn.sigmoid(nn.Conv(channels, (1, 1))(x))


class _MessageDecoder(nn.Module):
    bits: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Images, weight: jax.Array | None = None) -> jax.Array:
        for features, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2)):
            x = nn.relu(_layers.conv(features, jnp.float32, stride=stride, bias=True)(x))
        x = nn.relu(nn.Dense(512, kernel_init=nn.initializers.he_normal())(x.reshape(len(x), -1)))
        return nn.Dense(self.bits)(x)


class _Sampler(nn.Module):
    values: int
    hidden: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, noise: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        x, *parts = jnp.split(noise, 4, -1)
        for part in parts:
            x = nn.leaky_relu(_Norm(self.axis_name)(nn.Dense(self.hidden, use_bias=False)(x), weight), 0.2)
            x = jnp.concatenate([x, part], -1)
        return nn.sigmoid(nn.Dense(self.values)(x))


def _depth_to_space(x: jax.Array) -> jax.Array:
    """Rearrange [N, H, W, 4 C] to [N, 2 H, 2 W, C]; after a dense layer, a transposed 2x2 convolution."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height, width, 2, 2, channels // 4)
    return jnp.moveaxis(x, 3, 2).reshape(count, 2 * height, 2 * width, channels // 4)


def _resize(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resize images [N, H, W, C] to `size` linearly; computed by matrix products, whose gradients are exact."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear")
