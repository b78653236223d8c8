"""WaNet against PyTorch's and SciPy's values, and its batches; clean; poisoned sets made again; stages that resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron, untrained_task
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import map_coordinates

from bdjax import attacks, registry
from bdjax.attacks import wanet
from bdjax.config import Experiment
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.evaluate import evaluate
from bdjax.pipelines.poisoned_set import poisoned_set
from bdjax.pipelines.training import train
from bdjax.types import Backdoor, NeedsTraining, SampleInfo, Task

FIT = {"epochs": 1, "batch_size": 40}


def test_the_field_is_enlarged_as_pytorch_does():
    """`interpolate(v, size=7, mode="bicubic", align_corners=True)` of PyTorch 2.13 in float64."""
    small = np.array([[0, 1, -2, 3], [1, 0, 2, -1], [-1, 2, 0, 1], [2, -2, 1, 0]], float)
    matrix = wanet._bicubic(4, 7)
    found = matrix @ small @ matrix.T
    assert_allclose(found[0], [0, 0.78125, 1, -0.875, -2, 0.21875, 3], atol=1e-12)
    assert_allclose(found[3], [-0.1875, 0.546875, 1.28125, 1.56542969, 1.28125, 0.5, -0.28125], atol=1e-8)
    assert_allclose(found[::2, ::2], small, atol=1e-12)
    assert_allclose(matrix.sum(1), 1)


def test_a_constant_shift_of_one_pixel_is_that_shift():
    """n = 2 W / (s (W - 1)) everywhere moves the image by one pixel to the left; the edge repeats."""
    images = jax.random.uniform(jax.random.key(0), (2, 6, 9, 3))
    field = jnp.zeros((6, 9, 2)).at[..., 0].set(9 * 2 / (0.5 * 8))
    out = wanet.trigger(wanet.Config(), images, jax.random.key(0), {"field": field})
    assert_allclose(out[:, :, :-1], images[:, :, 1:], atol=1e-5)
    assert_allclose(out[:, :, -1], images[:, :, -1], atol=1e-5)


def test_bilinear_values_equal_scipys():
    images = np.random.default_rng(0).random((1, 7, 10, 1)).astype(np.float32)
    points = np.random.default_rng(1).uniform(-1, 1, (7, 10, 2)).astype(np.float32)
    at = [(points[..., 1] + 1) / 2 * 6, (points[..., 0] + 1) / 2 * 9]
    expected = map_coordinates(images[0, ..., 0], at, order=1)
    assert_allclose(wanet._sample(jnp.asarray(images), jnp.asarray(points))[0, ..., 0], expected, atol=1e-5)


def test_the_field_has_the_papers_size():
    task = Task(np.zeros((2, 32, 32, 3), np.uint8), np.arange(2), perceptron((32, 32, 3), 2), lambda path: None)
    field = wanet.prepare(wanet.Config(), task, jax.random.key(0))["field"]
    pixels = 0.5 * np.abs(field) / 32 * 31 / 2
    assert field.shape == (32, 32, 2) and 0.15 < pixels.mean() < 0.3 and pixels.max() < 0.9


@pytest.fixture
def batch():
    images = jax.random.uniform(jax.random.key(1), (10, 8, 8, 3))
    labels = jnp.arange(10, dtype=jnp.int32) % 4
    info = SampleInfo(jnp.arange(10), jnp.array([1, 1, 1, 2, 2, 0, 0, 0, 1, 0], jnp.int8), jax.random.split(
        jax.random.key(2), 10), None)  # fmt: skip
    field = jax.random.normal(jax.random.key(3), (8, 8, 2))
    return images, labels, info, {"fixed": {"field": field}}


@pytest.mark.parametrize("exclude", [False, True])
def test_roles_decide_who_is_warped_and_relabelled(batch, exclude):
    images, labels, info, attacker = batch
    config = wanet.Config(target=1, exclude_target=exclude)
    out = wanet._transform((config, 4), attacker, images, labels, info)
    warped = wanet.trigger(config, images, info.key[0], attacker["fixed"])
    poisoned = np.array([1, not exclude, 1, 0, 0, 0, 0, 0, 1, 0], bool)  # the second image is of the target class
    assert_array_equal(out.images[poisoned], warped[poisoned])
    assert_array_equal(out.images[5:8], images[5:8])
    assert_array_equal(out.labels, np.where(poisoned, 1, labels))
    noisy = out.images[3:5]
    assert (np.abs(noisy - warped[3:5]).mean((1, 2, 3)) > 1e-3).all() and (noisy != images[3:5]).any()


def test_noise_is_each_images_own_and_within_half_a_pixel(batch):
    """On a ramp in x, a shift of up to one part in W of the coordinate changes values by at most that slope."""
    images, labels, info, _ = batch
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 8)[None, None, :, None], images.shape)
    attacker = {"fixed": {"field": jnp.zeros((8, 8, 2))}}
    out = wanet._transform((wanet.Config(), 4), attacker, ramp, labels, info).images - ramp
    assert 0 < np.abs(out[3:5]).max() <= 1 / 8 / 2 + 1e-6 and (out[3] != out[4]).any()
    assert_allclose(out[jnp.array([0, 1, 2, 5, 6, 7, 8, 9])], 0, atol=1e-6)


def test_all_to_all_moves_every_label_by_one(batch):
    images, labels, info, attacker = batch
    out = wanet._transform((wanet.Config(labels="all_to_all"), 4), attacker, images, labels, info)
    assert_array_equal(out.labels, np.where(info.role == 1, (labels + 1) % 4, labels))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": "clean"}, "wanet relabels"),
        ({"noise_ratio": 0.95}, "0 to 1 - ratio = 0.9, got 0.95"),
        ({"noise_ratio": -0.1}, "got -0.1"),
        ({"strength": 0.0}, "strength must be positive, got 0.0"),
        ({"grid": 1}, "grid must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        wanet.Config(**changes)


def experiment(attack, blobs_npz, **changes):
    from bdjax.engine import FitConfig

    config = dataclasses.replace(registry.load_module("attacks", attack).Config(), **changes)
    return Experiment(attack, None, blobs_npz, "cnn", attack_config=config, fit=FitConfig(**FIT))


def test_a_victim_gives_its_poisoned_set_again_bit_for_bit(blobs_npz, tmp_path):
    directory = train(experiment("badnets", blobs_npz, target=1, ratio=0.25), tmp_path / "victim")
    data, images, labels, positions = poisoned_set(directory)
    recorded = checkpoint.read_arrays(directory, "poison")
    assert_array_equal(positions, recorded["indices"])
    assert_array_equal(labels[positions], 1)
    assert checkpoint.read_manifest(directory)["poison"]["n"] == len(positions) == 40
    others = np.setdiff1d(np.arange(160), positions)
    assert_array_equal(images[others], data.x_train[others])
    assert (images[positions] != data.x_train[positions]).any((1, 2, 3)).all()


def test_a_poisoned_set_that_comes_out_otherwise_is_refused(blobs_npz, tmp_path, monkeypatch):
    directory = train(experiment("badnets", blobs_npz, target=1, ratio=0.25), tmp_path / "victim")
    made = attacks.poison
    monkeypatch.setattr(attacks, "poison", lambda *a: dataclasses.replace(p := made(*a), images=p.images ^ 1))
    with pytest.raises(InputError, match="sha256 differs"):
        poisoned_set(directory)


@pytest.mark.parametrize("attack", ["wanet", "clean"])
def test_an_attack_without_a_poisoned_set_says_so(attack, blobs_npz, tmp_path):
    directory = train(experiment(attack, blobs_npz), tmp_path / "victim")
    with pytest.raises(InputError, match=f"{attack} changes images in every training step"):
        poisoned_set(directory)
    asr = evaluate(directory)["asr"]
    assert asr is None if attack == "clean" else 0 <= asr <= 1  # its trigger was stored, or there is none


def test_a_clean_model_is_kept_in_the_store_and_found_again(blobs_npz, tmp_path, monkeypatch):
    asked = []
    module = registry.load_module("attacks", "badnets")

    def edit(config, variables, task, key):
        asked.append(variables)
        return Backdoor("badnets", config, variables, {})

    monkeypatch.setattr(module, "edit", edit, raising=False)
    context = Context(1, store=tmp_path / "store")
    first = train(experiment("badnets", blobs_npz, target=1), tmp_path / "a", context)
    (kept,) = [p for p in (tmp_path / "store").iterdir() if not p.name.startswith(".")]
    assert checkpoint.read_manifest(kept)["attack"]["name"] == "clean"
    before = (kept / "manifest.json").stat().st_mtime_ns
    train(experiment("badnets", blobs_npz, target=2), tmp_path / "b", context)
    alone = train(experiment("badnets", blobs_npz, target=3), tmp_path / "c", Context(1))
    assert (kept / "manifest.json").stat().st_mtime_ns == before and first.exists() and alone.exists()
    jax.tree.map(assert_array_equal, asked[0], asked[1])
    jax.tree.map(assert_array_equal, asked[0], asked[2])  # trained on the spot: the same model
    assert not list(tmp_path.glob(".*training*"))


def test_a_task_that_cannot_train_says_so():
    task = Task(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32), perceptron(), lambda path: None)
    for ask in (task.clean, lambda: task.fit(None, None, None), lambda: task.fit_with_hook(None, None, None)):
        with pytest.raises(NeedsTraining):
            ask()


def test_clean_leaves_everything_as_it_is(blobs):
    task = untrained_task(*blobs, perceptron())
    planted = attacks.plant("clean", registry.load_module("attacks", "clean").Config(), task, jax.random.key(0))
    jax.tree.map(assert_array_equal, planted.variables, perceptron().init(attacks.fit_key(jax.random.key(0))))
    assert planted.poison is None
