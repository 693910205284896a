"""The training section of a report: what the log's step events say, as four charts."""

import numpy as np

from . import charts
from .page import Html, element, figure, note, section
from .record import RunRecord, duration

OUTLIER = 1.5  # a logged entry this many times slower than the median counts as an outlier


def training(record: RunRecord) -> Html:
    if not len(record.steps["step"]):
        return section("Training", note("The log holds no training step, so there are no curves."))
    columns, cfg = record.steps, record.cfg
    steps, loss = columns["step"], columns["loss"]
    smoothed = charts.running_mean(loss, charts.smoothing_width(len(loss)))
    lead = (
        f"{record.last_step:,} steps of {cfg.train_batch_tokens:,} tokens in {duration(record.train_seconds)}. "
        f"The training loss went from {loss[0]:.3f} to {smoothed[-1]:.3f} nats per token."
    )
    notes = []
    if not record.end:
        notes.append(note(f"Training has not finished: the log ends at step {record.last_step:,}."))
    if record.resumed_at:
        places = ", ".join(f"{step:,}" for step in record.resumed_at)
        notes.append(note(f"The run was interrupted and resumed at step {places}."))
    if not np.isfinite(loss).all():
        first = int(steps[~np.isfinite(loss)][0])
        notes.append(
            note(f"The loss was not a finite number at step {first:,} and maybe later; the curves have gaps there.")
        )
    small = [_learning_rate(record), _step_time(record), _gradient_norm(record)]
    return section("Training", element("p", lead), *notes, _loss(record), element("div", *small, class_="grid"))


def _loss(record: RunRecord) -> Html:
    steps, loss = record.steps["step"], record.steps["loss"]
    validation = [(e["step"], e["val_loss"]) for e in record.of("validate")]
    final = (record.end["step"], record.end["val_loss"]) if record.end else None
    width = charts.smoothing_width(len(loss))
    keys = (
        [("faint", "train, as logged"), ("c1", f"train, mean of {width} entries")] if width > 1 else [("c1", "train")]
    )
    keys += [("c2 dot", "validation")] * bool(validation)
    keys += [("c3 diamond", f"validation of the final weights, {final[1]:.4f}")] if final else []
    _, high = charts.loss_limits(loss, [v for _, v in validation] + ([final[1]] if final else []))
    above = steps[loss > high]
    caption = f"The first steps, up to step {int(above[-1]):,}, lie above the axis." if len(above) else ""
    return figure("Loss", charts.loss_chart(steps, loss, validation, final), caption, keys)


def _learning_rate(record: RunRecord) -> Html:
    steps, lr, cfg = record.steps["step"], record.steps["lr"], record.cfg
    falling = steps[lr < 1]
    caption = f"Multiplies every learning rate, such as the matrices' {cfg.matrix_lr:g}. " + (
        f"It falls from step {int(falling[0]):,} on." if len(falling) else "It has not begun to fall."
    )
    return figure("Learning-rate multiplier", charts.lr_chart(steps, lr), caption, [("c1", "multiplier, no unit")])


def _step_time(record: RunRecord) -> Html:
    steps, step_ms = record.steps["step"], record.steps["step_ms"]
    median = float(np.median(step_ms))
    outlier = step_ms > OUTLIER * median
    keys = [("faint", "as logged"), ("c1", "median")]
    if outlier.any():
        keys.append(("c2", "outlier"))
        worst = int(np.argmax(step_ms))
        caption = (
            f"Median {median:,.1f} ms. {outlier.sum():,} of {len(steps):,} log entries took over {OUTLIER:g} times "
            f"that, the slowest {step_ms[worst]:,.0f} ms per step at step {int(steps[worst]):,}."
        )
    else:
        caption = f"Median {median:,.1f} ms; no log entry took over {OUTLIER:g} times that."
    return figure("Step time", charts.step_time_chart(steps, step_ms, outlier), caption, keys)


def _gradient_norm(record: RunRecord) -> Html:
    steps, norm, clip = record.steps["step"], record.steps["grad_norm"], record.cfg.grad_clip_norm
    if not (np.isfinite(norm) & (norm > 0)).any():
        return note("No logged gradient norm is a positive number, so there is no curve of it.")
    smoothed = charts.smoothing_width(len(norm)) > 1
    keys = [("faint", "as logged"), ("c1", "smoothed")] if smoothed else [("c1", "as logged")]
    caption = "Over all parameters, before clipping; this run does not clip."
    if clip > 0:
        keys.append(("c2", f"clipped to {clip:g}"))
        caption = f"Over all parameters, before clipping. {np.mean(norm > clip):.1%} of the logged steps were clipped."
    return figure("Gradient norm", charts.grad_norm_chart(steps, norm, clip), caption, keys)
