"""The attacks that train nothing, against values computed by hand or by other means."""

import json

import numpy as np
import pytest
from static_attacks import config_of, grey, planted, stamped, task_of

from bdjax.config import from_json, to_json
from bdjax.errors import InputError

NAMES = (
    "adaptive_blend", "adaptive_patch", "blended", "l0_inv", "lsb", "refool", "rgba_patch", "semantic_replacement",
    "sig",
)  # fmt: skip


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
