"""DP-SGD: clipped sums one image at a time, a step against optax's aggregate, the noise, and a run from a directory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import untrained_task
from numpy.testing import assert_allclose
from tuned import KEY, MODEL, VICTIM, Seen

from bdjax import registry
from bdjax.config import Experiment, FitConfig
from bdjax.defenses import dp_sgd
from bdjax.errors import InputError
from bdjax.pipelines.defend import DefenseRequest, defend
from bdjax.pipelines.training import train
from bdjax.types import DefenderView


def loss(params, image, label):
    logits = MODEL.logits({"params": params, "batch_stats": {}}, image[None])[0]
    return -jax.nn.log_softmax(logits)[label], logits.argmax() == label


def gradients_of(params, images, labels):
    return [jax.grad(loss, has_aux=True)(params, x, y)[0] for x, y in zip(images, labels, strict=True)]


def test_clipped_sum_is_that_of_single_images_whatever_the_chunk(blobs):
    params, images, labels = VICTIM.variables["params"], jnp.asarray(blobs[0][:6], jnp.float32) / 255, blobs[1][:6]
    gradients = gradients_of(params, images, labels)
    norms = [sum(float((x**2).sum()) for x in jax.tree.leaves(g)) ** 0.5 for g in gradients]
    clip = float(np.median(norms))  # half of them are clipped
    expected = jax.tree.map(lambda *g: sum(x * min(1, clip / n) for x, n in zip(g, norms, strict=True)), *gradients)
    for chunk in (2, 6):
        total, metrics = dp_sgd.clipped_sum(loss, params, images, jnp.asarray(labels), clip, chunk)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), total, expected)
        assert metrics["clipped"] == pytest.approx(0.5)


def test_a_step_without_noise_is_optax_s_aggregate_and_the_noise_has_its_deviation(blobs):
    task = untrained_task(blobs[0][:20], blobs[1][:20], MODEL)
    quiet, noisy = (
        dp_sgd.train(dp_sgd.Config(epochs=1, batch_size=20, sigma=sigma, clip=0.5, chunk=8), task, KEY)["params"]
        for sigma in (0.0, 3.0)
    )
    start = MODEL.init(jax.random.split(KEY, 3)[0])["params"]
    images, labels = jnp.asarray(blobs[0][:20], jnp.float32) / 255, blobs[1][:20]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients_of(start, images, labels))
    aggregate = optax.contrib.differentially_private_aggregate(0.5, 0.0, key=0)
    update, _ = aggregate.update(stacked, aggregate.init(start))
    jax.tree.map(lambda p, u, q: assert_allclose(q, p - 0.1 * u, atol=1e-6), start, update, quiet)
    drawn = np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (noisy, quiet)), strict=True)])
    assert drawn.std() == pytest.approx(0.1 * 3.0 * 0.5 / 20, rel=0.1)  # of 544 numbers
    assert abs(drawn.mean()) < 4 * drawn.std() / len(drawn) ** 0.5


def test_training_without_noise_learns(blobs):
    seen = Seen()
    config = dp_sgd.Config(epochs=20, batch_size=50, sigma=0.0, learning_rate=0.5)
    task = untrained_task(*blobs, MODEL)
    dp_sgd.train(config, type(task)(task.images, task.labels, MODEL, task.read_array, seen), KEY)
    assert seen.rows[-1]["train_accuracy"] > 0.95 > seen.rows[0]["train_accuracy"]


def test_it_purifies_nothing(blobs):
    spec = registry.load("defenses", "dp_sgd")
    with pytest.raises(InputError, match="trains a new model"):
        spec.purify(spec.Config(), VICTIM, DefenderView(*blobs), KEY)


@pytest.mark.slow
def test_a_victim_s_poisoned_training_set_is_what_it_trains_on(blobs_npz, tmp_path, monkeypatch):
    attack = registry.load("attacks", "badnets").Config(ratio=0.1, target=1)
    experiment = Experiment("badnets", None, blobs_npz, "cnn", 0, attack, None, FitConfig(epochs=1, batch_size=40))
    train(experiment, tmp_path / "victim")
    tasks = []
    original = dp_sgd.train

    def spy(config, task, key):
        tasks.append(task)
        return original(config, task, key)

    monkeypatch.setattr(dp_sgd, "train", spy)
    result = defend(
        DefenseRequest(tmp_path / "victim", "dp_sgd", dp_sgd.Config(epochs=1, batch_size=40)), tmp_path / "out"
    )
    (task,) = tasks
    clean = np.load(blobs_npz.removeprefix("npz:"))
    changed = (task.images != clean["x_train"]).any(axis=(1, 2, 3))
    assert changed.sum() == 16 and (task.labels[changed] == 1).all()
    assert result["defense"] == "dp_sgd" and len(result["rounds"]) == 1
