"""Solvers: one algorithm a file."""

from bilevel.solvers._base import Solver
from bilevel.solvers.asblo import ASBLO
from bilevel.solvers.descent import HypergradientDescent
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.vpbgd import VPBGD

__all__ = ["ASBLO", "F2SA", "VPBGD", "HypergradientDescent", "Solver"]
