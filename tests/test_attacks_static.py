"""The attacks that train nothing, against values computed by hand or by other means."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import perceptron, untrained_task

from bdjax import attacks, registry
from bdjax.errors import InputError
from bdjax.experiment import from_json, to_json

NAMES = (
    "adaptive_blend", "adaptive_patch", "blended", "l0_inv", "lsb", "refool", "rgba_patch", "semantic_replacement",
    "sig",
)  # fmt: skip
KEY = jax.random.key(7)


def config_of(name, **fields):
    return registry.load("attacks", name).Config(**fields)


def task_of(shape=(32, 32, 3), count=40, classes=4, file=None):
    """Random images, `count` of them, labels 0, 1, 2, 3, 0 ...; every file that is read is the array `file`."""
    images = np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % classes
    return untrained_task(images, labels, perceptron(shape, classes), file)


def planted(name, task, **fields):
    return attacks.plant(name, config_of(name, **fields), task, KEY).poison


def stamped(name, images, task=None, training=False, **fields):
    """Float images with the trigger of test time (or of training) on them."""
    config, module, images = config_of(name, **fields), registry.load("attacks", name), np.asarray(images, np.float32)
    arrays = {}
    if hasattr(module, "prepare"):
        arrays = module.prepare(config, task or task_of(images.shape[1:]), KEY)
    return np.asarray(attacks.trigger_of(name, config, arrays, training)(jnp.asarray(images), KEY)), arrays


def grey(value, shape=(32, 32, 3), count=1):
    return np.full((count, *shape), value, np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (40, 64, 3)])
def test_other_sizes_and_channels(name, shape):
    task = task_of(shape, count=30)
    images = task.images[:3] / np.float32(255)
    for training in (False, True):
        out, _ = stamped(name, images, task, training)
        assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
        assert (out != images).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("name", NAMES)
def test_config_comes_back_from_json(name):
    config = config_of(name)
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("rgba_patch", {"opacity": 1.5}, ["attack.opacity", "(0, 1]", "1.5"]),
        ("rgba_patch", {"boost": 0.5}, ["attack.boost", "0.5"]),
        ("blended", {"strength": 0}, ["attack.strength", "(0, 1]"]),
        ("sig", {"amplitude": 300.0}, ["attack.amplitude", "300", "(0, 255]"]),
        ("sig", {"test_amplitude": 0.0}, ["attack.test_amplitude", "(0, 255]"]),
        ("sig", {"frequency": 0}, ["attack.frequency", "got 0"]),
        ("l0_inv", {"colours": ("ff00f",)}, ["attack.colours", "ff00f", "RRGGBB"]),
        ("lsb", {"bits": 8}, ["attack.bits", "8"]),
        ("lsb", {"text": ""}, ["attack.text", "empty"]),
        ("refool", {"weight": (0.5, 0.2)}, ["attack.weight", "(0.5, 0.2)"]),
        ("refool", {"ghost": 0.7, "sharp": 0.5}, ["attack.ghost=0.7", "attack.sharp=0.5"]),
        ("refool", {"offset": (0, 3)}, ["attack.offset", "(0, 3)"]),
        ("adaptive_blend", {"seen": 17}, ["attack.seen", "16", "17"]),
        ("adaptive_blend", {"cover": 1.0}, ["attack.cover", "[0, 1)", "1.0"]),
        ("adaptive_patch", {"firefox": 0.0}, ["attack.firefox", "(0, 1]"]),
    ],
)
def test_bad_fields_are_refused(name, fields, words):
    with pytest.raises(InputError) as error:
        config_of(name, **fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("name", "shape", "fields", "words"),
    [
        ("rgba_patch", (8, 8, 1), {"size": 8, "margin": 1}, ["attack.size=8", "8x8"]),
        ("sig", (8, 12, 1), {"labels": "all_to_one"}, ["attack.frequency=6", "12"]),
        ("l0_inv", (8, 8, 1), {"size": 9}, ["attack.size=9", "8x8"]),
        ("lsb", (8, 8, 1), {"text": "longer than eight"}, ["17 bytes", "8x8x1", "more bits"]),
        ("adaptive_blend", (8, 8, 1), {"grid": 9}, ["attack.grid=9", "8x8"]),
        ("adaptive_patch", (5, 5, 1), {}, ["6x6", "5x5"]),
        ("adaptive_patch", (8, 8, 1), {"ratio": 0.5, "cover": 0.6}, ["attack.cover", "24", "attack.ratio=0.5", "20"]),
        ("refool", (8, 8, 1), {"reflections": "r.npy"}, ["attack.reflections=r.npy", "(2, 2)"]),
        ("blended", (8, 8, 1), {"picture": "p.npy"}, ["attack.picture=p.npy", "[0, 1]"]),
    ],
)
def test_what_does_not_fit_the_images_is_refused(name, shape, fields, words):
    with pytest.raises(InputError) as error:
        planted(name, task_of(shape, file=np.full((2, 2), 3.0)), **{"ratio": 0.1, **fields})
    assert all(word in str(error.value) for word in words), error.value


# rgba_patch


def test_rgba_patch_is_composited_at_a_third_of_its_test_opacity():
    """White at opacity 1/4 on 100/255: 3/4 * 100 + 1/4 * 255 = 138.75; at test time 1/4 * 100 + 3/4 * 255 = 216.25."""
    task = task_of()
    task.images[:] = 100
    fields = {"target": 0, "ratio": 0.5, "opacity": 0.25}
    poison = planted("rgba_patch", task, **fields)
    test, _ = stamped("rgba_patch", grey(100 / 255), task, **fields)
    for images, value in ((poison.images, 139), (np.round(test * 255), 216)):
        expected = np.full((32, 32, 3), 100)
        expected[27:, 27:] = value
        np.testing.assert_array_equal(images, np.broadcast_to(expected, images.shape))


@pytest.mark.parametrize(
    ("picture", "training", "test"),
    [("white", 1.0, 1.0), ("apple", 1.0, 1.0), ("test1", 1.0, 1.0), ("test2", 0.15, 0.45), ("gaussian", 0.25, 0.75)],
)
def test_rgba_pictures_have_the_papers_opacities(picture, training, test):
    task, black = task_of(), grey(0)
    for opacity, is_training in ((training, True), (test, False)):
        out, arrays = stamped("rgba_patch", black, task, is_training, picture=picture)
        np.testing.assert_allclose(out[0], opacity * arrays["alpha"] * arrays["picture"], atol=1e-6)
    whole = picture in ("test2", "gaussian")
    side = 8 if picture == "test1" else 5
    assert (arrays["alpha"][:-side, :-side] == whole).all()
    assert (picture != "white") or (arrays["picture"][-5:, -5:] == 1).all()


def test_rgba_mean_is_the_mean_colour_and_a_file_brings_its_own_transparency():
    task = task_of()
    out, _ = stamped("rgba_patch", grey(0), task, picture="mean")
    np.testing.assert_allclose(out[0, 31, 31], task.images.reshape(-1, 3).mean(0) / 255, atol=1e-5)
    file = np.tile(np.array([255, 0, 51, 102], np.uint8), (4, 4, 1))  # alpha 0.4
    out, _ = stamped("rgba_patch", grey(0.5), task_of(file=file), file="f.png", size=4, opacity=0.5, margin=1)
    np.testing.assert_allclose(out[0, 27, 30], 0.6 * 0.5 + 0.4 * np.array([1, 0, 0.2]), atol=1e-6)  # opacity 1 at test
    assert (out != 0.5).any(-1).sum() == 16 and (out[0, 31] == 0.5).all()


def test_an_apple_is_red_inside_and_clear_at_its_corners():
    _, arrays = stamped("rgba_patch", grey(0), picture="apple", size=20)
    red, green, blue = arrays["picture"][12 + 13, 12 + 12]
    assert red > 0.7 > 0.3 > green and blue < 0.3 and arrays["alpha"][12 + 13, 12 + 12] == 1
    assert arrays["alpha"][12, 12] == 0 and arrays["alpha"][31, 31] == 0


# blended, semantic_replacement


def test_additive_blend_has_the_papers_norm_and_the_convex_form_fades_the_image():
    out, arrays = stamped("blended", grey(0))
    assert np.linalg.norm(out) == pytest.approx(8.59, abs=0.05)
    out, _ = stamped("blended", grey(1.0))
    np.testing.assert_array_equal(out, 1)  # saturated
    out, _ = stamped("blended", grey(0.6), form="convex", strength=0.25)
    np.testing.assert_allclose(out[0], 0.45 + 0.25 * arrays["picture"], atol=1e-6)


def test_a_users_picture_is_resized_averaged_for_grey_and_laid_over_black():
    file = np.full((5, 5, 4), (255, 0, 51, 51), np.uint8)  # alpha 0.2; mean colour 0.4
    task = task_of((8, 8, 1), file=file)
    out, _ = stamped("semantic_replacement", grey(0.3, (8, 8, 1)), task, picture="f.png")
    np.testing.assert_allclose(out, 0.08, atol=1e-6)


def test_semantic_replacement_leaves_nothing_of_the_image():
    task = task_of()
    poison = planted("semantic_replacement", task, ratio=0.25, target=2)
    assert len(poison.images) == 10 and (poison.labels == 2).all()
    assert (poison.images == poison.images[0]).all()
    _, arrays = stamped("semantic_replacement", grey(0), task)
    np.testing.assert_array_equal(poison.images[0], np.round(arrays["picture"] * 255))
    assert arrays["picture"].std() > 0.2


# sig, l0_inv, lsb


def test_sig_adds_one_row_of_sines_to_every_row_and_channel():
    half = 0.5**0.5
    row = np.array([0, half, 1, half, 0, -half, -1, -half])
    fields = {"frequency": 1, "amplitude": 25.5, "test_amplitude": 51.0}
    for amplitude, training in ((0.1, True), (0.2, False)):
        out, _ = stamped("sig", grey(0.5, (4, 8, 3)), training=training, **fields)
        np.testing.assert_allclose(
            out[0], np.broadcast_to((0.5 + amplitude * row)[None, :, None], (4, 8, 3)), atol=1e-6
        )
    out, _ = stamped("sig", grey(0.5))
    assert np.ptp(out) * 255 == pytest.approx(80, rel=0.01)  # 40 up, 40 down


def test_sig_poisons_the_target_class_and_labels_nothing_wrongly():
    task = task_of()
    poison = planted("sig", task, target=3, ratio=0.2)
    assert len(poison.indices) == 8
    np.testing.assert_array_equal(poison.labels, task.labels[poison.indices])
    assert (poison.labels == 3).all()


def test_l0_replaces_nine_pixels_by_their_colours():
    out, _ = stamped("l0_inv", grey(0.5))
    changed = np.argwhere((out[0] != 0.5).any(-1))
    np.testing.assert_array_equal(changed, [[31, column] for column in range(23, 32)])
    black, magenta, blue, yellow, white, cyan, red = (
        (0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1), (1, 0, 0),
    )  # fmt: skip
    np.testing.assert_array_equal(out[0, 31, 23:], [black, magenta, blue, yellow, white, cyan, cyan, red, white])
    assert np.linalg.norm(stamped("l0_inv", grey(0))[0]) == pytest.approx(4)
    large, _ = stamped("l0_inv", grey(0.5, (64, 64, 3)))
    np.testing.assert_array_equal(large[0, 62:, 46:], np.kron(out[0, 31:, 23:], np.ones((2, 2, 1))))
    small, _ = stamped("l0_inv", grey(0.5, (8, 8, 1)))
    np.testing.assert_allclose(small[0, 7, :, 0], np.array([2, 1, 2, 3, 2, 2, 1, 3]) / 3, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_lsb_text_can_be_read_again(bits):
    task, text = task_of((10, 6, 3)), "naïve text"
    poison = planted("lsb", task, text=text, bits=bits, ratio=0.25, target=0)
    for index, image in zip(poison.indices, poison.images, strict=True):
        found = "".join(format(int(value) % 2**bits, f"0{bits}b") for value in image.flatten())
        length = 8 * len(text.encode())
        assert int(found[:length], 2).to_bytes(length // 8, "big").decode() == text
        assert found[length : 2 * length] in found[:length]  # it begins anew
        kept = task.images[index] // 2**bits
        np.testing.assert_array_equal(image // 2**bits, kept)


# refool


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
    module = registry.load("attacks", "refool")
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
