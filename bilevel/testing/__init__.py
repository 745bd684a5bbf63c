"""Problems with known answers, for tests of solvers of one's own."""

from bilevel.testing import problems

__all__ = ["problems"]
