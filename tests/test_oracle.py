from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel._errors import ObjectiveError
from bilevel._oracle import Oracle
from bilevel._problem import Batch, BilevelProblem
from bilevel._solution import Evaluations


class Counting:
    """Two objectives that count their own calls."""

    def __init__(self) -> None:
        self.calls = {"upper": 0, "lower": 0}
        self.problem = BilevelProblem(self.upper, self.lower)

    def upper(self, x: Tensor, y: Tensor, data: Any) -> Tensor:
        self.calls["upper"] += 1
        return (x**2).sum() * (y**2).sum()

    def lower(self, x: Tensor, y: Tensor, data: Any) -> Tensor:
        self.calls["lower"] += 1
        return ((y - x) ** 4).sum()


X, Y = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 5.0]).double()

CALLS = [
    (lambda o: o.upper(X, Y), Evaluations(upper=1)),
    (lambda o: o.lower(X, Y), Evaluations(lower=1)),
    (lambda o: o.upper_grad(X, Y), Evaluations(upper=1, upper_grad=1)),
    (lambda o: o.lower_grad(X, Y), Evaluations(lower=1, lower_grad=1)),
    (lambda o: o.upper_grad_y(X, Y), Evaluations(upper=1, upper_grad=1)),
    (lambda o: o.lower_grad_y(X, Y), Evaluations(lower=1, lower_grad=1)),
    (lambda o: o.linearized(X, Y), Evaluations(lower=1, lower_grad=1)),
    (lambda o: o.linearized(X, Y).hvp(Y), Evaluations(lower=1, lower_grad=1, hvp=1)),
    (lambda o: o.linearized(X, Y).mixed_vjp(Y), Evaluations(lower=1, lower_grad=1, hvp=1)),
    (lambda o: o.linearized(X, Y).products(Y), Evaluations(lower=1, lower_grad=1, hvp=2)),
    (
        lambda o: o.lower_tangents(X, Y, torch.eye(2).double()[:1], torch.eye(2).double()[:1]),
        Evaluations(lower=1, lower_grad=1, hvp=1),
    ),
    (lambda o: o.mapped(lambda x, y, data: y - x, X, Y), Evaluations(lower_grad=1)),
    (
        lambda o: o.linearized_map(lambda x, y, data: y - x, X, Y).vjp_y(Y),
        Evaluations(lower_grad=1, hvp=1),
    ),
    (lambda o: o.linearized(X, Y).hessian(), Evaluations(lower=1, lower_grad=1, hvp=2)),
    (
        lambda o: o.linearized(X, Y, upper=1.0, lower=2.0).hvp(Y),
        Evaluations(upper=1, lower=1, upper_grad=1, lower_grad=1, hvp=1),
    ),
]


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_each_call_is_counted_as_what_it_is(call: Any, expected: Evaluations) -> None:
    counting = Counting()
    oracle = Oracle(counting.problem)
    call(oracle)
    assert oracle.evaluations == expected
    assert counting.calls == {"upper": expected.upper, "lower": expected.lower}
    call(oracle)
    assert oracle.evaluations == expected + expected


def test_gradients_are_those_of_the_objectives() -> None:
    oracle = Oracle(Counting().problem)
    value, grad_x, grad_y = oracle.upper_grad(X, Y)
    assert float(value) == 5.0 * 34.0
    torch.testing.assert_close(grad_x, 2 * X * 34.0)
    torch.testing.assert_close(grad_y, 2 * Y * 5.0)
    torch.testing.assert_close(oracle.upper_grad_y(X, Y)[1], grad_y)
    value, grad_x, grad_y = oracle.lower_grad(X, Y)
    torch.testing.assert_close(grad_y, 4 * (Y - X) ** 3)
    torch.testing.assert_close(grad_x, -4 * (Y - X) ** 3)
    torch.testing.assert_close(oracle.lower_grad_y(X, Y)[1], grad_y)


def test_linearized_is_the_weighted_sum() -> None:
    linear = Oracle(Counting().problem).linearized(X, Y, upper=0.5, lower=3.0)
    torch.testing.assert_close(linear.value, torch.tensor(0.5 * 170.0 + 3.0 * 97.0).double())
    torch.testing.assert_close(linear.grad, 5.0 * Y + 12.0 * (Y - X) ** 3)
    expected = torch.diag(5.0 + 36.0 * (Y - X) ** 2)
    torch.testing.assert_close(linear.hessian(), expected)


def test_each_level_gets_its_part_of_a_batch() -> None:
    problem = BilevelProblem(lambda x, y, data: x.sum() * data, lambda x, y, data: y.sum() * data)
    oracle = Oracle(problem, Batch(upper=10.0, lower=100.0))
    assert float(oracle.upper(X, Y)) == 30.0
    assert float(oracle.lower(X, Y)) == 800.0
    assert float(Oracle(problem, 2.0).upper(X, Y)) == 6.0


def test_per_sample_losses_are_kept_and_their_mean_is_the_value() -> None:
    problem = BilevelProblem(
        lambda x, y, data: x.sum(), lambda x, y, data: (y - data) ** 2, per_sample=True
    )
    oracle = Oracle(problem, torch.tensor([1.0, 1.0]))
    assert oracle.losses is None
    value, _, grad_y = oracle.lower_grad(X, Y)
    assert float(value) == 10.0
    assert oracle.losses is not None
    assert oracle.losses.tolist() == [4.0, 16.0]
    assert grad_y.tolist() == [2.0, 4.0]


def test_objective_of_another_shape_says_the_rule() -> None:
    problem = BilevelProblem(lambda x, y, data: x, lambda x, y, data: (y - x).sum())
    with pytest.raises(ObjectiveError, match=r"upper=\.\.\.\)` must return a scalar tensor"):
        Oracle(problem).upper(X, Y)
    problem = BilevelProblem(lambda x, y, data: x.sum(), problem.lower, per_sample=True)
    with pytest.raises(ObjectiveError, match="one loss a sample"):
        Oracle(problem).lower_grad(X, Y)
