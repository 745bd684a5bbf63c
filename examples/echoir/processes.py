"""What the processes of one training agree on: who takes which patches, what time it is, when to stop.

    torchrun --nproc-per-node 2 examples/echoir/train.py

Each process computes on its share of every batch. Losses and gradients are means over all
(`bilevel.distributed`), so the weights are the same in each, and one alone measures, prints and writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes of a training, as one of them sees them.

    Attributes:
        rank: of this one, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that measures, prints and writes."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of a batch's patches are this process's."""
        return slice(self.rank, None, self.count)

    def check_shares(self, argument: str, patches: int):
        """Refuses batches that cannot be shared equally: a mean of the shares' means would be another.

        Raises:
            ValueError: if the number of patches is no multiple of the number of processes.
        """
        if patches % self.count:
            raise ValueError(
                f"`{argument}` must be divisible by the number of processes, in each stage. Got {patches} "
                f"for {self.count} processes. Change either: {argument} or --nproc-per-node."
            )

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """Whether any process is to stop, and the first one's seconds: equal in all. Each waits for all."""
        if self.count == 1:
            return stop, seconds
        said = torch.tensor([float(stop), seconds if self.is_first else 0.0], dtype=torch.float64)
        with _answered():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said[0]), float(said[1])

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes of a tensor that nothing is differentiated by."""
        if self.count == 1:
            return tensor
        total = tensor.detach().clone()
        with _answered():
            dist.all_reduce(total)
        return total / self.count


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun has started, and this one's device; without torchrun, this one alone.

    A group that is there already is used, and left as it is.

    Args:
        device: what each is to compute on; of several GPUs, each process of a machine takes its own.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()), device
        return
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # What is agreed on passes through the CPU: it does not wait for the GPU, and notices a process that has died.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


@contextmanager
def _answered() -> Iterator[None]:
    """Names what a failed exchange means, as `bilevel.distributed` does."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "All processes of a training must answer. Got no answer from another, which has ended or hangs. "
            "Look for the first error of all."
        ) from error
