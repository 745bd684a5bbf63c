"""Solvers: one algorithm a file."""

from bilevel.solvers._base import Solver
from bilevel.solvers.amigo import AmIGO
from bilevel.solvers.asblo import ASBLO
from bilevel.solvers.bome import BOME
from bilevel.solvers.descent import HypergradientDescent
from bilevel.solvers.f2sa import F2SA
from bilevel.solvers.lvhba import LVHBA
from bilevel.solvers.meha import MEHA
from bilevel.solvers.soba import SOBA
from bilevel.solvers.stocbio import StocBiO
from bilevel.solvers.vpbgd import VPBGD

__all__ = [
    "ASBLO",
    "BOME",
    "F2SA",
    "LVHBA",
    "MEHA",
    "SOBA",
    "VPBGD",
    "AmIGO",
    "HypergradientDescent",
    "Solver",
    "StocBiO",
]
