"""The linear solvers by name. Each is `solve(matvec, b, *, iterations, step, ridge) -> u` with (H + ridge I) u ≈ b.

`matvec` is the product with the symmetric matrix H, `b` a pytree. A solver uses of `iterations` (K), `step` (η) and
`ridge` what its docstring names. With λ the eigenvalues of H + ridge I and q = max |1 − η λ|: on I-BAU's problem λ has
both signs, so q > 1 and what needs q < 1 or λ > 0 does not converge there without a ridge.
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
"""Relative residual at which the solvers that watch it stop."""
LARGEST_DENSE = 4096
"""Largest dimension for which `lu` stores H (4,096 squared is 64 MiB in float32)."""


def fixed_point(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """u_k+1 = u_k − η (H u_k − b) from u_0 = 0: η Σ_{j<K} (I − ηH)^j b (Grazzi et al., ICML 2020).

    The first iteration multiplies a zero vector, so K iterations cost K − 1 products, as in I-BAU's release.
    Relative error q^K when q < 1; it grows like q^K otherwise, for then nothing converges.
    """
    matvec = _ridged(matvec, ridge)
    first = scale(step, b)
    return repeat(lambda u: axpy(-step, axpy(-1.0, b, matvec(u)), u), first, iterations - 1)


def neumann(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """The Neumann series η Σ_{j<=K} (I − ηH)^j b, term by term (Lorraine et al., AISTATS 2020).

    K iterations cost K products and equal K + 1 of :func:`fixed_point`; relative error q^(K+1), q as there.
    """
    matvec = _ridged(matvec, ridge)

    def more(state: tuple[Any, Any]) -> tuple[Any, Any]:
        term = axpy(-step, matvec(state[0]), state[0])
        return term, add(state[1], term)

    first = scale(step, b)
    return repeat(more, (first, first), iterations)[1]


def one_step(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """u = η b: the identity in place of the inverse (Bolte et al., NeurIPS 2023). No product; relative error q."""
    return scale(step, b)


def cg(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Conjugate gradients on H (jaxopt), stopped at relative residual 1e-6 or after K iterations of one product.

    Needs H + ridge I positive definite: on I-BAU's indefinite H without a ridge the result is erratic.
    """
    return linear_solve.solve_cg(_ridged(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def normal_cg(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Conjugate gradients on the normal equations H² u = H b (jaxopt): two products an iteration, any regular H.

    Stopped at relative residual 1e-6 of the normal equations. `ridge` is added to H, not to H².
    """
    return linear_solve.solve_normal_cg(_ridged(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def gmres(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """GMRES (jaxopt), one cycle of K iterations: the smallest residual in the Krylov space, for any regular H.

    Keeps K vectors like b (:func:`minres` reaches the same residual with seven). Stopped at relative residual 1e-6.
    """
    return linear_solve.solve_gmres(
        _ridged(matvec, ridge), b, tol=TOLERANCE, restart=iterations, maxiter=1, solve_method="incremental"
    )


def bicgstab(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Stabilised bi-conjugate gradients (jaxopt), two products an iteration; no guarantee when λ has both signs."""
    return linear_solve.solve_bicgstab(_ridged(matvec, ridge), b, tol=TOLERANCE, maxiter=iterations)


def _minres(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """MINRES (Paige and Saunders, 1975): the smallest residual in the Krylov space of a symmetric, indefinite H.

    One product an iteration, seven vectors. Stopped at relative residual 1e-6.
    """
    flat, unravel = ravel_pytree(b)
    matvec = _ridged(matvec, ridge)
    return unravel(minres(lambda v: ravel_pytree(matvec(unravel(v)))[0], flat, iterations, TOLERANCE))


def lu(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """The d x d matrix H, column by column, and its LU factors (jaxopt): exact, for d <= 4,096 values of δ.

    d products, whatever K says. The only solver that stores H. Raises InputError for a larger d.
    """
    flat, unravel = ravel_pytree(b)
    if flat.size > LARGEST_DENSE:
        raise InputError(
            f"solver lu stores H, which is {flat.size} x {flat.size} here; it goes up to {LARGEST_DENSE}. "
            "Use minres or gmres, or smaller images."
        )
    matvec = _ridged(matvec, ridge)
    dense = jax.lax.map(lambda v: ravel_pytree(matvec(unravel(v)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return unravel(linear_solve.solve_lu(lambda v: dense.T @ v, flat))


def nystrom(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """(ρ I + Y (ΩᵀY)⁻¹ Yᵀ)⁻¹ b with Y = HΩ, Ω of K Gaussian columns, ρ = ridge > 0 (Hataya and Yamada, AISTATS 2023).

    By Woodbury b/ρ − Y (ρ ΩᵀY + YᵀY)⁻¹ Yᵀ b/ρ: K products that do not depend on each other, K vectors like b.
    Exact for K = d; a low-rank, nearly positive H is what it is made for. Ω is drawn from a fixed key. The paper takes
    K columns of H; a Gaussian Ω sees all of H with each of them.
    """
    flat, unravel = ravel_pytree(b)
    count = min(iterations, flat.size)
    directions = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (flat.size, count), flat.dtype))[0].T  # [K, d]
    images = jax.lax.map(lambda v: ravel_pytree(matvec(unravel(v)))[0], directions)  # Yᵀ
    rho, core = jnp.asarray(ridge, flat.dtype), directions @ images.T
    small = rho * (core + core.T) / 2 + images @ images.T
    return unravel((flat - images.T @ jnp.linalg.solve(small, images @ flat)) / rho)


def none(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """u = 0: the direct gradient alone, right when δ is an exact interior solution of the same loss (Danskin)."""
    return scale(0.0, b)


def unrolled(matvec: Matvec, b: Any, *, iterations: int, step: Any, ridge: Any) -> Any:
    """Not a linear solve: T = K more descent steps of size η on g from δ, differentiated in reverse.

    The outer loss is taken where they end. At a stationary δ equal to :func:`fixed_point`. Memory grows with T;
    `unrolled_remat` computes each step anew in the backward pass (jax.checkpoint) and keeps only its δ.
    """
    raise InputError("solver unrolled differentiates inner steps; it cannot be called as solve(matvec, b).")


class Entry(NamedTuple):
    """A solver in :data:`SOLVERS`: its function, and what is known of it."""

    function: Callable[..., Any]
    products: Callable[[int, int], int]
    """(K, d) -> Hessian-vector products for a δ of d values, at most; −1: not known."""
    iterates: bool = True
    """Whether K means anything to it."""
    solves: bool = True
    """False for `none`, which leaves the indirect term away."""
    needs_ridge: bool = False
    """Whether the ridge must be positive."""
    unrolls: bool = False
    """Whether it differentiates inner steps and solves nothing."""
    remat: bool = False
    """Whether each unrolled step is computed anew in the backward pass."""


SOLVERS: dict[str, Entry] = {  # the first residual of jaxopt's costs a product
    "fixed_point": Entry(fixed_point, lambda k, d: k - 1),
    "neumann": Entry(neumann, lambda k, d: k),
    "one_step": Entry(one_step, lambda k, d: 0, iterates=False),
    "none": Entry(none, lambda k, d: 0, iterates=False, solves=False),
    "cg": Entry(cg, lambda k, d: k + 1),
    "normal_cg": Entry(normal_cg, lambda k, d: 2 * k + 3),
    "gmres": Entry(gmres, lambda k, d: k + 2),
    "bicgstab": Entry(bicgstab, lambda k, d: 2 * k + 1),
    "minres": Entry(_minres, lambda k, d: k),
    "lu": Entry(lu, lambda k, d: d, iterates=False),
    "nystrom": Entry(nystrom, min, needs_ridge=True),
    "unrolled": Entry(unrolled, lambda k, d: 0, unrolls=True),
    "unrolled_remat": Entry(unrolled, lambda k, d: 0, unrolls=True, remat=True),
}
"""The named solvers; a new one is entered here and nowhere else."""


def iterates(name: str) -> bool:
    """Whether the iterations K mean anything to the solver `name`; a file of one's own may use them."""
    return name not in SOLVERS or SOLVERS[name].iterates


def tolerance(dtype: Any) -> float:
    """Relative residual up to which a solution of this dtype counts as converged: 1e-6 in float64, else 1e-4."""
    return TOLERANCE if dtype == jnp.float64 else 100 * TOLERANCE


@dataclass(frozen=True)
class Solver:
    """A named solver with its settings: call it as `solve(matvec, b)`."""

    name: str
    """A key of :data:`SOLVERS`, or the path of a .py file that defines `solve(matvec, b)`."""
    iterations: int
    """K; see the solver's docstring for what it counts."""
    step: Any = 1.0
    """η, where the solver takes one; may be traced."""
    ridge: Any = 0.0
    """ρ, added to H; may be traced."""

    def __call__(self, matvec: Matvec, b: Any) -> Any:
        """Approximate solution u of (H + ridge I) u = b."""
        return self.entry.function(matvec, b, iterations=self.iterations, step=self.step, ridge=self.ridge)

    def products(self, size: int) -> int:
        """Hessian-vector products for a δ of `size` values, at most; −1 for a file of one's own."""
        return self.entry.products(self.iterations, size)

    @property
    def entry(self) -> Entry:
        """What is known of it."""
        return _entry(self.name)


def solver(name: str, iterations: int, step: jax.Array | float = 1.0, ridge: jax.Array | float = 0.0) -> Solver:
    """The solver `name` (a key of :data:`SOLVERS`, or the path of a .py file) with its settings filled in.

    The file defines `solve(matvec, b) -> u`; the ridge is in its matvec, and iterations and step are its own affair.

    Raises InputError for what :func:`check` refuses; a traced step or ridge is not looked at.
    """
    check(name, iterations, *(None if isinstance(v, jax.core.Tracer) else float(v) for v in (step, ridge)))
    return Solver(name, iterations, step, ridge)


def check(name: str, iterations: int, step: float | None, ridge: float | None) -> None:
    """Raise InputError for an unknown name, K < 1, a step or ridge out of range, nystrom without a ridge."""
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
    if name in SOLVERS:
        return SOLVERS[name]
    if not name.endswith(".py"):
        raise InputError(f"unknown solver {name!r}. Known: {', '.join(SOLVERS)}; or the path of a .py file.")
    own = getattr(load_file(Path(name)), "solve", None)
    if own is None:
        raise InputError(f"{name} defines no solve(matvec, b).")
    return Entry(lambda matvec, b, *, iterations, step, ridge: own(_ridged(matvec, ridge), b), lambda k, d: -1)


def _ridged(matvec: Matvec, ridge: Any) -> Matvec:
    if not isinstance(ridge, jax.core.Tracer) and ridge == 0:
        return matvec
    return lambda v: axpy(ridge, v, matvec(v))
