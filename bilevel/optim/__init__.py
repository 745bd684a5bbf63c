"""Minimizers of the lower problem, and steps on the upper variable."""

from bilevel.optim._base import Minimizer, Minimum, Point, SmoothFunction
from bilevel.optim.newton import Newton
from bilevel.optim.quasi_newton import QuasiNewton
from bilevel.optim.torch import Torch

__all__ = ["Minimizer", "Minimum", "Newton", "Point", "QuasiNewton", "SmoothFunction", "Torch"]
