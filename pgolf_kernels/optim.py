"""Muon: momentum, then orthogonalised updates, for matrices and for banks of matrices.

Matrices of one shape share one `newton_schulz` call, whatever parameters they come from. With a process group every
rank holds all gradients and all momentum, orthogonalises only its share of the matrices, and receives the rest: the
result does not depend on the number of ranks, because each matrix is rounded to the compute dtype on every path.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import require
from .ops.newton_schulz import newton_schulz

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are fast (GPUs from Ampere on, CPUs with AMX or AVX-512 BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


class Muon(torch.optim.Optimizer):
    """buf <- momentum buf + g;  u = g + momentum buf (Nesterov) or buf;  p <- (1 - lr wd) p - lr scale NS(u).

    Args:
        params: parameters of 2 dimensions (a matrix) or 3 (a bank of matrices along dimension 0), or groups of them.
        lr: step size; multiplied by the shape-dependent factor of `adjust_lr`.
        momentum: decay of the momentum buffer (float32 whatever the parameter's dtype), in [0, 1).
        weight_decay: decoupled; each step multiplies p by 1 - lr * weight_decay.
        nesterov: look one step ahead.
        ns_steps, ns_coefficients, row_normalize: as in `newton_schulz`.
        adjust_lr: "original", sqrt(max(1, rows / cols)), or "match_rms_adamw", 0.2 sqrt(max(rows, cols)).
        compute_dtype: of the Newton-Schulz products; None: bfloat16 where that is fast, else float32.
        process_group: ranks that share the work. Each must hold the same parameters and the same, already averaged
            gradients, and step at the same time. None: this process does all of it.

    Raises:
        ValueError: a parameter is no matrix or bank, or a hyper-parameter is out of range.

    Source: https://kellerjordan.github.io/posts/muon; torch.optim.Muon, with banks, MuonEq-R and sharding added.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Any = "quintic",
        row_normalize: bool = False,
        adjust_lr: str = "original",
        compute_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "row_normalize": row_normalize,
            "adjust_lr": adjust_lr,
            "compute_dtype": compute_dtype,
        }
        self.process_group = process_group
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        require(group["lr"] >= 0, "Muon", "lr must be >= 0", group["lr"])
        require(0 <= group["momentum"] < 1, "Muon", "momentum must be in [0, 1)", group["momentum"])
        require(group["weight_decay"] >= 0, "Muon", "weight_decay must be >= 0", group["weight_decay"])
        known = group["adjust_lr"] in ADJUST_LR
        require(known, "Muon", f"adjust_lr must be one of {list(ADJUST_LR)}", repr(group["adjust_lr"]))
        for p in group["params"]:
            shape = f"shape {tuple(p.shape)}"
            require(p.dim() in (2, 3), "Muon", "parameters must be matrices or banks", shape, "use AdamW for others")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, but the momentum stays float32 for parameters of fewer bits."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            if index in state_dict["state"]:
                buffer = state_dict["state"][index]["momentum_buffer"]
                self.state[p]["momentum_buffer"] = buffer.to(device=p.device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        in_flight = []
        for group in self.param_groups:
            for params in _by_matrix_shape(p for p in group["params"] if p.grad is not None):
                orthogonal, work = self._orthogonalize(self._momentum_updates(params, group), group)
                in_flight.append((group, params, orthogonal, work))
        for group, params, orthogonal, work in in_flight:  # the first gathers ran under the last products
            if work is not None:
                work.wait()
            _apply(group, params, orthogonal)
        return loss

    def _momentum_updates(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Advance the momentum; return the updates to orthogonalise, (matrices, rows, cols), float32."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad.float() for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        banks = [u.reshape(-1, *u.shape[-2:]) for u in updates]
        return banks[0] if len(banks) == 1 else torch.cat(banks)

    def _orthogonalize(self, updates: Tensor, group: dict[str, Any]) -> tuple[Tensor, dist.Work | None]:
        """Newton-Schulz of (matrices, rows, cols), of which this rank does a share; complete after work.wait()."""
        dtype = group["compute_dtype"] or default_compute_dtype(updates.device)
        args = (group["ns_steps"], group["ns_coefficients"], group["row_normalize"])
        world = 1 if self.process_group is None else self.process_group.size()
        if world == 1:
            return newton_schulz(updates, *args, dtype=dtype), None
        share = -(-len(updates) // world)  # the last ranks may hold fewer, or none
        start = self.process_group.rank() * share
        mine = newton_schulz(updates[start : start + share], *args, dtype=dtype)
        padded = mine.new_zeros(share, *updates.shape[1:])
        padded[: len(mine)] = mine
        gathered = mine.new_empty(world * share, *updates.shape[1:])
        work = _all_gather(gathered, padded, group=self.process_group, async_op=True)
        return gathered[: len(updates)], work


def _by_matrix_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters whose matrices can share one call, in the order of first appearance (the same on every rank)."""
    alike = defaultdict(list)
    for p in params:
        alike[p.shape[-2:], p.device].append(p)
    return list(alike.values())


def _apply(group: dict[str, Any], params: list[Tensor], orthogonal: Tensor) -> None:
    rows, cols = orthogonal.shape[-2:]
    lr = group["lr"]
    counts = [p.numel() // (rows * cols) for p in params]
    updates = [o.view_as(p) for o, p in zip(orthogonal.split(counts), params, strict=True)]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, updates, alpha=-lr * ADJUST_LR[group["adjust_lr"]](rows, cols))
