"""Every test sees four simulated devices, strict dtype promotion, warnings as errors, and XLA at its least effort."""

import dataclasses
import functools
import gc
import json
import os
import tempfile
from pathlib import Path

if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})  # 10 % faster than sharing all

_FLAGS = (
    "--xla_force_host_platform_device_count=4",
    "--xla_cpu_parallel_codegen_split_count=1",  # every core has a test process: small programs are not worth splitting
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = (
    "true"  # most of the suite's time is compilation; in child processes, too
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("commands", "convolutions", "dataset_checks")
jax.config.update("jax_numpy_dtype_promotion", "strict")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "bdjax-tests-jax")
)  # children too
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


LARGE = (
    "clip_vit_b_32", "convnext_tiny", "densenet121", "efficientnet_b3", "efficientnet_v2_s", "googlenet",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "resnet", "resnet_cifar", "senet18", "vgg16", "vgg19",
    "vgg19_bn", "vgg_cifar", "vit_b_32", "wide_resnet",
)  # fmt: skip
"""Networks of many layers, which take seconds to trace and compile; smaller ones of the same kinds are tested first."""


def large_are_slow(names):
    """Cases for `parametrize` by the names of models: those of LARGE are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


@functools.lru_cache
def perceptron(shape=(8, 8, 1), classes=4, hidden=8):
    """A one-hidden-layer Model: what tests of a method's arithmetic need, compiled in no time."""
    from bdjax.types import Model

    def init(key):
        first, second = jax.random.split(key)
        pixels = int(np.prod(shape))
        params = {
            "body": jax.random.normal(first, (pixels, hidden)) / pixels**0.5,
            "head": {"kernel": jax.random.normal(second, (hidden, classes)) / hidden**0.5},
        }
        return {"params": params, "batch_stats": {}}

    def apply(variables, images, train=False, keys=None, axis_name=None):
        params = variables["params"]
        features = jax.nn.elu(images.reshape(len(images), -1) @ params["body"])
        return features @ params["head"]["kernel"], {"flat": features}, variables["batch_stats"]

    def outputs(variables, images, train=False, axis_name=None):
        params = variables["params"]
        body = images.reshape(len(images), -1) @ params["body"]
        return {"body": body, "head/kernel": jax.nn.elu(body) @ params["head"]["kernel"]}, variables["batch_stats"]

    return Model("perceptron", shape, classes, init, apply, outputs)


@functools.lru_cache
def normalised(shape=(8, 8, 1), classes=4, channels=6):
    """A convolution, batch normalisation, ReLU, a mean and a dense layer: what tests of pruning need."""
    import flax.linen as nn

    from bdjax.types import Model

    class Net(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(channels, (3, 3), name="conv")(x)
            x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name if train else None, name="norm")(x)
            features = {"map": nn.relu(x)}
            features["flat"] = features["map"].mean((1, 2))
            return nn.Dense(classes, name="head")(features["flat"]), features

    def apply(variables, images, train=False, keys=None, axis_name=None):
        if not train:
            return *Net().apply(variables, images), variables["batch_stats"]
        (logits, features), state = Net(axis_name).apply(variables, images, True, mutable=["batch_stats"])
        return logits, features, state["batch_stats"]

    return Model("normalised", shape, classes, lambda key: dict(Net().init(key, np.zeros((1, *shape)))), apply)


def untrained_task(images, labels, model, file=None):
    """A Task whose training gives the initial weights: what tests of a method's own steps need."""
    from bdjax.types import Task

    def fit(images, labels, key, model=model, **_):
        return model.init(key)

    return Task(
        images,
        labels,
        model,
        lambda path: np.zeros((16, 16, 3), np.uint8) if file is None else file,
        fit=fit,
        fit_with_hook=lambda images, labels, key, hook, attacker, **_: (model.init(key), attacker),
        clean=lambda: model.init(jax.random.key(0)),
    )


def trained_task(images, labels, callback=None):
    """A Task that trains the perceptron (4 classes) by the engine: an epoch of SGD in batches of 40, unless told."""
    from bdjax.engine import FitConfig, fit_with_hook

    task = untrained_task(images, labels, perceptron(images.shape[1:]))
    usual = FitConfig(epochs=1, batch_size=40, optimizer="sgd", learning_rate=0.1)

    def controlled(images, labels, key, hook, attacker, *, stage="training", recipe=None, model=None):
        config = dataclasses.replace(usual, **recipe or {})
        model = model or task.model
        return fit_with_hook(model, images, labels, config, key, hook, attacker, stage=stage, callback=callback)

    def fit(images, labels, key, **options):
        return controlled(images, labels, key, None, None, **options)[0]

    return dataclasses.replace(task, fit=fit, fit_with_hook=controlled)


@pytest.fixture(autouse=True, scope="module")
def _room():
    """Forget compiled programs when there are many: each takes memory maps, of which Linux grants a process 65,530."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _optimisation(request):
    """Compile a module marked `optimised` as users do: it is about cost, memory, generated code or exact rounding."""
    if request.node.get_closest_marker("optimised") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _one_device():
    """Tests run on one device unless they ask for more, as a run with --devices does."""
    from bdjax.engine import parallel

    with parallel.using(1):
        yield


@pytest.fixture
def double():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def blobs():
    """A small problem that a few epochs learn: 8x8x1 images whose bright quarter tells the class (4 classes)."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4, dtype=np.int32), 50)
    images = rng.integers(0, 80, (200, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    return images, labels


@pytest.fixture(scope="session")
def blobs_npz(blobs, tmp_path_factory):
    """The same as a file, 160 training and 40 test images: a data set spec `npz:PATH`."""
    images, labels = blobs
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, x_train=images[:160], y_train=labels[:160], x_test=images[160:], y_test=labels[160:])
    return f"npz:{path}"


@pytest.fixture(scope="session")
def finished(blobs_npz, tmp_path_factory):
    """One run by the CLI, kept for the session: (its directory, its result)."""
    from commands import DEFEND, PLANT

    from bdjax import cli

    out = tmp_path_factory.mktemp("runs") / "one"
    cli.main(["run", "badnets", "ibau", "--dataset", blobs_npz, *PLANT, *DEFEND[:-2], "--out", str(out)])
    return out, json.loads((out / "result.json").read_text())
