"""The implicit hypergradient of a bilevel problem, and the linear solvers for it. The only importer of jaxopt.

The problem: the outer loss E(δ, θ) is to fall in θ, where δ(θ) is a stationary point of the inner
objective g(δ, θ). With H = ∇²_δδ g and e = ∂E/∂δ, implicit differentiation gives

    ∇ψ = ∂E/∂θ − (∇²_θδ g) u,   H u = e                      (I-BAU, Zeng et al., ICLR 2022, Eq. 2-3)

The optimality function is F(δ, θ) = ∇_δ g; `jaxopt.implicit_diff.root_vjp` linearises it once in δ, hands
`solve(matvec, b)` the product with H, and takes one mixed product at the end. Inside the solver nothing is
differentiated with respect to θ. F(δ, θ) = 0 is not checked: I-BAU's δ is far from stationary.

Every solver has the signature `solve(matvec, b, *, iterations, step, ridge)`: `matvec` is the product with the
symmetric matrix H, `b` a pytree, `ridge` adds a multiple of the identity to H. A function of one's own with the
signature `solve(matvec, b)` goes straight to :func:`hypergradient`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bdjax.errors import InputError

with warnings.catch_warnings():  # jaxopt is archived and says so on import; it works, see pyproject.toml
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import implicit_diff, linear_solve

Matvec: TypeAlias = Callable[[Any], Any]
Solve: TypeAlias = Callable[[Matvec, Any], Any]
Objective: TypeAlias = Callable[[Any, Any], jax.Array]
"""(δ, θ) -> scalar."""


def hypergradient(
    inner: Objective,
    outer: Objective,
    inner_solution: Any,
    params: Any,
    solve: Solve,
    reduce: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[jax.Array, Any]:
    """Value of the outer loss and its total derivative in `params`, by implicit differentiation.

    Args:
      inner: g(δ, θ), of which δ is a minimiser (or any stationary point).
      outer: E(δ, θ).
      inner_solution: δ, a pytree; params: θ, a pytree.
      solve: `solve(matvec, b)`, an approximate solution of H u = b (see :func:`solver`).
      reduce: sums a pytree over devices when each of them holds a share of both losses
        (losses that add up to the whole); the matrix products are summed, so all devices solve one system.

    Returns:
      (E, dE/dθ as a pytree like `params`).
    """
    value, (cotangent, direct) = jax.value_and_grad(outer, (0, 1))(inner_solution, params)
    value, cotangent, direct = reduce((value, cotangent, direct))

    def summed(matvec: Matvec, b: Any) -> Any:
        return solve(lambda v: reduce(matvec(v)), b)

    (indirect,) = implicit_diff.root_vjp(jax.grad(inner), inner_solution, (params,), cotangent, summed)
    return value, jax.tree.map(jnp.add, direct, reduce(indirect))


def solver(name: str, iterations: int, step: jax.Array | float = 1.0, ridge: jax.Array | float = 0.0) -> Solve:
    """The solver `name` (a key of SOLVERS) with its settings filled in, as `solve(matvec, b)`.

    Raises InputError for an unknown name and for fewer than one iteration.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver {name!r}. Known: {', '.join(SOLVERS)}.")
    if iterations < 1:
        raise InputError(f"solver_iterations must be at least 1, got {iterations}.")
    return partial(SOLVERS[name], iterations=iterations, step=step, ridge=ridge)


def fixed_point(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any = 0.0) -> Any:
    """u_k+1 = u_k − step (H u_k − b) from u_0 = 0: step Σ_{j<K} (I − step H)^j b (Grazzi et al., ICML 2020).

    The first iteration multiplies a zero vector, so K iterations cost K − 1 products, as in I-BAU's release.
    Relative error q^K when q = ‖I − step H‖ < 1; it grows like q^K otherwise, for then nothing converges.
    """
    u = _scale(step, b)
    for _ in range(iterations - 1):
        residual = jax.tree.map(lambda hu, x, y: hu + ridge * x - y, matvec(u), u, b)
        u = jax.tree.map(lambda x, r: x - step * r, u, residual)
    return u


def neumann(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any = 0.0) -> Any:
    """The Neumann series step Σ_{j<=K} (I − step H)^j b, term by term (Lorraine et al., AISTATS 2020).

    K iterations cost K products and equal K + 1 of :func:`fixed_point`; relative error q^(K+1), q as there.
    """
    term = total = _scale(step, b)
    for _ in range(iterations):
        term = jax.tree.map(lambda x, hx: x - step * (hx + ridge * x), term, matvec(term))
        total = jax.tree.map(jnp.add, total, term)
    return total


def cg(matvec: Matvec, b: Any, *, iterations: int, step: Any = None, ridge: Any = 0.0) -> Any:
    """Conjugate gradients on H (jaxopt), stopped at relative residual 1e-6 or after K iterations of one product.

    Needs H + ridge I positive definite: on I-BAU's indefinite H without a ridge the result is erratic.
    """
    return linear_solve.solve_cg(matvec, b, ridge=ridge, tol=TOLERANCE, maxiter=iterations)


def normal_cg(matvec: Matvec, b: Any, *, iterations: int, step: Any = None, ridge: Any = 0.0) -> Any:
    """Conjugate gradients on the normal equations H² u = H b (jaxopt): two products an iteration, any regular H.

    Stopped at relative residual 1e-6 of the normal equations. `ridge` is added to H, not to H².
    """
    return linear_solve.solve_normal_cg(_ridged(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


TOLERANCE = 1e-6
SOLVERS: dict[str, Callable[..., Any]] = {
    "fixed_point": fixed_point,
    "neumann": neumann,
    "cg": cg,
    "normal_cg": normal_cg,
}


def _scale(factor: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: factor * x, tree)


def _ridged(matvec: Matvec, ridge: Any) -> Matvec:
    return lambda v: jax.tree.map(lambda hv, x: hv + ridge * x, matvec(v), v)
