"""One optimiser step, and the whole of what a checkpoint must hold: what train.py drives.

A step is: batch -> loss in micro-batches -> one all-reduce of the flat gradient -> clip -> Muon and AdamW -> average;
with muon_comms "parallel" Muon's part of the gradient goes its own way instead, bank by bank.
"""

import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from . import budget, distributed
from .config import Config
from .data.dataset import Dataset
from .data.loader import make_loader
from .model import GPT, activation_dtype
from .optimise import checkpoint
from .optimise.averaging import make_average
from .optimise.fake_quantise import FakeQuantiser
from .optimise.gradients import GradientBuffer
from .optimise.groups import Optimisers


class Trainer:
    """Everything a step needs, and the whole of what a checkpoint must hold."""

    def __init__(self, cfg: Config, dataset: Dataset, ranks: distributed.Ranks):
        self.cfg, self.dataset, self.ranks = cfg, dataset, ranks
        torch.manual_seed(cfg.seed)
        self.model = GPT(cfg).to(ranks.device)
        self.model.activation_dtype = activation_dtype(cfg, ranks.device)
        self.optimisers = Optimisers(self.model, cfg, self.model.activation_dtype, ranks.group)
        self.gradients = GradientBuffer(self.model, self.optimisers.reduced_here)
        self.average = make_average(self.model, cfg)
        self.quantiser = None
        if cfg.qat != "none":
            shapes = {name: tuple(w.shape) for name, w in self.model.export_state().items()}
            self.quantiser = FakeQuantiser(cfg, shapes, ranks.device)
        self.loader = self._new_loader()
        self.step = 0
        self.elapsed_s = 0.0
        self.compiled = compiles(cfg, ranks.device)
        if self.compiled:
            self.model.compile(dynamic=False, fullgraph=True)

    def _new_loader(self):
        cfg, ranks = self.cfg, self.ranks
        return make_loader(
            cfg.loader,
            self.dataset.train_shards[: cfg.train_shards or None],
            cfg.train_seq_len,
            cfg.train_batch_tokens,
            ranks.rank,
            ranks.world_size,
            pin_memory=ranks.device.type == "cuda",
        )

    def run_step(self, lr: float, momentum: float, quantised: bool = False) -> tuple[Tensor, Tensor]:
        """One optimiser step. Returns this rank's share of the mean loss, and the gradient norm, as device tensors."""
        cfg, device = self.cfg, self.ranks.device
        self.model.fake_quantise = self.quantiser if quantised else None
        x, y = self.loader.next_batch()  # (windows of this rank, T)
        self.gradients.zero()
        loss = torch.zeros((), device=device)
        size = micro_batch_windows(len(x), cfg)
        for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
            part = self.model(x_part.to(device, non_blocking=True), y_part.to(device, non_blocking=True), "sum")
            part = part / cfg.train_batch_tokens
            part.backward()
            loss += part.detach()
        self.model.fake_quantise = None  # all but training sees the weights themselves
        if cfg.grad_clip_per_rank:  # the loss is over all ranks' tokens: this rank's share of it has 1 / ranks the norm
            norm = self.gradients.clip(cfg.grad_clip_norm / self.ranks.world_size) * self.ranks.world_size
            self.gradients.all_reduce(self.ranks.group)
        else:
            self.gradients.all_reduce(self.ranks.group)
            norm = self.gradients.clip(cfg.grad_clip_norm)
        self.optimisers.step(lr, momentum)
        if self.average:
            self.average.update(self.step + 1, lr)
        return loss, norm

    def warm_up(self, steps: int) -> dict[bool, float]:
        """Run a few steps, so that kernels are compiled and caches filled, then put everything back as it was.

        Where recurrence or quantisation switches on during the run, its graph is another one: all are prepared, so
        that the switch costs the clock nothing.

        Returns:
            Seconds of a step without (False) and with (True) recurrence, as far as the run has them; with quantisation,
            which is the slower, if it is ever on.
        """
        cfg = self.cfg
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        recurrence = sorted({cfg.recurs_at(0), cfg.recurs_at(cfg.max_steps - 1)})
        quantised = {self.quantiser is not None} | ({False} if cfg.qat_start <= 1 else set())
        taken: dict[bool, float] = {}
        for recurs, rounds in itertools.product(recurrence, sorted(quantised)):
            self.model.recurrence_active, seconds = recurs, []
            for _ in range(steps):
                started = time.perf_counter()
                self.run_step(1.0, cfg.muon_momentum, rounds)
                if self.ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            taken[recurs] = budget.median_after_first(seconds)
        self.model.recurrence_active = cfg.recurs_at(0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(before[name])
        self.optimisers.reset()
        if self.average:
            self.average.reset()
        self.loader = self._new_loader()
        return taken

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"optimiser.{k}": v for k, v in self.optimisers.state_tensors().items()}
        if self.average:
            tensors |= {f"average.{k}": v for k, v in self.average.state_tensors().items()}
        return tensors

    def save(self, run_dir: Path) -> None:
        """Every rank calls this: rank 0 writes what all hold alike, and the momentum that it gathers from them.

        Raises:
            InputError: on every rank, if rank 0 could not write it.
        """
        tensors = self.checkpoint_tensors()
        state = {"elapsed_s": self.elapsed_s, "loader": self.loader.state_dict()}
        state |= {"config": json.loads(self.cfg.to_json())}
        state |= {"quantised_since": self.quantiser.since} if self.quantiser else {}
        self.ranks.on_main(lambda: checkpoint.save(run_dir, self.step, tensors, state))

    def resume(self, run_dir: Path) -> None:
        tensors, state = checkpoint.load(run_dir)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.optimisers.load_state_tensors(part("optimiser."))
        if self.average:
            self.average.load_state_tensors(part("average."))
        self.loader.load_state_dict(state["loader"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        if self.quantiser:
            self.quantiser.since = state["quantised_since"]
        self.model.recurrence_active = self.cfg.recurs_after(self.step)

    def finished(self) -> bool:
        """Whether the budget is spent, by rank 0's clock on every rank."""
        if self.step >= self.cfg.max_steps:
            return True
        if not self.cfg.train_seconds:
            return False
        self.elapsed_s = self.ranks.broadcast(self.elapsed_s)
        return self.elapsed_s >= self.cfg.train_seconds


def compiles(cfg: Config, device: torch.device) -> bool:
    """What cfg.compile means on this device. On a CPU compiling takes longer than a run of minutes wins back."""
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def micro_batch_windows(num_windows: int, cfg: Config) -> int:
    """Windows per forward: the largest equal split of this rank's windows that fits cfg.micro_batch_tokens."""
    most = max(cfg.micro_batch_tokens // cfg.train_seq_len, 1)
    return next(size for size in range(min(most, num_windows), 0, -1) if num_windows % size == 0)
