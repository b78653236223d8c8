"""What a hypergradient costs and reports: products, flops, memory, residual; its errors; the guide's example."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import hypergrad, models
from bdjax.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

SOLVING = [name for name in hypergrad.SOLVERS if name != "none" and not name.startswith("unrolled")]
STOP_EARLY = ["cg", "normal_cg", "gmres", "bicgstab"]


def matrix(size=6, seed=0):
    """Symmetric, eigenvalues from 1 to about 4."""
    square = np.random.default_rng(seed).normal(size=(size, size))
    return square @ square.T / size + np.eye(size)


def problem(size=6, parameters=4, dtype=None):
    a, b = matrix(size), jnp.asarray(np.random.default_rng(1).normal(size=(size, parameters)), dtype)
    inner = lambda delta, theta: 0.5 * delta @ jnp.asarray(a, dtype) @ delta - delta @ b @ theta  # noqa: E731
    outer = lambda delta, theta: ((delta - 1) ** 2).sum() + (theta**2).sum()  # noqa: E731
    return inner, outer, jnp.arange(float(size), dtype=dtype), jnp.ones(parameters, dtype), a


def counted(a, calls):
    """v -> a v that notes each execution, also under transposition, inside loops and jit."""

    def host(v):
        calls.append(0)
        return a @ np.asarray(v)

    def product(_, v):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(v.shape, v.dtype), v, vmap_method="sequential")

    return lambda v: jax.custom_derivatives.linear_call(product, product, (), v)


@pytest.mark.parametrize("name", [*SOLVING, "none"])
@pytest.mark.parametrize("jit", [False, True])
def test_the_report_counts_the_products_that_run(double, name, jit):
    """All of them in three iterations, which do not suffice here; fewer where the tolerance stops the solver."""
    *_, b, _, a = problem()
    for iterations in (3, 30):
        calls = []
        solve = hypergrad.solver(name, iterations, 0.2, 0.1)
        run = partial(solve, counted(a, calls))
        jax.block_until_ready((jax.jit(run) if jit else run)(b))
        expected = solve.products(b.size)
        if iterations == 30 and name in STOP_EARLY:
            assert 0 < len(calls) < expected
        else:
            assert len(calls) == expected
    assert hypergrad.solver("fixed_point", 5).products(b.size) == 4  # as in I-BAU's release


@pytest.mark.parametrize("name", [*SOLVING, "none"])
def test_iterations_matter_to_the_solvers_that_say_so(double, name):
    *_, b, _, a = problem()
    one, two = (hypergrad.solver(name, k, 0.2, 0.1)(lambda v: jnp.asarray(a) @ v, b) for k in (1, 2))
    assert hypergrad.iterates(name) == bool(np.abs(one - two).max() > 1e-6)


@pytest.mark.parametrize("name", SOLVING)
def test_the_residual_is_that_of_the_solution(double, name):
    inner, outer, delta, theta, a = problem()
    solve = hypergrad.solver(name, 2, 0.2, 0.3)
    report = jax.jit(partial(hypergrad.hypergradient, inner, outer, solve=solve))(delta, theta)[2]
    e = 2 * (np.arange(6.0) - 1)
    u = np.asarray(solve(lambda v: jnp.asarray(a) @ v, jnp.asarray(e)))
    expected = np.linalg.norm(a @ u + 0.3 * u - e) / np.linalg.norm(e)
    np.testing.assert_allclose(report.residual, expected, rtol=1e-7, atol=1e-13)
    assert report.products == solve.products(6)
    assert bool(report.converged) == (expected <= 1e-6) == (name == "lu")


@pytest.mark.parametrize("name", ["none", "unrolled", "unrolled_remat"])
def test_what_solves_nothing_reports_nan(name):
    inner, outer, delta, theta, _ = problem()
    report = hypergrad.hypergradient(inner, outer, delta, theta, hypergrad.solver(name, 2, 0.1))[2]
    assert report.products == 0 and np.isnan(report.residual) and not report.converged


# compiling for speed is not wanted where only the program's size is looked at
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(QUICK)


def test_flops_in_forward_passes():
    """A product with H is 2 F; the release's K = 5 is 17 F, where its own formulation takes 26 (see benchmarks/)."""
    model = models.create("small_vgg", (16, 16, 3), 10)
    variables = model.init(jax.random.key(0))
    images, others = jax.random.uniform(jax.random.key(1), (2, 4, 16, 16, 3))
    delta = jax.random.normal(jax.random.key(2), (1, 16, 16, 3)) * 0.1

    def entropy(images, params):
        logits = model.apply({**variables, "params": params}, images)[0]
        return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)].mean()

    inner = lambda d, p: 0.001 * (d**2).sum() - entropy(images + d, p)  # noqa: E731
    outer = lambda d, p: entropy(jnp.concatenate([others[:1] + d, others[1:]]), p)  # noqa: E731

    def flops(function):
        return compiled(function, delta, variables["params"]).cost_analysis()["flops"]

    def hypergradient(iterations):
        solve = hypergrad.solver("fixed_point", iterations, 0.1)
        return lambda d, p: hypergrad.hypergradient(inner, outer, d, p, solve)[:2]

    forward = flops(lambda d, p: entropy(images + d, p))
    one, five = (flops(hypergradient(iterations)) / forward for iterations in (1, 5))
    np.testing.assert_allclose(five, 17, rtol=0.02)
    np.testing.assert_allclose((five - one) / 4, 2, rtol=0.05)


def perceptron(batch=256, pixels=64, hidden=32):
    """Inner and outer loss of a two-layer network on random images, with δ and θ."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, others = jax.random.normal(keys[0], (2, batch, pixels))
    theta = {"a": jax.random.normal(keys[1], (pixels, hidden)) / 8, "b": jax.random.normal(keys[2], (hidden, 10)) / 6}

    def entropy(x, params):
        return -jax.nn.log_softmax(jax.nn.elu(x @ params["a"]) @ params["b"])[:, 0].mean()

    inner = lambda d, p: (d**2).sum() - entropy(x + d, p)  # noqa: E731
    return inner, lambda d, p: entropy(others + d, p), jax.random.normal(keys[3], (pixels,)), theta


def temporary(name, iterations):
    inner, outer, delta, theta = perceptron()
    solve = hypergrad.solver(name, iterations, 0.1)
    function = lambda d, p: hypergrad.hypergradient(inner, outer, d, p, solve)  # noqa: E731
    return compiled(function, delta, theta).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["fixed_point", "neumann", "minres"])
def test_memory_of_an_implicit_solver_does_not_grow_with_the_iterations(name):
    """2 and 8 iterations are written out, 12 and 96 are a loop, whose own working set comes once."""
    two, eight, twelve, many = (temporary(name, iterations) for iterations in (2, 8, 12, 96))
    assert eight <= 1.05 * two
    assert twelve <= 1.25 * eight
    assert many <= 1.001 * twelve


@pytest.mark.parametrize("name", ["cg", "normal_cg", "bicgstab"])
def test_memory_of_jaxopts_solvers_does_not_grow_with_the_iterations(name):
    assert temporary(name, 96) <= 1.001 * temporary(name, 4)


def test_memory_of_unrolling_grows_and_rematerialising_keeps_only_the_perturbations():
    (few, many), (few_remat, many_remat) = (
        [temporary(name, steps) for steps in (12, 48)] for name in ("unrolled", "unrolled_remat")
    )
    assert many > 2.5 * few
    assert many_remat - few_remat <= 1.1 * 36 * 64 * 4  # 36 more perturbations of 64 float32 values
    assert many_remat < 0.2 * many


def largest(jaxpr):
    """Values in the largest array of a traced program, its sub-programs included."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inside = getattr(parameter, "jaxpr", parameter)
            sizes += [largest(inside)] if hasattr(inside, "eqns") else []
    return max(sizes, default=0)


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
def test_only_lu_stores_a_square_matrix(name):
    size = 200
    weight = jnp.linspace(1, 2, size)
    inner = lambda d, p: (weight * jnp.sin(d) ** 2).sum() + (d[:3] * p).sum()  # noqa: E731
    outer = lambda d, p: (d**4).sum() + (p**2).sum()  # noqa: E731
    solve = hypergrad.solver(name, 20, 0.1, 0.5)
    traced = jax.make_jaxpr(lambda d, p: hypergrad.hypergradient(inner, outer, d, p, solve))(weight, jnp.ones(3))
    assert (largest(traced.jaxpr) >= size * size) == (name == "lu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("cgg", 5), "'cgg'.*fixed_point.*minres"),
        (("cg", 0), "at least 1, got 0"),
        (("cg", 5, 0.0), "step must be positive and finite, got 0"),
        (("cg", 5, float("nan")), "step must be positive and finite, got nan"),
        (("cg", 5, 1.0, -0.5), "zero or more and finite, got -0.5"),
        (("nystrom", 5), "nystrom needs a ridge > 0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        hypergrad.solver(*settings)


def test_lu_refuses_a_matrix_that_is_too_large():
    size = hypergrad.LARGEST_DENSE + 1
    with pytest.raises(InputError, match=f"{size} x {size}.*up to {size - 1}"):
        hypergrad.solver("lu", 1)(lambda v: v, jnp.zeros(size))


def test_a_nystrom_without_a_ridge_cannot_be_traced_around():
    """A traced ridge is not looked at; the settings that are known still are."""
    with pytest.raises(InputError, match="at least 1"):
        jax.jit(lambda ridge: hypergrad.solver("nystrom", 0, ridge=ridge)(lambda v: v, jnp.ones(3)))(0.0)


@pytest.mark.parametrize("jit", [False, True])
def test_wrong_shapes_are_named(jit):
    inner, outer, delta, theta, _ = problem()

    def run(inner, outer, solve):
        function = partial(hypergrad.hypergradient, inner, outer, solve=solve)
        return (jax.jit(function) if jit else function)(delta, theta)

    good = hypergrad.solver("cg", 3)
    vector, pair = (lambda d, p: d), (lambda d, p: (d.sum(), p.sum()))
    with pytest.raises(InputError, match=r"inner\(δ, θ\) must be a scalar, got shape \(6,\)"):
        run(vector, outer, good)
    with pytest.raises(InputError, match=r"outer\(δ, θ\) must be a scalar, got a pytree"):
        run(inner, pair, good)
    with pytest.raises(InputError, match=r"solver returned \(5,\), but the right-hand side is \(6,\)"):
        run(inner, outer, lambda matvec, b: b[:5])
    with pytest.raises(InputError, match="must return a pytree like b"):
        run(inner, outer, lambda matvec, b: (b, b))


@pytest.mark.parametrize("name", SOLVING)
def test_a_product_that_is_not_finite(name):
    """Named outside jit, where the gradient can be looked at; inside, the report says it."""
    _, outer, delta, theta, _ = problem()
    inner = lambda d, p: jnp.nan * (d**2).sum() - d[:4] @ p  # noqa: E731
    run = partial(hypergrad.hypergradient, inner, outer, solve=hypergrad.solver(name, 3, 0.1, 0.5))
    with pytest.raises(InputError, match=f"not finite \\(solver {name}\\)"):
        run(delta, theta)
    report = jax.jit(run)(delta, theta)[2]
    assert np.isnan(report.residual) and not report.converged


def test_a_divergence_is_named():
    inner, outer, delta, theta, _ = problem()
    with pytest.raises(InputError, match="diverged: use fewer iterations, a smaller step or a ridge"):
        hypergrad.hypergradient(inner, outer, delta, theta, hypergrad.solver("fixed_point", 200, 10.0))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_lineax_solver_of_the_guide(double, jit, dtype):
    pytest.importorskip("lineax")
    page = (Path(__file__).parent.parent / "docs" / "solvers.md").read_text()
    (code,) = re.findall(r"<!-- example: lineax -->\s*```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    inner, outer, delta, theta, _ = problem(dtype=dtype)
    function = partial(hypergrad.hypergradient, inner, outer, solve=names["solve"])
    _, gradient, report = (jax.jit(function) if jit else function)(delta, theta)
    exact = hypergrad.hypergradient(inner, outer, delta, theta, hypergrad.solver("lu", 1))[1]
    np.testing.assert_allclose(gradient, exact, rtol=1e-5)
    assert gradient.dtype == dtype and report.converged and report.products == -1
