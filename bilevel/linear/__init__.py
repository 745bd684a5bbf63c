"""Solvers of linear systems that are known by their products: `solve(matvec, b, v0)`."""

from bilevel.linear._base import LinearSolver
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.gmres import GMRES
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.nystrom import Nystrom

__all__ = ["CG", "GMRES", "MINRES", "Dense", "LinearSolver", "Neumann", "Nystrom"]
