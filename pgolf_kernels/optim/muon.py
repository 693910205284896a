"""Muon: momentum, then orthogonalised updates, for matrices and for banks of matrices.

Matrices of one shape share one `newton_schulz` call, whatever parameters they come from. With a process group every
rank holds all gradients and all momentum, orthogonalises only its share of the matrices, and receives the rest: the
result does not depend on the number of ranks, because each matrix is rounded to the compute dtype on every path.

On a GPU a step is three passes: momentum, Newton-Schulz, update. fused=True makes each of the outer two one launch per
group, ns_impl="triton_megakernel" the middle one two launches for all groups, and capturable=True lets a CUDA graph of
the step be replayed with another learning rate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import meant, require, why_not_triton
from ..ops.newton_schulz import newton_schulz_banks
from .averages import Averages

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

HYPER_PARAMETERS = ("lr", "momentum", "weight_decay")  # those that a captured step reads from the device

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
        ns_impl: implementation of Newton-Schulz, as in `newton_schulz_banks`.
        ns_plain: its published arithmetic, without finer formats inside, as in `newton_schulz`.
        fused: momentum and update in one Triton launch each per group; parameters must be contiguous and on a GPU. The
            updates then reach Newton-Schulz rounded to the compute dtype if that is bfloat16.
        capturable: keep lr, momentum and weight_decay in float32 tensors on the device, so that a step can be captured
            in a CUDA graph. `group["lr"].fill_(x)` changes what the next replay uses; a number put into the group
            becomes a tensor again in the next step(). Needs fused=True, one step before the capture, and a new capture
            after load_state_dict, which brings other tensors.

    Raises:
        ValueError: a parameter is no matrix or bank, a hyper-parameter is out of range, or fused cannot run here.

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
        *,
        ns_impl: str = "auto",
        ns_plain: bool = False,
        fused: bool = False,
        capturable: bool = False,
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
        require(fused or not capturable, "Muon", "capturable needs fused=True", "fused=False")
        self.process_group, self.fused, self.capturable = process_group, fused, capturable
        self.ns_impl, self.ns_plain = ns_impl, ns_plain
        super().__init__(params, defaults)
        self.average_into({}, 0.0)

    def average_into(self, averages: Mapping[Tensor, Tensor], decay: float) -> None:
        """From now on every step ends with a <- a + (1 - decay) (p - a) for each parameter p, a = averages[p].

        Args:
            averages: float32 or the parameter's dtype, its shape and device; a parameter may have none.
            decay: in [0, 1].
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._averages = Averages("Muon", params, averages, decay)

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
            if self.fused:
                reason = why_not_triton(p) or (None if p.is_contiguous() else "it is not contiguous")
                require(reason is None, "Muon", "fused needs contiguous parameters on a GPU", reason, "use fused=False")
        if self.capturable:
            devices = {p.device for p in group["params"]}
            require(len(devices) == 1, "Muon", "capturable needs groups on one device", sorted(map(str, devices)))
            _put_on_device(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, but the momentum stays float32 for parameters of fewer bits."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            if index in state_dict["state"]:
                buffer = state_dict["state"][index]["momentum_buffer"]
                self.state[p]["momentum_buffer"] = buffer.to(device=p.device, dtype=torch.float32, copy=True)
        if self.capturable:
            for group in self.param_groups:
                _put_on_device(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        banks = []  # of all groups
        for group in self.param_groups:
            alike = _by_matrix_shape(p for p in group["params"] if p.grad is not None)
            updates = self._fused_updates(alike, group) if self.fused else map(self._updates, alike, repeat(group))
            banks += [_Bank(group, params, u) for params, u in zip(alike, updates, strict=True)]
        for together in self._calls(banks):
            self._orthogonalize(together)
        for bank in banks:  # the first gathers ran under the last products
            if bank.work is not None:
                bank.work.wait()
        for group in self.param_groups:
            (self._fused_apply if self.fused else _apply)(group, [bank for bank in banks if bank.group is group])
            left = group["params"] if not self.fused else [p for p in group["params"] if p.grad is None]
            self._averages.follow(left)
        return loss

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
                require(not capturing, "Muon", "momentum must exist before a capture", "none", "run one step before")
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _updates(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Advance the momentum; return the updates to orthogonalise, (matrices, rows, cols), float32."""
        buffers = self._buffers(params)
        grads = [p.grad.float() for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        banks = [u.reshape(-1, *u.shape[-2:]) for u in updates]
        return banks[0] if len(banks) == 1 else torch.cat(banks)

    def _fused_updates(self, alike: list[list[Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """The same for all shapes of a group; in bfloat16 if that is the compute dtype."""
        if not alike:
            return []
        from . import muon_passes  # Triton takes a second to import

        if self.capturable:
            _put_on_device(group)
        bfloat16 = _compute_dtype(group, alike[0][0].device) == torch.bfloat16
        return muon_passes.momentum_banks(
            [[p.grad for p in params] for params in alike],
            [self._buffers(params) for params in alike],
            group["momentum"] if self.capturable else float(group["momentum"]),
            group["nesterov"],
            torch.bfloat16 if bfloat16 else torch.float32,
        )

    def _calls(self, banks: list["_Bank"]) -> list[list["_Bank"]]:
        """Banks that share a call of Newton-Schulz: all that are alike, or one by one if gathers can run meanwhile."""
        together = defaultdict(list)
        apart = self.process_group is not None and meant(self.ns_impl) != "triton_megakernel"
        for index, bank in enumerate(banks):
            together[index if apart else bank.key()].append(bank)
        return list(together.values())

    def _orthogonalize(self, banks: list["_Bank"]) -> None:
        """Newton-Schulz of every bank's updates, of which this rank does a share; complete after bank.work.wait()."""
        group = banks[0].group
        world = 1 if self.process_group is None else self.process_group.size()
        rank = 0 if world == 1 else self.process_group.rank()
        shares = [-(-len(bank.updates) // world) for bank in banks]  # the last ranks may hold fewer, or none
        mine = newton_schulz_banks(
            [bank.updates[rank * n : (rank + 1) * n] for bank, n in zip(banks, shares, strict=True)],
            group["ns_steps"],
            group["ns_coefficients"],
            group["row_normalize"],
            dtype=_compute_dtype(group, banks[0].updates.device),
            plain=self.ns_plain,
            impl=self.ns_impl,
        )
        for bank, share, part in zip(banks, shares, mine, strict=True):
            matrices, bank.updates = len(bank.updates), None  # not needed any more
            if world == 1:
                bank.orthogonal = part
                continue
            padded = part.new_zeros(share, *part.shape[1:])
            padded[: len(part)] = part
            gathered = part.new_empty(world * share, *part.shape[1:])
            bank.work = _all_gather(gathered, padded, group=self.process_group, async_op=True)
            bank.orthogonal = gathered[:matrices]

    def _fused_apply(self, group: dict[str, Any], banks: list["_Bank"]) -> None:
        if not banks:
            return
        from . import muon_passes

        scale = ADJUST_LR[group["adjust_lr"]]
        muon_passes.update_banks(
            [bank.params for bank in banks],
            [bank.orthogonal for bank in banks],
            [scale(*bank.orthogonal.shape[-2:]) for bank in banks],
            *(group[name] if self.capturable else float(group[name]) for name in ("lr", "weight_decay")),
            self._averages,
        )


@dataclass(eq=False)
class _Bank:
    """The matrices of one shape in one group: updates, then their orthogonalised form, (matrices, rows, cols)."""

    group: dict[str, Any]
    params: list[Tensor]
    updates: Tensor | None
    orthogonal: Tensor | None = None
    work: dist.Work | None = None

    def key(self) -> tuple:
        """Equal for banks that one call of Newton-Schulz can take."""
        options = (self.group[name] for name in ("ns_steps", "ns_coefficients", "row_normalize", "compute_dtype"))
        return (self.updates.device, self.updates.dtype, *map(str, options))


def _compute_dtype(group: dict[str, Any], device: torch.device) -> torch.dtype:
    return group["compute_dtype"] or default_compute_dtype(device)


def _put_on_device(group: dict[str, Any]) -> None:
    """Numbers among the hyper-parameters become float32 tensors; tensors that are in place stay the same objects."""
    device = group["params"][0].device
    for name in HYPER_PARAMETERS:
        value = group[name]
        placed = isinstance(value, Tensor) and value.device == device and value.dtype == torch.float32
        group[name] = value if placed else torch.full((), float(value), dtype=torch.float32, device=device)


def _by_matrix_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters whose matrices can share one call, in the order of first appearance (the same on every rank)."""
    alike = defaultdict(list)
    for p in params:
        alike[p.shape[-2:], p.device].append(p)
    return list(alike.values())


def _apply(group: dict[str, Any], banks: list[_Bank]) -> None:
    lr = group["lr"]
    for bank in banks:
        rows, cols = bank.orthogonal.shape[-2:]
        counts = [p.numel() // (rows * cols) for p in bank.params]
        updates = [o.view_as(p) for o, p in zip(bank.orthogonal.split(counts), bank.params, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(bank.params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(bank.params, updates, alpha=-lr * ADJUST_LR[group["adjust_lr"]](rows, cols))
