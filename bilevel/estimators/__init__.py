"""Hypergradient estimators: one a file."""

from bilevel.estimators._accept import check_problem, refuse_constraints
from bilevel.estimators._base import Estimate, Estimator, hypergradient
from bilevel.estimators.implicit import Implicit
from bilevel.estimators.implicit_kkt import ImplicitKKT
from bilevel.estimators.one_step import OneStep
from bilevel.estimators.two_sided import TwoSided
from bilevel.estimators.unrolled import Unrolled
from bilevel.estimators.value_function import ValueFunction

__all__ = [
    "Estimate",
    "Estimator",
    "Implicit",
    "ImplicitKKT",
    "OneStep",
    "TwoSided",
    "Unrolled",
    "ValueFunction",
    "check_problem",
    "hypergradient",
    "refuse_constraints",
]
