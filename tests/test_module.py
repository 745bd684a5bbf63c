import math

import pytest
import torch
from torch import Tensor, nn

from bilevel._box import Box
from bilevel._errors import BilevelWarning, NonFiniteError, StructureError
from bilevel._module import from_module, update_module
from bilevel._solution import State


def mse(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return ((module(data[0]) - data[1]) ** 2).mean()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


DATA = (torch.ones(4, 2), torch.zeros(4, 1))


class Tied(nn.Module):
    """Two layers that share a weight, and one layer held under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.third = nn.Linear(2, 2)
        self.alias = self.third

    def forward(self, inputs: Tensor) -> Tensor:
        return self.alias(self.third(self.second(self.first(inputs))))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_parameters_are_divided_by_pattern() -> None:
    _, x0, y0 = from_module(network(), ["2.b*"], mse, mse)
    assert set(x0) == {"0.weight", "0.bias", "2.weight"}
    assert set(y0) == {"2.bias"}


def test_loss_sees_the_variables_and_every_submodule() -> None:
    net = network()

    def last_layer(module: nn.Sequential, data: None) -> Tensor:
        return module[2].weight.sum() + 10.0 * module[0].bias.sum()

    problem, x0, y0 = from_module(net, ["2.*"], last_layer, mse)
    x = {name: torch.ones_like(leaf) for name, leaf in x0.items()}
    y = {name: torch.full_like(leaf, 2.0) for name, leaf in y0.items()}
    assert float(problem.upper(x, y, None)) == 36.0


def test_gradient_is_that_of_the_module() -> None:
    net = network()
    problem, x0, y0 = from_module(net, ["2.*"], mse, mse)
    for leaf in (*x0.values(), *y0.values()):
        leaf.requires_grad_()
    problem.lower(x0, y0, DATA).backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    mse(net, DATA).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close({**x0, **y0}[name].grad, parameter.grad)


def test_module_is_not_modified_even_by_a_loss_that_raises() -> None:
    net = network()
    before, objects = snapshot(net), dict(net.named_parameters())

    def broken(module: nn.Module, data: None) -> Tensor:
        raise RuntimeError("inside")

    problem, x0, y0 = from_module(net, ["2.*"], broken, mse)
    x0["0.bias"] += 1.0
    problem.lower(x0, y0, DATA)
    with pytest.raises(RuntimeError, match="inside"):
        problem.upper(x0, y0, None)
    assert equal(snapshot(net), before)
    assert all(objects[name] is parameter for name, parameter in net.named_parameters())


def test_frozen_parameters_belong_to_neither_level() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    problem, x0, y0 = from_module(net, ["2.*"], mse, mse)
    assert set(x0) == {"0.bias"}
    torch.testing.assert_close(problem.upper(x0, y0, DATA), mse(net, DATA).detach())


def test_tied_weights_are_one_variable() -> None:
    net = Tied()
    before, objects = snapshot(net), dict(net.named_parameters(remove_duplicate=False))
    problem, x0, y0 = from_module(net, ["second.*"], mse, mse)
    assert set(y0) == {"first.weight"}
    assert set(x0) == {"first.bias", "third.weight", "third.bias"}
    inputs = torch.randn(3, 2)
    x = {"first.bias": torch.ones(2), "third.weight": torch.eye(2), "third.bias": torch.zeros(2)}
    y = {"first.weight": 2.0 * torch.eye(2)}
    expected = ((4.0 * inputs + 2.0) ** 2).mean()
    torch.testing.assert_close(problem.lower(x, y, (inputs, torch.zeros(3, 2))), expected)
    assert equal(snapshot(net), before)
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in objects.items())
    update_module(net, State(x, y))
    assert torch.equal(net.second.weight, 2.0 * torch.eye(2))
    torch.testing.assert_close(mse(net, (inputs, torch.zeros(3, 2))).detach(), expected)


def test_running_statistics_warn_and_stay() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    with pytest.warns(BilevelWarning, match="running statistics of '1' stay"):
        problem, x0, y0 = from_module(net, ["2.*"], mse, mse)
    before = snapshot(net)
    inputs = torch.randn(4, 2)
    first = problem.lower(x0, y0, (inputs, DATA[1]))
    assert torch.equal(problem.lower(x0, y0, (inputs, DATA[1])), first)
    assert equal(snapshot(net), before)


def test_batch_norm_in_evaluation_mode_does_not_warn() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    problem, x0, y0 = from_module(net, ["2.*"], mse, mse)
    torch.testing.assert_close(problem.lower(x0, y0, DATA), mse(net, DATA).detach())


def test_constraints_domain_and_per_sample_are_passed_on() -> None:
    box = Box(-1.0, 1.0)
    problem, x0, y0 = from_module(
        network(),
        ["2.*"],
        mse,
        lambda module, data: ((module(data[0]) - data[1]) ** 2).mean(dim=1),
        upper_constraint=lambda module, data: module[0].bias - 5.0,
        lower_constraint=lambda module, data: module[2].bias - 7.0,
        domain=box,
        per_sample=True,
    )
    assert problem.per_sample
    assert problem.lower(x0, y0, DATA).shape == (4,)
    assert problem.upper_constraint is not None
    assert problem.upper_constraint(x0, y0, None).shape == (3,)
    assert problem.lower_constraint is not None
    assert problem.lower_constraint(x0, y0, None).shape == (1,)
    assert problem.domain is box


def test_update_module_writes_both_levels() -> None:
    net = network()
    _, x0, y0 = from_module(net, ["2.*"], mse, mse)
    x = {name: leaf + 1.0 for name, leaf in x0.items()}
    update_module(net, State(x, y0))
    values = dict(net.named_parameters())
    assert all(torch.equal(values[name], leaf) for name, leaf in {**x, **y0}.items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("lower", "error", "message"),
    [
        ("2.*", TypeError, r"must be a list of patterns.*Got '2\.\*'.*Pass e\.g\. \['2\.\*'\]"),
        ([], TypeError, "at least one"),
        (["2.wieght"], StructureError, r"'2\.wieght', which matches none\. Close names.*2\.weight"),
        (["zzz"], StructureError, r"matches none\. The names are '0\.weight'"),
        (["*"], StructureError, "matches all 4 of them"),
    ],
)
def test_wrong_patterns_say_the_rule(lower: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_module(network(), lower, mse, mse)


def test_pattern_of_frozen_parameters_says_so() -> None:
    net = network()
    net[2].requires_grad_(False)
    with pytest.raises(StructureError, match=r"matches only .*, without requires_grad"):
        from_module(net, ["2.*"], mse, mse)


def test_module_without_parameters_says_the_rule() -> None:
    with pytest.raises(StructureError, match="must be given a module with trainable parameters"):
        from_module(nn.ReLU(), ["*"], mse, mse)


def test_arguments_of_another_type_say_the_rule() -> None:
    with pytest.raises(TypeError, match=r"must be given a `torch\.nn\.Module`\. Got function"):
        from_module(lambda data: data, ["*"], mse, mse)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"lower_loss=\.\.\.\)` must be callable\. Got float"):
        from_module(network(), ["2.*"], mse, 1.0)  # type: ignore[arg-type]


def test_variable_of_other_names_says_the_rule() -> None:
    problem, x0, y0 = from_module(network(), ["2.*"], mse, mse)
    with pytest.raises(
        StructureError, match=r"Got '0\.bias', '2\.bias', '2\.weight' missing or too many"
    ):
        problem.lower({"0.weight": x0["0.weight"], **y0}, y0, DATA)


def bad(x: dict, y: dict, kind: str) -> State:
    changes: dict = {
        "name": ({**x, "0.wieght": x["0.weight"]}, y),
        "shape": ({**x, "0.bias": torch.zeros(2)}, y),
        "type": ({**x, "0.bias": 1.0}, y),
        "nan": (x, {**y, "2.bias": torch.tensor([math.nan])}),
        "missing": ({"0.weight": x["0.weight"]}, y),
        "both": ({**x, **y}, y),
        "tensor": (torch.zeros(3), y),
    }
    return State(*changes[kind])


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("name", StructureError, r"`result\.x\['0\.wieght'\]` must name .*Close names.*0\.weight"),
        ("shape", StructureError, r"must have the shape \(3,\) of the parameter\. Got \(2,\)"),
        ("type", StructureError, r"must have the shape .* Got float"),
        ("nan", NonFiniteError, r"`result\.y\['2\.bias'\]` must be finite"),
        ("missing", StructureError, r"Got '0\.bias' in neither"),
        ("both", StructureError, r"Got '2\.bias', '2\.weight' in both"),
        ("tensor", StructureError, r"must find a dictionary in `result\.x`\. Got Tensor"),
    ],
)
def test_result_that_does_not_fit_leaves_the_module_alone(
    kind: str, error: type[Exception], message: str
) -> None:
    net = network()
    before = snapshot(net)
    _, x0, y0 = from_module(net, ["2.*"], mse, mse)
    with pytest.raises(error, match=message):
        update_module(net, bad({k: v + 1.0 for k, v in x0.items()}, y0, kind))
    assert equal(snapshot(net), before)
