"""The ranks of one training job, as torchrun starts them; a plain start is one rank and needs none of this."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tidali.errors import Interrupted, UsageError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is among how many."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    joined: bool = False
    """In one process group, by which ranks can ask each other."""

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and talks."""
        return self.rank == 0

    def share(self, global_batch_size: int) -> int:
        """This rank's part of a global batch.

        Raises:
            UsageError: the batch does not divide by the number of ranks.
        """
        if global_batch_size % self.world_size:
            raise UsageError(f"--batch-size {global_batch_size}: not a multiple of the {self.world_size} ranks")
        return global_batch_size // self.world_size

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Of each of some values the largest of any rank: what lets all of them do the same after the same step. Waits for the
        device."""
        if self.world_size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return [float(value) for value in found.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if not self.joined:
            return [value]
        values = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's batch-norm statistics, those that are saved: an evaluation is then of one model."""
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def synchronise_batch_norm(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norm over the batches of all ranks.

        Raises:
            UsageError: torch has it on GPUs alone.
        """
        if device.type != "cuda":
            raise UsageError("--sync-bn: torch synchronises batch norm between GPUs alone; leave it out on a CPU")
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return synchronised

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients. Batch-norm statistics stay each rank's own; rank 0's are saved."""
        if self.world_size == 1:
            return model
        parameter = next(model.parameters())
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; earlier ones know that name alone.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[parameter.device.index] if parameter.is_cuda else None,
                broadcast_buffers=False,  # rank 0's statistics would be everybody's before each step, for a broadcast each
                gradient_as_bucket_view=True,
            )


@contextmanager
def joined_ranks(device_type: str) -> Iterator[Ranks]:
    """Join the other ranks for the time of a run, by NCCL between GPUs and gloo between CPUs; one rank without torchrun.

    The group is left in order after the work, or where all ranks stopped after the same step. A rank that failed leaves it as
    it is: the others may be waiting in a collective, leaving could wait for them, and its error would never be printed.
    torchrun ends them once it has exited.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]), world_size=world_size, local_rank=int(os.environ.get("LOCAL_RANK", "0")), joined=True
    )
    if device_type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield ranks
    except Interrupted:
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def add_up(rank: int, backend: str, world_size: int, folder: str) -> None:
    """Join a group of this many ranks that meet by a file in the folder, and add up their numbers over all of them.

    Raises:
        RuntimeError: the backend cannot work here, or gave another sum.
    """
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    try:
        number = torch.tensor([rank + 1.0], device="cuda" if backend == "nccl" else "cpu")
        distributed.all_reduce(number)
        if number.item() != world_size * (world_size + 1) / 2:
            raise RuntimeError(f"the sum of 1 to {world_size} came out as {number.item()}")
    finally:
        distributed.destroy_process_group()
