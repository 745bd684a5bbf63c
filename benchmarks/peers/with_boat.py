"""BOAT 1.1.1: a method put together from operations that are named in a configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import boat_torch
import torch
from speed.work import Answer, Hypergradient, Lower, Work
from torch import Tensor, nn

from peers.variables import LowerVariable, UpperVariable, fill, values

Objective = Callable[..., Tensor]
LOG = Path(tempfile.gettempdir()) / "boat_losses.json"  # it writes one at every step


def loss(feed: dict[str, Objective], above: nn.Module, below: nn.Module, **_: Any) -> Tensor:
    """What its configuration names as the loss of both levels: the objective that is fed."""
    return below(feed["objective"], above())


def unrolled(work: Work, steps: int) -> Hypergradient:
    return _dynamic(work, steps, "RAD", {"k": 1, "tolerance": 0.0})


def implicit(work: Work, steps: int, products: int) -> Hypergradient:
    """`products` of its conjugate gradients at most; the tolerance, absolute, is its own default."""
    return _dynamic(work, steps, "CG", {"k": products, "tolerance": 1e-10})


def _dynamic(work: Work, steps: int, operation: str, cg: dict[str, float]) -> Hypergradient:
    above, below = UpperVariable(work.x), LowerVariable(work.y)
    problem = _problem(
        above,
        below,
        fo_op=None,
        gm_op=["NGD"],
        na_op=[operation],
        lower_iters=steps,
        lower_level_opt=torch.optim.SGD(below.parameters(), lr=work.lr, momentum=work.momentum),
        upper_level_opt=torch.optim.SGD(above.parameters(), lr=1.0),
        CG=cg,
        return_grad=True,
    )

    def hypergradient(x: Tensor, y: Lower) -> Answer:
        fill(above, (x,))
        fill(below, y)
        above.zero_grad()  # what it finds is added to what is there
        problem.loss_history.clear()  # else every call writes the losses of all before
        (found,), _ = problem.run_iter({"objective": work.lower}, {"objective": work.upper}, 0)
        return Answer(found, values(below))

    return hypergradient


def meso(work: Work, upper_lr: float) -> Iterator[Answer]:
    """Its Moreau-envelope method of one loop; x and y after each step."""
    above, below = UpperVariable(work.x), LowerVariable(work.y)
    problem = _problem(
        above,
        below,
        fo_op="MESO",
        gm_op=None,
        na_op=None,
        lower_iters=1,
        lower_level_opt=torch.optim.SGD(below.parameters(), lr=work.lr),
        upper_level_opt=torch.optim.Adam(above.parameters(), lr=upper_lr),
        MESO={"eta": work.lr, "gamma_1": 0.1, "c0": 1.0, "y_hat_lr": work.lr},
        return_grad=False,
    )
    for step in count():
        problem.loss_history.clear()
        above.zero_grad()
        problem.run_iter({"objective": work.lower}, {"objective": work.upper}, step)
        yield Answer(above.x, values(below))


def _problem(above: nn.Module, below: nn.Module, **options: Any) -> boat_torch.Problem:
    config = {
        "lower_level_model": below,
        "upper_level_model": above,
        "lower_level_var": list(below.parameters()),
        "upper_level_var": list(above.parameters()),
        "device": "cpu",
        "accumulate_grad": False,
        "copy_last_param": True,
        "fo_ol_batch_input": False,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
        "loss_log_path": str(LOG),
        **options,
    }
    name = {"function": f"{__name__}.loss", "params": {}}
    losses = {"lower_level_loss": name, "upper_level_loss": name}
    problem = boat_torch.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    return problem
