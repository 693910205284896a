"""Muon: momentum, then orthogonalised updates, for matrices and for banks of matrices.

Matrices of one shape share one `newton_schulz` call, whatever parameters they come from. With a process group the
ranks share that work in one of three ways (parallel.py): the result does not depend on their number, because each
matrix is rounded to the compute dtype on every path.

On a GPU a step is three passes: momentum, Newton-Schulz, update. fused=True makes each of the outer two one launch per
group, ns_impl="triton_megakernel" the middle one two launches for all groups, and capturable=True lets a CUDA graph of
the step be replayed with another learning rate.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import meant, require, why_not_triton
from ..ops.newton_schulz import newton_schulz_banks
from .averages import Averages
from .banks import ADJUST_LR, Bank, as_bank, by_matrix_shape, calls, update
from .parallel import COMMS, Shared

HYPER_PARAMETERS = ("lr", "momentum", "weight_decay")  # those that a captured step reads from the device


class Muon(torch.optim.Optimizer):
    """buf <- momentum buf + g;  u = g + momentum buf (Nesterov) or buf;  p <- (1 - lr wd) p - lr scale NS(u).

    Args:
        params: parameters of 2 dimensions (a matrix) or 3 (a bank of matrices along dimension 0), or groups of them.
        lr: step size; multiplied by the shape-dependent factor of `adjust_lr`.
        momentum: decay of the momentum buffer, in [0, 1).
        weight_decay: decoupled; each step multiplies p by 1 - lr * weight_decay.
        nesterov: look one step ahead.
        ns_steps, ns_coefficients, row_normalize: as in `newton_schulz`.
        adjust_lr: "original", sqrt(max(1, rows / cols)), or "match_rms_adamw", 0.2 sqrt(max(rows, cols)).
        compute_dtype: of the Newton-Schulz products; None: bfloat16 where that is fast, else float32.
        process_group: ranks that share the work; each must hold the same parameters and step at the same time. None:
            this process does all of it.
        comms: how they share it. "shared": gradients must be averaged already, momentum is whole on every rank, each
            orthogonalises a slice of every bank and receives the rest. "round_robin": the same gradients, but matrix i
            and its momentum belong to rank i mod W, and one buffer with all updates is summed. "parallel": each rank
            gives its own gradients; a bank's are reduce-scattered, momentum and orthogonalisation done on the slice,
            the update gathered while the next bank is at work. Made for banks: a loose matrix is a bank of one, and
            they all land on rank 0. The last two keep 1/W of the momentum on a rank; see `full_state_dict`.
        comms_dtype: of gradients and updates on their way; None: the compute dtype.
        reduction: of "parallel" gradients, "mean" or "sum" (of losses that all ranks' tokens were divided out of).
        momentum_dtype: of the momentum; #1217 and #1128 keep it in bfloat16.
        ns_impl: implementation of Newton-Schulz, as in `newton_schulz_banks`.
        ns_plain: its published arithmetic, without finer formats inside, as in `newton_schulz`.
        fused: momentum and update in one Triton launch each per group; parameters must be contiguous and on a GPU, the
            momentum float32, comms "shared". Updates reach Newton-Schulz in bfloat16 if that is the compute dtype.
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
        comms: str = "shared",
        comms_dtype: torch.dtype | None = None,
        reduction: str = "mean",
        momentum_dtype: torch.dtype = torch.float32,
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
        require(comms in COMMS, "Muon", f"comms must be one of {list(COMMS)}", repr(comms))
        require(reduction in ("mean", "sum"), "Muon", "reduction must be 'mean' or 'sum'", repr(reduction))
        passes = comms == "shared" and momentum_dtype == torch.float32
        got = f"{comms=} and {momentum_dtype}"
        require(passes or not fused, "Muon", "fused needs comms='shared' and float32 momentum", got)
        self.process_group, self.fused, self.capturable = process_group, fused, capturable
        self.ns_impl, self.ns_plain, self.momentum_dtype = ns_impl, ns_plain, momentum_dtype
        alone = process_group is None or process_group.size() == 1
        self._exchange = (Shared if alone else COMMS[comms])(process_group, comms_dtype, reduction == "mean")
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
        self._exchange.add(group["params"])
        if self.capturable:
            devices = {p.device for p in group["params"]}
            require(len(devices) == 1, "Muon", "capturable needs groups on one device", sorted(map(str, devices)))
            _put_on_device(group)

    @property
    def reduces_gradients(self) -> bool:
        """Whether each rank must give its own gradients instead of averaged ones."""
        return self._exchange.takes_own_gradients

    def full_state_dict(self) -> dict[str, Any]:
        """state_dict() with the momentum of all ranks, on rank 0; on others without momentum. Every rank must call it.

        load_state_dict takes it on any number of ranks, whatever their comms.
        """
        full = self.state_dict()
        state, full["state"] = full["state"], {}
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if index in state:
                whole = self._exchange.whole(p, state[index]["momentum_buffer"])
                if whole is not None:
                    full["state"][index] = {"momentum_buffer": whole}
        return full

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; momentum may be whole or this rank's own, and is kept in momentum_dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, ours, strict=True):
            if index in state_dict["state"]:
                buffer, mine = state_dict["state"][index]["momentum_buffer"], self._new_buffer(p)
                if buffer.shape != mine.shape:
                    whole = f"momentum of a parameter {tuple(p.shape)} must be whole or {tuple(mine.shape)}"
                    require(buffer.shape == p.shape, "Muon", whole, tuple(buffer.shape), "load on as many ranks")
                    buffer = as_bank(buffer)[self._exchange.owned(p)]
                self.state[p]["momentum_buffer"] = mine.copy_(buffer)
        if self.capturable:
            for group in self.param_groups:
                _put_on_device(group)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Start to reduce the gradients if comms is "parallel"; step() does it, unless this was called before.

        What runs between the two, such as the step of another optimiser, runs while gradients travel.
        """
        if self.reduces_gradients:
            self._exchange.reduce(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.reduces_gradients:
            self._step_bank_by_bank()
        else:
            self._step_together()
        for group in self.param_groups:
            left = group["params"] if not self.fused else [p for p in group["params"] if p.grad is None]
            self._averages.follow(left)
        return loss

    def _step_together(self) -> None:
        banks = []  # of all groups
        for group in self.param_groups:
            alike = by_matrix_shape(p for p in group["params"] if p.grad is not None)
            updates = self._fused_updates(alike, group) if self.fused else self._updates(alike, group)
            banks += [Bank(group, params, u) for params, u in zip(alike, updates, strict=True)]
        apart = self._exchange.one_by_one and meant(self.ns_impl) != "triton_megakernel"
        for together in calls(banks, apart):
            self._orthogonalize(together)
        self._exchange.receive(banks)  # the first gathers ran under the last products
        for group in self.param_groups:
            (self._fused_apply if self.fused else update)(group, [bank for bank in banks if bank.group is group])

    def _step_bank_by_bank(self) -> None:
        self.reduce_gradients()
        before = None  # its update is on its way while the next bank is orthogonalised
        for bank in chain(self._exchange.reduced(), [None]):
            if bank is not None:
                bank.updates = self._advance(bank.params, [bank.gradient], bank.group)
                self._orthogonalize([bank])
            if before is not None:
                self._exchange.receive([before])
                update(before.group, [before])
            before = bank

    def _new_buffer(self, p: Tensor) -> Tensor:
        """Zero momentum of what this rank owns of p: in p's shape if that is all, else (matrices, rows, cols)."""
        owned = self._exchange.owned(p)
        return torch.zeros_like(p if owned == slice(None) else as_bank(p)[owned], dtype=self.momentum_dtype)

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
                require(not capturing, "Muon", "momentum must exist before a capture", "none", "run one step before")
                self.state[p]["momentum_buffer"] = self._new_buffer(p)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _updates(self, alike: list[list[Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """Advance the momentum of all shapes of a group; return the updates to orthogonalise."""
        owned = self._exchange.owned
        return [self._advance(params, [as_bank(p.grad)[owned(p)] for p in params], group) for params in alike]

    def _advance(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The same for one shape: (matrices, rows, cols), float32. grads: of what this rank owns."""
        buffers = [as_bank(buffer) for buffer in self._buffers(params)]
        grads = [g.to(self.momentum_dtype) for g in grads]
        if self.momentum_dtype == torch.float32:
            torch._foreach_mul_(buffers, group["momentum"])
        else:  # on a CPU the pass above rounds 0.99 to the buffers' dtype, and bfloat16 has 0.988
            for buffer in buffers:
                buffer.mul_(group["momentum"])
        torch._foreach_add_(buffers, grads)
        grads, buffers = [g.float() for g in grads], [buffer.float() for buffer in buffers]
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
        return updates[0] if len(updates) == 1 else torch.cat(updates)

    def _fused_updates(self, alike: list[list[Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """The same for all shapes of a group; in bfloat16 if that is the compute dtype."""
        if not alike:
            return []
        from . import muon_passes  # Triton takes a second to import

        if self.capturable:
            _put_on_device(group)
        bfloat16 = Bank(group, alike[0]).compute_dtype == torch.bfloat16
        return muon_passes.momentum_banks(
            [[p.grad for p in params] for params in alike],
            [self._buffers(params) for params in alike],
            group["momentum"] if self.capturable else float(group["momentum"]),
            group["nesterov"],
            torch.bfloat16 if bfloat16 else torch.float32,
        )

    def _orthogonalize(self, banks: list[Bank]) -> None:
        """Newton-Schulz of this rank's part of every bank; complete when the exchange has received it."""
        group = banks[0].group
        parts = newton_schulz_banks(
            [self._exchange.mine(bank) for bank in banks],
            group["ns_steps"],
            group["ns_coefficients"],
            group["row_normalize"],
            dtype=banks[0].compute_dtype,
            plain=self.ns_plain,
            impl=self.ns_impl,
        )
        for bank, part in zip(banks, parts, strict=True):
            bank.updates = None  # not needed any more
            self._exchange.send(bank, part)

    def _fused_apply(self, group: dict[str, Any], banks: list[Bank]) -> None:
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


def _put_on_device(group: dict[str, Any]) -> None:
    """Numbers among the hyper-parameters become float32 tensors; tensors that are in place stay the same objects."""
    device = group["params"][0].device
    for name in HYPER_PARAMETERS:
        value = group[name]
        placed = isinstance(value, Tensor) and value.device == device and value.dtype == torch.float32
        group[name] = value if placed else torch.full((), float(value), dtype=torch.float32, device=device)
