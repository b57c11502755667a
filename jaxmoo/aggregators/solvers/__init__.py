"""The small problems behind the methods, solved exactly and in batches of blocks.

- ``cosines``: a Gram matrix split into cosines and norms, in which all of them are solved.
- ``convex``: the shortest vector of a hull, projections on the dual cone, the best worst case in a
  ball; by block principal ``pivoting`` and a primal-dual ``interior_point`` method.
- ``fair``: the equations of fair bargaining, by Newton's method.
- ``eigen``: eigenvalues and pseudo-inverses of graded matrices, by Jacobi's method.
- ``simplex_step``: one projected gradient step of weights that are kept on the simplex.
"""

from jaxmoo.aggregators.solvers.convex import best_worst_case, min_norm, project_on_dual_cone
from jaxmoo.aggregators.solvers.cosines import Equilibrated, equilibrate, mean_norm
from jaxmoo.aggregators.solvers.eigen import eigh_graded, pseudo_solve
from jaxmoo.aggregators.solvers.fair import fair_weights

__all__ = [
    "Equilibrated",
    "best_worst_case",
    "eigh_graded",
    "equilibrate",
    "fair_weights",
    "mean_norm",
    "min_norm",
    "project_on_dual_cone",
    "pseudo_solve",
]
