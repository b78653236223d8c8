"""The hypergradient of a bilevel problem in float64, and what its Hessian is like: what solvers are compared with."""

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

_CHUNK = 16  # columns of the dense H at a time


@dataclass(frozen=True)
class Reference:
    """The hypergradient in float64, and the system H u = −e that it was solved from."""

    gradient: np.ndarray
    facts: dict[str, Any]
    """JSON-able: the method, its residual and seconds; where H is dense, its eigenvalues."""
    product: Callable[[np.ndarray], np.ndarray]
    """v -> H v in float64."""
    right: np.ndarray
    """What the solvers are given, −e."""

    def residual(self, u: np.ndarray, ridge: float) -> float:
        """Of the system that a solver was asked to solve, with its own ridge."""
        return float(np.linalg.norm(self.product(u) + ridge * u - self.right) / np.linalg.norm(self.right))


def reference_of(
    victim: Victim, config: ibau.Config, problem: ibau.Problem, tick: Callable[[str, int, int], None]
) -> Reference:
    """The hypergradient of `problem`, of the config's ridge: by a dense H up to lu's limit, else by 2,000 MINRES steps.

    H is filled in float32 and its solution refined with float64 products until the residual is 1e-10; where that does
    not converge (a condition number beyond 1e6), H is filled in float64.
    """
    begin = time.perf_counter()
    with _double():
        single = _Precision(victim.model, problem, victim.variables["params"])
        double = _in_double(victim, problem)
        right = double.right()
        if right.size <= hypergrad.LARGEST_DENSE:
            matrix, found, method = _solved_densely(single, double, right, config.ridge, tick)
            facts = {"method": method, **_spectrum(matrix, config)}
            solve: Callable = lambda matvec, b: jnp.asarray(found.reshape(b.shape))  # noqa: E731
        else:
            facts = {"method": "minres, 2000 iterations, float64"}
            solve = hypergrad.solver("minres", 2000, 1.0, config.ridge)
        gradient, solution, _ = gradient_of(double.model, double.problem, double.params, solve)
    reference = Reference(flat(gradient), facts, double.product, right)
    facts["residual"] = reference.residual(flat(solution), config.ridge)
    facts["seconds"] = time.perf_counter() - begin
    return reference


def gradient_of(model: Model, problem: ibau.Problem, params: Any, solve: Callable) -> tuple[Any, Any, Callable]:
    """(hypergradient, u, the compiled program); the residual of its report costs a product and is not computed."""

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
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@dataclass(frozen=True)
class _Precision:
    """The problem in one floating-point precision, that of its model, δ and θ."""

    model: Model
    problem: ibau.Problem
    params: Any

    @cached_property
    def _program(self) -> Callable:
        def run(vectors: Any, delta: Any, params: Any, arrays: Any) -> Any:
            inner = self.problem.build(self.model, arrays)[0]
            product = jax.linearize(lambda d: jax.grad(inner)(d, params), delta)[1]
            return jax.vmap(lambda v: product(v.astype(delta.dtype).reshape(delta.shape)).ravel())(vectors)

        return jax.jit(run)

    def products(self, vectors: np.ndarray) -> np.ndarray:
        """[n, d] -> H v of each row v."""
        with _double():
            found = self._program(vectors, self.problem.delta, self.params, self.problem.arrays)
            return np.asarray(found, np.float64)

    def product(self, v: np.ndarray) -> np.ndarray:
        """[d] -> H v."""
        return self.products(v[None])[0]

    def right(self) -> np.ndarray:
        """−e [d], the right-hand side."""
        problem = self.problem
        slope = jax.jit(lambda params, arrays: jax.grad(problem.build(self.model, arrays)[1])(problem.delta, params))
        return -flat(slope(self.params, problem.arrays))

    def hessian(self, tick: Callable[[str, int, int], None]) -> np.ndarray:
        """H [d, d], made symmetric; some columns at a time, the last ones padded with zeros to that number."""
        size = self.problem.delta.size
        filled = np.zeros((size, size))
        for start in range(0, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            rows = np.zeros((_CHUNK, size))
            rows[np.arange(stop - start), np.arange(start, stop)] = 1
            filled[start:stop] = self.products(rows)[: stop - start]
            tick("reference", stop, size)
        return (filled + filled.T) / 2


def _in_double(victim: Victim, problem: ibau.Problem) -> _Precision:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)

    model = models.as_dtype(victim.model, jnp.float64)
    shared = {**problem.arrays["shared"], "batch_stats": cast(victim.variables["batch_stats"])}
    arrays = {**problem.arrays, "shared": shared}
    return _Precision(
        model, problem._replace(arrays=arrays, delta=cast(problem.delta)), cast(victim.variables["params"])
    )


def _solved_densely(
    single: _Precision, double: _Precision, right: np.ndarray, ridge: float, tick: Callable[[str, int, int], None]
) -> tuple[np.ndarray, np.ndarray, str]:
    """(H, the solution of (H + ridge I) u = right, how it was found)."""
    shift = ridge * np.eye(right.size)
    matrix = single.hessian(tick)
    found, residual = _refined(matrix + shift, double.product, right, ridge)
    if residual > 1e-8:
        matrix = double.hessian(tick)
        return matrix, np.linalg.solve(matrix + shift, right), "dense, float64"
    return matrix, found, "dense, refined in float64"


def _refined(
    matrix: np.ndarray, product: Callable[[np.ndarray], np.ndarray], right: np.ndarray, ridge: float
) -> tuple[np.ndarray, float]:
    """Iterative refinement: (solution, relative residual) of the system whose exact product is `product` + ridge."""
    factors = scipy.linalg.lu_factor(matrix)
    found, missing = np.zeros_like(right), right
    for _ in range(20):
        found = found + scipy.linalg.lu_solve(factors, missing)
        missing = right - product(found) - ridge * found
        if np.linalg.norm(missing) <= 1e-10 * np.linalg.norm(right):
            break
    return found, float(np.linalg.norm(missing) / np.linalg.norm(right))


def _spectrum(matrix: np.ndarray, config: ibau.Config) -> dict[str, Any]:
    """The eigenvalues of H, and what the ridge and the step make of them."""
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
