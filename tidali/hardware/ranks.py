"""The ranks of one distributed job, as torchrun starts them; without torchrun there is one rank, and nothing is
communicated."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tidali.errors import Diverged, Interrupted, TidaliError, UsageError, first_line

LOST_AFTER = timedelta(minutes=15)
"""A rank whose machine has gone without closing its connections is waited for so long. Longer than any shard is
(`tidali.dataset.limited_copy`)."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank, and the number of ranks."""

    rank: int = 0
    world_size: int = 1
    joined: bool = False
    """In one process group, by which ranks can ask each other."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def local_batch_size(self, global_batch_size: int) -> int:
        """This rank's part of a batch over all ranks, in samples.

        Raises:
            UsageError: the batch does not divide by the number of ranks.
        """
        if global_batch_size % self.world_size:
            raise UsageError(f"--batch-size {global_batch_size}: not a multiple of the {self.world_size} ranks")
        return global_batch_size // self.world_size

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each value over all ranks, so that all ranks can decide alike. Waits for the device."""
        if self.world_size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return [float(value) for value in largest.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if not self.joined:
            return [value]
        values = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's batch-norm statistics, which are the ones saved, to all ranks, so that they evaluate one model."""
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel. Each rank keeps its own batch-norm statistics; rank 0's are saved."""
        if self.world_size == 1:
            return model
        parameter = next(model.parameters())
        with warnings.catch_warnings():
            # torch 2.14 deprecates the name broadcast_buffers; earlier versions have no other.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[parameter.device.index] if parameter.is_cuda else None,
                broadcast_buffers=False,  # it would cost a broadcast of rank 0's statistics before each step
                gradient_as_bucket_view=True,
            )


@contextmanager
def joined_ranks(device_type: str) -> Iterator[Ranks]:
    """Join torchrun's process group while this is entered, by NCCL between GPUs and gloo between CPUs; without torchrun, one
    rank.

    The group is destroyed after the work, or where all ranks stopped after the same step. A rank that failed does not destroy
    it: the others may be waiting in a collective, destroying could wait for them, and the error would never be printed.
    torchrun ends the others once this rank has exited; those on other machines lose their connection to it.

    Raises:
        TidaliError: another rank is gone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    ranks = Ranks(rank=int(os.environ["RANK"]), world_size=world_size, joined=True)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=LOST_AFTER)
    try:
        yield ranks
    except (Interrupted, Diverged):
        distributed.destroy_process_group()
        raise
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        cause = re.sub(r"^\[\S+\] |\. .*", "", first_line(error))  # without gloo's own source file, and its advice
        raise TidaliError(
            f"rank {ranks.rank} lost its connection to another rank, whose own messages say why ({cause}); start "
            f"the command again, on fewer machines if one is lost; a training run goes on with --resume"
        ) from None
    distributed.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank does not answer. gloo raises plain RuntimeErrors."""
    return isinstance(error, distributed.DistError) or any(text in str(error) for text in _LOST)


def check_all_reduce(rank: int, backend: str, world_size: int, folder: str) -> None:
    """Test a backend: join a process group through a file in the folder, and sum the ranks' numbers over all of them.

    Raises:
        RuntimeError: the backend does not work here, or its sum is wrong.
    """
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        number = torch.tensor([rank + 1.0], device="cuda" if backend == "nccl" else "cpu")
        distributed.all_reduce(number)
        if number.item() != world_size * (world_size + 1) / 2:
            raise RuntimeError(f"the sum of 1 to {world_size} was computed as {number.item()}")
    finally:
        distributed.destroy_process_group()
