"""Progress bars with the time left (rich). On anything but a terminal, a plain line now and then instead.

rich is imported where a bar is drawn: a bundled program does without it, and then has plain lines on a terminal too.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .config import Config

PLAIN_LINE_EVERY_S = 15.0


def note(text: str) -> None:
    """A line for people that is no result, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _draws() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def _bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True, highlight=False),
        transient=False,
    )


class Meter:
    """A bar from 0 to 1 with a note beside it; silent when disabled."""

    def __init__(self, description: str, enabled: bool = True):
        self.description, self.enabled = description, enabled
        self._bar = _bar() if enabled and _draws() else None
        self._next_line = time.monotonic() + PLAIN_LINE_EVERY_S

    def __enter__(self) -> "Meter":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=1.0, note="")
        elif self.enabled:
            note(self.description)
        return self

    def __exit__(self, *_exception) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, share: float, text: str = "") -> None:
        if self._bar:
            self._bar.update(self._task, completed=min(share, 1.0), note=text)
        elif self.enabled and time.monotonic() >= self._next_line:
            note(f"{self.description}: {share:.0%} {text}")
            self._next_line = time.monotonic() + PLAIN_LINE_EVERY_S


@contextmanager
def meter(description: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar for a loop that reports (done, total)."""
    with Meter(description, enabled) as bar:
        yield lambda done, total: bar.update(done / max(total, 1))


@contextmanager
def staged_meter(description: str, enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work in stages that reports (stage, done, total); total 0 means unknown."""
    with Meter(description, enabled) as bar:
        yield lambda stage, done, total: bar.update(done / total if total else 0.0, stage)


class StageClock:
    """Times the stages of some work, in `seconds` by name, and passes their progress on.

    Args:
        on_progress: called with (stage, done, total), total 0 where that is unknown; None: nobody is told.
    """

    def __init__(self, on_progress: Callable[[str, int, int], None] | None) -> None:
        self.on_progress, self.seconds = on_progress, {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        started = time.perf_counter()

        def report(done: int, total: int) -> None:
            if self.on_progress:
                self.on_progress(name, done, total)

        report(0, 0)
        yield report
        self.seconds[name] = round(time.perf_counter() - started, 3)


class TrainingProgress:
    """The bar of a training run: its share of the time or step budget, whichever is further along."""

    def __init__(self, cfg: Config, enabled: bool):
        self.cfg, self.enabled = cfg, enabled
        self._meter: Meter | None = None

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception) -> None:
        if self._meter:
            self._meter.__exit__(*exception)

    def note(self, text: str) -> None:
        if self.enabled:
            note(text)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Something before or after training whose length is unknown."""
        if self._meter:
            self._meter.__exit__()
            self._meter = None
        if self.enabled and _draws():
            from rich.console import Console

            with Console(stderr=True, highlight=False).status(text):
                yield
        else:
            self.note(text)
            yield

    def step(self, step: int, elapsed_s: float, loss: float) -> None:
        if not self._meter:
            self._meter = Meter("training", self.enabled)
            self._meter.__enter__()
        share = step / self.cfg.max_steps
        if self.cfg.max_seconds:
            share = max(share, elapsed_s / self.cfg.train_seconds)
        self._meter.update(share, f"step {step}  loss {loss:.3f}  {1e3 * elapsed_s / step:.0f} ms/step")


def show(text: str) -> None:
    """A result for people, on stdout; what its encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
