"""The hypergradient by every solver: closed forms, central differences, dense solves, dtypes, trees, vmap, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets, hypergrad, models
from bdjax.types import to_float

# iterations at which each solver is exact to 1e-6 on `quadratic`, whose Hessian has its eigenvalues in [1, 5]
ENOUGH = {
    "fixed_point": 90, "neumann": 90, "cg": 20, "normal_cg": 20, "gmres": 20, "bicgstab": 20, "minres": 20, "lu": 1,
    "nystrom": 20, "unrolled": 90, "unrolled_remat": 90,
}  # fmt: skip
IMPLICIT = [name for name in ENOUGH if not name.startswith("unrolled")]
ALL = [*ENOUGH, "one_step", "none"]
assert set(ALL) == set(hypergrad.SOLVERS)
RIDGE = {"nystrom": 1e-7}  # it needs one; this small, it changes the result by less than 1e-6


def quadratic(dimension=6, parameters=4, seed=0, dtype=jnp.float64):
    """g = ½ δᵀAδ − δᵀBθ, E = ½‖δ − c‖² + ½‖θ‖²: δ(θ) = A⁻¹Bθ, dE/dθ = BᵀA⁻¹(δ − c) + θ."""
    rng = np.random.default_rng(seed)
    square = rng.normal(size=(dimension, dimension))
    a = jnp.asarray(square @ square.T / dimension + np.eye(dimension), dtype)
    b = jnp.asarray(rng.normal(size=(dimension, parameters)), dtype)
    c, theta = (jnp.asarray(rng.normal(size=n), dtype) for n in (dimension, parameters))

    def inner(delta, params):
        return 0.5 * delta @ a @ delta - delta @ b @ params

    def outer(delta, params):
        return 0.5 * ((delta - c) ** 2).sum() + 0.5 * (params**2).sum()

    def closed(delta, inverse):
        """The hypergradient with `inverse` in the place of A⁻¹."""
        return b.T @ inverse @ (delta - c) + theta

    return inner, outer, jnp.linalg.solve(a, b @ theta), theta, closed, a


def run(inner, outer, solve, jit=True):
    function = partial(hypergrad.hypergradient, inner, outer, solve=solve)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("name", ENOUGH)
def test_agrees_with_the_closed_form(double, name):
    inner, outer, delta, theta, closed, a = quadratic()
    solve = hypergrad.solver(name, ENOUGH[name], 0.2, RIDGE.get(name, 0.0))
    value, gradient, _ = run(inner, outer, solve)(delta, theta)
    np.testing.assert_allclose(gradient, closed(delta, jnp.linalg.inv(a)), rtol=1e-6)
    np.testing.assert_allclose(value, outer(delta, theta), rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_jit_changes_nothing(double, name):
    """Three iterations, where none but lu and nystrom has converged and a difference in the path would show."""
    inner, outer, delta, theta, *_ = quadratic()
    solve = hypergrad.solver(name, 3, 0.2, 0.3)
    eager, compiled = (run(inner, outer, solve, jit)(delta + 0.5, theta) for jit in (False, True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), tuple(eager), tuple(compiled))


def test_the_truncated_solvers_have_their_own_closed_forms(double):
    inner, outer, delta, theta, closed, a = quadratic()
    delta, eye, step = delta + 0.3, jnp.eye(6), 0.15
    power = [jnp.linalg.matrix_power(eye - step * a, j) for j in range(6)]
    forms = {
        "none": 0 * eye,
        "one_step": step * eye,
        "fixed_point": step * sum(power[:5]),
        "neumann": step * sum(power),
    }
    for name, inverse in forms.items():
        gradient = run(inner, outer, hypergrad.solver(name, 5, step))(delta, theta)[1]
        np.testing.assert_allclose(gradient, closed(delta, inverse), rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("name", IMPLICIT)
def test_ridge_shifts_the_matrix(double, name):
    inner, outer, delta, theta, closed, a = quadratic()
    found = run(inner, outer, hypergrad.solver(name, ENOUGH[name], 0.15, 0.7))(delta, theta)[1]
    np.testing.assert_allclose(found, closed(delta, jnp.linalg.inv(a + 0.7 * jnp.eye(6))), rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_nystrom_is_the_woodbury_inverse_of_a_low_rank_matrix(double, rank):
    """H of rank r is recovered whole by r columns; of full rank, r columns give H Ω (Ωᵀ H Ω)⁻¹ Ωᵀ H."""
    rng = np.random.default_rng(3)
    factor, b = jnp.asarray(rng.normal(size=(6, rank))), jnp.asarray(rng.normal(size=6))
    solve, low = hypergrad.solver("nystrom", rank, ridge=0.05), factor @ factor.T
    np.testing.assert_allclose(solve(lambda v: low @ v, b), jnp.linalg.solve(low + 0.05 * jnp.eye(6), b), rtol=1e-8)
    *_, a = quadratic()
    found = solve(lambda v: a @ v, b)
    omega = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, rank), jnp.float64))[0]
    dense = a @ omega @ jnp.linalg.inv(omega.T @ a @ omega) @ omega.T @ a
    np.testing.assert_allclose(found, jnp.linalg.solve(dense + 0.05 * jnp.eye(6), b), rtol=1e-8)


@pytest.fixture(scope="module")
def network():
    """A two-layer network, penalised so that the inner problem is strongly convex, solved by Newton steps."""
    with jax.enable_x64(True):
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
        return inner, loss, theta, delta, solution


def assert_slopes(gradient, value, theta, rtol):
    for place in [("a", 0, 0), ("a", 4, 6), ("b", 2, 1)]:
        step = jnp.zeros_like(theta[place[0]]).at[place[1:]].set(1e-5)
        ahead, behind = ({**theta, place[0]: theta[place[0]] + s * step} for s in (1, -1))
        difference = (value(ahead) - value(behind)) / 2e-5
        np.testing.assert_allclose(gradient[place[0]][place[1:]], difference, rtol=rtol)


@pytest.mark.parametrize("name", ENOUGH)
def test_agrees_with_central_differences_on_a_network(double, name, network):
    inner, loss, theta, delta, solution = network
    solve = hypergrad.solver(name, ENOUGH[name], 0.2, RIDGE.get(name, 0.0))
    gradient = run(inner, loss, solve)(delta, theta)[1]
    assert_slopes(gradient, jax.jit(lambda params: loss(solution(params), params)), theta, 2e-6)


@pytest.mark.parametrize("name", ["unrolled", "unrolled_remat"])
@pytest.mark.parametrize("steps", [3, 12])  # written out, and a loop
def test_unrolled_is_the_derivative_of_its_own_steps(double, name, steps, network):
    inner, loss, theta, delta, _ = network
    start = delta + 0.4

    @jax.jit
    def descended(params):
        last = start
        for _ in range(steps):
            last = last - 0.1 * (jax.grad(inner)(last, params) + 0.3 * last)
        return loss(last, params)

    value, gradient, _ = run(inner, loss, hypergrad.solver(name, steps, 0.1, 0.3))(start, theta)
    np.testing.assert_allclose(value, descended(theta), rtol=1e-12)
    assert_slopes(gradient, descended, theta, 1e-6)


@pytest.mark.parametrize("name", ["unrolled", "unrolled_remat"])
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_unrolled_at_a_stationary_point_is_fixed_point(double, name, steps, network):
    inner, loss, theta, delta, _ = network
    first, second = (run(inner, loss, hypergrad.solver(n, steps, 0.1))(delta, theta)[1] for n in (name, "fixed_point"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-13), first, second)


@pytest.fixture(scope="module")
def digits_hessian():
    """The inner Hessian of `cnn` on eight real digits (every fourth pixel), its product, and a right-hand side."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax initialises float32 statistics
        data = datasets.load("digits")
        images = to_float(data.x_train[:8, ::4, ::4]).astype(jnp.float64)
        model = models.create("cnn", (8, 8, 1), 10, jnp.float64)
        variables = jax.tree.map(lambda v: v.astype(jnp.float64), model.init(jax.random.key(0)))

        def inner(delta):
            logits = model.apply(variables, images + delta)[0]
            return jax.nn.log_softmax(logits)[jnp.arange(8), data.y_train[:8]].mean()

        delta = jax.random.normal(jax.random.key(1), (1, 8, 8, 1), jnp.float64) * 0.1
        product = jax.jit(lambda v: jax.jvp(jax.grad(inner), (delta,), (v,))[1])
        dense = jnp.stack([product(e.reshape(delta.shape)).ravel() for e in jnp.eye(64)])
        values = np.linalg.eigvalsh(dense)
        assert values[0] < -1e-3 and values[-1] > 1e-3  # indefinite without a ridge
        np.testing.assert_allclose(dense, dense.T, atol=1e-12)
        b = jax.random.normal(jax.random.key(2), delta.shape, jnp.float64)
        return lambda v: (dense @ v.ravel()).reshape(v.shape), np.asarray(dense), b


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLICIT)
def test_agrees_with_a_dense_solve_on_digits(double, name, digits_hessian):
    """With a ridge above the largest |eigenvalue|, to the tolerance that each solver states."""
    product, dense, b = digits_hessian
    values = np.linalg.eigvalsh(dense)
    ridge = float(2 * np.abs(values).max() + 0.1)
    expected = np.linalg.solve(dense + ridge * np.eye(64), b.ravel()).reshape(b.shape)
    rate = float(np.abs(values / ridge).max())  # the contraction q of the docstring at step 1 / ridge
    found = hypergrad.solver(name, 64 if name == "nystrom" else 30, 1 / ridge, ridge)(product, b)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    bound = {"fixed_point": rate**30, "neumann": rate**31}.get(name, 0.0)
    # ‖error‖ <= condition number (at most 3 here) times the relative residual, at which the solvers stop
    assert error <= bound + 3e-6


def test_minres_and_gmres_have_the_smallest_residual_of_an_indefinite_system(double, digits_hessian):
    sparse = pytest.importorskip("scipy.sparse.linalg")
    product, dense, b = digits_hessian

    def residual(u):
        return np.linalg.norm(dense @ np.ravel(u) - np.ravel(b)) / np.linalg.norm(b)

    last = 1.0
    for iterations in (2, 5, 12, 24):
        minres, gmres = (residual(hypergrad.solver(n, iterations)(product, b)) for n in ("minres", "gmres"))
        theirs = residual(sparse.minres(dense, np.ravel(b), rtol=1e-15, maxiter=iterations)[0])
        np.testing.assert_allclose([gmres, theirs], minres, rtol=1e-6)
        assert 1e-6 < minres < last
        last = minres


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_input(double, name, dtype):
    inner, outer, delta, theta, closed, a = quadratic(dtype=dtype)
    ridge = 0.01 if name == "nystrom" else 0.0
    value, gradient, report = run(inner, outer, hypergrad.solver(name, ENOUGH.get(name, 1), 0.2, ridge))(delta, theta)
    assert value.dtype == gradient.dtype == dtype
    if name in IMPLICIT:
        assert report.residual.dtype == dtype and report.converged
        inverse = jnp.linalg.inv(a + jnp.asarray(ridge, dtype) * jnp.eye(6, dtype=dtype))
        np.testing.assert_allclose(gradient, closed(delta, inverse), rtol=1e-4 if dtype == jnp.float32 else 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_perturbation_may_be_a_pytree(double, name):
    inner, outer, delta, theta, *_ = quadratic()
    join = lambda tree: jnp.concatenate([tree["u"], tree["v"].ravel()])  # noqa: E731
    solve = hypergrad.solver(name, 3, 0.2, 0.3)
    flat = run(inner, outer, solve)(delta + 0.5, theta)
    tree = {"u": (delta + 0.5)[:2], "v": (delta + 0.5)[2:].reshape(2, 2)}
    found = run(lambda d, p: inner(join(d), p), lambda d, p: outer(join(d), p), solve)(tree, theta)
    np.testing.assert_allclose(found[1], flat[1], rtol=1e-9)
    np.testing.assert_allclose(found[2].residual, flat[2].residual, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_vmap_over_perturbations_is_a_loop(double, name):
    inner, outer, delta, theta, *_ = quadratic()
    curved = lambda d, p: inner(d, p) + 0.1 * (d**4).sum()  # noqa: E731  another Hessian at every δ
    one = run(curved, outer, hypergrad.solver(name, 3, 0.1, 0.3))
    several = delta + jnp.asarray(np.random.default_rng(5).normal(size=(3, 6)))
    mapped = jax.vmap(one, (0, None))(several, theta)
    looped = jax.tree.map(lambda *leaves: jnp.stack(jnp.asarray(leaves)), *(one(d, theta) for d in several))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), tuple(mapped), tuple(looped))


@pytest.mark.parametrize("name", ALL)
def test_linear_in_the_cotangent(double, name):
    """E = s e(δ) + h(θ): the hypergradient is a line in s, and at s = 0 it is ∇h, solved exactly by u = 0."""
    inner, outer, delta, theta, *_ = quadratic()
    solve = hypergrad.solver(name, 3, 0.2, 0.3)

    def scaled(s):
        whole = lambda d, p: s * (outer(d, p) - 0.5 * (p**2).sum()) + 0.5 * (p**2).sum()  # noqa: E731
        return hypergrad.hypergradient(inner, whole, delta + 0.5, theta, solve)

    nothing, once, minus_twice = (scaled(s) for s in (0.0, 1.0, -2.0))
    np.testing.assert_allclose(nothing[1], theta, rtol=1e-12)
    np.testing.assert_allclose(minus_twice[1] - theta, -2 * (once[1] - theta), rtol=1e-8, atol=1e-12)
    assert name == "none" or np.abs(once[1] - theta).max() > 0.1
    if name in [*IMPLICIT, "one_step"]:
        assert nothing[2].residual == 0 and nothing[2].converged


def test_a_solver_of_ones_own_is_accepted(double):
    inner, outer, delta, theta, closed, a = quadratic()
    own = lambda matvec, b: jnp.linalg.solve(a, b)  # noqa: E731
    _, gradient, report = run(inner, outer, own)(delta, theta)
    np.testing.assert_allclose(gradient, closed(delta, jnp.linalg.inv(a)), rtol=1e-10)
    assert report.products == -1 and report.residual < 1e-12 and report.converged
