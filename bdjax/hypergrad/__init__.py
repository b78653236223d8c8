"""The hypergradient of a bilevel problem: one function, many solvers. The only importer of jaxopt.

The problem: the outer loss E(δ, θ) is to fall in θ, where δ(θ) is a stationary point of the inner
objective g(δ, θ). With H = ∇²_δδ g and e = ∂E/∂δ, implicit differentiation gives

    ∇ψ = ∂E/∂θ − (∇²_θδ g) u,   H u = e                      (I-BAU, Zeng et al., ICLR 2022, Eq. 2-3)

:func:`hypergradient` computes it; :func:`solver` picks what solves H u = e, a name of :data:`SOLVERS`. Any
function of one's own with the signature `solve(matvec, b) -> u` (lineax, say) takes the place of a named solver.
The guide is docs/solvers.md.
"""

from bdjax.hypergrad._implicit import Report, hypergradient
from bdjax.hypergrad._solvers import LARGEST_DENSE, SOLVERS, Entry, Solver, check, iterates, solver, tolerance

__all__ = [
    "LARGEST_DENSE", "SOLVERS", "Entry", "Report", "Solver", "check", "hypergradient", "iterates", "solver",
    "tolerance",
]  # fmt: skip
