"""Score-first test-time training: a chunk of the stream is scored, then a copy of the model trains on it.

So every target is scored by weights that have seen earlier chunks only. What surprises is ttt_freeze_blocks: it freezes
the small tensors of the first blocks, while their matrices, which live in banks, go on training; so it was published.
A step's gradient is the mean over slices (the published ranks), added in the order of the slices whoever computed them:
the weights have the same bits on any number of ranks with the same number of slices, threads and kind of device.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config
from ..distributed import Ranks
from ..errors import InputError
from ..model import GPT
from .gate import TokenGate
from .stream import cut_slices
from .windows import Window


class Step(NamedTuple):
    """One optimiser step: loss in nats per token before it, the gradient's norm behind the clipping."""

    chunk: int
    lr: float
    loss: float
    grad_norm: float


class ScoreFirst:
    """SGD with momentum on `model`, a copy, so the original is not changed; `steps` is what it did."""

    def __init__(self, cfg: Config):
        if cfg.ttt_chunk_tokens < cfg.eval_seq_len:
            raise InputError(
                f"ttt: ttt_chunk_tokens must be at least eval_seq_len {cfg.eval_seq_len}, got {cfg.ttt_chunk_tokens}; "
                "a smaller chunk holds no whole sequence to train on"
            )
        self.cfg = cfg
        self.steps: list[Step] = []

    def begin(self, model: GPT) -> GPT:
        """Copy the model; all later scores are the copy's."""
        cfg = self.cfg
        self.model = copy.deepcopy(model).requires_grad_(True)
        frozen = tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks))
        for name, p in self.model.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
        self.steps = []
        return self.model

    def split(self, windows: list[Window], num_targets: int) -> list[list[Window]]:
        """The windows of each chunk: where the first target lies that a window scores."""
        size = self.cfg.ttt_chunk_tokens
        chunks: list[list[Window]] = [[] for _ in range(math.ceil(num_targets / size))]
        for w in windows:
            chunks[(w.start + w.score_from) // size].append(w)
        return chunks

    @torch.enable_grad()
    def train(self, chunk: int, gate: TokenGate, ranks: Ranks) -> None:
        """Train on the targets of a chunk that is scored, in whole sequences; a rest is dropped.

        The learning rate follows the length of the whole stream, which is known beforehand; its tokens are not.
        """
        cfg, T = self.cfg, self.cfg.eval_seq_len
        start = chunk * cfg.ttt_chunk_tokens
        end = min(start + cfg.ttt_chunk_tokens, gate.num_targets)
        num_chunks = math.ceil(gate.planned_targets / cfg.ttt_chunk_tokens)
        lr = 0.5 * cfg.ttt_lr * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sequences = [start + i * T for i in range((end - start) // T)]
        parts = [part for part in cut_slices(sequences, cfg.eval_slices, False) if part]
        batch = cfg.ttt_batch_seqs
        for _ in range(cfg.ttt_epochs):
            for first in range(0, max(map(len, parts), default=0), batch):
                micro = [part[first : first + batch] for part in parts]
                self._step(chunk, lr, [starts for starts in micro if starts], gate, ranks)

    def _step(self, chunk: int, lr: float, micro: list[list[int]], gate: TokenGate, ranks: Ranks) -> None:
        """One step on a micro-batch per slice: the mean of their gradients."""
        owners = [r for r, part in enumerate(cut_slices(micro, ranks.world_size, False)) for _ in part]
        total = None  # all gradients side by side, and the loss behind them
        own = [starts for starts, owner in zip(micro, owners, strict=True) if owner == ranks.rank]
        mine = (self._gradient(starts, gate, ranks) for starts in own)
        if ranks.group is not None:
            mine = iter(list(mine))  # all ranks at once, before the first of them sends
        for owner in owners:
            part = next(mine) if owner == ranks.rank else self._empty()
            if ranks.group is not None:
                dist.broadcast(part, src=owner, group=ranks.group)
            total = part if total is None else total.add_(part)
        total /= len(micro)
        for p, g in zip(self.parameters, total[:-1].split([p.numel() for p in self.parameters]), strict=True):
            p.grad = g.view_as(p)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if limit := self.cfg.ttt_grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        self.optimizer.step()
        self.steps.append(Step(chunk, lr, total[-1].item(), norm.item()))

    def _empty(self) -> Tensor:
        size = sum(p.numel() for p in self.parameters) + 1
        return torch.empty(size, dtype=self.parameters[0].dtype, device=self.parameters[0].device)

    def _gradient(self, starts: list[int], gate: TokenGate, ranks: Ranks) -> Tensor:
        """The gradients of the mean loss of the sequences that begin at `starts`, side by side, and that loss."""
        T, gamma = self.cfg.eval_seq_len, self.cfg.ttt_focal_gamma
        rows = torch.stack([gate.committed(s, s + T) for s in starts]).to(ranks.device)
        if gamma:
            nll = self.model(rows[:, :-1], rows[:, 1:], reduction="none")
            loss = ((1 - torch.exp(-nll)).clamp(min=1e-12) ** gamma * nll).mean()
        else:
            loss = self.model(rows[:, :-1], rows[:, 1:])
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        flat = self._empty()
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.parameters, strict=True)]
        return torch.cat([*(g.flatten().to(flat.dtype) for g in parts), loss.detach().to(flat.dtype)[None]], out=flat)
