"""`pgolf demo`: every step from text to score with the defaults, and one table of what came out."""

from pathlib import Path

from . import run
from .errors import InputError
from .presets import preset
from .progress import meter, note, staged_meter


def run_demo(run_dir: Path, data: Path, preset_name: str, settings: list[str], device: str) -> dict:
    """Prepare data if it is missing, train, pack, score three ways and write the report.

    Returns:
        {"run", "scores": {method: result}, "artifact_bytes", "train": summary, "table": text}

    Raises:
        InputError: run_dir holds a finished or unfinished run already; it is never overwritten.
    """
    from .artifact.pack import pack_run
    from .data.corpus import stdlib_documents
    from .data.prepare import prepare
    from .evaluate import evaluate
    from .publish.report import write_report
    from .train import train

    cfg = preset(preset_name).with_settings(settings)
    if (run_dir / run.CONFIG).exists():
        raise InputError(f"{run_dir}: holds a run already; delete it or name another with --run")
    if not (data / "manifest.json").exists():
        with staged_meter("preparing data") as on_progress:
            prepare(stdlib_documents(), data, vocab_size=cfg.vocab_size, progress=on_progress)
    summary = train(cfg, data, run_dir, device=device)
    artifact = run_dir / run.ARTIFACT
    with staged_meter("packing") as on_progress:
        packed = pack_run(run_dir, artifact, on_progress=on_progress)
    scores = {}
    for method in ("plain", "sliding", "slot"):
        with meter(f"scoring ({method})") as on_progress:
            scores[method] = evaluate(artifact, data, method, device=device, on_progress=on_progress)
    report = write_report(run_dir)
    note(f"report: {report}")
    return {
        "run": str(run_dir),
        "train": summary,
        "artifact_bytes": packed.artifact_bytes,
        "scores": scores,
        "table": result_table(summary, packed.artifact_bytes, scores),
    }


def result_table(summary: dict, artifact_bytes: int, scores: dict[str, dict]) -> str:
    """Markdown: the table that README shows."""
    rows = [
        ("trained weights, float32", summary["val_loss"], summary["val_bpb"], None),
        ("artifact (int6), no overlap", *_pick(scores["plain"])),
        ("artifact, sliding window", *_pick(scores["sliding"])),
        ("artifact, sliding window + causal SLOT", *_pick(scores["slot"])),
    ]
    lines = ["| score | nats per token | bits per byte | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {loss:.4f} | {bpb:.4f} | {'' if seconds is None else f'{seconds:.0f}'} |"
        for name, loss, bpb, seconds in rows
    ]
    lines.append("")
    lines.append(
        f"artifact {artifact_bytes:,} bytes; {summary['step']} steps in {summary['train_seconds']:.0f} s, "
        f"{summary['tokens_per_second']:,} tokens/s"
    )
    return "\n".join(lines)


def _pick(score: dict) -> tuple[float, float, float]:
    return score["val_loss"], score["val_bpb"], score["seconds"]
