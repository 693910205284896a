"""Declared clocks, kept by prediction: what the first steps or batches took, extrapolated to the whole.

A plan that cannot meet its budget is refused while that is cheap, with the seconds it lacks. Every prediction is kept
beside what it came to, in the log and in scores.json, so that its error is known.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .config import Config
from .data.dataset import Dataset
from .errors import InputError
from .model import GPT

FEWEST_STEPS = 4  # warm-up steps that a prediction takes; the first, which compiles, does not count
FIRST_CHECK = 4  # batches after which a scoring is predicted, and again each time that their number has doubled


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will take. Seconds of the optimiser's steps and of calibration; step_ms: of all steps on average."""

    steps: int
    step_ms: float
    train_seconds: float
    calibration_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.calibration_seconds

    def as_dict(self) -> dict:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def plan_training(cfg: Config, step_seconds: dict[bool, float], calibration_seconds: float = 0.0) -> TrainingPlan:
    """How many steps fit, and how long they take.

    Args:
        step_seconds: of one step without (False) and with (True) recurrence; the ones that the run has.
    """
    switch = min(cfg.recur_start_step, cfg.max_steps) if cfg.recur_layers else cfg.max_steps
    before, after = step_seconds.get(False, 0.0), step_seconds.get(True, 0.0)
    steps, seconds = cfg.max_steps, switch * before + (cfg.max_steps - switch) * after
    if cfg.train_seconds and seconds > cfg.train_seconds:
        seconds = cfg.train_seconds
        in_first = switch * before
        steps = int(seconds / before) if seconds < in_first else switch + int((seconds - in_first) / after)
    return TrainingPlan(steps, 1e3 * seconds / max(steps, 1), seconds, calibration_seconds)


def check_training(cfg: Config, plan: TrainingPlan, budget_s: float) -> None:
    """Refuse a plan that takes longer than its budget; training and calibration share one clock.

    Raises:
        InputError: with what would fit.
    """
    over = plan.seconds - budget_s
    if over <= 0:
        return
    room = budget_s - plan.calibration_seconds
    if cfg.max_seconds:
        what = f"max_seconds at most {budget_s:g}"
        if cfg.uses_gptq:
            what += f" and gptq_reserve_seconds at least {plan.calibration_seconds:.1f}"
    else:
        what = f"about {int(plan.steps * max(room, 0) / plan.train_seconds):,} steps fit"
    raise InputError(
        f"train: --budget {budget_s:g} cannot be met: {plan.steps:,} steps of {plan.step_ms:.1f} ms take "
        f"{plan.train_seconds:.1f} s, calibration {plan.calibration_seconds:.1f} s: {over:.1f} s too long; {what}"
    )


def median_after_first(seconds: list[float]) -> float:
    """The median without the first, which compiles and fills caches; of one alone, that one."""
    return statistics.median(seconds[1:] or seconds)


def measure_calibration(cfg: Config, model: GPT, dataset: Dataset) -> float:
    """Seconds that calibration will take, from a few of its batches; 0 without GPTQ. The model stays as it is."""
    if not cfg.uses_gptq:
        return 0.0
    from .artifact.calibration import GENERATED_AT_ONCE, calibrate

    def seconds(batches: int) -> float:
        started = time.perf_counter()
        calibrate(cfg.replace(calibration_batches=batches), model, dataset)
        return time.perf_counter() - started

    total = cfg.calibration_batches
    if cfg.calibration == "generated":  # sequences are written side by side, so a whole group is the unit
        group = min(GENERATED_AT_ONCE, total)
        return seconds(group) * total / group
    seconds(1)  # memory, caches
    one, three = seconds(1), seconds(3)
    return one + (three - one) / 2 * (total - 1)


class Pace:
    """A progress callback that predicts how long the loop will take, and stops it where that is too long.

    Args:
        what: takes the time, for the message.
        device: whose queue is emptied before a clock is read.
        limit_s: seconds from now on that it may take; None: any.
        budget_s: what the user declared, for the message.
        on_progress: passed on.
    """

    def __init__(
        self,
        what: str,
        device: torch.device,
        limit_s: float | None = None,
        budget_s: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        self.what, self.device, self.limit_s, self.budget_s = what, device, limit_s, budget_s
        self.on_progress = on_progress
        self.predicted_s: float | None = None  # the first prediction
        self._started, self._first, self._next = time.perf_counter(), 0.0, FIRST_CHECK

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self._first = self._elapsed()  # reading, compiling
        elif done == self._next and done < total:
            self._next *= 2
            elapsed = self._elapsed()
            predicted = self._first + (elapsed - self._first) / (done - 1) * (total - 1)
            self.predicted_s = self.predicted_s or predicted
            if self.limit_s is not None and predicted > self.limit_s:
                raise InputError(
                    f"eval: --budget {self.budget_s:g} cannot be met: {done} of {total:,} batches of {self.what} took "
                    f"{elapsed:.1f} s, all would take {predicted:.1f} s and {max(self.limit_s, 0):.1f} s are left: "
                    f"{predicted - self.limit_s:.1f} s too long"
                )
        if self.on_progress:
            self.on_progress(done, total)

    def _elapsed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self._started
