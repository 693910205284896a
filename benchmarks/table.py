"""Markdown tables of the committed rows: `python -m benchmarks.table` rewrites README.md and docs/ratios.md.

Only the newest row of each measurement counts. What stands between the markers in README.md is this program's output
and nothing else; a test renders it again and compares.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- rows: {} -->\n", "<!-- end of rows -->"
ORDER = (
    "leaky_relu2_mlp",
    "newton_schulz",
    "int6_linear",
    "causal_attention",
    "softcapped_cross_entropy",
    "slot",
    "step",
)
SAME = ("machine", "op", "shape", "dtype", "impl", "peer", "timing", "isa", "malloc", "threads")


def newest_rows(paths: Iterable[Path] | None = None) -> list[dict]:
    """The last row of every measurement, in the order of the README's ops."""
    newest: dict[tuple, dict] = {}
    for path in sorted(RESULTS.glob("*.csv")) if paths is None else paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(row[name] for name in SAME)
                if key not in newest or row["date"] >= newest[key]["date"]:
                    newest[key] = row
    return sorted(newest.values(), key=lambda row: ORDER.index(row["op"]))


def _ratio(row: dict) -> str:
    low, high = float(row["ratio_p20"]), float(row["ratio_p80"])
    return f"{float(row['ratio_median']):.2f}x [{low:.2f}, {high:.2f}]"


def _milliseconds(row: dict) -> str:
    return f"{float(row['ms']):.3g}"


def _share(row: dict) -> str:
    return f"{100 * float(row['limit_fraction']):.0f} %"


def _markdown(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _is_gpu(row: dict) -> bool:
    return row["isa"] == ""


def best_peers(rows: Iterable[dict]) -> list[dict]:
    """Of the rows of each case, the one whose peer is fastest: the smallest ratio."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[name] for name in SAME if name != "peer")
        if key not in best or float(row["ratio_median"]) < float(best[key]["ratio_median"]):
            best[key] = row
    return list(best.values())


def gpu_table(rows: Iterable[dict]) -> str:
    """One line per case: device time of CUDA graphs where it was captured, else the clock of a loop."""
    graphed = {(row["op"], row["shape"]) for row in rows if row["timing"] == "graph"}
    kept = [r for r in rows if _is_gpu(r) and (r["timing"] == "graph") == ((r["op"], r["shape"]) in graphed)]
    return _table(kept)


def cpu_table(rows: Iterable[dict]) -> str:
    """One line per case at the machine's own instruction set, large tensors kept from the system's allocator."""
    tuned = {(row["op"], row["shape"], row["dtype"]) for row in rows if row["malloc"] == "tuned"}
    kept = []
    for row in rows:
        wanted = "tuned" if (row["op"], row["shape"], row["dtype"]) in tuned else "default"
        if not _is_gpu(row) and row["isa"] in ("avx512bf16", "amx") and row["malloc"] == wanted:
            kept.append(row)
    return _table(kept)


def _table(rows: list[dict]) -> str:
    lines = []
    for row in best_peers(row for row in rows if row["impl"] != "reference"):
        case = (f"`{row['op']}` {row['shape']}", row["dtype"], row["impl"])
        lines.append((*case, _milliseconds(row), _ratio(row), row["peer"], _share(row)))
    return _markdown(("op, shape", "dtype", "ours", "ms", "over the best peer", "best peer", "of the limit"), lines)


def full_table(rows: Iterable[dict]) -> str:
    """Every row of every machine."""
    header = ("shape", "dtype", "ours", "instructions", "malloc", "timing", "ms", "peer", "ratio", "of the limit")
    text = []
    machine_op = None
    lines: list[tuple[str, ...]] = []

    def flush() -> None:
        if lines:
            text.append(_markdown(header, lines) + "\n")
            lines.clear()

    for row in sorted(rows, key=lambda r: (r["machine"], ORDER.index(r["op"]))):
        if (row["machine"], row["op"]) != machine_op:
            flush()
            machine_op = row["machine"], row["op"]
            text.append(f"## {row['op']} on {row['machine']}, {row['threads']} threads, torch {row['torch']}\n\n")
        case = (row["shape"], row["dtype"], row["impl"], row["isa"] or "GPU", row["malloc"], row["timing"])
        lines.append((*case, _milliseconds(row), row["peer"], _ratio(row), _share(row)))
    flush()
    return "".join(text)


def render(text: str, rows: list[dict]) -> str:
    """`text` with what stands between each pair of markers replaced by the table it names."""
    for name, table in (("gpu", gpu_table), ("cpu", cpu_table)):
        begin = BEGIN.format(name)
        pattern = re.escape(begin) + ".*?" + re.escape(END)
        text = re.sub(pattern, lambda _, b=begin, t=table: b + t(rows) + END, text, flags=re.DOTALL)
    return text


RATIOS_INTRO = """\
# Every measured ratio

Rendered from `benchmarks/results/*.csv` by `python -m benchmarks.table`; the newest row of each measurement. Ratio =
peer's time / ours, median of interleaved rounds [20th, 80th percentile]. The limit is the larger of the least
arithmetic at the measured peak of matrix products and the least traffic at the measured bandwidth of the memory that
holds it. "malloc tuned" keeps large tensors from being returned to the system between calls, for both sides.

"""


def main() -> None:
    rows = newest_rows()
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(), rows))
    (ROOT / "docs/ratios.md").write_text(RATIOS_INTRO + full_table(rows).rstrip() + "\n")


if __name__ == "__main__":
    main()
