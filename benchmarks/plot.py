"""Draw benchmark rows: one bar per case and peer, its length the ratio peer / ours, a line from p20 to p80."""

from pathlib import Path

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def plot(rows: list[dict], path: str | Path) -> Path:
    """Write a PNG of rows as benchmarks.bench makes them.

    Raises:
        ValueError: there are no rows to draw.
    """
    if not rows:
        raise ValueError("bench: nothing to plot, because no case was timed")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        ratio, low, high = row["ratio_median"], row["ratio_p20"], row["ratio_p80"]
        axes.barh(i, ratio, color=COLORS[peers.index(row["peer"]) % len(COLORS)])
        axes.plot((low, high), (i, i), color="black", linewidth=1)
        axes.text(max(ratio, high), i, f"  {ratio:.2f}x", va="center", fontsize=8)
    labels = [f"{row['op']} {row['shape']} {row['dtype']} {row['impl']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("peer's time / ours (median; line: 20th to 80th percentile)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[i % len(COLORS)]) for i in range(len(peers))]
    axes.legend(handles, peers, fontsize=8, loc="upper center", bbox_to_anchor=(0.3, 1), ncols=min(4, len(peers)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)
