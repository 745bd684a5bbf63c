"""Bi-level optimization for PyTorch."""

from bilevel import barriers, callbacks, distributed, fixed_points, linear, optim, schedules
from bilevel._box import Box
from bilevel._certify import certify
from bilevel._checkpoint import load_state, save_state
from bilevel._compare import Comparison, Run, compare
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
from bilevel._iterate import iterate
from bilevel._module import from_module, update_module
from bilevel._problem import Batch, BilevelProblem
from bilevel._recommend import Recommendation, recommend
from bilevel._solution import Certificate, Evaluations, Solution, State, Status
from bilevel._solve import solve
from bilevel._solve_many import Solutions, solve_many
from bilevel._types import Schedule
from bilevel.diagnostics import Report, check_hypergradient
from bilevel.estimators import (
    Estimate,
    Estimator,
    Implicit,
    ImplicitKKT,
    OneStep,
    TwoSided,
    Unrolled,
    ValueFunction,
    hypergradient,
)
from bilevel.fixed_points import FixedPoint
from bilevel.solvers import (
    ASBLO,
    BOME,
    F2SA,
    LVHBA,
    MEHA,
    SOBA,
    VPBGD,
    AmIGO,
    HypergradientDescent,
    Solver,
    StocBiO,
)

__all__ = [
    "ASBLO",
    "BOME",
    "F2SA",
    "LVHBA",
    "MEHA",
    "SOBA",
    "VPBGD",
    "AmIGO",
    "Batch",
    "BilevelError",
    "BilevelProblem",
    "BilevelWarning",
    "Box",
    "Certificate",
    "CheckpointError",
    "Comparison",
    "Estimate",
    "Estimator",
    "Evaluations",
    "FixedPoint",
    "HypergradientDescent",
    "Implicit",
    "ImplicitKKT",
    "InfeasibleError",
    "NonFiniteError",
    "ObjectiveError",
    "OneStep",
    "Recommendation",
    "Report",
    "Run",
    "Schedule",
    "Solution",
    "Solutions",
    "Solver",
    "State",
    "Status",
    "StocBiO",
    "StructureError",
    "TwoSided",
    "UnboundedError",
    "Unrolled",
    "ValueFunction",
    "barriers",
    "callbacks",
    "certify",
    "check_hypergradient",
    "compare",
    "distributed",
    "fixed_points",
    "from_module",
    "hypergradient",
    "iterate",
    "linear",
    "load_state",
    "optim",
    "recommend",
    "save_state",
    "schedules",
    "solve",
    "solve_many",
    "update_module",
]

__version__ = "0.1.0"
