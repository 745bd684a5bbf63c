"""A network cut in two by the names of its parameters."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from bilevel._errors import BilevelWarning, NonFiniteError, StructureError
from bilevel._problem import BilevelProblem
from bilevel._solution import Solution, State
from bilevel._types import Objective, Projection, Tree

Loss = Callable[[Any, Any], Tensor]


def from_module(
    module: nn.Module,
    lower: Sequence[str],
    upper_loss: Loss,
    lower_loss: Loss,
    *,
    upper_constraint: Loss | None = None,
    lower_constraint: Loss | None = None,
    domain: Projection | None = None,
    per_sample: bool = False,
) -> tuple[BilevelProblem, dict[str, Tensor], dict[str, Tensor]]:
    """The bi-level problem of a network whose parameters belong to two levels.

    Each loss is called as `loss(module, data)`, with the variables in the place of the module's
    parameters; every submodule can be reached. The module is never modified: not its parameters,
    and not its buffers, which an evaluation sees as copies. Parameters that do not require a
    gradient belong to neither level and stay as they are. A parameter that the module holds under
    several names is one variable, under its first name; a pattern may match any of them.

    Args:
        module: The network.
        lower: Patterns of the names of the lower parameters, as in `fnmatch`: `*` stands for any
            text. All the others are upper ones.
        upper_loss: F, from the module and the data of the upper level.
        lower_loss: f, likewise.
        upper_constraint: H, likewise; see `BilevelProblem`.
        lower_constraint: h, likewise.
        domain: Projects the dictionary x onto its domain.
        per_sample: Whether `lower_loss` returns one loss a sample; see `BilevelProblem`.

    Returns:
        The problem, and the parameters of both levels as dictionaries of new tensors by name.

    Raises:
        TypeError: `module` is no module, `lower` a single string, or a loss not callable.
        StructureError: A pattern matches no parameter, or one of the levels has none; or `module` is sharded by FSDP2.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> def loss(net, data):
        ...     return ((net(data) - 1.0) ** 2).mean()
        >>> problem, x0, y0 = from_module(net, ["2.*"], upper_loss=loss, lower_loss=loss)
        >>> list(x0), list(y0)
        (['0.weight', '0.bias'], ['2.weight', '2.bias'])
        >>> data = torch.ones(5, 2)
        >>> torch.equal(problem.upper(x0, y0, data), loss(net, data))
        True
    """
    _check_arguments(module, lower)
    _refuse_sharded(module)
    chosen = _match(module, lower)
    x0: dict[str, Tensor] = {}
    y0: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (y0 if name in chosen else x0)[name] = parameter.detach().clone()
    if not x0:
        raise StructureError(
            "`from_module(lower=...)` must leave parameters to the upper level. "
            f"Got {list(lower)}, which matches all {len(y0)} of them. Narrow the patterns."
        )
    _warn_of_running_statistics(module)

    def objective(name: str, loss: Loss | None) -> Any:
        if loss is not None and not callable(loss):
            raise TypeError(
                f"`from_module({name}=...)` must be callable. Got {type(loss).__name__}. "
                "Pass a function of (module, data)."
            )
        return loss and _objective(module, loss, set(x0), set(y0))

    problem = BilevelProblem(
        objective("upper_loss", upper_loss),
        objective("lower_loss", lower_loss),
        upper_constraint=objective("upper_constraint", upper_constraint),
        lower_constraint=objective("lower_constraint", lower_constraint),
        domain=domain,
        per_sample=per_sample,
    )
    return problem, x0, y0


def update_module(module: nn.Module, result: State | Solution) -> None:
    """Write the variables of a run into the parameters of the module that it came from.

    Everything is checked first: a module is updated as a whole or not at all.

    Args:
        module: The module that was passed to `from_module`, or one like it.
        result: A `State` or a `Solution`.

    Raises:
        StructureError: A name or a shape does not fit, or a trainable parameter is missing.
        NonFiniteError: A value is NaN or infinite.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> x, y = {"0.weight": torch.tensor([[3.0]])}, {"1.weight": torch.tensor([[2.0]])}
        >>> update_module(net, State(x, y))
        >>> net(torch.ones(1)).item()
        6.0
    """
    parameters = dict(module.named_parameters())
    for level, tree in (("x", result.x), ("y", result.y)):
        if not isinstance(tree, dict):
            raise StructureError(
                f"`update_module(module, result)` must find a dictionary in `result.{level}`. "
                f"Got {type(tree).__name__}. Pass the result of a problem made by `from_module`."
            )
        for name, value in cast("dict[str, Any]", tree).items():
            _check_value(f"result.{level}[{name!r}]", name, value, parameters)
    values: dict[str, Tensor] = {**result.x, **result.y}
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    missing = sorted(trainable - set(values))
    if missing or len(values) < len(result.x) + len(result.y):
        raise StructureError(
            "`update_module(module, result)` must find each trainable parameter in x or in y. "
            f"Got {_some(missing or sorted(set(result.x) & set(result.y)))} in "
            f"{'neither' if missing else 'both'}. Pass the module that the problem was made from."
        )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


class _Call(nn.Module):
    """The module and a loss as one module, so that the loss sees the variables inside the module."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, data: Any) -> Tensor:
        return self.loss(self.module, data)


def _objective(module: nn.Module, loss: Loss, x_names: set[str], y_names: set[str]) -> Objective:
    call = _Call(module, loss)
    names = {parameter: name for name, parameter in module.named_parameters()}
    held: list[tuple[str, str]] = []  # each place of a variable and its name, a submodule once
    buffers: list[str] = []
    for prefix, part in _submodules(module):
        dot = f"{prefix}." if prefix else ""
        for local, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                held.append((f"module.{dot}{local}", names[parameter]))
        buffers += [
            f"module.{dot}{local}"
            for local, _ in part.named_buffers(recurse=False, remove_duplicate=False)
        ]

    def evaluate(x: Tree, y: Tree, data: Any) -> Tensor:
        for level, tree, expected in (("x", x, x_names), ("y", y, y_names)):
            if set(tree) != expected:
                raise StructureError(
                    f"`{level}` must be a dictionary of the parameters of its level. "
                    f"Got {_some(sorted(set(tree) ^ expected))} missing or too many. "
                    f"Start from the `{level}0` that `from_module` returned."
                )
        variables = {**x, **y}
        tensors = {place: variables[name] for place, name in held}
        tensors |= {place: call.get_buffer(place).clone() for place in buffers}
        # Not `strict`, which wants a submodule with two names swapped twice and so corrupts it.
        # The names were checked above.
        return torch.func.functional_call(call, tensors, (data,), tie_weights=False)

    return evaluate


def _submodules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(cast(Any, module).named_modules())  # its stub is untyped


def _match(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The first names of the trainable parameters that have a name that matches a pattern."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    every = dict(module.named_parameters(remove_duplicate=False))
    trainable = [name for name, parameter in every.items() if parameter.requires_grad]
    if not trainable:
        raise StructureError(
            "`from_module(module, ...)` must be given a module with trainable parameters. "
            f"Got {type(module).__name__} with {len(every)} parameters, none with requires_grad. "
            "Create its layers first, or call `module.requires_grad_()`."
        )
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in trainable if fnmatchcase(name, pattern)]
        if not found:
            frozen = [name for name in every if fnmatchcase(name, pattern)]
            close = difflib.get_close_matches(pattern, trainable, n=3, cutoff=0.4)
            raise StructureError(
                "`from_module(lower=...)` must match trainable parameters with each pattern. "
                f"Got {pattern!r}, which matches "
                + (f"only {_some(frozen)}, without requires_grad. " if frozen else "none. ")
                + f"{'Close names are' if close else 'The names are'} {_some(close or trainable)}."
            )
        chosen |= {names[every[name]] for name in found}
    return chosen


def _check_arguments(module: Any, lower: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            "`from_module(module, ...)` must be given a `torch.nn.Module`. "
            f"Got {type(module).__name__}. Pass the network itself."
        )
    if isinstance(lower, str) or not lower:
        raise TypeError(
            "`from_module(lower=...)` must be a list of patterns, at least one. "
            f"Got {lower!r}. Pass e.g. {[lower or 'head.*']}."
        )


def _refuse_sharded(module: nn.Module) -> None:
    """Raises where FSDP2 holds a part of `module`; it has then been imported."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, part in _submodules(module):
        if fsdp is not None and fsdp.FSDPModule in type(part).__mro__:
            raise StructureError(
                f"`from_module(module=...)` must not be sharded by FSDP2. Got `fully_shard` on {name or 'the module'}: "
                "it gathers the parameters that the module holds, not those that a solver puts in their place, and "
                "its gradients have no derivatives, which second-order methods need. Leave the module whole, and "
                "share the batches: `bilevel.distributed.data_parallel`."
            )


def _check_value(where: str, name: str, value: Any, parameters: Mapping[str, Tensor]) -> None:
    if name not in parameters:
        close = difflib.get_close_matches(name, list(parameters), n=3, cutoff=0.4)
        raise StructureError(
            f"`{where}` must name a parameter of the module. Got a name that it does not have. "
            f"{'Close names are' if close else 'Its names are'} {_some(close or list(parameters))}."
        )
    if not isinstance(value, Tensor) or value.shape != parameters[name].shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise StructureError(
            f"`{where}` must have the shape {tuple(parameters[name].shape)} of the parameter. "
            f"Got {got}. Pass the module that the problem was made from."
        )
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"`{where}` must be finite. Got NaN or infinity. Take an earlier state: "
            "the module was left as it is."
        )


def _warn_of_running_statistics(module: nn.Module) -> None:
    tracking = [
        name
        for name, part in _submodules(module)
        if part.training and isinstance(getattr(part, "running_mean", None), Tensor)
    ]
    if tracking:
        warnings.warn(
            f"The running statistics of {_some(tracking)} stay as they are: an objective is a pure "
            "function, so an evaluation updates copies. Update them with a pass of your own after "
            "`update_module`, or put these layers in `.eval()`.",
            BilevelWarning,
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
