"""Masks and triggers as people store them: channels first, one channel, zeros and ones, by channel."""

import jax
import numpy as np
import pytest
from commands import refused
from conftest import perceptron, untrained_task
from PIL import Image

from bdjax.attacks import image_trigger
from bdjax.datasets._files import read_array
from bdjax.errors import InputError

MASK = np.zeros((8, 8), np.float32)
MASK[5:, 6:] = 1


def prepared(path, channels=3, **fields):
    from dataclasses import replace

    images = np.zeros((4, 8, 8, channels), np.uint8)
    task = replace(untrained_task(images, np.arange(4), perceptron((8, 8, channels))), read_array=read_array)
    config = image_trigger.Config(mask=str(path), mode="replace", **fields)
    return config, image_trigger.prepare(config, task, jax.random.key(0))


@pytest.mark.parametrize(
    "mask",
    [
        MASK, MASK[..., None], MASK[None], np.stack([MASK] * 3), np.stack([MASK] * 3, -1), np.stack([MASK] * 3)[None],
        MASK[None, None], MASK.astype(bool), MASK.astype(np.uint8), (MASK * 255).astype(np.uint8),
        MASK.astype(np.int64), np.stack([MASK] * 3).astype(np.float64), np.stack([MASK] * 3).astype(np.uint8),
    ],
)  # fmt: skip
def test_a_mask_in_any_usual_form_is_the_same_mask(mask, tmp_path):
    np.save(tmp_path / "m.npy", mask)
    _, arrays = prepared(tmp_path / "m.npy")
    np.testing.assert_array_equal(arrays["mask"], MASK[..., None])


@pytest.mark.parametrize(("mode", "top"), [("L", 1), ("RGB", 1), *((m, 255) for m in ("L", "1", "RGB", "RGBA", "LA"))])
def test_a_mask_as_a_picture(mode, top, tmp_path):
    Image.fromarray((MASK * top).astype(np.uint8)).convert(mode).save(tmp_path / "m.png")
    _, arrays = prepared(tmp_path / "m.png")
    np.testing.assert_array_equal(arrays["mask"], MASK[..., None])


def test_a_mask_by_channel_is_used_by_channel(tmp_path):
    mask = np.zeros((3, 8, 8), np.float32)
    mask[1, :, :4] = 1
    np.save(tmp_path / "m.npy", mask)
    config, arrays = prepared(tmp_path / "m.npy")
    assert arrays["mask"].shape == (8, 8, 3)
    stamped = np.asarray(image_trigger.trigger(config, np.full((1, 8, 8, 3), 0.5, np.float32), None, arrays))
    assert (
        (stamped[..., [0, 2]] == 0.5).all() and (stamped[:, :, :4, 1] != 0.5).all() and (stamped[:, :, 4:] == 0.5).all()
    )
    assert prepared(tmp_path / "m.npy", channels=1)[1]["mask"].shape == (8, 8, 1)


@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 8, 2), (2, 3, 8, 8), (8,)])
def test_other_forms_are_refused_with_those_that_are_taken(shape, tmp_path):
    np.save(tmp_path / "m.npy", np.zeros(shape, np.float32))
    with pytest.raises(
        InputError, match=r"attack.mask=.*expected \[H, W\], \[H, W, 1, 3 or 4\] or \[1, 3 or 4, H, W\]"
    ):
        prepared(tmp_path / "m.npy")


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 8), (8, 0, 1), (8, 8, 0)])
@pytest.mark.parametrize("field", ["trigger", "mask"])
def test_a_picture_without_a_pixel_is_refused(field, shape, tmp_path, capsys):
    np.save(tmp_path / "t.npy", np.zeros(shape))
    np.save(tmp_path / "good.npy", np.zeros((8, 8, 3)))
    argv = ["train", "image_trigger", "--dataset", "digits", "--out", tmp_path / "v"]
    argv += ["--attack.trigger", tmp_path / "good.npy", f"--attack.{field}", tmp_path / "t.npy"]
    said = refused(capsys, *argv)
    assert f"attack.{field}={tmp_path}/t.npy has shape" in said
