"""SLOT with parameters that have no closed form: a hashed table of shifts beside delta, or one temperature.

Both were reported without code, so what the reports leave open is chosen here. The table has a row for every bucket of
(2039 * previous + current) mod buckets, with 0 before a window's first token: its index knows inputs only. The
temperature divides the capped logits, begins at 1 and is fitted by SGD to the targets that slot_share names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import GPT, rms_norm
from .gate import Batch, NllOf
from .objective import objective_weights
from .slot import Slot, make_optimizer


class AutogradSlot(Slot):
    """Slot for slot_buckets > 0 or slot_parameters "temperature"; `last_parameters` are those of the newest batch."""

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        cfg, x = self.cfg, batch.inputs
        state = model.trunk(x) if cfg.slot_norm == "before" else model.hidden(x)
        state = state if state.dtype == torch.float64 else state.float()
        weight, softcap = model.head_weight().to(state.dtype), model.cfg.logit_softcap
        group = torch.zeros_like(x) if self.shared else torch.arange(len(x), device=x.device)[:, None].expand_as(x)
        bucket = (2039 * F.pad(x[:, :-1], (1, 0)) + x) % max(cfg.slot_buckets, 1)
        num_groups = 1 if self.shared else len(x)
        if cfg.slot_parameters == "temperature":
            parameters = {"temperature": state.new_ones(num_groups)}
        else:
            D = state.shape[-1]
            parameters = {
                "delta": state.new_zeros(num_groups, D),
                "table": state.new_zeros(num_groups, cfg.slot_buckets, D),
            }

        def nll(rows: Tensor, targets: Tensor) -> Tensor:
            h, g = state[rows], group[rows]
            if "table" in parameters:
                h = h + parameters["delta"][g] + parameters["table"][g, bucket[rows]]
            h = rms_norm(h) if cfg.slot_norm == "before" else h
            logits = softcap * torch.tanh(F.linear(h, weight) / softcap)
            if "temperature" in parameters:
                logits = logits / parameters["temperature"][g][:, None]
            return F.cross_entropy(logits, targets[rows], reduction="none")

        weights = objective_weights(cfg, batch.windows, x.shape[1])
        fitted = batch.to_fit(weights, self.shared)
        weights = weights.to(x.device, state.dtype)
        total = weights.sum(1, keepdim=True) if cfg.slot_normalize == "window" else weights.sum()
        weights = weights / total.where(total > 0, 1.0)
        if (weights > 0).any():
            self._descend(parameters, weights, lambda rows: nll(rows, fitted))
        self.last_parameters = parameters
        return lambda targets: nll(batch.scored, targets)

    @torch.enable_grad()
    def _descend(self, parameters: dict[str, Tensor], weights: Tensor, nll) -> None:
        cfg, rows = self.cfg, weights > 0
        leaves = [p.requires_grad_(True) for p in parameters.values()]
        if cfg.slot_parameters == "temperature":
            optimizer, rates = torch.optim.SGD(leaves, lr=cfg.slot_lr), [cfg.slot_lr] * cfg.slot_steps
        else:
            made = make_optimizer(cfg)
            optimizer = torch.optim.AdamW(leaves, betas=made.betas, eps=made.eps, weight_decay=made.weight_decay)
            rates = made.learning_rates(cfg.slot_steps)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            (weights[rows] * nll(rows)).sum().backward()
            optimizer.step()
        for p in leaves:
            p.requires_grad_(False)
