"""Ranks: a process per GPU under torchrun (NCCL), CPU processes (gloo), or a single process with no group at all."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import FailedElsewhereError, InputError

T = TypeVar("T")
_STARTS = itertools.count()  # how often this process has joined a job: training, then each evaluation


@dataclass(frozen=True)
class Ranks:
    """This process's place. `group` carries tensors, `control` small CPU values; both None in a single process."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: float) -> float:
        """Rank 0's value on every rank, without touching the GPU's queue."""
        if self.control is None:
            return value
        t = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(t, src=0, group=self.control)
        return t.item()

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def on_main(self, act: Callable[[], T]) -> T | None:
        """Call `act` on rank 0 alone, such as to write a file, while the others wait to hear how it went.

        Returns:
            What `act` returned; None on the other ranks.

        Raises:
            Exception: on rank 0, what `act` raised; on the others FailedElsewhereError, so that none waits in vain.
        """
        result = failure = None
        if self.is_main:
            try:
                result = act()
            except Exception as error:
                failure = error
        if self.control is not None:
            said = [failure and (str(failure) or type(failure).__name__)]
            dist.broadcast_object_list(said, src=0, group=self.control)
            if said[0] is not None and not self.is_main:
                raise FailedElsewhereError(said[0])
        if failure is not None:
            raise failure
        return result

    def gather(self, value: object) -> list:
        """The values of all ranks, in rank order."""
        if self.control is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values


def start(device: str = "auto") -> Ranks:
    """Join the job described by torchrun's environment; a plain process is a job of one.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        InputError: "cuda", and there is none.
    """
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch must see a GPU, got none; use --device cpu or auto")
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(kind))
    place = torch.device(kind)
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    # Keys of an earlier attempt or stage in a reused store would name dead connections: give each its own.
    store, rank, world_size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") + f".{next(_STARTS)}"
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
        **({"device_id": place} if kind == "cuda" else {}),
    )
    control = dist.new_group(backend="gloo") if kind == "cuda" else dist.group.WORLD
    return Ranks(rank, world_size, place, dist.group.WORLD, control)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
