"""Logits, gradients and hypergradients of this device beside float64 on the CPU.

The reference is computed by a process of its own that sees no accelerator (`python -m accelerator.parity ...`), while
this one compiles: there the library's CPU convolutions take float64 to matrix products, where XLA's own would be slow.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from accelerator.environment import child_environment
from accelerator.records import Run
from bdjax import hypergrad, models
from bdjax.cli._devices import prepare_jax
from bdjax.types import Model

QUANTITIES = ("logits", "gradient", "hypergradient")
VARIANTS = (("float32", "default"), ("float32", "highest"), ("bfloat16", "default"))
"""Type of the activations, and precision of float32 products: the default is TF32 on recent GPUs, bfloat16 on TPUs."""
CLASSES = 10
_BATCH_NORM_SHARE = 0.1  # of a batch's own statistics in the running ones after one step (bdjax/models/_layers.py)


class Sizes(NamedTuple):
    """How much is computed."""

    models: tuple[str, ...]
    images: int
    shape: tuple[int, int, int]
    iterations: int
    """K of the fixed-point solver, as in I-BAU's release."""


FULL = Sizes(("small_vgg", "resnet18"), 32, (32, 32, 3), 5)
SMOKE = Sizes(("cnn",), 4, (8, 8, 1), 2)


def inputs(sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images float32 [N, H, W, C] in [0, 1], labels int32 [N], a perturbation float32 [1, H, W, C] of L2 norm 1."""
    rng = np.random.default_rng(0)
    images = rng.random((sizes.images, *sizes.shape), np.float32)
    delta = rng.standard_normal((1, *sizes.shape)).astype(np.float32)
    return images, rng.integers(0, CLASSES, sizes.images).astype(np.int32), delta / np.linalg.norm(delta)


def start(name: str, sizes: Sizes) -> tuple[Any, Any]:
    """Weights and BatchNorm statistics of a model, the latter those of the images themselves, float32 on the host.

    A network whose statistics are the initial ones has activations that grow from block to block, so that rounding
    errors say little about a trained one.
    """
    model = models.create(name, sizes.shape, CLASSES)
    variables = jax.jit(model.init)(jax.random.key(0))
    initial = variables["batch_stats"]
    after = jax.jit(lambda v, x: model.apply(v, x, True)[2])(variables, inputs(sizes)[0])
    stats = jax.tree.map(lambda new, old: old + (new - old) / _BATCH_NORM_SHARE, after, initial)
    return jax.device_get((variables["params"], stats))


def quantities(model: Model, sizes: Sizes, params: Any, stats: Any, arrays: Any) -> dict[str, Any]:
    """Logits; the gradient of the cross-entropy in training mode; I-BAU's hypergradient at the perturbation.

    arrays: images, labels and perturbation of :func:`inputs`, in the precision of `params`.
    """
    images, labels, delta = arrays

    def entropy(params: Any, shown: jax.Array, train: bool = False) -> jax.Array:
        logits = model.apply({"params": params, "batch_stats": stats}, shown, train)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def inner(delta: jax.Array, params: Any) -> jax.Array:
        return 0.001 * (delta**2).sum() - entropy(params, images + delta)

    def outer(delta: jax.Array, params: Any) -> jax.Array:
        return entropy(params, images + delta)

    solve = hypergrad.solver("fixed_point", sizes.iterations, 0.1)
    return {
        "logits": model.apply({"params": params, "batch_stats": stats}, images)[0],
        "gradient": jax.grad(entropy)(params, images, True),
        "hypergradient": hypergrad.hypergradient(inner, outer, delta, params, solve)[1],
    }


def flat(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distance(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Cosine with the reference and relative error in L2 norm."""
    scale = np.linalg.norm(found) * np.linalg.norm(reference)
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    return {"cosine": float(found @ reference / scale), "relative_error": float(error)}


def reference(name: str, sizes: Sizes, given: Path, target: Path) -> None:
    """Write the quantities of a model in float64, from weights that `given` holds, as `target`."""
    begin = time.perf_counter()
    prepare_jax()
    model = models.create(name, sizes.shape, CLASSES, jnp.float64)
    like = jax.eval_shape(models.as_dtype(model, jnp.float32).init, jax.random.key(0))
    with np.load(given) as file, jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        leaves = [jnp.asarray(file[f"leaf{i}"], jnp.float64) for i in range(len(jax.tree.leaves(like)))]
        params, stats = jax.tree.unflatten(jax.tree.structure((like["params"], like["batch_stats"])), leaves)
        images, labels, delta = inputs(sizes)
        arrays = jnp.asarray(images, jnp.float64), jnp.asarray(labels), jnp.asarray(delta, jnp.float64)
        found = jax.jit(partial(quantities, model, sizes))(params, stats, arrays)
        vectors = {what: flat(found[what]) for what in QUANTITIES}
    partial_file = target.with_suffix(".part.npz")
    np.savez(partial_file, **vectors, seconds=time.perf_counter() - begin)  # type: ignore[arg-type]
    partial_file.rename(target)


def parity(run: Run) -> None:
    """Each model in float32 (default and highest precision of products) and in bfloat16, against the reference.

    The programs of a model are compiled side by side, so `compile_seconds` overlap.
    """
    prepare_jax()
    sizes = SMOKE if run.smoke else FULL
    began, failed = [], []
    for name in sizes.models:
        given = run.work / f"parity-{name}.npz"
        params, stats = start(name, sizes)
        np.savez(given, **{f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves((params, stats)))})
        began.append((name, params, stats, _ask(run, name, given)))
    for name, params, stats, process in began:
        arguments = jax.device_put((params, stats, inputs(sizes)))
        programs = [_lowered(name, sizes, arguments, *variant) for variant in VARIANTS]
        with ThreadPoolExecutor(len(VARIANTS)) as pool:
            waiting = [pool.submit(_compiled, program) for program in programs]
            for (dtype, precision), compiled in zip(VARIANTS, waiting, strict=True):
                facts: dict[str, Any] = {"model": name, "dtype": dtype, "precision": precision}
                try:
                    found, seconds, compiling = _ran(*compiled.result(), arguments)
                except jax.errors.JaxRuntimeError as error:  # out of memory, say: the others may fit
                    run.record("parity failed", **facts, reason=str(error).partition("\n")[0])
                    failed.append(str(error))
                    continue
                exact = _answer(run, name, process)
                facts |= {what: distance(found[what], exact[what]) for what in QUANTITIES}
                facts |= {"images": sizes.images, "iterations": sizes.iterations}
                facts |= {
                    "seconds": seconds,
                    "compile_seconds": compiling,
                    "reference_seconds": float(exact["seconds"]),
                }
                run.record("parity", **facts)
    if failed:
        raise RuntimeError(f"{len(failed)} programs failed: {failed[0]}")


def _ran(program: Any, compiling: float, arguments: Any) -> tuple[dict[str, np.ndarray], float, float]:
    """What a program gives as vectors, the seconds of its second run, and those of compiling it."""
    jax.block_until_ready(program(*arguments))
    begin = time.perf_counter()
    found = jax.block_until_ready(program(*arguments))
    seconds = time.perf_counter() - begin
    return {what: flat(found[what]) for what in QUANTITIES}, seconds, compiling


def _lowered(name: str, sizes: Sizes, arguments: Any, dtype: str, precision: str) -> Any:
    """The program of one variant, not compiled yet."""
    model = models.create(name, sizes.shape, CLASSES, jnp.dtype(dtype))
    with jax.default_matmul_precision(precision):
        return jax.jit(partial(quantities, model, sizes)).lower(*arguments)


def _compiled(lowered: Any) -> tuple[Any, float]:
    """(program, seconds)."""
    begin = time.perf_counter()
    return lowered.compile(), time.perf_counter() - begin


def _target(run: Run, name: str) -> Path:
    return run.work / f"parity-{name}-float64.npz"


def _ask(run: Run, name: str, given: Path) -> subprocess.Popen:
    """A process that computes the reference of one model on the CPU; it ends with this step."""
    size = "smoke" if run.smoke else "full"
    command = [sys.executable, "-m", "accelerator.parity", name, size, str(given), str(_target(run, name))]
    return subprocess.Popen(command, env=child_environment(JAX_PLATFORMS="cpu"))


def _answer(run: Run, name: str, process: subprocess.Popen) -> dict[str, np.ndarray]:
    """The reference, as soon as its process has ended. Raises RuntimeError when that fails."""
    if code := process.wait(max(run.left(), 1)):
        raise RuntimeError(f"the float64 reference of {name} ended with code {code}")
    with np.load(_target(run, name)) as exact:
        return dict(exact)


def main(argv: list[str]) -> None:
    """Compute one reference: MODEL smoke|full GIVEN TARGET."""
    name, size, given, target = argv
    reference(name, SMOKE if size == "smoke" else FULL, Path(given), Path(target))


if __name__ == "__main__":
    main(sys.argv[1:])
