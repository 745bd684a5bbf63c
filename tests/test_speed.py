"""The benchmark against what it claims: right answers, exact counts, and a table that hides nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
from speed import (
    by_hand,
    entries,
    ours,
    t0_tiny,
    t1_quadratic,
    t2_logistic,
    t3_hypercleaning,
    t6_upsampler,
)
from speed.race import (
    FLOOR,
    OURS,
    Contender,
    MissedError,
    Rules,
    answers,
    cold,
    factor,
    milliseconds,
    race,
    rows,
    tuned,
)
from speed.work import Answer, Work, descend, relative_error

import bilevel as bl

STEPS = 100


@pytest.fixture(scope="module")
def quadratic():
    return t1_quadratic.work(12)


@pytest.mark.parametrize("name", ["implicit", "unrolled"])
def test_by_hand_finds_the_hypergradient_in_closed_form(quadratic, name):
    work, truth = quadratic
    numbers = (STEPS, 1e-10, 24) if name == "implicit" else (STEPS,)
    found = getattr(by_hand, name)(work, *numbers)(work.x, work.y)
    assert relative_error(found.value, truth) < 1e-6


@pytest.mark.parametrize("rtol", [1e-6, 1e-10])  # the conjugate gradients check the second
def test_library_evaluates_one_product_more_than_by_hand(quadratic, rtol):
    """It measures the residual of the linear system, once for itself and for the solver."""
    work, _ = quadratic
    hand = by_hand.implicit(work, STEPS, rtol, 24)(work.x, work.y)
    method = ours.implicit(work, STEPS, rtol, 24)
    found = ours.hypergradient(work, method)(work.x, work.y)
    assert relative_error(found.value, hand.value) < 1e-6  # what the linear systems are solved to
    assert (found.gradients, found.hvps) == (hand.gradients, hand.hvps + 1)


def test_library_recomputes_no_step_of_a_small_problem():
    """One gradient more than by hand: that which says whether the lower problem is solved."""
    work = t0_tiny.work()
    graph = by_hand.unrolled(work, 10)(work.x, work.y)
    hand = by_hand.recomputed(work, 10)(work.x, work.y)
    found = ours.hypergradient(work, bl.Unrolled(10, lr=work.lr))(work.x, work.y)
    assert relative_error(hand.value, graph.value) < 1e-12
    assert relative_error(found.value, graph.value) < 1e-12
    assert (found.gradients, found.hvps) == (graph.gradients + 1, hand.hvps)


def test_descent_by_hand_and_by_the_library_end_at_one_point():
    work = t0_tiny.work()
    hand = descend(by_hand.implicit(work, 10, 1e-10, 10), work, 5, t0_tiny.LR)
    upper = bl.optim.Torch(torch.optim.SGD, lr=t0_tiny.LR)
    solver = bl.HypergradientDescent(ours.implicit(work, 10, 1e-10, 10), upper_optimizer=upper)
    with pytest.warns(bl.BilevelWarning, match="not solved to its tolerance"):
        found = ours.iterated(work, solver, 5)
    assert relative_error(found.value, hand.value) < 1e-12


def test_many_tiny_problems_at_once_end_where_each_does_by_hand():
    together, loop = t0_tiny.at_once(3)
    assert relative_error(together().value, loop().value) < 1e-9


def test_truth_of_logistic_regression_is_that_of_many_steps():
    work, truth = t2_logistic.work(*t2_logistic.breast_cancer())
    found = by_hand.implicit(work, 300, 1e-10, 300)(work.x, work.y)
    assert relative_error(found.value, truth) < 1e-6


@pytest.mark.parametrize(
    ("method", "rates"), [(t3_hypercleaning.f2sa, (0.1, 0.02)), (t3_hypercleaning.soba, (0.1,))]
)
def test_hypercleaning_by_hand_gets_better_than_without_cleaning(method, rates):
    task = t3_hypercleaning.cleaning("linear")
    run = t3_hypercleaning.to_target(task, 0.9, lambda: method(task.work, *rates))
    assert task.accuracy(run().y) >= 0.9


def test_unfold_is_the_echo_upsampler():
    torch.manual_seed(0)
    layer = t6_upsampler.EchoUpsampler(8, 4, radius=2)
    x, echo = torch.randn(1, 8, 6, 7), torch.randn(1, 4, 12, 14)
    assert relative_error(t6_upsampler.by_unfold(layer, x, echo), layer(x, echo)) < 1e-5


def count_to(number: int):
    """A contender's work: as many additions."""

    def run() -> Answer:
        return Answer(sum((torch.ones(1) for _ in range(number)), torch.zeros(1)), (), number, 0)

    return run


def fail():
    raise ValueError("no such | thing\nand more")


def test_table_shows_what_is_faster_and_why_a_contender_fails():
    contenders = [
        Contender(FLOOR, "count", lambda: count_to(100)),
        Contender(OURS, "count", lambda: count_to(1000)),
        Contender("TorchOpt", "count", fail),
    ]
    results = race(contenders, Rules(repeats=2))
    assert [len(result.seconds) for result in results] == [2, 2, 0]
    assert answers(results)["count"].gradients == 100
    text = rows(results, lambda _, answer: [f"{float(answer.value):g}"], ("sum",))
    head, _, floor, ours_, failed = (
        [c.strip() for c in line.split("|")] for line in text.splitlines()
    )
    column = head.index("ratio")
    assert floor[column] == "1.00"
    assert float(ours_[column]) > 2.0
    assert ours_[head.index("sum")] == "1000"
    assert failed[head.index("ms")] == "ValueError: no such / thing"
    assert len(race(contenders, Rules(0, with_peers=False))) == 2


def test_missing_peer_says_so_in_every_table_it_belongs_to(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    work = t0_tiny.work()
    missing = Contender("JAX", "implicit", lambda: entries.peer("JAX", "implicit", work, 0.1, 2))
    (result,) = race([missing], Rules(1))
    assert "jax" in result.reason
    assert result.reason == t0_tiny.by_vmap(1)


def test_numbers_keep_their_digits():
    assert [factor(ratio) for ratio in (1.234, 0.1, 0.0123)] == ["1.23", "0.10", "0.012"]
    assert [milliseconds(s) for s in (1.2345, 0.012345, 0.000012345)] == ["1234", "12.3", "0.0123"]
    compiled = [Answer(torch.ones(1), cold=seconds) for seconds in (None, 0.123, 1.23, 41.2)]
    assert [cold(answer) for answer in compiled] == ["", "0.12", "1.2", "41"]


def test_contender_that_misses_the_accuracy_is_not_timed():
    with pytest.raises(MissedError, match=r"misses 1e-03: its relative error is 5e-01"):
        tuned(count_to, lambda answer: 1.0 / float(answer.value), 1e-3, [1, 2])
    run = tuned(count_to, lambda answer: 1.0 / float(answer.value), 0.5, [1, 2, 3])
    assert float(run().value) == 2.0


def test_work_of_one_tensor_and_of_several_are_problems_of_the_library():
    one = Work(
        lambda x, y: (y - x).sum(), lambda x, y: (y * x).sum(), torch.ones(2), (torch.ones(2),), 0.1
    )
    two = Work(
        lambda x, a, b: (a - x).sum() * b,
        lambda x, a, b: (a * x).sum() + b,
        torch.ones(2),
        (torch.ones(2), torch.ones(())),
        0.1,
    )
    for work in (one, two):
        assert work.problem.lower(work.x, work.start, None) == work.lower(work.x, *work.y)
        assert work.problem.upper(work.x, work.start, None) == work.upper(work.x, *work.y)


def test_tasks_that_run_alone_take_their_places_where_all_else_is_the_same():
    before = "on a day\nof a month\n\n## a: b\n\n1\n\n## c\n\n2\n\n3"
    new = ["on a day\nof a month", "## c\n\n4"]
    assert bench.renewed(before, new) == [new[0], "## a: b\n\n1", "## c\n\n4"]
    assert bench.renewed(before, ["on another day", "## c\n\n4"]) == []
