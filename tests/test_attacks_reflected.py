"""Refool and the adaptive attacks, against values computed by hand or by other means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from static_attacks import KEY, config_of, grey, planted, stamped, task_of

from bdjax import registry
from bdjax.errors import InputError


def mixed(weight, image, reflection):
    return (weight * image**2.2 + (1 - weight) * reflection**2.2) ** (1 / 2.2)


@pytest.fixture(scope="module")
def reflection():
    """One smooth random picture [1, 32, 32, 3], uint8."""
    picture = np.random.default_rng(5).uniform(0, 1, (1, 32, 32, 3))
    return (255 * scipy.ndimage.gaussian_filter(picture, (0, 1, 1, 0), mode="wrap")).astype(np.uint8)


def reflected(image, reflection, count=3, **fields):
    out, _ = stamped("refool", np.repeat(image, count, 0), task_of(file=reflection), reflections="r.npy", **fields)
    return out


def test_sharp_reflection_mixes_in_linear_light(reflection):
    image = task_of().images[:1] / np.float32(255)
    out = reflected(image, reflection, ghost=0.0, sharp=1.0)
    np.testing.assert_allclose(out, np.repeat(mixed(0.4, image, reflection / 255), 3, 0), atol=1e-4)
    out = reflected(image, reflection, ghost=0.0, sharp=1.0, weight=(0.55, 0.95))
    t, r = image[0] ** 2.2, (reflection[0] / 255) ** 2.2
    weights = [((one.astype(np.float64) ** 2.2 - r) * (t - r)).sum() / ((t - r) ** 2).sum() for one in out]
    assert all(0.55 <= w <= 0.95 for w in weights) and len({round(w, 4) for w in weights}) == 3  # one for each image


def test_ghost_is_two_shifted_pictures_enlarged(reflection):
    """With an offset of 4, c from least squares over the two pictures must lie in its range and explain all."""
    image = grey(0.3)
    out = reflected(image, reflection, count=12, ghost=1.0, offset=(4, 4)).astype(np.float64)
    linear = jnp.asarray((reflection[0] / 255) ** 2.2)
    near, far = (
        np.asarray(jax.image.resize(part, (32, 32, 3), "linear")).ravel() for part in (linear[4:, 4:], linear[:-4, :-4])
    )
    shares = []
    for one in out:
        ghost = (one.ravel() ** 2.2 - 0.4 * 0.3**2.2) / 0.6
        share = (ghost - far) @ (near - far) / ((near - far) @ (near - far))
        np.testing.assert_allclose(ghost, share * near + (1 - share) * far, atol=1e-5)
        shares.append(share)
    assert all(0.15 <= s <= 0.5 or 0.5 <= s <= 0.85 for s in shares)
    assert min(shares) < 0.5 < max(shares) and len({round(s, 5) for s in shares}) == 12


def test_blurred_reflection_is_dimmed_where_it_overexposes(reflection):
    linear = (reflection[0] / 255) ** 2.2
    blur, ones = (
        scipy.ndimage.gaussian_filter(picture, (2, 2, 0), mode="constant", truncate=2.0)
        for picture in (linear, np.ones((32, 32, 3)))
    )
    blur = blur / ones
    window = np.exp(-(np.linspace(-3, 3, 32) ** 2) / 2)
    vignette = np.sqrt(np.outer(window, window))[..., None]
    fields = {"ghost": 0.0, "sigma": (2.0, 2.0)}
    dark = reflected(grey(0.0), reflection, **fields).astype(np.float64)
    np.testing.assert_allclose(dark[0] ** 2.2, 0.8 * vignette * blur, atol=1e-5)
    bright = reflected(grey(1.0), reflection, **fields).astype(np.float64)
    for one in bright:  # b + 1 exceeds 1 everywhere, by b
        seen = (one**2.2 - 0.4) / (0.8 * vignette)
        place = np.unravel_index(np.argmax(vignette * blur), blur.shape)
        factor = (blur[place] - seen[place]) / blur[..., place[2]].mean()
        assert 1.08 <= factor <= 1.18
        expected = np.clip(blur - blur.mean((0, 1)) * factor, 0, 1)
        np.testing.assert_allclose(one**2.2, 0.4 + 0.8 * vignette * expected, atol=1e-4)


def test_refool_kinds_come_at_their_rates(reflection):
    """On black paper a sharp reflection is known exactly; 30 % of 300 images must show it."""
    out = reflected(grey(0.0, count=1), reflection, count=300, ghost=0.3, sharp=0.3)
    sharp = np.abs(out - mixed(0.4, 0.0, reflection / 255)).max(axis=(1, 2, 3)) < 1e-3
    assert 60 <= sharp.sum() <= 120


def test_refool_reflects_other_classes_and_keeps_labels_when_clean():
    task = task_of()
    task.images[:] = (50 * task.labels)[:, None, None, None]  # the class is the brightness
    module = registry.load_module("attacks", "refool")
    bank = module.prepare(config_of("refool", target=2), task, KEY)["reflections"]
    assert len(bank) == 30 and set(np.unique(bank)) == {0, 50, 150}
    assert len(module.prepare(config_of("refool", target=2, count=7), task, KEY)["reflections"]) == 7
    assert len(module.prepare(config_of("refool", source="drawn", count=7), task, KEY)["reflections"]) == 7
    poison = planted("refool", task, target=2, ratio=0.2, labels="clean")
    assert len(poison.indices) == 8 and (task.labels[poison.indices] == 2).all() and (poison.labels == 2).all()
    with pytest.raises(InputError, match="source=drawn"):
        module.prepare(config_of("refool", target=2), dataclasses.replace(task, labels=task.labels * 0 + 2), KEY)


# adaptive_blend, adaptive_patch


@pytest.mark.parametrize("name", ["adaptive_blend", "adaptive_patch"])
def test_covers_carry_the_training_trigger_and_keep_their_labels(name):
    task = task_of(count=200)
    alone = planted(name, task, ratio=0.1, cover=0.0, target=1, exclude_target=True)
    poison = planted(name, task, ratio=0.1, cover=0.2, target=1, exclude_target=True)
    before = task.labels[poison.indices]
    changed = poison.labels != before
    assert len(poison.indices) == 60 and changed.sum() == 20 and (poison.labels[changed] == 1).all()
    np.testing.assert_array_equal(poison.indices[changed], alone.indices)
    assert set(before[~changed]) == {0, 1, 2, 3}
    assert (poison.images != task.images[poison.indices]).any(axis=(1, 2, 3)).all()


def test_adaptive_blend_shows_half_of_its_pieces_in_training_and_all_at_test_time():
    task = task_of(count=20)
    images = task.images / np.float32(255)
    test, arrays = stamped("adaptive_blend", images, task)
    full = images + 0.2 * (arrays["picture"] - images)
    np.testing.assert_allclose(test, full, atol=1e-6)
    training, _ = stamped("adaptive_blend", images, task, training=True)
    seen = (training != images).reshape(20, 4, 8, 4, 8, 3).any(axis=(2, 4, 5))
    assert (seen.sum(axis=(1, 2)) == 8).all() and len(np.unique(seen, axis=0)) > 15
    where = np.kron(seen, np.ones((8, 8), bool))[..., None]
    np.testing.assert_allclose(training, np.where(where, full, images), atol=1e-6)


def test_adaptive_patch_wakes_to_two_opaque_patches():
    out, _ = stamped("adaptive_patch", grey(0.5))
    wide = [[1, 0, 1], [0, 1, 0], [1, 0, 0]], [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    low = [[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    for rows, pair in ((slice(0, 3), wide), (slice(29, 32), low)):
        for columns, cells in zip((slice(0, 3), slice(29, 32)), pair, strict=True):
            np.testing.assert_array_equal(out[0, rows, columns], np.array(cells)[..., None].repeat(3, -1))
    changed = (out[0] != 0.5).any(-1)
    assert changed.sum() == 50 + 36 - 18 and changed[27:, :5].all() and changed[27:, 27:].all()
    np.testing.assert_array_equal(out[0, 27:29, :5], out[0, 27:29, 27:])  # pasted, not mirrored
    other, _ = stamped("adaptive_patch", grey(0.5), wake="firefox_trojan")
    changed = (other[0] != 0.5).any(-1)
    assert changed[1:14, 18:31].sum() == 137 and changed[21:29, 21:29].sum() == 64 and changed.sum() == 201
    np.testing.assert_allclose(other[0, 1:14, 18:31][changed[1:14, 18:31]].mean(0) * 255, (192, 114, 82), atol=1)


def test_adaptive_patch_trains_with_one_faint_patch_an_image():
    """Pixel by pixel x + s (k - x), with k from the opaque patches, s and the place from the paper's table."""
    awake, _ = stamped("adaptive_patch", grey(0.5))
    other, _ = stamped("adaptive_patch", grey(0.5), wake="firefox_trojan")
    out, _ = stamped("adaptive_patch", grey(0.5, count=400), training=True)
    changed = (out != 0.5).any(-1).sum(axis=(1, 2))
    sizes = {25: "phoenix", 137: "firefox", 36: "badnets", 64: "trojan"}
    assert set(changed) == set(sizes) and all(60 < (changed == n).sum() < 140 for n in sizes)
    one = {name: out[np.argmax(changed == n)] for n, name in sizes.items()}
    corner = (slice(0, 3), slice(0, 3))
    np.testing.assert_allclose(one["badnets"][corner], 0.5 + 0.5 * (awake[0][corner] - 0.5), atol=1e-6)
    np.testing.assert_allclose(one["phoenix"][27:29, 27:], 0.5 + 0.5 * (awake[0, 27:29, 27:] - 0.5), atol=1e-6)
    mean = (one["phoenix"][27:, 27:].mean((0, 1)) - 0.25) / 0.5 * 255
    np.testing.assert_allclose(mean, (180, 204, 244), atol=1)
    for name, strength, place in (
        ("firefox", 0.2, (slice(1, 14), slice(18, 31))),
        ("trojan", 0.3, (slice(21, 29), slice(21, 29))),
    ):
        np.testing.assert_allclose(one[name][place], 0.5 + strength * (other[0][place] - 0.5), atol=1e-6)
