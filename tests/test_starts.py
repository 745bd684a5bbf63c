import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing import problems

IMPLICIT = bl.HypergradientDescent(bl.Implicit())
TOY = problems.pbgd_toy()
START = torch.tensor([2.8], dtype=torch.float64)


def test_more_starts_find_the_better_optimum() -> None:
    one = bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=100)
    best = bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=100, starts=12)
    assert one.upper == pytest.approx(1.243458, abs=1e-5)
    assert best.upper == pytest.approx(TOY.upper_star, abs=1e-8)
    assert best.certificate is not None
    assert best.certificate.is_trusted
    assert "the best of 12 starts" in best.message


def test_starts_are_the_same_at_every_call_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    runs = [bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=50, starts=3) for _ in "ab"]
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].evaluations == runs[1].evaluations
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluations_of_all_starts_are_summed() -> None:
    pairs = [(START - 1.0, -START), (START - 2.0, -START)]
    runs = [
        bl.solve(TOY.problem, IMPLICIT, x, y, max_steps=50) for x, y in [(START, -START), *pairs]
    ]
    total = sum((run.evaluations for run in runs), bl.Evaluations())
    best = bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=50, starts=pairs)
    assert best.evaluations == total
    assert best.upper == min(run.upper for run in runs)


def test_start_that_fails_does_not_end_the_others() -> None:
    def upper(x: Tensor, y: Tensor, data: object) -> Tensor:
        return ((y - 1.0) ** 2).sum() + 0.0 * x.sqrt().sum()  # NaN where x < 0

    problem = bl.BilevelProblem(upper, lambda x, y, data: ((y - x) ** 2).sum())
    bad, good = torch.tensor([-4.0]).double(), torch.tensor([4.0]).double()
    found = bl.solve(problem, IMPLICIT, bad, bad, max_steps=50, starts=[(good, good)])
    assert float(found.x) == pytest.approx(1.0)
    with pytest.raises(bl.NonFiniteError, match="from every start"):
        bl.solve(problem, IMPLICIT, bad, bad, max_steps=50, starts=1)


def test_certified_answer_wins_over_a_smaller_value() -> None:
    def wells(x: Tensor, y: Tensor, data: object) -> Tensor:
        return ((y**2 - 1.0) ** 2 + 0.5 * y).sum() + 0.0 * x.sum()

    problem = bl.BilevelProblem(lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(), wells)
    x, right = torch.tensor([0.1]).double(), torch.tensor([1.0]).double()
    found = bl.solve(problem, IMPLICIT, x, right, max_steps=50, starts=[(x, -right)])
    assert float(found.y) == pytest.approx(-1.0575, abs=1e-3)  # F is 4.2, and 0.005 in the other


@pytest.mark.parametrize("starts", [0, -1])
def test_number_of_starts_below_one_is_refused(starts: int) -> None:
    with pytest.raises(ValueError, match=r"starts=...\)` must be at least 1"):
        bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=5, starts=starts)


def test_starts_need_the_full_batch() -> None:
    with pytest.raises(ValueError, match="needs the full batch"):
        bl.solve(TOY.problem, IMPLICIT, START, -START, [None], max_steps=5, starts=2)
