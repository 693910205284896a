"""One launch over many tensors: a table of their addresses on the device, and which piece each program works on.

An address changes whenever the caching allocator hands out another block, and a copy from the host cannot be captured
in a CUDA graph without pinned memory that outlives it. So addresses travel as arguments of a tiny kernel that writes
the table: no host memory to keep, no synchronisation, and a replayed graph writes its own table again. Outside of a
capture a table is kept for the next call with the same addresses, which in a training loop is every call.

What does not change, the sizes, is a `Pieces`, copied to the device once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_LAUNCH = 32  # addresses that one launch writes
KEPT = 64  # tables, oldest dropped first
ALIGNMENT = 16  # bytes, or elements: what the widest loads need
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_tables: dict[tuple, Tensor] = {}


@triton.jit(do_not_specialize=["addresses"])
def write_addresses_kernel(table_ptr, addresses):
    for i in tl.static_range(len(addresses)):
        tl.store(table_ptr + i, addresses[i])


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def address_table(addresses: Sequence[int], device: torch.device) -> Tensor:
    """`addresses` as int64 on `device`, for kernels on its current stream; call under its device guard."""
    if kept := not capturing(device):
        # Another stream would not wait for the launch that fills the table.
        key = (device, torch.cuda.current_stream(device) if device.type == "cuda" else None, *addresses)
        if key in _tables:
            return _tables[key]
    padded = (*addresses, *(-len(addresses) % PER_LAUNCH) * (addresses[-1],))  # 32-bit fillers would compile again
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), PER_LAUNCH):
        write_addresses_kernel[(1,)](table[start:], padded[start : start + PER_LAUNCH], num_warps=1)
    if kept:
        if len(_tables) >= KEPT:
            del _tables[next(iter(_tables))]
        _tables[key] = table
    return table


def aligned(values: Sequence[int]) -> bool:
    """Whether kernels may take every address, or count of elements, as a multiple of ALIGNMENT."""
    return not any(value % ALIGNMENT for value in values)


class PassTile(NamedTuple):
    """Of a pass over tensors: elements of a piece (16 a thread or less keep every load ahead of the first use)."""

    size: int
    num_warps: int


class Pieces(NamedTuple):
    """A list of tensors cut into pieces of `size` elements, one per program; no piece holds two tensors.

    Rows of `table`, int64 [3, count]: elements; number of the first piece; place of the tensor in a packed buffer.
    """

    table: Tensor
    count: int
    size: int
    total: int  # number of pieces, the grid
    aligned: bool  # whether every size and offset is a multiple of ALIGNMENT

    def arguments(self) -> dict:
        """What `locate` needs, as arguments of the kernel that calls it."""
        padded = triton.next_power_of_2(self.count)
        return {"pieces_ptr": self.table, "count": self.count, "PADDED": padded, "SIZE": self.size}


def to_device_once(values: Sequence | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers that the caller keeps for good: this copy waits for the device.

    Raises:
        ValueError: the current stream is being captured.
    """
    if capturing(device):
        raise ValueError("multi_tensor: sizes and plans go to the device before a capture; run a step before capturing")
    return torch.as_tensor(values, dtype=dtype).to(device)


@functools.cache
def pieces(numels: tuple[int, ...], offsets: tuple[int, ...], size: int, device: torch.device) -> Pieces:
    """Made once per list of sizes, then kept; see to_device_once."""
    starts = [0]
    for numel in numels:
        starts.append(starts[-1] + -(-numel // size))
    table = to_device_once([numels, starts[:-1], offsets], torch.int64, device)
    return Pieces(table, len(numels), size, starts[-1], aligned(numels + offsets))


@functools.cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, made once per list of values, then kept; see to_device_once."""
    return to_device_once(values, torch.float32, device)


@triton.jit
def locate(pieces_ptr, count, PADDED: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor of this program, its offset in a packed buffer, its elements [SIZE] and which of these exist."""
    piece = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED)
    starts = tl.load(pieces_ptr + count + every, mask=every < count, other=9223372036854775807)
    tensor = tl.sum((starts <= piece).to(tl.int32), axis=0) - 1  # empty tensors share the start of the next one
    numel = tl.load(pieces_ptr + tensor)
    offset = tl.load(pieces_ptr + 2 * count + tensor)
    if ALIGNED:
        numel, offset = tl.multiple_of(numel, 16), tl.multiple_of(offset, 16)
    at = (piece - tl.load(pieces_ptr + count + tensor)) * SIZE + tl.arange(0, SIZE)
    return tensor, offset, at, at < numel


@triton.jit
def pointer(table_ptr, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table as a pointer to `dtype`."""
    at = tl.load(table_ptr + index).to(tl.pointer_type(dtype))
    if ALIGNED:
        at = tl.multiple_of(at, 16)  # of the pointer: a hint on the integer is lost in the conversion
    return at


@triton.jit
def follow(a_ptr, p, one_minus_decay, exists):
    """a <- a + (1 - decay) (p - a), where p is as it is stored."""
    a = tl.load(a_ptr, mask=exists).to(tl.float32)
    a += one_minus_decay * (p.to(tl.float32) - a)
    tl.store(a_ptr, a.to(a_ptr.dtype.element_ty), mask=exists)


@triton.jit
def number(value, ON_DEVICE: tl.constexpr):
    """A hyper-parameter: given as it is, or as the address of a tensor that a replayed graph reads afresh."""
    return tl.load(value) if ON_DEVICE else value
