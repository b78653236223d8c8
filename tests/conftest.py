"""Every test sees four simulated devices, strict dtype promotion, and warnings as errors."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or "/tmp/bdjax-tests-jax")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _one_device():
    """Tests run on one device unless they ask for more, as a run with --devices does."""
    from bdjax.engine import parallel

    with parallel.using(1):
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
