"""Train one GPT: `torchrun --standalone --nproc_per_node=N -m pgolf.train ...`, or `pgolf train ...` for one process.

The loop: trainer.py has what a step does. The clock excludes warm-up, compilation and validation.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from pgolf_kernels import dispatch

from . import budget, distributed, ledger, run
from .artifact import calibration
from .config import Config
from .data.dataset import Dataset
from .errors import InputError
from .optimise import checkpoint
from .optimise.schedule import lr_multiplier, muon_momentum
from .progress import TrainingProgress
from .scoring.validation import plain_score, validation_tokens
from .trainer import Trainer

FIRST_STEPS = 10  # always logged: a run that goes wrong at once shows it here


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

    def begin() -> run.RunLog:
        recorder.start(provenance["sha256"], lambda: trainer.step, resume)
        return _open_run(cfg, dataset, run_dir, ranks, on_event)

    log = ranks.on_main(begin)
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
    ranks.on_main(lambda: _export(trainer, run_dir, log, progress))
    if plan:
        progress.note(
            f"predicted {plan.steps:,} steps in {plan.train_seconds:.1f} s, "
            f"did {trainer.step:,} in {trainer.elapsed_s:.1f} s"
        )
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


def _export(trainer: Trainer, run_dir: Path, log: run.RunLog, progress: TrainingProgress) -> None:
    """Write the weights, and with GPTQ the Hessians of their inputs."""
    cfg = trainer.cfg
    weights = {k: v.detach().float().cpu().contiguous() for k, v in trainer.model.export_state().items()}
    content = safetensors.torch.save(weights, {run.TRAINED_STEPS: str(trainer.step)})
    run.write_atomically(run_dir / run.MODEL, content)
    if not cfg.uses_gptq:
        return
    with progress.stage("calibrating"):
        seconds = _calibrate(trainer, run_dir, hashlib.sha256(content).hexdigest())
    log.write("calibrate", seconds=round(seconds, 3), batches=cfg.calibration_batches)
    if cfg.max_seconds and trainer.elapsed_s + seconds > cfg.max_seconds:
        progress.note(
            f"training and calibration took {trainer.elapsed_s + seconds:.1f} s of {cfg.max_seconds:g}; "
            "raise gptq_reserve_seconds"
        )


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
