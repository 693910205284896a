"""SLOT: a small vector is fitted to targets of a batch of windows, the model frozen, and scores the batch or the next.

One scorer runs every fitted form; the default, which fits nothing, is slot_cache.py. objective.py says which targets
a form sees and whether its score is causal. The default share, causal, is one fit per window:
the state that scores targets [s, w) of a window comes from its targets [0, s) alone, and the first window, which has no
such part, is scored as it is.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_kernels import LBFGS, AdamW, HypergradientAdamW, SlotFit, slot_fit, slot_score

from ..config import Config
from ..model import GPT
from .gate import Batch, NllOf
from .objective import SHARES, objective_weights
from .stream import BatchScorer


class States(NamedTuple):
    """What is fitted and scored: a batch as it is or, for a bias after the softcap, gathered rows."""

    state: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    softcap: float | None


class Slot(BatchScorer):
    """Fits and scores as the slot_ fields of a config say. `last_fit` is the fit of the newest batch."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.shared, self.behind = SHARES[cfg.slot_share].shared, SHARES[cfg.slot_share].behind
        self.sequential = cfg.slot_warm_start or self.behind
        self.last_fit: SlotFit | None = None
        self._states: States | None = None  # of the batch that is scored and not yet fitted to

    def begin_slice(self) -> None:
        self.last_fit = None

    def __call__(self, model: GPT, batch: Batch) -> NllOf:
        cfg, x, scored = self.cfg, batch.inputs, batch.scored
        states = States(
            model.trunk(x) if cfg.slot_norm == "before" else model.hidden(x),
            model.head_weight(),
            model.cfg.logit_softcap,
        )
        if self.behind:
            self._states = states
        else:
            self._adapt(states, batch)
        fit, num_scored = self.last_fit, batch.num_scored
        if cfg.slot_parameters != "logits":
            return lambda targets: self._score(states, fit, targets, scored, num_scored)
        capped = _capped_rows(states, scored)
        every = torch.ones(capped.state.shape[:2], dtype=torch.bool, device=x.device)
        return lambda targets: self._score(capped, fit, targets[scored][None], every, [sum(num_scored)])

    def learn(self, batch: Batch) -> None:
        if self.behind:
            self._adapt(self._states, batch)
            self._states = None

    def _adapt(self, states: States, batch: Batch) -> None:
        """Fit to the targets that slot_share names, as far as the gate gives them out."""
        weights = objective_weights(self.cfg, batch.windows, batch.inputs.shape[1])
        targets = batch.to_fit(weights, self.shared)
        # Counted here, where the windows are known, so that a GPU need not be asked and waited for.
        num_rows = (weights > 0).sum(1).tolist()
        weights = weights.to(targets.device, non_blocking=True)
        if self.cfg.slot_parameters == "logits":
            rows = weights > 0
            states, targets, weights = _capped_rows(states, rows), targets[rows][None], weights[rows][None]
            num_rows = [sum(num_rows)]
        self.last_fit = self._fit(states, targets, weights, num_rows)

    def _fit(self, states: States, targets: Tensor, weights: Tensor, num_rows: list[int]) -> SlotFit | None:
        """Each part of slot_restart_steps steps begins with a fresh optimiser; the losses are joined."""
        cfg = self.cfg
        fit = self._newest() if self.sequential else None
        every, losses = cfg.slot_restart_steps or max(cfg.slot_steps, 1), []
        for first in range(0, cfg.slot_steps, every):
            fit = slot_fit(
                states.state,
                states.weight,
                targets,
                weights,
                softcap=states.softcap,
                norm=cfg.slot_norm,
                share="batch" if self.shared else "window",
                normalize=cfg.slot_normalize,
                parameters="bias" if cfg.slot_parameters == "logits" else cfg.slot_parameters,
                optimizer=make_optimizer(cfg),
                steps=min(every, cfg.slot_steps - first),
                init=fit,
                num_rows=num_rows,
            )
            losses.append(fit.loss_per_step)
        if fit is None:
            return None
        if bound := cfg.slot_clamp:
            fit = fit._replace(
                **{
                    k: v.clamp(-bound, bound)
                    for k, v in fit._asdict().items()
                    if k != "loss_per_step" and v is not None
                }
            )
        return fit._replace(loss_per_step=torch.cat(losses)) if losses else fit

    def _newest(self) -> SlotFit | None:
        """The last window's part of the last fit: it knows no target that a later batch scores."""
        if self.last_fit is None:
            return None
        delta, bias, losses = self.last_fit
        return SlotFit(None if delta is None else delta[-1:], None if bias is None else bias[-1:], losses)

    def _score(self, states: States, fit: SlotFit | None, targets: Tensor, rows: Tensor, num_rows: list[int]) -> Tensor:
        return slot_score(
            states.state,
            states.weight,
            targets,
            fit,
            softcap=states.softcap,
            norm=self.cfg.slot_norm,
            rows=rows,
            num_rows=num_rows,
        )


def _capped_rows(states: States, rows: Tensor) -> States:
    """The rows' capped logits as one window [1, n, V] under an identity head: a bias then joins after the softcap."""
    hidden = states.state[rows]
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    logits = states.softcap * torch.tanh(F.linear(hidden, states.weight.to(hidden.dtype)) / states.softcap)
    return States(logits[None], torch.eye(len(states.weight), dtype=hidden.dtype, device=hidden.device), None)


def make_optimizer(cfg: Config) -> AdamW | HypergradientAdamW | LBFGS:
    """The optimiser that slot_optimizer names, with its fields."""
    adam = {
        "lr": cfg.slot_lr,
        "betas": (cfg.slot_beta1, cfg.slot_beta2),
        "eps": cfg.slot_eps,
        "weight_decay": cfg.slot_wd,
    }
    if cfg.slot_optimizer == "adamw":
        return AdamW(**adam, lr_min=cfg.slot_lr_min or None)
    if cfg.slot_optimizer == "hypergradient":
        joint = not SHARES[cfg.slot_share].shared
        bounds = {"lr_min": cfg.slot_lr_min, "lr_max": cfg.slot_lr_max}
        return HypergradientAdamW(**adam, **bounds, rate=cfg.slot_hyper_rate, joint=joint)
    return LBFGS(
        lr=cfg.slot_lr,
        max_iter=cfg.slot_max_iter,
        history=cfg.slot_history,
        max_line_search=cfg.slot_line_search or None,
        joint=cfg.slot_optimizer == "lbfgs-joint",
    )
