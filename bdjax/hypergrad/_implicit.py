"""Hypergradient by implicit differentiation or by unrolled inner steps, with a report on the linear solve."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.hypergrad._jaxopt import implicit_diff
from bdjax.hypergrad._repeat import repeat
from bdjax.hypergrad._solvers import Solver, tolerance
from bdjax.hypergrad._tree import add, axpy, norm

Objective: TypeAlias = Callable[[Any, Any], jax.Array]
"""(δ, θ) -> scalar."""
Solve: TypeAlias = Callable[[Callable[[Any], Any], Any], Any]
"""`solve(matvec, b) -> u` with H u = b: a :class:`Solver` or a user-defined function."""


class Report(NamedTuple):
    """Cost and accuracy of the linear solve."""

    products: int
    """Largest number of Hessian-vector products of the solver; fewer are computed when a solver with a stopping
    criterion (cg, normal_cg, bicgstab, gmres) reaches its tolerance earlier. −1 for a user-defined function."""
    residual: jax.Array
    """‖(H + ridge I) u − e‖ / ‖e‖. It costs one more product, which XLA removes when the value is unused. NaN where
    no system is solved (none, unrolled)."""
    converged: jax.Array
    """Whether the residual is at most 1e-6 in float64, 1e-4 in float32."""
    solution: Any
    """u, a pytree like δ; None where no system is solved."""


def hypergradient(
    inner: Objective,
    outer: Objective,
    inner_solution: Any,
    params: Any,
    solve: Solve,
    reduce: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[jax.Array, Any, Report]:
    """Compute the outer loss, its total derivative in `params`, and a report on the linear solve.

    The map δ -> (∇_δ g, ∇_θ g) is linearised once, forward over reverse. H is symmetric, so the products H v and
    (∇²_θδ g) v of every later step are the two halves of that one linear map, and an unused half costs nothing. In
    units of a forward pass F of the inner batch (a gradient costs 3 F): 2 F for the linearisation, 2 F per product
    with H, 4 F for the mixed product, plus 3 F of the outer batch: 17 F for K = 5 fixed-point steps. `inner` must keep
    the BatchNorm statistics frozen: batch statistics would depend on δ, which changes H.

    The stationarity F(δ, θ) = ∇_δ g = 0 is not checked, because I-BAU's δ is far from stationary. The implicit
    function theorem is applied by `jaxopt.implicit_diff.root_vjp`.

    Args:
      inner: inner objective g(δ, θ), of which δ is a minimiser (or any stationary point); returns a scalar.
      outer: outer loss E(δ, θ); returns a scalar.
      inner_solution: δ, a pytree.
      params: θ, a pytree.
      solve: `solve(matvec, b) -> u`, an approximate solution of H u = b (see :func:`bdjax.hypergrad.solver`).
      reduce: sum of a pytree over devices, when the losses of the devices add up to the total losses. Matrix products
        are summed too, so all devices solve the same system.

    Returns:
      (E, dE/dθ as a pytree like `params`, :class:`Report`).

    Raises:
      InputError: when a loss is not a scalar or the solution has another shape than δ; outside jit also when the
        hypergradient is not finite.
    """
    for name, loss in (("inner", inner), ("outer", outer)):
        shape = getattr(jax.eval_shape(loss, inner_solution, params), "shape", None)
        if shape != ():
            raise InputError(f"{name}(δ, θ) must be a scalar, got {f'shape {shape}' if shape else 'a pytree'}.")
    if isinstance(solve, Solver) and solve.entry.unrolls:
        value, gradient, report = _unrolled(inner, outer, inner_solution, params, solve, reduce)
    else:
        value, gradient, report = _implicit(inner, outer, inner_solution, params, solve, reduce)
    _check_finite(gradient, solve)
    return value, gradient, report


def _implicit(
    inner: Objective, outer: Objective, delta: Any, params: Any, solve: Solve, reduce: Callable[[Any], Any]
) -> tuple[jax.Array, Any, Report]:
    """Hypergradient by the implicit function theorem with the given linear solver."""
    value, (cotangent, direct) = reduce(jax.value_and_grad(outer, (0, 1))(delta, params))
    if isinstance(solve, Solver) and not solve.entry.solves:
        return value, direct, _no_solve()
    (stationary, _), products = jax.linearize(lambda d: jax.grad(inner, (0, 1))(d, params), delta)
    solves: list[Any] = []

    def solve_once(matvec: Callable[[Any], Any], b: Any) -> Any:
        u = solve(lambda v: reduce(matvec(v)), b)
        _check_like(u, b)
        solves.append((u, matvec, b))
        return u

    @jax.custom_vjp
    def optimality(delta: Any, params: Any) -> Any:
        return stationary

    def forward(delta: Any, params: Any) -> tuple[Any, None]:
        return stationary, None

    def backward(_: None, v: Any) -> tuple[Any, Any]:
        return products(v)  # H is symmetric: its transpose is itself, that of ∇²_δθ g is the mixed product

    optimality.defvjp(forward, backward)
    (indirect,) = implicit_diff.root_vjp(optimality, delta, (params,), cotangent, solve_once)
    u, matvec, b = solves[0]
    b_norm = norm(b)
    residual_norm = norm(axpy(-1.0, b, axpy(getattr(solve, "ridge", 0.0), u, reduce(matvec(u)))))
    residual = residual_norm / jnp.where(b_norm > 0, b_norm, 1)  # e = 0 is solved by u = 0
    _check_finite((indirect, residual), solve)  # cg and similar solvers return u = 0 after a non-finite product
    count = solve.products(sum(leaf.size for leaf in jax.tree.leaves(b))) if isinstance(solve, Solver) else -1
    return value, add(direct, reduce(indirect)), Report(count, residual, residual <= tolerance(residual.dtype), u)


def _unrolled(
    inner: Objective, outer: Objective, delta: Any, params: Any, solve: Solver, reduce: Callable[[Any], Any]
) -> tuple[jax.Array, Any, Report]:
    """Reverse mode through T descent steps on g from δ (Shaban et al., AISTATS 2019: truncated back-propagation)."""

    def descend(delta: Any, params: Any) -> Any:
        return axpy(-solve.step, axpy(solve.ridge, delta, reduce(jax.grad(inner)(delta, params))), delta)

    descend = jax.checkpoint(descend) if solve.entry.remat else descend

    def unrolled_loss(params: Any) -> jax.Array:
        return outer(repeat(lambda last: descend(last, params), delta, solve.iterations), params)

    value, gradient = jax.value_and_grad(unrolled_loss)(params)
    return *reduce((value, gradient)), _no_solve()


def _no_solve() -> Report:
    return Report(0, jnp.float32(jnp.nan), jnp.bool_(False), None)


def _check_like(u: Any, b: Any) -> None:
    """Raise InputError unless the solution has the structure and shapes of the right-hand side."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (u, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the solver returned {shapes[0]}, but the right-hand side is {shapes[1]}. "
            "solve(matvec, b) must return a pytree like b."
        )


def _check_finite(gradient: Any, solve: Solve) -> None:
    """Raise InputError when a value is NaN or infinite; traced values are not checked."""
    leaves = jax.tree.leaves(gradient)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return  # inside jit, the residual in the report is NaN
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
        name = solve.name if isinstance(solve, Solver) else getattr(solve, "__name__", "user-defined")
        raise InputError(
            f"the hypergradient is not finite (solver {name}). Either a Hessian-vector product is not finite: check "
            "the images, labels and weights; or the solver diverged: use fewer iterations, a smaller step or a ridge."
        )
