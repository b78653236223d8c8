"""The reference that solvers are compared with: a hypergradient in float64, and the spectrum of its Hessian."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from bdjax import hypergrad, models
from bdjax.defenses import ibau
from bdjax.types import Model, Victim

_CHUNK = 16  # columns of the dense H that are computed together


@dataclass(frozen=True)
class Reference:
    """The hypergradient in float64, and the system H u = −e that it was solved from."""

    gradient: np.ndarray
    facts: dict[str, Any]
    """JSON values: the method, its residual and seconds and, for a dense H, its eigenvalues."""
    product: Callable[[np.ndarray], np.ndarray]
    """v -> H v in float64."""
    right: np.ndarray
    """The right-hand side, −e."""

    def residual(self, u: np.ndarray, ridge: float) -> float:
        """Relative residual of a solution u of the system with a solver's own ridge."""
        return float(np.linalg.norm(self.product(u) + ridge * u - self.right) / np.linalg.norm(self.right))


def reference_of(
    victim: Victim, config: ibau.Config, problem: ibau.Problem, tick: Callable[[str, int, int], None]
) -> Reference:
    """Compute the hypergradient of a problem in float64, by a dense H up to LU's limit, else by 2,000 MINRES steps.

    H is computed in float32 and the solution refined with float64 products until the residual is 1e-10; where that does
    not converge (a condition number above 1e6), H is computed in float64.

    Args:
      victim: the model.
      config: I-BAU's; its ridge belongs to the system.
      problem: the bilevel problem of I-BAU's first step.
      tick: called with the progress.

    Returns:
      The reference.
    """
    begin = time.perf_counter()
    with _double():
        single = _Precision(victim.model, problem, victim.variables["params"])
        double = _in_double(victim, problem)
        right = double.right()
        if right.size <= hypergrad.LARGEST_DENSE:
            matrix, exact, method = _solve_densely(single, double, right, config.ridge, tick)
            facts = {"method": method, **_spectrum(matrix, config)}
            solve: Callable[..., Any] = lambda matvec, b: jnp.asarray(exact.reshape(b.shape))  # noqa: E731
        else:
            facts = {"method": "minres, 2000 iterations, float64"}
            solve = hypergrad.solver("minres", 2000, 1.0, config.ridge)
        gradient, solution, _ = gradient_of(double.model, double.problem, double.params, solve)
    reference = Reference(flat(gradient), facts, double.product, right)
    facts["residual"] = reference.residual(flat(solution), config.ridge)
    facts["seconds"] = time.perf_counter() - begin
    return reference


def gradient_of(
    model: Model, problem: ibau.Problem, params: Any, solve: Callable[..., Any]
) -> tuple[Any, Any, Callable[..., Any]]:
    """Compute the hypergradient of a problem with a solver.

    The residual that the report of :func:`bdjax.hypergrad.hypergradient` offers costs a product and is not computed.

    Args:
      model: the network.
      problem: the bilevel problem.
      params: θ.
      solve: the linear solver.

    Returns:
      (hypergradient, solution u, the compiled program).
    """

    def run(delta: Any, params: Any, arrays: Any) -> Any:
        _, gradient, report = hypergrad.hypergradient(*problem.build(model, arrays), delta, params, solve)
        return gradient, report.solution

    program = jax.jit(run).lower(problem.delta, params, problem.arrays).compile()
    return *jax.block_until_ready(program(problem.delta, params, problem.arrays)), program


def flat(tree: Any) -> np.ndarray:
    """All leaves of a pytree as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@contextmanager
def _double() -> Iterator[None]:
    """Compute in float64 within the block."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@dataclass(frozen=True)
class _Precision:
    """The problem in the floating-point precision of its model, δ and θ."""

    model: Model
    problem: ibau.Problem
    params: Any

    @cached_property
    def _program(self) -> Callable[..., Any]:
        def run(vectors: Any, delta: Any, params: Any, arrays: Any) -> Any:
            inner = self.problem.build(self.model, arrays)[0]
            product = jax.linearize(lambda d: jax.grad(inner)(d, params), delta)[1]
            return jax.vmap(lambda v: product(v.astype(delta.dtype).reshape(delta.shape)).ravel())(vectors)

        return jax.jit(run)

    def products(self, vectors: np.ndarray) -> np.ndarray:
        """H v for each row v of [n, d], float64 [n, d]."""
        with _double():
            products = self._program(vectors, self.problem.delta, self.params, self.problem.arrays)
            return np.asarray(products, np.float64)

    def product(self, v: np.ndarray) -> np.ndarray:
        """H v of one vector v, float64 [d]."""
        product: np.ndarray = self.products(v[None])[0]
        return product

    def right(self) -> np.ndarray:
        """The right-hand side, −e, float64 [d]."""
        problem = self.problem
        slope = jax.jit(lambda params, arrays: jax.grad(problem.build(self.model, arrays)[1])(problem.delta, params))
        return -flat(slope(self.params, problem.arrays))

    def hessian(self, tick: Callable[[str, int, int], None]) -> np.ndarray:
        """H, float64 [d, d], symmetrised; computed some columns at a time, the last ones padded with zeros."""
        size = self.problem.delta.size
        matrix = np.zeros((size, size))
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            rows = np.zeros((_CHUNK, size))
            rows[np.arange(stop - start), np.arange(start, stop)] = 1
            matrix[start:stop] = self.products(rows)[: stop - start]
            tick("reference", stop, size)
        return (matrix + matrix.T) / 2


def _in_double(victim: Victim, problem: ibau.Problem) -> _Precision:
    """The problem in float64."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)

    model = models.as_dtype(victim.model, jnp.float64)
    shared = {**problem.arrays["shared"], "batch_stats": cast(victim.variables["batch_stats"])}
    arrays = {**problem.arrays, "shared": shared}
    return _Precision(
        model, problem._replace(arrays=arrays, delta=cast(problem.delta)), cast(victim.variables["params"])
    )


def _solve_densely(
    single: _Precision, double: _Precision, right: np.ndarray, ridge: float, tick: Callable[[str, int, int], None]
) -> tuple[np.ndarray, np.ndarray, str]:
    """(H, the solution of (H + ridge I) u = right, name of the method)."""
    shift = ridge * np.eye(right.size)
    matrix = single.hessian(tick)
    solution, residual = _refine(matrix + shift, double.product, right, ridge)
    if residual > 1e-8:
        matrix = double.hessian(tick)
        return matrix, np.linalg.solve(matrix + shift, right), "dense, float64"
    return matrix, solution, "dense, refined in float64"


def _refine(
    matrix: np.ndarray, product: Callable[[np.ndarray], np.ndarray], right: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """Solve by iterative refinement with exact products `product` + ridge; return (solution, relative residual)."""
    factors = scipy.linalg.lu_factor(matrix)
    solution, residual = np.zeros_like(right), right
    for _ in range(20):
        solution = solution + scipy.linalg.lu_solve(factors, residual)
        residual = right - product(solution) - ridge * solution
        if np.linalg.norm(residual) <= 1e-10 * np.linalg.norm(right):
            break
    return solution, float(np.linalg.norm(residual) / np.linalg.norm(right))


def _spectrum(matrix: np.ndarray, config: ibau.Config) -> dict[str, Any]:
    """Facts about the eigenvalues of H, with the ridge and the step of the config."""
    values = np.linalg.eigvalsh(matrix)
    shifted = np.abs(values + config.ridge)
    return {
        "eigenvalue_min": float(values[0]),
        "eigenvalue_max": float(values[-1]),
        "negative_eigenvalues": int((values < 0).sum()),
        "eigenvalues_below_1e-3": int((shifted < 1e-3).sum()),
        "condition": float(shifted.max() / shifted.min()),
        "contraction": float(np.abs(1 - np.float64(config.solver_step or 0) * (values + config.ridge)).max()),
    }
