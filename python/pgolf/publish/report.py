"""`pgolf report`: RUN/report.html, one page that needs nothing else, from what the run directory holds.

The same directory gives the same bytes: every date on the page is the run's own.
"""

import datetime
from pathlib import Path

from .. import run
from .curves import training
from .page import Html, document, element
from .record import RunRecord, duration
from .sections import artifact, implementations, machine, scores, settings

LADDER_CELLS = 5  # more do not fit side by side; the table has them all


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html and return its path.

    A run that is unfinished, unpacked or unscored gives a shorter page that says so.

    Raises:
        InputError: run_dir is not a run directory, or report.html cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / run.REPORT
    run.write_atomically(path, render(RunRecord.read(run_dir)).encode())
    return path


def render(record: RunRecord) -> str:
    """The whole page."""
    return document(
        f"{record.name}: pgolf run",
        header(record),
        ladder(record),
        stats(record),
        training(record),
        scores(record),
        artifact(record),
        element("div", element("div", implementations(record), settings(record)), machine(record), class_="grid two"),
    )


def header(record: RunRecord) -> Html:
    facts = [f"preset {record.cfg.preset}"]
    if record.start:
        started = datetime.datetime.fromtimestamp(record.start["time"], datetime.UTC)
        facts.append(f"started {started:%Y-%m-%d %H:%M} UTC")
    facts.append(f"seed {record.cfg.seed}")
    facts.append(record.environment.get("gpu") or record.environment.get("cpu"))
    return element(
        "header",
        element("p", "pgolf run", class_="eyebrow"),
        element("h1", record.name),
        element("p", *(element("span", fact) for fact in facts if fact), class_="facts"),
    )


def ladder(record: RunRecord) -> Html | None:
    """Bits per byte of the first stages in large figures, each with the change from the one before."""
    cells = record.stages[:LADDER_CELLS]
    if not cells:
        cells = [(f"Validation at step {e['step']:,}", e["val_bpb"]) for e in record.of("validate")[-1:]]
    if not cells:
        return None
    best = min(value for _, value in cells)
    blocks, before = [], None
    for name, value in cells:
        change = "bits/byte"
        if record.same_text and before is not None:  # else the difference would say nothing
            change = f"{value - before:+.4f} bits/byte".replace("-", "\N{MINUS SIGN}")
        blocks.append(
            element(
                "div",
                element("dt", name),
                element("dd", f"{value:.4f}", class_="big"),
                element("dd", change),
                class_="best" if record.same_text and value == best else None,
            )
        )
        before = value
    return element("dl", *blocks, class_="card ladder")


def stats(record: RunRecord) -> Html | None:
    """What the scores cost: bytes, seconds, tokens, parameters."""
    cells = []
    if record.artifact:
        size, limit = record.artifact["artifact_bytes"], record.artifact["limit_bytes"]
        meter = element("span", style=f"width:{min(100 * size / limit, 100):.2f}%")
        meter = element("dd", meter, class_="meter", aria_hidden="true")
        cells.append(("Artifact", f"{size / 1e6:.2f} MB", f"{size:,} bytes, {size / limit:.1%} of {limit:,}", meter))
    if record.last_step:
        cells.append(("Training time", duration(record.train_seconds), f"{record.last_step:,} steps"))
    if record.tokens_per_second:
        cells.append(("Throughput", f"{record.tokens_per_second:,.0f}", "tokens per second"))
    if record.start:
        count = record.start["parameters"]
        cells.append(("Parameters", f"{count / 1e6:.2f} M", f"{count:,}, trained in {record.start['dtype']}"))
    blocks = [
        element("div", element("dt", name), element("dd", value, class_="big"), element("dd", detail), *more)
        for name, value, detail, *more in cells
    ]
    return element("dl", *blocks, class_="stats") if blocks else None
