"""Solvers: one algorithm a file."""

from bilevel.solvers._base import Solver
from bilevel.solvers.asblo import ASBLO
from bilevel.solvers.descent import HypergradientDescent

__all__ = ["ASBLO", "HypergradientDescent", "Solver"]
