"""BDJAX_CPU_CONVOLUTIONS=0 turns off the convolutions of `models/cpu`: the program of a model then has lax's alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.models import _layers, cpu

KEY = jax.random.key(0)
PRIMITIVES = ("plain_conv", "strided_conv")


def loss_of(name):
    """A model that has convolutions of stride 1 and 2, a new loss (so that nothing is traced before), its arguments."""
    model = models.create(name, (8, 8, 3), 4, width=8)
    images = jax.random.uniform(KEY, (6, 8, 8, 3))

    def loss(params):
        logits = model.apply({**variables, "params": params}, images, True)[0]
        return (logits**2).sum()

    variables = model.init(KEY)
    return loss, variables["params"]


def program(name):
    """StableHLO of value and gradient; whether any of our primitives is in it; the values."""
    loss, params = loss_of(name)
    function = jax.jit(jax.value_and_grad(loss))
    traced = str(jax.make_jaxpr(jax.value_and_grad(loss))(params))
    return function.lower(params).as_text(), any(p in traced for p in PRIMITIVES), function(params)


@pytest.mark.parametrize("name", ["small_vgg", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_switch_leaves_lax_alone(name, monkeypatch):
    text_on, ours_on, on = program(name)
    monkeypatch.setenv(cpu.VARIABLE, "0")
    text_off, ours_off, off = program(name)
    monkeypatch.delenv(cpu.VARIABLE)
    monkeypatch.setattr(_layers, "convolve", jax.lax.conv_general_dilated)
    text_lax, ours_lax, _ = program(name)
    assert text_off == text_lax and "stablehlo.convolution" in text_off and not ours_off and not ours_lax
    on_cpu = jax.default_backend() == "cpu"
    assert ours_on == on_cpu and (text_on != text_off) == on_cpu
    for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(off), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("1", True), ("0", False)])
def test_the_switch_is_on_unless_it_is_0(value, enabled, monkeypatch):
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(cpu.VARIABLE, value)
    assert cpu.enabled() == (enabled and jax.default_backend() == "cpu")
