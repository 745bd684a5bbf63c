from dataclasses import replace
from typing import Any

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


def test_callback_that_answers_true_ends_all_starts() -> None:
    seen: list[int] = []
    found = bl.solve(
        TOY.problem,
        IMPLICIT,
        START,
        -START,
        max_steps=50,
        starts=5,
        callback=lambda state: seen.append(state.step) or state.step == 2,
    )
    assert seen == [1, 2]
    assert found.status is bl.Status.STOPPED
    assert "the best of 1 starts" in found.message


class Scripted(bl.Solver):
    """Says it has stalled where x is below 1, converged elsewhere; runs into an error where x is above 5."""

    def init(self, problem: Any, x0: Any, y0: Any, data: Any, *, full_batch: bool) -> bl.State:
        return bl.State(x0, y0)

    def step(self, problem: Any, state: bl.State, data: Any) -> bl.State:
        x = float(state.x)
        if x > 5.0 and state.step == 3:
            raise bl.NonFiniteError("it broke")
        going = x > 5.0 or state.step < 1
        ended = bl.Status.STALLED if x < 1.0 else bl.Status.CONVERGED
        return replace(
            state,
            step=state.step + 1,
            status=bl.Status.RUNNING if going else ended,
            evaluations=state.evaluations + bl.Evaluations(lower=10),
        )


PLAIN = bl.BilevelProblem(
    lambda x, y, data: (y**2).sum() + (x**2).sum(), lambda x, y, data: ((y - x) ** 2).sum()
)


def at(x: float) -> tuple[Tensor, Tensor]:
    return (torch.tensor([x]).double(), torch.tensor([x]).double())


def test_start_that_stalled_wins_only_where_all_failed() -> None:
    """At x = 0 the certificate finds nothing wrong, yet the run says it failed; at x = 2 it is wrong."""
    with pytest.warns(bl.BilevelWarning, match="certificate disagrees"):
        found = bl.solve(PLAIN, Scripted(), *at(0.0), max_steps=9, starts=[at(2.0)])
    assert found.status is bl.Status.CONVERGED
    with pytest.raises(bl.BilevelError, match="Scripted failed from every start"):
        bl.solve(PLAIN, Scripted(), *at(0.0), max_steps=9, starts=[at(0.5)])


def test_start_that_raised_has_its_evaluations_counted_up_to_there() -> None:
    with pytest.warns(bl.BilevelWarning, match="the best of 2 starts"):
        both = bl.solve(PLAIN, Scripted(), *at(2.0), max_steps=9, starts=[at(6.0)])
    with pytest.warns(bl.BilevelWarning, match="certificate disagrees"):
        one = bl.solve(PLAIN, Scripted(), *at(2.0), max_steps=9)
    assert both.evaluations.lower - one.evaluations.lower == 31  # three steps, and the first check


@pytest.mark.parametrize("starts", [2.5, object()])
def test_starts_of_another_kind_are_refused(starts: object) -> None:
    with pytest.raises(TypeError, match=r"solve\(starts=...\)` must be an instance of `int` or"):
        bl.solve(TOY.problem, IMPLICIT, START, -START, max_steps=5, starts=starts)  # pyright: ignore[reportArgumentType]


def test_further_starts_of_asblo_reach_what_its_path_does_not() -> None:
    """y*(x) has a peak at 1.2, where the path from the minimum of F leads, and a higher one at -1."""

    def peaks(x: Tensor) -> Tensor:
        return (-10.0 * (x + 1.0) ** 2).exp() + 0.8 * (-10.0 * (x - 1.2) ** 2).exp()

    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2 + 1e-3 * (x - 1.2) ** 2).sum(),
        lambda x, y, data: ((y - peaks(x)) ** 2).sum(),
    )
    alone = bl.solve(problem, bl.ASBLO(), *at(0.0), max_steps=300)
    best = bl.solve(problem, bl.ASBLO(), *at(0.0), max_steps=300, starts=8)
    assert alone.x.item() == pytest.approx(1.2, abs=1e-3)
    assert best.x.item() == pytest.approx(-0.978, abs=1e-3)
    assert best.upper < alone.upper
    assert best.certificate is not None
    assert best.certificate.is_trusted


def test_error_of_the_first_start_goes_out_where_all_run_into_one() -> None:
    with pytest.raises(bl.NonFiniteError, match="it broke"):
        bl.solve(PLAIN, Scripted(), *at(6.0), max_steps=9, starts=[at(7.0)])
