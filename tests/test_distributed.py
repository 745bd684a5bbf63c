"""Several processes, each with a part of the batch, find what one process finds with the joined batch.

Processes cost seconds to start, so all checks of a number of ranks run in one group. The tests look at what its
ranks have written.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import bilevel as bl
from bilevel.distributed import data_parallel

RANKS = (2, 3)
SAMPLES = 12  # of each level; 2 and 3 divide it
Data = tuple[Tensor, Tensor]
Wrap = Callable[[bl.BilevelProblem], bl.BilevelProblem]
func: Any = torch.func


def samples(seed: int, rank: int = 0, count: int = 1) -> Data:
    """Inputs and targets; of a rank, its part."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    targets = torch.tanh(inputs[:, 0] - 0.5 * inputs[:, 1])
    targets = targets + 0.1 * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    part = slice(rank * SAMPLES // count, (rank + 1) * SAMPLES // count)
    return inputs[part], targets[part]


def start() -> tuple[dict[str, Tensor], list[Tensor]]:
    zero = torch.tensor(0.0).double()
    return {"scale": torch.tensor([0.1, -0.2, 0.0]).double(), "weight": zero - 2.0}, [
        torch.tensor([0.3, -0.1, 0.2]).double(),
        zero + 0.1,
    ]


def errors(x: Any, y: Any, data: Data) -> Tensor:
    """Of each sample: a curved regression, so that no derivative up to the third vanishes."""
    inputs, targets = data
    return (torch.tanh(inputs * x["scale"].exp()) @ y[0] + y[1] - targets).square()


def lower_losses(x: Any, y: Any, data: Data) -> Tensor:
    penalty = torch.exp(x["weight"]) * (y[0].square().sum() + y[1] ** 2)
    return errors(x, y, data) + 0.1 * y[0].pow(4).sum() + penalty


def stated(data: Data | None = None, *, per_sample: bool = False) -> bl.BilevelProblem:
    """The problem on given data, or on that of its batches."""

    def lower(x: Any, y: Any, batch: Any) -> Tensor:
        losses = lower_losses(x, y, data or batch)
        return losses if per_sample else losses.mean()

    def upper(x: Any, y: Any, batch: Any) -> Tensor:
        return errors(x, y, data or batch).mean() + 0.01 * x["scale"].square().sum()

    return bl.BilevelProblem(upper, lower, per_sample=per_sample)


def derivatives(wrap: Wrap, rank: int, count: int) -> dict[str, Any]:
    """The value and derivatives of an objective and of a constraint, in all modes."""
    data = samples(1, rank, count)
    problem = wrap(
        replace(
            stated(),
            lower_constraint=lambda x, y, d: torch.stack([errors(x, y, d).mean(), y[1]]),
        )
    )
    x, y = start()
    u = torch.cat([x["scale"], x["weight"].reshape(1)])
    v = torch.cat([y[0], y[1].reshape(1)])
    along_u, along_v = torch.linspace(-1, 1, 4).double(), torch.linspace(2, 1, 4).double()
    directions = torch.eye(4).double()

    def f(u: Tensor, v: Tensor) -> Tensor:
        return problem.lower({"scale": u[:3], "weight": u[3]}, [v[:3], v[3]], data)

    def h(v: Tensor) -> Tensor:
        assert problem.lower_constraint is not None
        return problem.lower_constraint(x, [v[:3], v[3]], data)

    def slope(u: Tensor, v: Tensor) -> Tensor:  # forward mode alone
        return func.jvp(f, (u, v), (along_u, along_v))[1]

    grad = func.grad(f, argnums=(0, 1))
    tracked_u, tracked_v = u.clone().requires_grad_(), v.clone().requires_grad_()
    first = torch.autograd.grad(f(tracked_u, tracked_v), (tracked_u, tracked_v), create_graph=True)
    second = torch.autograd.grad(first[1] @ along_v, (tracked_u, tracked_v), create_graph=True)
    third = torch.autograd.grad(second[1] @ along_v, (tracked_u, tracked_v))
    return {
        "value": f(u, v).detach(),
        "gradient": grad(u, v),
        "jvp": slope(u, v),
        "reverse over reverse": [t.detach() for t in second],
        "third order": third,
        "forward over reverse": func.jvp(grad, (u, v), (along_u, along_v))[1],
        "reverse over forward": func.grad(slope, argnums=(0, 1))(u, v),
        "vmap": func.vmap(lambda d: func.jvp(func.grad(f, 1), (u, v), (0 * d, d))[1])(directions),
        "vmap of values": func.vmap(f, in_dims=(None, 0))(u, directions),
        "hessian": func.hessian(f, argnums=1)(u, v),
        "constraint": h(v),
        "jacobian": func.jacrev(h)(v),
        "jacobian forward": func.jacfwd(h)(v),
    }


def solutions(wrap: Wrap, rank: int, count: int) -> dict[str, Any]:
    """What solvers find, on all data and on batches."""
    x, y = start()
    whole = wrap(stated(samples(2, rank, count)))

    def batches() -> Any:
        for step in range(12):
            yield bl.Batch(samples(100 + step, rank, count), samples(200 + step, rank, count))

    def found(
        problem: bl.BilevelProblem, solver: bl.Solver, steps: int, data: Any = None
    ) -> dict[str, Any]:
        done = bl.solve(problem, solver, x, y, data, max_steps=steps)
        assert done.steps == steps, done
        return {"x": done.x, "y": done.y, "upper": torch.tensor(done.upper).double()}

    descent = bl.HypergradientDescent
    return {
        "ASBLO": found(whole, bl.ASBLO(), 6),
        "ASBLO on batches": found(wrap(stated(per_sample=True)), bl.ASBLO(), 12, batches()),
        "Implicit": found(whole, descent(bl.Implicit(linear=bl.linear.CG())), 4),
        "Implicit, dense": found(whole, descent(bl.Implicit(linear=bl.linear.Dense())), 4),
        "Unrolled": found(whole, descent(bl.Unrolled(max_steps=20, lr=0.2)), 4),
    }


def exchanges(rank: int, count: int) -> dict[str, Any]:
    """How often ranks wait for each other in one gradient: once forward, once backward."""
    calls, all_reduce = [0], dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return all_reduce(*arguments, **options)

    problem, (x, y) = data_parallel(stated(samples(1, rank, count))), start()
    for leaf in (*x.values(), *y):
        leaf.requires_grad_()
    dist.all_reduce = counted
    try:
        problem.upper(x, y, None).backward()
    finally:
        dist.all_reduce = all_reduce
    return {"exchanges": torch.tensor(calls[0])}


def message(do: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as raised:
        do()
    return str(raised.value)


def mistakes(rank: int, count: int) -> dict[str, str]:
    """What each rank says where ranks do not fit together."""
    x, y = start()
    inputs, targets = samples(1, rank, count)
    uneven = (inputs[: 3 + (rank == 1)], targets[: 3 + (rank == 1)])
    losses = data_parallel(stated(uneven, per_sample=True))
    elsewhere = {**x, "weight": x["weight"] + (rank == 1)}
    first = dist.new_group([0])
    mesh = init_device_mesh("cpu", (count,))
    sharded = [distribute_tensor(y[0].float(), mesh), y[1].float()]
    said = {
        "uneven": message(lambda: losses.lower(x, y, None), bl.ObjectiveError),
        "start": message(
            lambda: data_parallel(stated(uneven)).upper(elsewhere, y, None), bl.StructureError
        ),
        "sharded": message(
            lambda: data_parallel(stated(uneven)).upper(x, sharded, None), bl.StructureError
        ),
    }
    if rank == 1:
        said["outside"] = message(lambda: data_parallel(stated(), first), ValueError)
    return said


def subgroup(rank: int, count: int) -> dict[str, Any]:
    """The last two of the ranks alone, each with half of the data."""
    pair = [count - 2, count - 1]
    group = dist.new_group(pair)
    if rank not in pair:
        return {}
    problem = data_parallel(stated(samples(3, rank - pair[0], 2)), group)
    return {"subgroup": bl.hypergradient(problem, *start(), bl.Implicit()).grad}


def work(rank: int, count: int, folder: str) -> None:
    """One process: all checks in turn; then the last rank fails, and the others say what they see."""
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=30)
    dist.init_process_group("gloo", store, timeout=limit, rank=rank, world_size=count)
    found = {
        **derivatives(data_parallel, rank, count),
        **solutions(data_parallel, rank, count),
        **exchanges(rank, count),
        **subgroup(rank, count),
        "mistakes": mistakes(rank, count),
    }
    path = Path(folder) / f"{rank}.pt"
    problem, (x, y) = data_parallel(stated(samples(1, rank, count))), start()
    problem.upper(x, y, None)
    if rank == count - 1:
        torch.save(found, path)
        raise OSError("no photographs here")
    began = time.monotonic()
    found["left alone"] = message(lambda: problem.upper(x, y, None), ConnectionError)
    found["waited"] = time.monotonic() - began
    torch.save(found, path)


@pytest.fixture(scope="module", params=RANKS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each rank has found."""
    count, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(
        work, (count, str(folder)), count, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(300)  # a busy machine takes its time
    exits = [process.exitcode for process in context.processes]
    assert exits == [0] * (count - 1) + [1], Path(context.error_files[0]).read_bytes()
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds with the joined batch."""

    def same(problem: bl.BilevelProblem) -> bl.BilevelProblem:
        return problem

    joined = bl.hypergradient(stated(samples(3)), *start(), bl.Implicit()).grad
    return {**derivatives(same, 0, 1), **solutions(same, 0, 1), "subgroup": joined}


def flat(tree: Any) -> Tensor:
    parts = tree.values() if isinstance(tree, dict) else tree
    if isinstance(tree, Tensor):
        return tree.reshape(-1)
    return torch.cat([flat(part) for part in parts])


DERIVATIVES = (
    "value",
    "gradient",
    "jvp",
    "reverse over reverse",
    "third order",
    "forward over reverse",
    "reverse over forward",
    "vmap",
    "vmap of values",
    "hessian",
    "constraint",
    "jacobian",
    "jacobian forward",
)
SOLVERS = ("ASBLO", "ASBLO on batches", "Implicit", "Implicit, dense", "Unrolled")


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_joined_batch(ranks: Any, alone: Any, name: str) -> None:
    torch.testing.assert_close(flat(ranks[0][name]), flat(alone[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*SOLVERS, "subgroup"])
def test_solutions_are_those_of_the_joined_batch(ranks: Any, alone: Any, name: str) -> None:
    if name != "subgroup":  # a gradient; the others must have moved, else this shows nothing
        began = torch.cat([flat(tree) for tree in start()])
        assert (flat(alone[name])[: len(began)] - began).abs().max() > 1e-3
    torch.testing.assert_close(flat(ranks[-1][name]), flat(alone[name]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*DERIVATIVES, *SOLVERS])
def test_ranks_agree_to_the_last_bit(ranks: Any, name: str) -> None:
    for other in ranks[1:]:
        assert torch.equal(flat(ranks[0][name]), flat(other[name]))


def test_a_gradient_is_two_exchanges(ranks: Any) -> None:
    assert [int(found["exchanges"]) for found in ranks] == [2] * len(ranks)


def test_ranks_that_do_not_fit_are_told_on_each(ranks: Any) -> None:
    lengths = [3, 4, 3][: len(ranks)]
    for found in ranks:
        said = found["mistakes"]
        assert (
            f"equally many numbers on all ranks of `data_parallel`. Got {lengths}."
            in said["uneven"]
        )
        assert "x0 and y0 must be the same on all ranks" in said["start"]
        assert "Got other values than rank 0's on [1]" in said["start"]
        assert "Got a `DTensor`" in said["sharded"]
    assert "Got a group without process 1" in ranks[1]["mistakes"]["outside"]


def test_a_rank_that_fails_ends_the_others_with_an_error(ranks: Any) -> None:
    for found in ranks[:-1]:
        assert (
            "All ranks of `data_parallel` must take part in each evaluation." in found["left alone"]
        )
        assert found["waited"] < 20.0


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"Got none. Call `torch.distributed.init_process_group"):
        data_parallel(stated())


def test_only_a_problem_is_wrapped() -> None:
    with pytest.raises(TypeError, match=r"`data_parallel\(problem=...\)` must be an instance"):
        data_parallel(lambda x, y, data: x)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def group() -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
@pytest.mark.usefixtures("group")
def test_first_order_and_unrolled_take_distributed_tensors(placement: Any) -> None:
    """Those form no products with vectors of their own, which torch would refuse to mix with a `DTensor`."""
    problem = bl.BilevelProblem(
        upper=lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
        lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum() + 0.1 * (y**4).sum(),
    )
    whole = torch.tensor([0.1, -0.2, 0.3]).double(), torch.zeros(3).double()
    mesh = init_device_mesh("cpu", (1,))
    parts = [distribute_tensor(tensor, mesh, [placement]) for tensor in whole]
    unrolled = bl.Unrolled(max_steps=20, lr=0.1)
    expected = bl.hypergradient(problem, *whole, unrolled).grad
    found = bl.hypergradient(problem, *parts, unrolled).grad
    torch.testing.assert_close(found.full_tensor(), expected)

    def stepped(x: Any, y: Any) -> Any:
        *_, last = islice(bl.iterate(problem, bl.ASBLO(), x, y, repeat(None)), 3)
        return last.x

    torch.testing.assert_close(stepped(*parts).full_tensor(), stepped(*whole))


@pytest.mark.usefixtures("group")
def test_a_module_sharded_by_fsdp2_is_refused_with_the_reason() -> None:
    fsdp = importlib.import_module("torch.distributed.fsdp")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    fsdp.fully_shard(net[0], mesh=init_device_mesh("cpu", (1,)))

    def loss(module: Any, data: Any) -> Tensor:
        return module(data).square().mean()

    with pytest.raises(bl.StructureError, match=r"`fully_shard` on 0: .* have no derivatives"):
        bl.from_module(net, lower=["1.*"], upper_loss=loss, lower_loss=loss)
