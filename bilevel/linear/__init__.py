"""Solvers of linear systems that are known by their products: `solve(matvec, b, v0)`."""

from bilevel.linear._base import LinearSolver
from bilevel.linear.cg import CG
from bilevel.linear.dense import Dense
from bilevel.linear.neumann import Neumann

__all__ = ["CG", "Dense", "LinearSolver", "Neumann"]
