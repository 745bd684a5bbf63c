"""Problems with known answers and the contract as checks, for solvers and estimators of one's own."""

from bilevel.testing import problems
from bilevel.testing.checks import ContractError, check_hypergradient_estimator, check_solver

__all__ = ["ContractError", "check_hypergradient_estimator", "check_solver", "problems"]
