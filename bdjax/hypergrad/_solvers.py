"""Table of linear solvers. Each is `solve(matvec, b, *, iterations, step, ridge) -> u` with (H + ridge I) u ≈ b.

`matvec` is the product with the symmetric matrix H, and `b` is a pytree. The docstring of a solver states which of
`iterations` (K), `step` (η) and `ridge` (ρ) it uses. Let λ be the eigenvalues of H + ridge I and q = max |1 − η λ|. On
I-BAU's problem λ has both signs, so q > 1, and solvers that need q < 1 or λ > 0 do not converge without a ridge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bdjax.errors import InputError
from bdjax.hypergrad._jaxopt import linear_solve
from bdjax.hypergrad._minres import minres
from bdjax.hypergrad._repeat import repeat
from bdjax.hypergrad._tree import add, axpy, scale
from bdjax.registry import load_file

Matvec: TypeAlias = Callable[[Any], Any]

TOLERANCE = 1e-6
"""Relative residual at which solvers with a stopping criterion stop."""
LARGEST_DENSE = 4096
"""Largest dimension for which `lu` stores H (4,096² values are 64 MiB in float32)."""


def _fixed_point(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Fixed-point iteration u_k+1 = u_k − η (H u_k − b) from u_0 = 0 (Grazzi et al., ICML 2020).

    Equals η Σ_{j<K} (I − ηH)^j b. The first iteration multiplies a zero vector, so K iterations cost K − 1 products,
    as in I-BAU's release. The relative error is q^K when q < 1; otherwise the iteration diverges like q^K.
    """
    matvec = _add_ridge(matvec, ridge)
    first = scale(step, b)
    return repeat(lambda u: axpy(-step, axpy(-1.0, b, matvec(u)), u), first, iterations - 1)


def _neumann(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Truncated Neumann series η Σ_{j<=K} (I − ηH)^j b (Lorraine et al., AISTATS 2020).

    K iterations cost K products and equal K + 1 fixed-point iterations; the relative error is q^(K+1).
    """
    matvec = _add_ridge(matvec, ridge)

    def add_term(state: tuple[Any, Any]) -> tuple[Any, Any]:
        term = axpy(-step, matvec(state[0]), state[0])
        return term, add(state[1], term)

    first = scale(step, b)
    return repeat(add_term, (first, first), iterations)[1]


def _one_step(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """One-step approximation u = η b (Bolte et al., NeurIPS 2023): no product; the relative error is q."""
    return scale(step, b)


def _cg(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Conjugate gradients on H (jaxopt), up to relative residual 1e-6 or K iterations of one product each.

    Requires H + ridge I positive definite: on I-BAU's indefinite H the result without a ridge is erratic.
    """
    return linear_solve.solve_cg(_add_ridge(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def _normal_cg(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Conjugate gradients on the normal equations H² u = H b (jaxopt), for any nonsingular H.

    Two products per iteration, up to relative residual 1e-6 of the normal equations. `ridge` is added to H, not to H².
    """
    return linear_solve.solve_normal_cg(_add_ridge(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def _gmres(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """GMRES (jaxopt), one cycle of K iterations: minimises the residual in the Krylov space, for any nonsingular H.

    Stores K vectors like b (MINRES reaches the same residual with seven). Stops at relative residual 1e-6.
    """
    return linear_solve.solve_gmres(
        _add_ridge(matvec, ridge), b, tol=TOLERANCE, restart=iterations, maxiter=1, solve_method="incremental"
    )


def _bicgstab(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Stabilised bi-conjugate gradients (jaxopt), two products per iteration; no guarantee when λ has both signs."""
    return linear_solve.solve_bicgstab(_add_ridge(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def _minres(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """MINRES (Paige and Saunders, 1975): minimises the residual in the Krylov space of a symmetric, indefinite H.

    One product per iteration, seven stored vectors. Stops at relative residual 1e-6.
    """
    flat, unravel = ravel_pytree(b)
    matvec = _add_ridge(matvec, ridge)
    return unravel(minres(lambda v: ravel_pytree(matvec(unravel(v)))[0], flat, iterations, TOLERANCE))


def _lu(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """LU factorisation (jaxopt) of the d x d matrix H, computed column by column: exact, for d <= 4,096 values of δ.

    Costs d products, independent of K. The only solver that stores H. Raises InputError for a larger d.
    """
    flat, unravel = ravel_pytree(b)
    if flat.size > LARGEST_DENSE:
        raise InputError(
            f"solver lu stores H, which is {flat.size} x {flat.size} here; it goes up to {LARGEST_DENSE}. "
            "Use minres or gmres, or smaller images."
        )
    matvec = _add_ridge(matvec, ridge)
    dense = jax.lax.map(lambda v: ravel_pytree(matvec(unravel(v)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return unravel(linear_solve.solve_lu(lambda v: dense.T @ v, flat))


def _nystrom(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Nyström approximation (ρ I + Y (ΩᵀY)⁻¹ Yᵀ)⁻¹ b with Y = HΩ and ρ = ridge > 0 (Hataya and Yamada, AISTATS 2023).

    Ω has K Gaussian columns, drawn from a fixed key. By the Woodbury identity the result is
    b/ρ − Y (ρ ΩᵀY + YᵀY)⁻¹ Yᵀ b/ρ: K independent products, K vectors like b. Exact for K = d; suited to a low-rank,
    nearly positive H. The paper samples K columns of H; here each Gaussian column of Ω mixes all columns of H.
    """
    flat, unravel = ravel_pytree(b)
    count = min(iterations, flat.size)
    directions = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (flat.size, count), flat.dtype))[0].T  # [K, d]
    images = jax.lax.map(lambda v: ravel_pytree(matvec(unravel(v)))[0], directions)  # Yᵀ
    rho, core = jnp.asarray(ridge, flat.dtype), directions @ images.T
    small = rho * (core + core.T) / 2 + images @ images.T
    return unravel((flat - images.T @ jnp.linalg.solve(small, images @ flat)) / rho)


def _none(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Direct gradient alone (u = 0), exact when δ is an interior optimum of the same loss (Danskin's theorem)."""
    return scale(0.0, b)


def _unrolled(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Placeholder of the unrolled solver: T = K more descent steps of size η on g from δ, differentiated in reverse.

    The outer loss is evaluated at the last step. At a stationary δ the result equals that of the fixed-point solver.
    Memory grows with T; `unrolled_remat` recomputes each step in the backward pass (jax.checkpoint) and stores only δ.
    """
    raise InputError("solver unrolled differentiates inner steps; it cannot be called as solve(matvec, b).")


class Entry(NamedTuple):
    """Entry of :data:`SOLVERS`: a solver function and its properties."""

    function: Callable[..., Any]
    products: Callable[[int, int], int]
    """(K, d) -> largest number of Hessian-vector products for a δ of d values; −1 when unknown."""
    iterates: bool = True
    """Whether the solver uses K."""
    solves: bool = True
    """Whether a linear system is solved; False for `none`, which omits the indirect term."""
    needs_ridge: bool = False
    """Whether the ridge must be positive."""
    unrolls: bool = False
    """Whether the solver differentiates unrolled inner steps instead of solving a system."""
    remat: bool = False
    """Whether each unrolled step is recomputed in the backward pass."""


SOLVERS: dict[str, Entry] = {  # the initial residual of jaxopt's solvers costs one product
    "fixed_point": Entry(_fixed_point, lambda k, d: k - 1),
    "neumann": Entry(_neumann, lambda k, d: k),
    "one_step": Entry(_one_step, lambda k, d: 0, iterates=False),
    "none": Entry(_none, lambda k, d: 0, iterates=False, solves=False),
    "cg": Entry(_cg, lambda k, d: k + 1),
    "normal_cg": Entry(_normal_cg, lambda k, d: 2 * k + 3),
    "gmres": Entry(_gmres, lambda k, d: k + 2),
    "bicgstab": Entry(_bicgstab, lambda k, d: 2 * k + 1),
    "minres": Entry(_minres, lambda k, d: k),
    "lu": Entry(_lu, lambda k, d: d, iterates=False),
    "nystrom": Entry(_nystrom, min, needs_ridge=True),
    "unrolled": Entry(_unrolled, lambda k, d: 0, unrolls=True),
    "unrolled_remat": Entry(_unrolled, lambda k, d: 0, unrolls=True, remat=True),
}
"""All named solvers; add a new solver here."""


def iterates(name: str) -> bool:
    """Whether the solver `name` uses the number of iterations K; True for user-defined files."""
    return name not in SOLVERS or SOLVERS[name].iterates


def tolerance(dtype: Any) -> float:
    """Return the relative residual below which a solution counts as converged: 1e-6 in float64, else 1e-4."""
    return TOLERANCE if dtype == jnp.float64 else 100 * TOLERANCE


@dataclass(frozen=True)
class Solver:
    """A solver with its settings, called as `solve(matvec, b)`."""

    name: str
    """A key of :data:`SOLVERS`, or the path of a .py file that defines `solve(matvec, b)`."""
    iterations: int
    """K, the number of iterations; the solver's docstring says what it counts."""
    step: Any = 1.0
    """Step size η, where the solver uses one; may be traced."""
    ridge: Any = 0.0
    """ρ, added to H; may be traced."""

    def __call__(self, matvec: Matvec, b: Any) -> Any:
        """Return an approximate solution u of (H + ridge I) u = b."""
        return self.entry.function(matvec, b, iterations=self.iterations, step=self.step, ridge=self.ridge)

    def products(self, size: int) -> int:
        """Return the largest number of Hessian-vector products for a δ of `size` values; −1 for user-defined files."""
        return self.entry.products(self.iterations, size)

    @property
    def entry(self) -> Entry:
        """The solver's function and properties."""
        return _entry(self.name)


def solver(name: str, iterations: int, step: jax.Array | float = 1.0, ridge: jax.Array | float = 0.0) -> Solver:
    """Return the solver `name` with its settings.

    Args:
      name: key of :data:`SOLVERS`, or the path of a .py file that defines `solve(matvec, b) -> u`. The ridge is already
        part of the file's `matvec`; the file ignores `iterations` and `step`.
      iterations: K, at least 1.
      step: step size η > 0; may be traced.
      ridge: ρ >= 0, added to the diagonal of H; may be traced.

    Returns:
      A :class:`Solver`.

    Raises:
      InputError: when :func:`check` refuses a setting; traced values are not checked.
    """
    check(name, iterations, *(None if isinstance(v, jax.core.Tracer) else float(v) for v in (step, ridge)))
    return Solver(name, iterations, step, ridge)


def check(name: str, iterations: int, step: float | None, ridge: float | None) -> None:
    """Validate the settings of a solver.

    Args:
      name: key of :data:`SOLVERS`, or the path of a .py file.
      iterations: K.
      step: step size η; None when it is traced.
      ridge: ρ; None when it is traced.

    Raises:
      InputError: when the name is unknown, K < 1, the step or ridge is out of range, or nystrom has no ridge.
    """
    entry = _entry(name)
    if iterations < 1:
        raise InputError(f"the solver's iterations must be at least 1, got {iterations}.")
    if step is not None and not 0 < step < math.inf:
        raise InputError(f"the solver's step must be positive and finite, got {step}.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise InputError(f"the ridge must be zero or more and finite, got {ridge}.")
    if entry.needs_ridge and ridge == 0:
        raise InputError(f"solver {name} needs a ridge > 0, the ρ that its low-rank matrix is added to; got 0.")


def _entry(name: str) -> Entry:
    """Return the table entry of a solver; a .py file is loaded."""
    if name in SOLVERS:
        return SOLVERS[name]
    if not name.endswith(".py"):
        raise InputError(f"unknown solver {name!r}. Known: {', '.join(SOLVERS)}; or the path of a .py file.")
    function = getattr(load_file(Path(name)), "solve", None)
    if function is None:
        raise InputError(f"{name} defines no solve(matvec, b).")
    return Entry(lambda matvec, b, *, iterations, step, ridge: function(_add_ridge(matvec, ridge), b), lambda k, d: -1)


def _add_ridge(matvec: Matvec, ridge: Any) -> Matvec:
    """Return the product with H + ridge I."""
    if not isinstance(ridge, jax.core.Tracer) and ridge == 0:
        return matvec
    return lambda v: axpy(ridge, v, matvec(v))
