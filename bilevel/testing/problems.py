"""The zoo: small bi-level problems whose answers are known, each with where the answer comes from.

All of them are float64, need no data, and draw from a generator of their own.
"""

from __future__ import annotations

from bilevel.testing._case import ZooProblem
from bilevel.testing._irregular import bda, pbgd_toy, sine
from bilevel.testing._regular import quadratic, ridge

__all__ = ["ZooProblem", "bda", "pbgd_toy", "quadratic", "ridge", "sine", "zoo"]


def zoo() -> tuple[ZooProblem, ...]:
    """All problems from all their starts: what `make zoo` solves.

    Returns:
        One case for each problem, size and start.

    Example:
        >>> len(zoo())
        37
    """
    quadratics = [
        quadratic(*size, condition) for condition in (10.0, 1e3) for size in ((5, 10), (20, 40))
    ]
    problems = [*quadratics, ridge(1), ridge(20), bda(), *map(sine, (1, 2, 10, 50)), pbgd_toy()]
    return tuple(case for problem in problems for case in problem.cases())
