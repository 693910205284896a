"""Muon on W ranks: three ways to share momentum, orthogonalisation and what has to be sent.

    Shared        gradients come averaged; every rank has all momentum, orthogonalises 1/W of each bank and gathers
                  the rest
    RoundRobin    gradients come averaged; matrix i and its momentum belong to rank i mod W; all updates meet in one
                  flat buffer that is summed (#1333, #675)
    Parallel      gradients come as each rank has them; a bank is padded to a multiple of W matrices, its gradient
                  reduce-scattered, momentum and orthogonalisation done on the slice, the update gathered (#1217, #1128)

The surprise is when Parallel's update is applied: in #1217 a bank's gather was waited for before the next bank's
Newton-Schulz began, so nothing overlapped. Here it is waited for one bank later; the result is the same.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .banks import Bank, as_bank

# Both were renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shared:
    """Also the way of a single process, which sends nothing.

    Args:
        process_group: the ranks; None: this process alone.
        dtype: of what is sent; None: the compute dtype.
        mean: gradients that come as each rank has them are averaged; False: added.
    """

    takes_own_gradients = False  # whether gradients come as each rank has them, instead of averaged

    def __init__(self, process_group: dist.ProcessGroup | None, dtype: torch.dtype | None, mean: bool) -> None:
        self.group, self.dtype, self.mean = process_group, dtype, mean
        self.world = 1 if process_group is None else process_group.size()
        self.rank = 0 if process_group is None else process_group.rank()
        self.one_by_one = self.world > 1  # a bank's gather then runs under the next bank's products

    def add(self, params: Iterable[Tensor]) -> None:
        """Take notice of parameters, in the same order on every rank, before their matrices are dealt."""

    def owned(self, p: Tensor, rank: int | None = None) -> slice:
        """Of the matrices of p, those whose momentum is on `rank`; None: on this one."""
        return slice(None)

    def mine(self, bank: Bank) -> Tensor:
        """Of bank.updates, those that this rank orthogonalises."""
        return bank.updates[_slice(bank.num_matrices, self.rank, self.world)]

    def send(self, bank: Bank, part: Tensor) -> None:
        """Give this rank's part of bank.orthogonal to all others."""
        if self.world == 1:
            bank.orthogonal = part
            return
        share = -(-bank.num_matrices // self.world)
        gathered = part.new_empty(self.world * share, *part.shape[1:], dtype=self.dtype or part.dtype)
        padded = gathered[self.rank * share : (self.rank + 1) * share]  # the padding is sent, and never read
        padded[: len(part)] = part
        bank.work = _all_gather(gathered, padded, group=self.group, async_op=True)
        bank.orthogonal = gathered[: bank.num_matrices]

    def receive(self, banks: list[Bank]) -> None:
        """Wait until bank.orthogonal of every bank is complete."""
        for bank in banks:
            if bank.work is not None:
                bank.work.wait()

    def whole(self, p: Tensor, buffer: Tensor) -> Tensor | None:
        """All of p's momentum on rank 0, None on others. Every rank must call it, with its own."""
        if self.owned(p) == slice(None):
            return buffer if self.rank == 0 else None
        padded = buffer.new_zeros(-(-len(as_bank(p)) // self.world), *buffer.shape[1:])
        padded[: len(buffer)] = buffer
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        if parts is None:
            return None
        whole = torch.empty_like(p, dtype=buffer.dtype)
        for rank, part in enumerate(parts):
            place = as_bank(whole)[self.owned(p, rank)]
            place.copy_(part[: len(place)])
        return whole


class RoundRobin(Shared):
    """Every matrix has one owner, which alone keeps its momentum; its number counts over all parameters."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.one_by_one = False
        self._number: dict[Tensor, int] = {}  # of each parameter's first matrix
        self._count = 0

    def add(self, params: Iterable[Tensor]) -> None:
        for p in params:
            self._number[p] = self._count
            self._count += len(as_bank(p))

    def owned(self, p: Tensor, rank: int | None = None) -> slice:
        rank = self.rank if rank is None else rank
        return slice((rank - self._number[p]) % self.world, None, self.world)

    def mine(self, bank: Bank) -> Tensor:
        return bank.updates

    def send(self, bank: Bank, part: Tensor) -> None:
        bank.orthogonal = part  # of the owned matrices alone, until it is received

    def receive(self, banks: list[Bank]) -> None:
        if not banks:
            return
        parts = [bank.orthogonal for bank in banks]
        sizes = [sum(p.numel() for p in bank.params) for bank in banks]
        flat = parts[0].new_zeros(sum(sizes), dtype=self.dtype or reduce(torch.promote_types, (p.dtype for p in parts)))
        for bank, part, place in zip(banks, parts, flat.split(sizes), strict=True):
            bank.orthogonal = place.view(-1, *part.shape[1:])
            matrices = bank.orthogonal.split([len(as_bank(p)) for p in bank.params])
            owned = [m[self.owned(p)] for m, p in zip(matrices, bank.params, strict=True)]
            for to, own in zip(owned, part.split([len(m) for m in owned]), strict=True):
                to.copy_(own)
        dist.all_reduce(flat, group=self.group)


class Parallel(Shared):
    """A bank is one parameter; slices of its dimension 0 go to the ranks, of which the last may have none."""

    takes_own_gradients = True
    _reducing: list[Bank] | None = None

    def owned(self, p: Tensor, rank: int | None = None) -> slice:
        return _slice(len(as_bank(p)), self.rank if rank is None else rank, self.world)

    def mine(self, bank: Bank) -> Tensor:
        return bank.updates

    def reduce(self, groups: list[dict[str, Any]]) -> None:
        """Start the reduce-scatters, the largest bank's first, unless they have been since the last step."""
        if self._reducing is not None:
            return
        banks = [Bank(group, [p]) for group in groups for p in group["params"] if p.grad is not None]
        banks.sort(key=lambda bank: -bank.params[0].numel())
        for bank in banks:
            grads = as_bank(bank.params[0].grad)  # (M, rows, cols)
            share = -(-len(grads) // self.world)
            shape = (self.world * share, *grads.shape[1:])
            padded = grads.new_empty(shape, dtype=self.dtype or bank.compute_dtype)
            torch.mul(grads, 1 / self.world if self.mean else 1, out=padded[: len(grads)])  # scaled, then rounded
            padded[len(grads) :].zero_()
            bank.gradient, bank.work = _start_reduce_scatter(padded, share, self.rank, self.group)
        self._reducing = banks

    def reduced(self) -> Iterator[Bank]:
        """The banks in that order, each when its gradient has arrived."""
        banks, self._reducing = self._reducing, None
        for bank in banks:
            bank.work.wait()
            owned = self.owned(bank.params[0])
            bank.gradient = bank.gradient[: owned.stop - owned.start]
            yield bank


COMMS = {"shared": Shared, "round_robin": RoundRobin, "parallel": Parallel}


def _slice(count: int, rank: int, world: int) -> slice:
    share = -(-count // world)
    return slice(min(rank * share, count), min((rank + 1) * share, count))


def _start_reduce_scatter(padded: Tensor, share: int, rank: int, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """This rank's slice of the sum over ranks, valid when the work is done."""
    mine = padded.new_empty(share, *padded.shape[1:])
    try:
        return mine, _reduce_scatter(mine, padded, group=group, async_op=True)
    except RuntimeError as error:
        if "not support" not in str(error):
            raise
    # Some backends have none, gloo for one before it learned it: then the whole sum, at twice the traffic.
    return padded[rank * share : (rank + 1) * share], dist.all_reduce(padded, group=group, async_op=True)
