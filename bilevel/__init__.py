"""Bi-level optimization for PyTorch."""

from bilevel import barriers, linear, optim, schedules
from bilevel._certify import certify
from bilevel._checkpoint import load_state, save_state
from bilevel._errors import (
    BilevelError,
    BilevelWarning,
    CheckpointError,
    InfeasibleError,
    NonFiniteError,
    ObjectiveError,
    StructureError,
    UnboundedError,
)
from bilevel._module import from_module, update_module
from bilevel._problem import Batch, BilevelProblem, Box
from bilevel._solution import Certificate, Evaluations, Solution, State, Status
from bilevel._solve import iterate, solve
from bilevel._types import Schedule
from bilevel.diagnostics import Report, check_hypergradient
from bilevel.estimators import Estimate, Estimator, Implicit, Unrolled, ValueFunction, hypergradient
from bilevel.solvers import ASBLO, BOME, F2SA, MEHA, VPBGD, HypergradientDescent, Solver

__all__ = [
    "ASBLO",
    "BOME",
    "Batch",
    "BilevelError",
    "BilevelProblem",
    "BilevelWarning",
    "Box",
    "Certificate",
    "CheckpointError",
    "Estimate",
    "Estimator",
    "Evaluations",
    "F2SA",
    "HypergradientDescent",
    "Implicit",
    "InfeasibleError",
    "MEHA",
    "NonFiniteError",
    "ObjectiveError",
    "Report",
    "Schedule",
    "Solution",
    "Solver",
    "State",
    "Status",
    "StructureError",
    "UnboundedError",
    "Unrolled",
    "VPBGD",
    "ValueFunction",
    "barriers",
    "certify",
    "check_hypergradient",
    "from_module",
    "hypergradient",
    "iterate",
    "linear",
    "load_state",
    "optim",
    "save_state",
    "schedules",
    "solve",
    "update_module",
]

__version__ = "0.1.0"
