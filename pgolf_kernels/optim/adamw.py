"""AdamW as torch.optim.AdamW(fused=True) has it; on a GPU the update and the average of the weights are one launch.

The surprise is what that saves, launches and not bytes: a small GPT's embeddings and scales are dozens of tensors of a
few megabytes in all, and their moving average alone is as many kernels again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..dispatch import why_not_triton
from .averages import Averages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamW(torch.optim.AdamW):
    """m <- lerp(m, g, 1 - beta1);  v <- lerp(v, g^2, 1 - beta2);  p <- (1 - lr wd) p - lr m^ / (sqrt(v^) + eps).

    Args:
        params: tensors or groups of them, as any torch optimiser takes.
        lr: step size; a float32 tensor on the parameters' device is read afresh by a replayed CUDA graph.
        betas: decay of m and of v, each in [0, 1).
        eps: added to the root.
        weight_decay: decoupled; each step multiplies p by 1 - lr * weight_decay.

    m, v and the step counts are torch's own state, so state dicts of torch.optim.AdamW(fused=True) go both ways. Where
    the Triton pass cannot run (a CPU, float64, strided parameters, a GradScaler) torch's fused step does.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.average_into({}, 0.0)

    def average_into(self, averages: Mapping[Tensor, Tensor], decay: float) -> None:
        """From now on every step ends with a <- a + (1 - decay) (p - a) for each parameter p, a = averages[p].

        Args:
            averages: float32 or the parameter's dtype, its shape and device; a parameter may have none.
            decay: in [0, 1].
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._averages = Averages("AdamW", params, averages, decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the averages of all of them move."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            left = [p for p in group["params"] if p.grad is None]
            params, grads, exp_avgs, exp_avg_sqs, steps = [], [], [], [], []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            if params and self._why_not_pass(params, grads) is None:
                self._pass(group, params, grads, exp_avgs, exp_avg_sqs, steps)
            elif params:
                self._torch(group, params, grads, exp_avgs, exp_avg_sqs, steps)
                left += params
            self._averages.follow(left)
        return loss

    def _why_not_pass(self, params: list[Tensor], grads: list[Tensor]) -> str | None:
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return "a GradScaler gives its scale to torch's fused step"
        for t in (t for t in (*params, *grads) if t.numel()):
            if reason := why_not_triton(t):
                return reason
            if t.dtype not in DTYPES or not t.is_contiguous():
                return f"the pass needs contiguous tensors of 16 or 32 bits, got {t.dtype} {tuple(t.stride())}"
        return None

    def _pass(self, group: dict, params, grads, exp_avgs, exp_avg_sqs, steps) -> None:
        from .adamw_pass import adamw_pass  # Triton may be missing, and takes a second to import

        torch._foreach_add_(steps, 1)
        kinds: dict[tuple, list[int]] = {}
        for i, p in enumerate(params):
            if not p.numel():
                continue
            kinds.setdefault((p.device, p.dtype, self._averages.dtype(p)), []).append(i)
        for indices in kinds.values():
            own = [[tensors[i] for i in indices] for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
            averages = [self._averages.of[p] for p in own[0] if p in self._averages.of]
            betas, eps = group["betas"], group["eps"]
            adamw_pass(*own, averages, group["lr"], betas, eps, group["weight_decay"], self._averages.decay)

    def _torch(self, group: dict, params, grads, exp_avgs, exp_avg_sqs, steps) -> None:
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            capturable=group["capturable"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
