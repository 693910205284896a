"""Train one GPT: `torchrun --standalone --nproc_per_node=N -m pgolf.train ...`, or `pgolf train ...` for one process.

A step is: batch -> loss in micro-batches -> one all-reduce of the flat gradient -> clip -> Muon and AdamW -> average;
with muon_comms "parallel" Muon's part of the gradient goes its own way instead, bank by bank.
The clock excludes warm-up, compilation and validation.
"""

import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pgolf_kernels import dispatch

from . import budget, distributed, ledger, run
from .artifact import calibration
from .config import Config
from .data.dataset import Dataset
from .data.loader import make_loader
from .errors import InputError
from .model import GPT, activation_dtype
from .optimise import checkpoint
from .optimise.averaging import make_average
from .optimise.fake_quantise import FakeQuantiser
from .optimise.gradients import GradientBuffer
from .optimise.groups import Optimisers
from .optimise.schedule import lr_multiplier, muon_momentum
from .progress import TrainingProgress
from .scoring.validation import plain_score, validation_tokens

FIRST_STEPS = 10  # always logged: a run that goes wrong at once shows it here


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
        """Every rank calls this: rank 0 writes what all hold alike, and the momentum that it gathers from them."""
        tensors = self.checkpoint_tensors()
        if self.ranks.is_main:
            state = {"elapsed_s": self.elapsed_s, "loader": self.loader.state_dict()}
            state |= {"config": json.loads(self.cfg.to_json())}
            state |= {"quantised_since": self.quantiser.since} if self.quantiser else {}
            checkpoint.save(run_dir, self.step, tensors, state)
        self.ranks.barrier()

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


def train(
    cfg: Config,
    data: Path,
    run_dir: Path,
    resume: bool = False,
    device: str = "auto",
    *,
    tokenizer: Path | None = None,
    budget_s: float | None = None,
    on_event: Callable[[str, dict], None] | None = None,
) -> dict:
    """Train until the budget is spent and leave the averaged weights in run_dir/model.safetensors.

    Args:
        cfg: the run. With resume it must equal the one the run was started with.
        data: a prepared dataset, or the challenge's own layout.
        run_dir: created; refused if it holds a run already and resume is False.
        resume: continue from the newest checkpoint, or from the start if the run ended before its first.
        tokenizer: the model file, where it does not lie with the data.
        budget_s: seconds that training and calibration may take together: a plan that takes longer by its warm-up
            steps is refused before anything is written.
        on_event: called on rank 0 with every line of the log as it is written: (event, values).

    Returns:
        The last line of the log: steps, seconds, tokens per second, val_loss, val_bpb.
    """
    ranks = distributed.start(device)
    try:
        with (
            TrainingProgress(cfg, enabled=ranks.is_main) as progress,
            ledger.Recorder(run_dir, cfg, enabled=ranks.is_main) as recorder,
        ):
            return _train(cfg, data, run_dir, resume, ranks, progress, recorder, tokenizer, budget_s, on_event)
    finally:
        distributed.stop()


def _train(
    cfg: Config,
    data: Path,
    run_dir: Path,
    resume: bool,
    ranks: distributed.Ranks,
    progress: TrainingProgress,
    recorder: ledger.Recorder,
    tokenizer: Path | None,
    budget_s: float | None,
    on_event: Callable[[str, dict], None] | None,
) -> dict:
    _check_run_directory(cfg, run_dir, resume)
    if (cfg.train_batch_tokens // cfg.train_seq_len) % ranks.world_size:
        raise InputError(
            f"train_batch_tokens {cfg.train_batch_tokens} must be a multiple of train_seq_len x ranks "
            f"= {cfg.train_seq_len} x {ranks.world_size}; use --set train_batch_tokens=..."
        )
    dataset = Dataset.open(data, tokenizer, vocab_size=cfg.vocab_size)
    kept = run_dir / run.TOKENIZER
    if resume and kept.exists() and kept.read_bytes() != dataset.tokenizer.model:
        raise InputError(
            f"{data}: its tokenizer is not the one that {run_dir} was trained with; use the data of that run"
        )
    validation_tokens(cfg, dataset, cfg.val_tokens)  # too few would otherwise show only when training is over
    trainer = Trainer(cfg, dataset, ranks)
    plan = _prepare(trainer, progress, budget_s)
    ranks.barrier()  # every rank has accepted its input before rank 0 writes anything
    provenance = dataset.provenance()
    recorder.start(provenance["sha256"], lambda: trainer.step, resume)
    log = _open_run(cfg, dataset, run_dir, ranks, on_event) if ranks.is_main else None
    if resume and checkpoint.latest(run_dir):
        trainer.resume(run_dir)
        progress.note(f"resumed at step {trainer.step}")
    if log:
        log.write(
            "start",
            step=trainer.step,
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            dtype=str(trainer.model.activation_dtype).removeprefix("torch."),
            world_size=ranks.world_size,
            data=provenance,
        )
        if plan:
            log.write("predict", **plan.as_dict())
    _loop(trainer, run_dir, log, progress)

    if trainer.average and not trainer.average.copy_to_model():
        progress.note(f"average {cfg.average}: no snapshot was taken; the last weights are exported")
    if ranks.is_main:
        weights = {k: v.detach().float().cpu().contiguous() for k, v in trainer.model.export_state().items()}
        content = safetensors.torch.save(weights, {run.TRAINED_STEPS: str(trainer.step)})
        run.write_atomically(run_dir / run.MODEL, content)
        if cfg.uses_gptq:
            with progress.stage("calibrating"):
                seconds = _calibrate(trainer, run_dir, hashlib.sha256(content).hexdigest())
            log.write("calibrate", seconds=round(seconds, 3), batches=cfg.calibration_batches)
            if cfg.max_seconds and trainer.elapsed_s + seconds > cfg.max_seconds:
                progress.note(
                    f"training and calibration took {trainer.elapsed_s + seconds:.1f} s of {cfg.max_seconds:g}; "
                    "raise gptq_reserve_seconds"
                )
        if plan:
            progress.note(
                f"predicted {plan.steps:,} steps in {plan.train_seconds:.1f} s, "
                f"did {trainer.step:,} in {trainer.elapsed_s:.1f} s"
            )
    ranks.barrier()
    with progress.stage("validating"):
        scores = validate(trainer)
    summary = {
        "step": trainer.step,
        "train_seconds": round(trainer.elapsed_s, 3),
        "tokens_per_second": round(trainer.step * cfg.train_batch_tokens / max(trainer.elapsed_s, 1e-9)),
        **scores,
    }
    if plan:
        summary["predicted_train_seconds"] = round(plan.train_seconds, 3)
    if ranks.is_main:
        log.write("end", **summary)
        log.close()
    return summary


def _prepare(trainer: Trainer, progress: TrainingProgress, budget_s: float | None) -> budget.TrainingPlan | None:
    """Warm up, and predict from that what the run will take; InputError, on every rank, if that exceeds the budget."""
    cfg, ranks = trainer.cfg, trainer.ranks
    steps = cfg.warmup_steps if budget_s is None else max(cfg.warmup_steps, budget.FEWEST_STEPS)
    if not steps:
        return None
    with progress.stage("compiling and warming up" if trainer.compiled else "warming up"):
        step_seconds = {active: ranks.broadcast(seconds) for active, seconds in trainer.warm_up(steps).items()}
        calibration_s = 0.0
        if budget_s is not None and ranks.is_main:
            calibration_s = budget.measure_calibration(cfg, trainer.model, trainer.dataset)
    plan = budget.plan_training(cfg, step_seconds, ranks.broadcast(calibration_s))
    if budget_s is not None:
        budget.check_training(cfg, plan, budget_s)
    return plan


def _calibrate(trainer: Trainer, run_dir: Path, model_sha256: str) -> float:
    """Keep the Hessians of the final weights in the run directory. Returns the seconds without writing them."""
    started = time.perf_counter()
    hessians = calibration.calibrate(trainer.cfg, trainer.model, trainer.dataset)
    seconds = time.perf_counter() - started
    calibration.save_hessians(run_dir, trainer.cfg, model_sha256, hessians)
    return seconds


def _loop(trainer: Trainer, run_dir: Path, log: run.RunLog | None, progress) -> None:
    cfg, ranks = trainer.cfg, trainer.ranks
    cuda = ranks.device.type == "cuda"
    first, logged = trainer.step, (trainer.step, trainer.elapsed_s)
    previous = None  # event at the end of the step before, so that the CPU runs at most one step ahead of the GPU
    if cfg.val_every and trainer.step == 0:
        scores = validate(trainer)
        if log:
            log.write("validate", step=0, elapsed_s=0.0, **scores)
    started = time.perf_counter() - trainer.elapsed_s
    while not trainer.finished():
        trainer.model.recurrence_active = cfg.recurs_at(trainer.step)
        lr = lr_multiplier(cfg, trainer.step, trainer.elapsed_s)
        quantised = trainer.quantiser is not None and trainer.quantiser.active_at(trainer.step, lr)
        loss, norm = trainer.run_step(lr, muon_momentum(cfg, trainer.step), quantised)
        if cuda:
            event = torch.cuda.Event()
            event.record()
            if previous:
                previous.synchronize()
            previous = event
        trainer.step += 1
        trainer.elapsed_s = time.perf_counter() - started

        paused = time.perf_counter()
        if log and trainer.step == first + 1:
            log.write("implementations", implementations=dict(dispatch.CHOSEN))
        if trainer.step % cfg.log_every == 0 or trainer.step <= FIRST_STEPS:
            mean_loss = sum(ranks.gather(loss.item()))
            if log:
                log.write(
                    "step",
                    step=trainer.step,
                    loss=mean_loss,
                    grad_norm=norm.item(),
                    lr=lr,
                    step_ms=round(1e3 * (trainer.elapsed_s - logged[1]) / (trainer.step - logged[0]), 3),
                    elapsed_s=round(trainer.elapsed_s, 3),
                )
            progress.step(trainer.step, trainer.elapsed_s, mean_loss)
            logged = trainer.step, trainer.elapsed_s
        if cfg.val_every and trainer.step % cfg.val_every == 0:
            scores = validate(trainer)
            if log:
                log.write("validate", step=trainer.step, elapsed_s=round(trainer.elapsed_s, 3), **scores)
        if cfg.checkpoint_every and trainer.step % cfg.checkpoint_every == 0:
            trainer.save(run_dir)
        started += time.perf_counter() - paused
    trainer.save(run_dir)


def validate(trainer: Trainer) -> dict:
    """val_loss (nats per token) and val_bpb of the weights as they are, over windows that do not overlap."""
    score = plain_score(trainer.model, trainer.dataset, trainer.cfg, trainer.ranks)
    return {"val_loss": score.val_loss, "val_bpb": score.val_bpb, "val_tokens": score.tokens, "val_bytes": score.bytes}


def _check_run_directory(cfg: Config, run_dir: Path, resume: bool) -> None:
    exists = (run_dir / run.CONFIG).exists()
    if exists and not resume:
        raise InputError(f"{run_dir}: holds a run already; continue it with --resume or name another directory")
    if resume and run.read_config(run_dir) != cfg:
        raise InputError(f"{run_dir}: --resume continues the run as it was configured; drop the other settings")
    if resume:
        checkpoint.check(run_dir, cfg)


def _open_run(cfg: Config, dataset: Dataset, run_dir: Path, ranks: distributed.Ranks, on_event) -> run.RunLog:
    environment = run.describe_environment(ranks.device, ranks.world_size)
    run.write_atomically(run_dir / run.ENVIRONMENT, json.dumps(environment, indent=2).encode())
    run.write_atomically(run_dir / run.TOKENIZER, dataset.tokenizer.model)
    run.write_atomically(run_dir / run.CONFIG, cfg.to_json().encode())
    return run.RunLog(run_dir / run.LOG, on_event)


def main(argv: list[str] | None = None) -> int:
    from .cli import main as cli

    return cli(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
