"""The charts of a report as inline SVG, drawn by matplotlib.

Colours in the SVG are CSS variables and its text is in the page's own font: matplotlib draws with stand-in colours that
are replaced afterwards. Identifiers are unique per chart, because all charts share one page.
"""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .page import Html, element

WIDE, NARROW, SMALL, MEDIUM = (840, 300), (360, 260), (320, 190), (380, 240)  # SVG units; about one CSS pixel each

# Stand-ins that appear nowhere else in matplotlib's output, and the CSS variables they become.
_COLORS = {f"#fe01{i:02x}": f"--{name}" for i, name in enumerate(("ink", "muted", "line", "faint", "c1", "c2", "c3"))}
INK, MUTED, LINE, FAINT, BLUE, ORANGE, TEAL = _COLORS

_RC = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}

_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.6g}".rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}")


def _svg(name: str, size: tuple[int, int], label: str, draw: Callable[[Axes], None], class_: str = "") -> Html:
    """Run draw(axes) on an empty chart and return it as an <svg> element that scales with its container."""
    with matplotlib.rc_context({**_RC, "svg.hashsalt": f"{name} {size}"}):
        chart = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")  # 72 SVG units an inch
        FigureCanvasSVG(chart)
        chart.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
        chart.patch.set_visible(False)
        axes = chart.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        chart.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    inner = text[text.index(">") + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    inner = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", inner)
    inner = inner.replace("xlink:href=", "href=")
    # Six decimals are four too many for a screen, and most of the page.
    inner = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), inner)
    for stand_in, variable in _COLORS.items():
        inner = inner.replace(stand_in, f"var({variable})")
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    return element(
        "svg", Html(inner), viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_label=label, class_=class_ or None
    )


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    last = max(float(steps[-1]), 1.0)
    axes.set_xlim(min(float(steps[0]), 0.98 * last), last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.set_xlabel("step")


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, width: float = 1.8) -> None:
    axes.plot(x, y, color=color, linewidth=width, marker="o" if len(x) < 3 else None, markersize=4)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` entries, fewer at both ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def smoothing_width(count: int) -> int:
    """Logged entries per mean: an odd number, about a 25th of the run."""
    return min(count // 25, 400) // 2 * 2 + 1


def loss_limits(loss: np.ndarray, validation: Sequence[float]) -> tuple[float, float]:
    """y range that shows everything after the first tenth of the run; the plunge before may leave at the top."""
    shown = np.concatenate((loss[len(loss) // 10 :], validation))
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * max(high - low, 0.1)
    return low - margin, high + margin


def loss_chart(
    steps: np.ndarray, loss: np.ndarray, validation: Sequence[tuple[int, float]], final: tuple[int, float] | None
) -> Html:
    """Training loss raw and smoothed, validation as points. In two proportions; the style sheet shows one of them."""
    points = [*validation, *([final] if final else [])]
    limits = loss_limits(loss, [value for _, value in points])

    def draw(axes: Axes) -> None:
        _line(axes, steps, loss, FAINT, 0.9)
        _line(axes, steps, running_mean(loss, smoothing_width(len(loss))), BLUE, 2.0)
        if validation:
            axes.plot(*zip(*validation, strict=True), "o", color=ORANGE, markersize=4.5)
        if final:
            axes.plot(*final, "D", color=TEAL, markersize=6.5, clip_on=False, zorder=3)
        _step_axis(axes, steps)
        axes.set_ylim(*limits)
        axes.set_ylabel("loss, nats per token")

    label = f"Training loss by step, from {loss[0]:.3f} to {loss[-1]:.3f} nats per token"
    return Html(_svg("loss", WIDE, label, draw, "wide") + _svg("loss", NARROW, label, draw, "narrow"))


def lr_chart(steps: np.ndarray, lr: np.ndarray) -> Html:
    def draw(axes: Axes) -> None:
        _line(axes, steps, lr, BLUE)
        _step_axis(axes, steps)
        axes.set_ylim(0, 1.08 * max(float(np.nanmax(lr)), 1e-9))
        axes.set_ylabel("multiplier")

    return _svg("lr", SMALL, f"Learning-rate multiplier by step, {lr[0]:.3g} to {lr[-1]:.3g}", draw)


def step_time_chart(steps: np.ndarray, step_ms: np.ndarray, outlier: np.ndarray) -> Html:
    """Milliseconds per step with the median; outliers are ticks at the top, so that they do not flatten the rest."""
    median = float(np.median(step_ms))

    def draw(axes: Axes) -> None:
        top = 1.2 * max(float(step_ms[~outlier].max()), median)
        _line(axes, steps, np.where(outlier, np.nan, step_ms), FAINT, 1.0)
        axes.axhline(median, color=BLUE, linewidth=1.8)
        if outlier.any():
            gap = np.full(outlier.sum(), np.nan)
            x = np.stack((steps[outlier], steps[outlier], gap), axis=1).ravel()
            y = np.stack((gap * 0 + 0.94 * top, gap * 0 + top, gap), axis=1).ravel()
            y[0::3], y[1::3] = 0.94 * top, top
            axes.plot(x, y, color=ORANGE, linewidth=1.8)
        _step_axis(axes, steps)
        axes.set_ylim(0, top)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_THOUSANDS)
        axes.set_ylabel("ms per step")

    return _svg("step_time", SMALL, f"Time per step, median {median:.1f} ms", draw)


def grad_norm_chart(steps: np.ndarray, norm: np.ndarray, clip: float) -> Html:
    """Gradient norm before clipping, on a logarithmic axis."""
    positive = np.where(np.isfinite(norm) & (norm > 0), norm, np.nan)

    def draw(axes: Axes) -> None:
        _line(axes, steps, positive, FAINT, 0.9)
        _line(axes, steps, np.exp(running_mean(np.log(positive), smoothing_width(len(norm)))), BLUE)
        if clip > 0:
            axes.axhline(clip, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 3)))
        _step_axis(axes, steps)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_THOUSANDS)
        few_decades = np.nanmax(positive) < 100 * np.nanmin(positive)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("gradient norm (log scale)")

    return _svg("grad_norm", SMALL, f"Gradient norm by step, last {norm[-1]:.3g}", draw)


def stage_chart(stages: Sequence[tuple[str, float]]) -> Html:
    """Bits per byte from the trained weights to the last scoring method; the axis does not start at zero."""
    values = [value for _, value in stages]

    def draw(axes: Axes) -> None:
        rows = range(len(stages))
        axes.plot(values, rows, color=FAINT, linewidth=1.2)
        axes.plot(values, rows, "o", color=BLUE, markersize=8)
        for row, value in enumerate(values):
            axes.annotate(f"{value:.4f}", (value, row), (0, 9), textcoords="offset points", ha="center")
        axes.set_yticks(rows, [name for name, _ in stages])
        axes.set_ylim(len(stages) - 0.6, -0.75)
        spread = max(max(values) - min(values), 0.01)
        axes.set_xlim(min(values) - 0.2 * spread, max(values) + 0.2 * spread)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("bits per byte (the axis does not start at zero)")

    label = "Bits per byte by stage: " + ", ".join(f"{name} {value:.4f}" for name, value in stages)
    return _svg("stages", (MEDIUM[0], max(MEDIUM[1], 60 + 40 * len(stages))), label, draw)
