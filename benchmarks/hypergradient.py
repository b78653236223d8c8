"""Compare one hypergradient of I-BAU between bdjax and PyTorch, in value and time.

    python benchmarks/hypergradient.py [--torch-python PATH] [--repeats 9] [--products bfloat16] [--json]

Small VGG with CIFAR-10 shapes, batches of 100, K = 5 fixed-point iterations of step 0.1, one perturbed image in the
outer batch, frozen BatchNorm; weights and images are random and the same on both sides. PyTorch follows the official
release: the graph of one inner step is retained, and each iteration is a reverse pass through it (the first multiplies
zero). bdjax linearises once and uses forward-over-reverse products (docs/solvers.md).

Each side is a separate process and may use its own interpreter (PyTorch: `pip install "bdjax[torch]"`, or PATH, an
interpreter with torch and numpy). The results are compared, then timed in alternation (A B A B). XLA_FLAGS are passed
on. `--products bfloat16` evaluates bdjax's inner objective, and so the products with its Hessian, with a bfloat16 model
and reports the deviation from PyTorch's float32.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hypergradient_torch import ITERATIONS, PENALTY, STEP, Arrays, Run, cores, to_torch_layout, torch_side

BATCH, CLASSES, NORM = 100, 10, 10.0


def make_problem(path: Path) -> None:
    """Save random weights (kernels HWIO), images (NHWC), labels and a perturbation of norm 10 to an .npz file."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    for i, (fan, out) in enumerate([(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]):
        arrays[f"Conv_{i}/kernel"] = rng.normal(0, (2 / (9 * fan)) ** 0.5, (3, 3, fan, out))
        arrays[f"Conv_{i}/bias"], arrays[f"BatchNorm_{i}/bias"], arrays[f"mean_{i}"] = rng.normal(0, 0.1, (3, out))
        arrays[f"BatchNorm_{i}/scale"], arrays[f"var_{i}"] = rng.uniform(0.8, 1.2, (2, out))
    arrays["head/kernel"] = rng.normal(0, 2048**-0.5, (2048, CLASSES))
    arrays["head/bias"] = rng.normal(0, 0.1, CLASSES)
    arrays["inner"], arrays["outer"] = rng.random((2, BATCH, 32, 32, 3))
    arrays["delta"] = rng.normal(size=(1, 32, 32, 3))
    arrays["delta"] *= NORM / np.linalg.norm(arrays["delta"])
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["inner_labels"], arrays["outer_labels"] = rng.integers(0, CLASSES, (2, BATCH))
    np.savez(path, **arrays)


def jax_side(data: Arrays, products: str) -> tuple[Run, Run, str]:
    """Return two functions for bdjax, the hypergradient and its direct term as arrays by name, and the version."""
    import jax
    import jax.numpy as jnp
    import optax

    from bdjax import hypergrad, models

    arrays = {name: jnp.asarray(array) for name, array in data.items()}
    params: dict[str, dict[str, jax.Array]] = {}
    for name in (name for name in arrays if "/" in name):
        layer, leaf = name.split("/")
        params.setdefault(layer, {})[leaf] = arrays[name]
    stats = {f"BatchNorm_{i}": {"mean": arrays[f"mean_{i}"], "var": arrays[f"var_{i}"]} for i in range(6)}
    model = models.create("small_vgg", (32, 32, 3), CLASSES)
    inner_model = models.create("small_vgg", (32, 32, 3), CLASSES, jnp.dtype(products))

    def entropy(model: Any, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params, "batch_stats": stats}, images)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def inner(delta: jax.Array, p: Any) -> jax.Array:
        return PENALTY * (delta**2).sum() - entropy(inner_model, p, arrays["inner"] + delta, arrays["inner_labels"])

    patched = (jnp.arange(BATCH) < 1)[:, None, None, None]

    def outer(delta: jax.Array, params: Any) -> jax.Array:
        return entropy(model, params, arrays["outer"] + jnp.where(patched, delta, 0.0), arrays["outer_labels"])

    def with_solver(solver: str) -> Run:
        solve = hypergrad.solver(solver, ITERATIONS, STEP)
        step = jax.jit(lambda delta, params: hypergrad.hypergradient(inner, outer, delta, params, solve)[1])

        def run() -> Arrays:
            gradient = jax.block_until_ready(step(arrays["delta"], params))
            return {f"{layer}/{leaf}": a for layer, leaves in gradient.items() for leaf, a in leaves.items()}

        return run

    version = f"jax {jax.__version__} on {jax.devices()[0].device_kind}, products in {products}"
    return with_solver("fixed_point"), with_solver("none"), version


def work(side: str, problem: Path, products: str) -> None:
    """Run a worker: save the results, report readiness, and time one run per line of standard input."""
    data = dict(np.load(problem))
    run, direct, version = torch_side(data) if side == "torch" else jax_side(data, products)
    for name, function in (("total", run), ("direct", direct)):
        result: Arrays = {name: np.asarray(array) for name, array in function().items()}
        np.savez(problem.with_name(f"{side}-{name}.npz"), **result)
    run()
    print(version, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def compare(problem: Path) -> dict[str, float]:
    """Compare the two hypergradients, and their indirect terms, by cosine and relative error."""
    names = [name for name in np.load(problem) if "/" in name]

    def vector(side: str, part: str) -> np.ndarray:
        saved = np.load(problem.with_name(f"{side}-{part}.npz"))
        leaves = (to_torch_layout(name, saved[name]) if side == "jax" else saved[name] for name in names)
        return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(float)

    ours, theirs = vector("jax", "total"), vector("torch", "total")
    indirect = ours - vector("jax", "direct"), theirs - vector("torch", "direct")
    comparison = {"indirect_share": float(np.linalg.norm(indirect[1]) / np.linalg.norm(theirs))}
    for name, (a, b) in (("", (ours, theirs)), ("indirect_", indirect)):
        comparison[f"{name}cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        comparison[f"{name}relative_error"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return comparison


def main() -> None:
    """Start both workers, compare their results, time them in alternation, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch and numpy")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--products", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker[0], Path(options.worker[1]), options.products)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}.")
    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ended:
        problem, workers, versions = Path(folder, "problem.npz"), {}, {}
        make_problem(problem)
        for side, python in (("torch", options.torch_python), ("jax", sys.executable)):
            command = [python, __file__, "--worker", side, str(problem), "--products", options.products]
            pipes = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[side] = ended.enter_context(pipes)
            versions[side] = answer(pipes)  # one after the other, so that the first waits while the second compiles
        comparison = compare(problem)
        line = (
            "cosine {cosine:.6f}, relative error {relative_error:.1e}; of the indirect term, {indirect_share:.2g} of "
        )
        line += "the whole: {indirect_cosine:.6f}, {indirect_relative_error:.1e}"
        if options.products == "float32" and min(comparison["cosine"], comparison["indirect_cosine"]) < 0.9999:
            raise SystemExit(f"the two hypergradients differ: {line.format(**comparison)}.")
        for _ in range(options.repeats):
            for side in seconds:
                seconds[side].append(float(answer(workers[side], "go\n")))
    ratios = [a / b for a, b in zip(seconds["jax"], seconds["torch"], strict=True)]
    if options.json:
        facts = {"cores": cores(), "versions": versions, "seconds": seconds, "ratios": ratios}
        print(json.dumps({**comparison, **facts, "ratio": statistics.median(ratios)}))
        return
    print(f"{cores()} cores; the two hypergradients compared: {line.format(**comparison)}")
    for name, values in [*seconds.items(), ("ratio", ratios)]:
        spread = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, n = {len(values)})"
        print(f"{name:6}{spread}  {versions.get(name, 'jax / torch, of each pair of runs')}")


def answer(worker: subprocess.Popen[str], line: str = "") -> str:
    """Send a line to a worker and return its answer; exit if the worker has ended."""
    assert worker.stdin and worker.stdout
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(line)
        worker.stdin.flush()
    return worker.stdout.readline().strip() or sys.exit(f"worker ended early: {worker.args!r}")


if __name__ == "__main__":
    main()
