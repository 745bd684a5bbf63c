from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel import _problem, _returned
from bilevel._box import Box
from bilevel._errors import ObjectiveError, StructureError
from bilevel._problem import Batch, BilevelProblem


def square(x: Tensor, y: Tensor, data: Any) -> Tensor:
    return ((y - x) ** 2).sum()


def test_batch_is_divided_and_anything_else_goes_to_both_levels() -> None:
    assert _problem.split_data(Batch(1, 2)) == (1, 2)
    assert _problem.split_data((1, 2)) == ((1, 2), (1, 2))
    assert _problem.split_data(None) == (None, None)


@pytest.mark.parametrize("name", ["upper", "lower"])
def test_objective_that_is_not_callable_says_the_rule(name: str) -> None:
    arguments = {"upper": square, "lower": square, name: torch.ones(1)}
    with pytest.raises(TypeError, match=rf"{name}=\.\.\.\)` must be callable\. Got Tensor"):
        BilevelProblem(**arguments)
    with pytest.raises(TypeError, match="Got NoneType"):
        BilevelProblem(**{**arguments, name: None})


@pytest.mark.parametrize("name", ["upper_constraint", "lower_constraint", "domain"])
def test_optional_part_that_is_not_callable_says_the_rule(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}=\.\.\.\)` must be callable\. Got float"):
        BilevelProblem(square, square, **{name: 1.0})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"must return a scalar tensor\. Got float"),
        (None, r"Got NoneType"),
        (torch.ones(2), r"Got shape \(2,\)\. Reduce it"),
        (torch.tensor(1), r"Got dtype torch\.int64"),
    ],
)
def test_objective_that_returns_no_scalar_says_the_rule(value: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        _returned.scalar(value, "upper")


def test_scalar_of_one_entry_becomes_0d() -> None:
    assert _returned.scalar(torch.ones(1, 1), "upper").shape == ()


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), torch.ones(2, 2), torch.ones(0), torch.arange(2), 1.0]
)
def test_samples_that_are_no_vector_say_the_rule(value: Any) -> None:
    with pytest.raises(ObjectiveError, match="must return one loss a sample"):
        _returned.samples(value)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (torch.tensor([0.0, 2.0]), 1.0)]
)
def test_box_upside_down_says_the_rule(low: Any, high: Any) -> None:
    with pytest.raises(ValueError, match=r"must have low <= high\. Got low="):
        Box(low, high)


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        ("a", 1.0, TypeError, r"`Box\(low=\.\.\.\)` must be a number, .*Got str"),
        (0.0, {"a": None, "b": "1"}, TypeError, r"`Box\(high=\.\.\.\)` must be .*Got str"),
        (torch.zeros(2), torch.ones(3), StructureError, r"Got shapes \(2,\) and \(3,\)"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], StructureError, r"two bounds of one structure"),
        ({"a": 0.0, "b": 0.0}, {"a": 1.0, "c": 1.0}, StructureError, r"\['c'\]"),
    ],
)
def test_box_of_bounds_that_do_not_fit_each_other_says_the_rule(
    low: Any, high: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Box(low, high)


@pytest.mark.parametrize(
    "bound", [{"q": 0.0, "r": 0.0}, {"a": 0.0}, [0.0, 0.0], {"a": 0.0, "b": 0.0, "c": 0.0}], ids=str
)
def test_box_with_other_names_than_x_is_not_matched_by_order(bound: Any) -> None:
    x = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(StructureError, match=r"tree like x with the leaves .*'a'.*'b'"):
        Box(low=bound)(x)


def test_box_does_not_round_a_number_to_float32() -> None:
    x = torch.ones(2, dtype=torch.float64)
    assert Box(-1.0, 0.1)(x).tolist() == [0.1, 0.1]
    assert Box(-1.0, {"a": 0.1, "b": 0.3})({"a": x, "b": x})["b"].tolist() == [0.3, 0.3]


def test_boxes_with_tensors_can_be_compared() -> None:
    box = Box(torch.zeros(2), torch.ones(2))
    assert box == box
    assert box != Box(torch.zeros(2), torch.ones(2))


def test_box_projects_trees_with_numbers_tensors_and_trees_as_bounds() -> None:
    x = {"a": torch.tensor([-2.0, 2.0]), "b": torch.tensor(5.0)}
    number = Box(-1.0, 1.0)(x)
    assert number["a"].tolist() == [-1.0, 1.0]
    assert float(number["b"]) == 1.0
    tree = Box(high={"a": torch.tensor([0.0, 9.0]), "b": torch.tensor(3.0)})(x)
    assert tree["a"].tolist() == [-2.0, 2.0]
    assert float(tree["b"]) == 3.0
    assert x["a"].tolist() == [-2.0, 2.0]


def test_box_keeps_dtype_and_nan() -> None:
    x = torch.tensor([float("nan"), 3.0], dtype=torch.bfloat16)
    projected = Box(0.0, 1.0)(x)
    assert projected.dtype == torch.bfloat16
    assert bool(torch.isnan(projected[0]))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(low=[torch.zeros(1), torch.zeros(1)]), r"leaves \[''\]\. Got \['\[0\]', '\[1\]'\]"),
        (Box(high=torch.ones(4)), r"must broadcast to the shape of x"),
    ],
)
def test_box_that_does_not_fit_says_the_rule(box: Box, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        box(torch.zeros(3))


def test_raveled_problem_has_the_values_of_the_problem() -> None:
    x = {"a": torch.tensor([-2.0, 2.0]), "b": torch.tensor(5.0)}
    y = [torch.tensor([[1.0, 2.0]])]

    def upper(x: Any, y: Any, data: float) -> Tensor:
        return data * x["a"].sum() + x["b"] * y[0].sum()

    problem = BilevelProblem(
        upper,
        lambda x, y, data: y[0].sum() + x["b"],
        upper_constraint=lambda x, y, data: x["a"],
        domain=Box(-1.0, {"a": torch.tensor([0.0, 9.0]), "b": torch.tensor(3.0)}),
        per_sample=True,
    )
    flat, (u, v), unravel_x, unravel_y = _problem.ravel(problem, x, y)
    assert flat.per_sample
    assert float(flat.upper(u, v, 2.0)) == float(upper(x, y, 2.0)) == 15.0
    assert flat.upper_constraint is not None
    assert flat.upper_constraint(u, v, None).tolist() == [-2.0, 2.0]
    assert flat.lower_constraint is None
    assert flat.domain is not None
    assert flat.domain(u).tolist() == [-1.0, 2.0, 3.0]
    assert float(unravel_x(u)["b"]) == 5.0
    assert torch.equal(unravel_y(v)[0], y[0])


def test_raveled_problem_wraps_any_projection_and_checks_what_it_returns() -> None:
    x, y = {"a": torch.ones(2)}, torch.ones(1)
    good = BilevelProblem(square, square, domain=lambda x: {"a": 0.5 * x["a"]})
    flat, (u, _), _, _ = _problem.ravel(good, x, y)
    assert flat.domain is not None
    assert flat.domain(u).tolist() == [0.5, 0.5]
    bad = BilevelProblem(square, square, domain=lambda x: x["a"])
    flat, (u, _), _, _ = _problem.ravel(bad, x, y)
    assert flat.domain is not None
    with pytest.raises(StructureError, match=r"domain=\.\.\.\)\(x\)` must have the structure"):
        flat.domain(u)


def test_problem_over_vectors_knows_the_trees_of_the_one_it_was_made_of() -> None:
    x, y = {"b": torch.tensor(5.0), "a": torch.ones(2, 2)}, [torch.arange(3.0)]
    problem = BilevelProblem(lambda x, y, data: x["b"], lambda x, y, data: y[0].sum())
    assert problem.unravel is None
    flat, (u, v), _, _ = _problem.ravel(problem, x, y)
    again, _, _, _ = _problem.ravel(flat, u, v)  # of vectors: the trees are still the user's
    for made in (flat, again):
        assert made.unravel is not None
        assert torch.equal(made.unravel[0](u)["a"], x["a"])
        assert float(made.unravel[0](u)["b"]) == 5.0
        assert torch.equal(made.unravel[1](v)[0], y[0])


def test_domain_without_a_signature_is_a_domain() -> None:
    """`torch.relu` projects onto x >= 0, and cannot be asked for its arguments."""
    problem = BilevelProblem(
        lambda x, y, data: ((y + 1.0) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        domain=torch.relu,
    )
    one = torch.ones(1, dtype=torch.float64)
    found = bl.solve(problem, bl.HypergradientDescent(bl.Implicit()), one, one, max_steps=50)
    assert found.status is bl.Status.CONVERGED
    assert float(found.x) == 0.0
