"""The hypergradient against a closed form, central differences, and a dense solve."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets, hypergrad, models
from bdjax.errors import InputError
from bdjax.types import to_float


def quadratic(dimension=6, parameters=4, seed=0):
    """g = ½ δᵀAδ − δᵀBθ, E = ½‖δ − c‖² + ½‖θ‖²: δ(θ) = A⁻¹Bθ, dE/dθ = BᵀA⁻¹(δ − c) + θ."""
    rng = np.random.default_rng(seed)
    square = rng.normal(size=(dimension, dimension))
    a = jnp.asarray(square @ square.T / dimension + np.eye(dimension))
    b = jnp.asarray(rng.normal(size=(dimension, parameters)))
    c, theta = jnp.asarray(rng.normal(size=dimension)), jnp.asarray(rng.normal(size=parameters))

    def inner(delta, params):
        return 0.5 * delta @ a @ delta - delta @ b @ params

    def outer(delta, params):
        return 0.5 * ((delta - c) ** 2).sum() + 0.5 * (params**2).sum()

    delta = jnp.linalg.solve(a, b @ theta)
    return inner, outer, delta, theta, b.T @ jnp.linalg.solve(a, delta - c) + theta, a


# iterations at which each solver is exact to 1e-6 here; eigenvalues of A lie in [1, 5]
ENOUGH = {"fixed_point": 90, "neumann": 90, "cg": 20, "normal_cg": 20}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
@pytest.mark.parametrize("jit", [False, True])
def test_agrees_with_the_closed_form(double, name, jit):
    inner, outer, delta, theta, expected, _ = quadratic()
    solve = hypergrad.solver(name, ENOUGH[name], step=0.2)
    run = partial(hypergrad.hypergradient, inner, outer, solve=solve)
    value, gradient = (jax.jit(run) if jit else run)(delta, theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(value, outer(delta, theta), rtol=1e-12)


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
def test_agrees_with_central_differences_on_a_network(double, name):
    """A two-layer network, penalised so that the inner problem is strongly convex, solved by Newton steps."""
    keys = jax.random.split(jax.random.key(1), 4)
    x, y = jax.random.normal(keys[0], (12, 5)), jax.random.randint(keys[1], (12,), 0, 3)
    theta = {"a": jax.random.normal(keys[2], (5, 7)) * 0.4, "b": jax.random.normal(keys[3], (7, 3)) * 0.4}

    def loss(delta, params):
        logits = jax.nn.elu((x + delta) @ params["a"]) @ params["b"]
        return -jax.nn.log_softmax(logits)[jnp.arange(12), y].mean()

    def inner(delta, params):
        return -loss(delta, params) + 2.0 * (delta**2).sum()

    @jax.jit
    def solution(params):
        delta = jnp.zeros(5)
        for _ in range(8):
            delta = delta - jnp.linalg.solve(jax.hessian(inner)(delta, params), jax.grad(inner)(delta, params))
        return delta

    delta = solution(theta)
    assert jnp.linalg.norm(jax.grad(inner)(delta, theta)) < 1e-12
    solve = hypergrad.solver(name, ENOUGH[name], step=0.2)
    run = jax.jit(partial(hypergrad.hypergradient, inner, loss, solve=solve))
    _, gradient = run(delta, theta)
    for place in [("a", 0, 0), ("a", 4, 6), ("b", 2, 1)]:
        step = jnp.zeros_like(theta[place[0]]).at[place[1:]].set(1e-5)
        ahead, behind = ({**theta, place[0]: theta[place[0]] + s * step} for s in (1, -1))
        difference = (loss(solution(ahead), ahead) - loss(solution(behind), behind)) / 2e-5
        np.testing.assert_allclose(gradient[place[0]][place[1:]], difference, rtol=1e-6)


@pytest.fixture(scope="module")
def digits_hessian():
    """The inner Hessian of `cnn` on eight real digits (every fourth pixel), its product and its dense form."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax initialises float32 statistics
        data = datasets.load("digits")
        images = to_float(data.x_train[:8, ::4, ::4]).astype(jnp.float64)
        model = models.create("cnn", (8, 8, 1), 10, jnp.float64)
        variables = jax.tree.map(lambda v: v.astype(jnp.float64), model.init(jax.random.key(0)))

        def inner(delta):
            logits = model.apply(variables, images + delta)[0]
            return jax.nn.log_softmax(logits.astype(jnp.float64))[jnp.arange(8), data.y_train[:8]].mean()

        delta = jax.random.normal(jax.random.key(1), (1, 8, 8, 1), jnp.float64) * 0.1
        product = jax.jit(lambda v: jax.jvp(jax.grad(inner), (delta,), (v,))[1])
        dense = jnp.stack([product(e.reshape(delta.shape)).ravel() for e in jnp.eye(64)])
        return product, dense


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
@jax.numpy_dtype_promotion("standard")
def test_solver_agrees_with_a_dense_solve_on_digits(double, name, digits_hessian):
    """With a ridge above the largest |eigenvalue|, to the tolerance that each solver states."""
    product, dense = digits_hessian
    values = jnp.linalg.eigvalsh(dense)
    ridge = 2 * float(jnp.abs(values).max()) + 0.1
    assert values.min() < 0  # indefinite without a ridge
    b = jax.random.normal(jax.random.key(2), (1, 8, 8, 1), jnp.float64)
    expected = jnp.linalg.solve(dense + ridge * jnp.eye(64), b.ravel()).reshape(b.shape)
    step, iterations = 1 / ridge, 30
    rate = float(jnp.abs(1 - step * (values + ridge)).max())  # the contraction q of the docstring
    found = hypergrad.solver(name, iterations, step, ridge)(product, b)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    # the head of the model computes in float32, hence 1e-5 where the solvers state 1e-6
    bound = {"fixed_point": rate**iterations, "neumann": rate ** (iterations + 1)}.get(name, 0.0)
    assert error <= 2 * bound + 1e-5


def test_fixed_point_is_the_truncated_sum_and_neumann_one_more_term(double):
    *_, a = quadratic()
    b, step = jnp.arange(6.0), 0.1
    term, total, sums = step * b, jnp.zeros(6), []
    for _ in range(6):
        total = total + term
        sums.append(total)
        term = term - step * a @ term
    np.testing.assert_allclose(hypergrad.solver("fixed_point", 5, step)(lambda v: a @ v, b), sums[4], rtol=1e-12)
    np.testing.assert_allclose(hypergrad.solver("neumann", 5, step)(lambda v: a @ v, b), sums[5], rtol=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("fixed_point", 4), ("neumann", 5)])
def test_products_counted(name, expected):
    calls = []
    hypergrad.solver(name, 5, 0.1)(lambda v: calls.append(0) or v, jnp.ones(3))
    assert len(calls) == expected


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
def test_ridge_shifts_the_matrix(double, name):
    *_, a = quadratic()
    b = jnp.arange(6.0)
    found = hypergrad.solver(name, ENOUGH[name], 0.15, ridge=0.7)(lambda v: a @ v, b)
    np.testing.assert_allclose(found, jnp.linalg.solve(a + 0.7 * jnp.eye(6), b), rtol=1e-6)


@pytest.mark.parametrize("name", hypergrad.SOLVERS)
def test_linear_in_b_and_works_on_a_pytree(double, name):
    *_, a = quadratic()

    def matvec(tree):
        out = a @ jnp.concatenate([tree["u"], tree["v"]])
        return {"u": out[:2], "v": out[2:]}

    solve = hypergrad.solver(name, ENOUGH[name], 0.2)
    b = {"u": jnp.array([1.0, -2.0]), "v": jnp.arange(4.0)}
    once, twice = solve(matvec, b), solve(matvec, jax.tree.map(lambda x: 2 * x, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-6), once, twice)


def test_a_solver_of_ones_own_is_accepted(double):
    inner, outer, delta, theta, expected, a = quadratic()
    _, gradient = hypergrad.hypergradient(inner, outer, delta, theta, lambda matvec, b: jnp.linalg.solve(a, b))
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


@pytest.mark.parametrize(("name", "iterations", "words"), [("cgg", 5, "'cgg'"), ("cg", 0, "got 0")])
def test_bad_settings_are_named(name, iterations, words):
    with pytest.raises(InputError, match=words):
        hypergrad.solver(name, iterations)
