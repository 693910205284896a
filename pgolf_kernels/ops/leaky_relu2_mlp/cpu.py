"""The MLP in C++ (csrc/leaky_relu2_mlp): hands tensors over as pointers, and keeps packed weights for inference.

The kernel multiplies by weights in a layout of its own. Training packs them in every call, because they change in every
step. Inference keeps them, which leaves one question: has the weight changed? Its version counter tells of writes
through the tensor, not of those through `.data` or NumPy; for these, 64 of the weight's cache lines are hashed in every
call. The limit: a write behind the counter's back that misses all 64 lines goes unseen. Write under `torch.no_grad()`
instead, or call `PACKED.clear()`. `isa` forces an instruction set, for tests.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ... import extension

# With fewer rows packing the weights costs a training step more than it saves. PyTorch's bfloat16 products run at the
# hardware's peak, so there is little to save per row.
MIN_ROWS = {torch.float32: 32, torch.bfloat16: 512}


def why_not(dtype: torch.dtype, x: Tensor, w_up: Tensor, w_down: Tensor) -> str | None:
    """None if the C++ kernel can run these arguments in `dtype`."""
    if extension.WHY_NOT_CPU:
        return extension.WHY_NOT_CPU
    if any(t.device.type != "cpu" for t in (x, w_up, w_down)) or dtype not in MIN_ROWS:
        return f"the C++ kernel computes in float32 or bfloat16 on CPU tensors, got {dtype} on {x.device}"
    if x.shape[:-1].numel() < MIN_ROWS[dtype]:
        return f"for fewer than {MIN_ROWS[dtype]} rows of {dtype} packing the weights costs more than it saves"
    return None


class _Entry(NamedTuple):
    storage: StorageWeakRef  # while it is held, no other storage can get its address
    version: int
    fingerprint: int
    packed: Tensor


class PackedWeights:
    """Packed forms of weights that are still alive and unchanged, up to `capacity` bytes, the latest used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._lock = threading.Lock()  # the kernels run without the interpreter's lock

    def get(self, w: Tensor, isa: str) -> Tensor:
        """The packed form of w [N, K], which must be contiguous."""
        if w.is_inference():  # no version to go by
            return _pack(w, isa)
        key = (w.untyped_storage()._cdata, w.storage_offset(), tuple(w.shape), w.dtype, isa)
        version = w._version
        fingerprint = extension.cpu.mlp_fingerprint(w.data_ptr(), w.numel() * w.element_size())
        with self._lock:
            entry = self._entries.get(key)
            if entry and (entry.version, entry.fingerprint) == (version, fingerprint):
                self._entries.move_to_end(key)
                return entry.packed
        packed = _pack(w, isa)
        with self._lock:
            self._entries.pop(key, None)
            for dead in [k for k, e in self._entries.items() if e.storage.expired()]:
                del self._entries[dead]
            self._entries[key] = _Entry(StorageWeakRef(w.untyped_storage()), version, fingerprint, packed)
            while len(self._entries) > 1 and self.num_bytes() > self.capacity:
                self._entries.popitem(last=False)
        return packed

    def __len__(self) -> int:
        return len(self._entries)

    def num_bytes(self) -> int:
        """What the packed forms occupy."""
        return sum(e.packed.nbytes for e in self._entries.values())

    def clear(self) -> None:
        """Forget every packed form."""
        with self._lock:
            self._entries.clear()


PACKED = PackedWeights(capacity=1 << 29)


def _pack(w: Tensor, isa: str) -> Tensor:
    rows, columns = w.shape
    bf16 = w.dtype == torch.bfloat16
    packed = torch.empty(extension.cpu.mlp_packed_bytes(rows, columns, bf16=bf16, isa=isa), dtype=torch.uint8)
    extension.cpu.mlp_pack(
        weight=w.data_ptr(),
        rows=rows,
        columns=columns,
        bf16=bf16,
        threads=torch.get_num_threads(),
        isa=isa,
        out=packed.data_ptr(),
    )
    return packed


def _problem(x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float, isa: str):
    return extension.cpu.MlpProblem(
        x=x.data_ptr(),
        w_up=w_up.data_ptr(),
        w_down=w_down.data_ptr(),
        sizes=(*x.shape, len(w_up)),
        bf16=x.dtype == torch.bfloat16,
        negative_slope=negative_slope,
        threads=torch.get_num_threads(),
        isa=isa,
    )


def forward(
    x: Tensor, w_up: Tensor, w_down: Tensor, negative_slope: float, save: bool, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """y [M, D] and, if `save`, what backward needs: a [M, H], leaky(p)^2 with the sign of p in its last bit.

    Contiguous tensors of one dtype, x [M, D]. Without `save` the weights' packed forms are kept for the next call, and
    `a` is empty.
    """
    problem = _problem(x, w_up, w_down, negative_slope, isa)
    y = torch.empty_like(x)
    if save:
        a = x.new_empty(len(x), len(w_up))
        extension.cpu.mlp_forward(problem, y=y.data_ptr(), a=a.data_ptr())
        return y, a
    up, down = PACKED.get(w_up, isa), PACKED.get(w_down, isa)
    extension.cpu.mlp_forward(problem, packed_up=up.data_ptr(), packed_down=down.data_ptr(), y=y.data_ptr())
    return y, x.new_empty(0)


def backward(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    a: Tensor,
    negative_slope: float,
    needs: list[bool],
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw_up and dw_down; those that `needs` does not ask for are empty. Contiguous tensors of one dtype."""
    wanted = [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((x, w_up, w_down), needs, strict=True)]
    dx, dw_up, dw_down = (t.data_ptr() if need else 0 for t, need in zip(wanted, needs, strict=True))
    problem = _problem(x, w_up, w_down, negative_slope, isa)
    extension.cpu.mlp_backward(problem, dy=dy.data_ptr(), a=a.data_ptr(), dx=dx, dw_up=dw_up, dw_down=dw_down)
    return tuple(wanted)
