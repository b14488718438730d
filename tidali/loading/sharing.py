"""Pixels that the ranks on one machine decode together, each a share of them."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from tidali.errors import TidaliError
from tidali.hardware.cpu_memory import map_memory
from tidali.hardware.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """A rank among those on its machine."""

    ranks: Ranks
    machines: tuple[tuple[int, ...], ...]
    """The ranks on each machine."""

    @classmethod
    def of(cls, ranks: Ranks) -> Sharing:
        """All ranks have to call this."""
        if not ranks.joined:
            return cls(ranks=ranks, machines=((ranks.rank,),))
        by_machine: dict[str, list[int]] = {}
        for rank, machine in enumerate(ranks.gather(_machine())):
            by_machine.setdefault(machine, []).append(rank)
        return cls(ranks=ranks, machines=tuple(map(tuple, by_machine.values())))

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks on this machine."""
        return next(members for members in self.machines if self.ranks.rank in members)

    @property
    def names_corrupt(self) -> bool:
        """Whether this rank prints what it finds corrupt: its share, on the first machine only. Ranks that are not joined
        decode everything each, and the first of them prints."""
        return self.ranks.rank in self.machines[0] if self.ranks.joined else self.ranks.is_main

    def part(self, count: int, rank: int | None = None) -> slice:
        """Which of so many samples a rank decodes; by default this one."""
        place, ranks = self.members.index(self.ranks.rank if rank is None else rank), len(self.members)
        return slice(count * place // ranks, count * (place + 1) // ranks)

    def zeros(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """uint8; in the memory of a CPU, one tensor for all ranks on the machine. All ranks have to call this.

        That memory is a file without a name (memfd_create), which the other ranks open as one of the first rank's open files.
        The kernel frees it when the last of them has ended, however it ends, and the size of /dev/shm does not limit it.

        Raises:
            TidaliError: the ranks do not get at each other's memory.
        """
        length, file = torch.Size(shape).numel(), -1
        if device.type != "cpu" or not length:
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        if len(self.members) == 1:
            return torch.frombuffer(map_memory(length), dtype=torch.uint8).view(shape)
        if self.ranks.rank == self.members[0]:
            file = os.memfd_create("tidali-pixels")
            os.ftruncate(file, length)
        path = self.ranks.gather(f"/proc/{os.getpid()}/fd/{file}")[self.members[0]]
        try:
            if file < 0:
                file = os.open(path, os.O_RDWR)
            memory = mmap.mmap(file, length)
        except OSError as error:
            raise TidaliError(f"{path}, memory shared by ranks: {error.strerror}; use --cache off") from None
        self.ranks.gather(None)  # until all have opened it, its first file must stay open
        os.close(file)
        return torch.frombuffer(memory, dtype=torch.uint8).view(shape)

    def exchange(self, pixels: Tensor) -> None:
        """Give every rank on the machine what the others have decoded, each into its part of ``pixels``. All ranks have to call
        this.

        On a CPU they are there already. Every GPU needs all pixels in memory of its own: they are sent from GPU to GPU, which
        even over PCIe moves 20 GB/s, 1.7 million images of 64 px, while each rank has only its share of the cores to decode
        with. Between machines nothing is sent: many cores decode small images faster than a network carries them decoded.
        """
        if len(self.members) > 1 and pixels.device.type == "cuda":
            self.broadcast(pixels)

    def broadcast(self, pixels: Tensor) -> None:
        """From each rank on the machine its part to the others."""
        groups: list[Any] = [distributed.new_group(m) if len(self.machines) > 1 else None for m in self.machines]
        for rank in self.members:
            part = pixels[self.part(len(pixels), rank)]
            if len(part):
                distributed.broadcast(part, rank, group=groups[self.machines.index(self.members)])


def _machine() -> str:
    """The same for processes that can open each other's files: of one user on one running kernel, in one container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
