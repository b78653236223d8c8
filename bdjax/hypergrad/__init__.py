"""Hypergradient of a bilevel problem, with a choice of linear solvers. The only package that imports jaxopt.

The problem: minimise the outer loss E(δ, θ) over θ, where δ(θ) is a stationary point of the inner
objective g(δ, θ). With H = ∇²_δδ g and e = ∂E/∂δ, implicit differentiation gives

    ∇ψ = ∂E/∂θ − (∇²_θδ g) u,   H u = e                      (I-BAU, Zeng et al., ICLR 2022, Eq. 2-3)

:func:`hypergradient` computes it; :func:`solver` selects the solver of H u = e by its name in :data:`SOLVERS`. A
user-defined function with the signature `solve(matvec, b) -> u` (based on lineax, for example) can replace a named
solver. See the guide in docs/solvers.md.
"""

from bdjax.hypergrad._implicit import Report, hypergradient
from bdjax.hypergrad._solvers import LARGEST_DENSE, SOLVERS, Entry, Solver, check, iterates, solver, tolerance

__all__ = [
    "LARGEST_DENSE", "SOLVERS", "Entry", "Report", "Solver", "check", "hypergradient", "iterates", "solver",
    "tolerance",
]  # fmt: skip
