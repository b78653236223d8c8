"""Activation-guided editing against a formulation in PyTorch's layout; which layers it edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import large_are_slow
from numpy.testing import assert_allclose, assert_array_equal
from scipy.signal import correlate2d

from bdjax import models, registry
from bdjax.defenses import _activation_edit, age
from bdjax.defenses._activation_edit import factor, later_layers
from bdjax.types import DefenderView, Victim

KEY = jax.random.key(0)


def corner(images, key):
    return images.at[:, -3:, -3:].set(1.0)


def drawn(seed=1):
    """The small convolutional network with every number drawn."""
    model = models.create("cnn", (8, 8, 1), 4)
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(model.init, KEY)

    def draw(path, leaf):
        low = 0.5 if path[-1].key in ("var", "scale") else -0.5
        return jnp.asarray(rng.uniform(low, low + 1, leaf.shape), jnp.float32)

    return Victim(model, jax.tree_util.tree_map_with_path(draw, like))


def pooled_3d(a, shape):
    """Adaptive average pooling of [1, H, W] to [I, kH, kW], bin by bin."""
    out = np.zeros(shape)
    for index in np.ndindex(*shape):
        cut = tuple(
            slice(int(np.floor(i * n / m)), int(np.ceil((i + 1) * n / m)))
            for i, n, m in zip(index, a.shape, shape, strict=True)
        )
        out[index] = a[cut].mean()
    return out


def edited_in_oihw(variables, batches, train, names):
    """The paper's steps in float64 with maps [N, C, H, W], kernels [O, I, kH, kW] and dense kernels [O, I]."""
    params, stats = (jax.tree.map(lambda v: np.asarray(v, np.float64), variables[k]) for k in ("params", "batch_stats"))
    kernels = {f"Conv_{i}": params[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1) for i in range(3)}
    kernels["head"] = params["head"]["kernel"].T
    total = dict.fromkeys(kernels, 0.0)
    for x in batches:
        for i in range(3):
            theta = kernels[f"Conv_{i}"]
            maps = [[sum(correlate2d(c, k, "same") for c, k in zip(n, o, strict=True)) for o in theta] for n in x]
            x = np.array(maps)
            total[f"Conv_{i}"] = total[f"Conv_{i}"] + x.mean(0) / len(batches)
            n, o, h, w = x.shape
            x = x.reshape(n, o, h // 2, 2, w // 2, 2).max((3, 5))
            own, bn = stats[f"BatchNorm_{i}"], params[f"BatchNorm_{i}"]
            mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3))) if train else (own["mean"], own["var"])
            if train:
                own["mean"], own["var"] = 0.9 * own["mean"] + 0.1 * mean, 0.9 * own["var"] + 0.1 * var
            shape = (1, -1, 1, 1)
            x = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
            x = x * bn["scale"].reshape(shape) + bn["bias"].reshape(shape)
            x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        logits = x.transpose(0, 2, 3, 1).reshape(len(x), -1) @ kernels["head"].T + params["head"]["bias"]
        total["head"] = total["head"] + logits.mean(0) / len(batches)
    for name in names:
        theta, a = kernels[name], -total[name]
        if theta.ndim == 4:
            a = np.stack([pooled_3d(channel[None], theta.shape[1:]) for channel in a])
        else:
            a = np.repeat(a[:, None], theta.shape[1], 1)
        a = (a - a.mean()) / np.sqrt(((a - a.mean()) ** 2).mean() + 1e-5)
        kernels[name] = theta * (0.5 * a + 1.0)
    return kernels, stats


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(("share", "names"), [(0.5, ["Conv_2", "head"]), (1.0, ["Conv_0", "Conv_1", "Conv_2", "head"])])
def test_the_edit_is_that_of_a_plain_formulation_with_channels_first(blobs, knows, share, names):
    """Maps of 8, 4 and 2 pixels are pooled to kernels of 3: bins that overlap, and bins that are wider than the map."""
    victim, view = drawn(), DefenderView(blobs[0][:7], blobs[1][:7], trigger=corner)
    before = jax.tree.map(np.array, victim.variables)
    config = age.Config(backdoor_knowledge=knows, share=share, batch_size=4, share_of="layers", batch_norm=None)
    found = age.purify(config, victim, view, KEY)
    images = np.asarray(view.images, np.float64) / 255
    if knows:
        images[:, -3:, -3:] = 1
    order = np.asarray(jax.random.permutation(jax.random.fold_in(KEY, 0), 7))[:6].reshape(2, 3)  # two equal batches
    batches = [images[i].transpose(0, 3, 1, 2) for i in order]
    kernels, stats = edited_in_oihw(victim.variables, batches, not knows, names)
    for name, theta in kernels.items():
        own = np.asarray(found["params"][name]["kernel"])
        assert_allclose(own.transpose(3, 2, 0, 1) if own.ndim == 4 else own.T, theta, rtol=1e-3, atol=2e-5)
        assert (own != before["params"][name]["kernel"]).any() == (name in names)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), found["batch_stats"], stats)
    jax.tree.map(assert_array_equal, victim.variables, before)
    assert_array_equal(found["params"]["head"]["bias"], before["params"]["head"]["bias"])
    pairs = zip(*(jax.tree.leaves(v["batch_stats"]) for v in (found, before)), strict=True)
    assert {bool((np.asarray(a) != b).any()) for a, b in pairs} == {not knows}


def test_the_factors_have_their_mean_and_deviation():
    activation = jax.random.normal(KEY, (5, 7, 6))
    found = factor(activation, (3, 3, 4, 6), 0.5, 1.0, 1e-5)
    assert found.shape == (3, 3, 1, 6)
    assert float(found.mean()) == pytest.approx(1, abs=1e-5) and float(found.std()) == pytest.approx(0.5, abs=1e-3)
    other = factor(activation, (3, 3, 4, 6), 0.2, 3.0, 1e-5)
    assert_allclose(other, 3 + (found - 1) * 0.4, atol=1e-5)
    assert_allclose(factor(jnp.full((4, 4, 6), 2.0), (3, 3, 4, 6), 0.5, 1.0, 1e-5), 1, atol=1e-6)  # nothing to say


def test_the_target_of_ten_classes_changes_its_sign():
    """An outlier among C equal logits scores -sqrt(C - 1) when negated: a factor of -0.5, and 1 + 1/6 for the rest."""
    logits = jnp.zeros(10).at[2].set(20.0)
    found = factor(logits, (64, 10), 0.5, 1.0, 1e-5)
    assert found.shape == (1, 10)
    assert_allclose(found[0, 2], -0.5, atol=1e-4)
    assert_allclose(np.delete(found[0], 2), 7 / 6, atol=1e-4)


def test_a_dense_layer_of_many_places_is_averaged():
    tokens = jax.random.normal(KEY, (9, 6))
    assert_allclose(
        factor(tokens, (4, 6), 0.5, 1.0, 1e-5),
        factor(tokens.mean(0), (4, 6), 0.5, 1.0, 1e-5),
        atol=1e-6,
    )


# --- which layers


def test_the_later_part_by_layers_and_by_scalars():
    layers = [("a", 1), ("b", 2), ("c", 90), ("d", 4), ("e", 3)]
    assert later_layers(layers, 0.5, "layers") == ["c", "d", "e"]  # the border is in c
    assert later_layers(layers[:4], 0.5, "layers") == ["c", "d"]
    assert later_layers(layers, 0.5, "scalars") == ["c", "d", "e"]
    assert later_layers(layers, 0.07, "scalars") == ["d", "e"]
    assert later_layers(layers, 0.01, "layers") == ["e"] == later_layers(layers, 1e-6, "scalars")
    assert later_layers(layers, 1.0, "layers") == later_layers(layers, 1.0, "scalars") == list("abcde")


@pytest.mark.parametrize("name", large_are_slow(registry.names("models")))
def test_every_model_tells_what_each_kernel_gives_in_forward_order(name):
    model = models.create(name, (32, 32, 3), 10)
    variables, order = jax.eval_shape(model.init, KEY), []

    def run(variables, images):
        found, stats = models.outputs(model, variables, images, True)
        order.extend(found)
        return found, stats

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    found, stats = jax.eval_shape(run, variables, images)
    kernels = {path: leaf for path, leaf in models.kernels(variables["params"]).items() if path.endswith("kernel")}
    assert set(found) == set(kernels) and order[-1] == "head/kernel"
    convolutions = [path for path in order if kernels[path].ndim == 4]
    assert kernels[convolutions[0]].shape[-2] == 3  # the first sees the image
    if all(path.split("_")[0] == "Conv" for path in convolutions):  # numbered by Flax
        assert convolutions == sorted(convolutions, key=lambda path: int(path.split("/")[0].split("_")[1]))
    assert all(value.shape[-1] == kernels[path].shape[-1] for path, value in found.items())
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    program = _activation_edit._editor(model, _activation_edit._Static(0.5, "layers", 128, True))
    hyper = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("scale", "shift", "epsilon")}
    edited = jax.eval_shape(program, variables, jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.uint8), KEY, hyper)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), edited) == jax.tree.map(lambda a: (a.shape, a.dtype), variables)


def test_outputs_are_those_of_the_layers_before_normalisation():
    victim = drawn()
    images = jax.random.uniform(KEY, (2, 8, 8, 1))
    found, stats = models.outputs(victim.model, victim.variables, images)
    kernel, layout = victim.variables["params"]["Conv_0"]["kernel"], ("NHWC", "HWIO", "NHWC")
    first = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
    assert_allclose(found["Conv_0/kernel"], first, atol=1e-5)
    assert_allclose(found["head/kernel"], victim.model.logits(victim.variables, images), atol=1e-5)
    jax.tree.map(assert_array_equal, stats, victim.variables["batch_stats"])
