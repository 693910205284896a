"""Score an artifact: `torchrun --standalone --nproc_per_node=N -m pgolf.evaluate ...`, or `pgolf eval ...`.

The model, its shape and the settings of the method come from the artifact alone; the text comes from the dataset.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pgolf_kernels import dispatch

from . import distributed, run
from .artifact.container import Content
from .artifact.pack import read_content
from .artifact.quantise import dequantise_state
from .config import Config
from .data.dataset import Dataset
from .errors import InputError
from .model import GPT, activation_dtype
from .scoring.slot import PerWindowSlot
from .scoring.stream import BatchScorer, score_frozen, score_stream
from .scoring.validation import validation_tokens

METHODS = ("plain", "sliding", "slot")
SCORING_FIELDS = ("eval_", "slot_", "drop_val_tail", "dtype")  # prefixes of the fields that --set may change here


def load_model(path: Path, device: torch.device) -> tuple[GPT, Config, dict]:
    """The model of an artifact, ready to score: (model, config, header)."""
    content = read_content(path)
    return build_model(path, content, device), content.header.config, content.header.as_dict()


def build_model(path: Path, content: Content, device: torch.device) -> GPT:
    """The model of a content that was read from `path`, dequantised, with the recurrence its training ended with."""
    config, steps = content.header.config, content.header.extra.get(run.TRAINED_STEPS, 0)
    if type(steps) is not int or steps < 0:
        raise InputError(f"{path}: {run.TRAINED_STEPS} in its header must be a number of steps, got {steps!r}")
    model = GPT(config)
    try:
        model.load_export(dequantise_state(content.tensors))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: its tensors do not fit its config ({error})") from error
    model.activation_dtype = activation_dtype(config, device)
    model.recurrence_active = config.recurs_after(steps)
    return model.to(device).eval().requires_grad_(False)


def evaluate(
    artifact: Path,
    data: Path,
    method: str,
    *,
    settings: list[str] = (),
    limit: int = 0,
    device: str = "auto",
    tokenizer: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Score an artifact and record the result in scores.json beside it.

    Args:
        method: "plain" (no overlap), "sliding" or "slot" (sliding, with a fit to each window's context).
        settings: `field=value` overrides of the artifact's config, for what concerns scoring.
        limit: score only the first targets; 0: all.
        tokenizer: the model file, where it does not lie with the data.

    Returns:
        {"method", "share", "val_loss", "val_bpb", "tokens", "bytes", "seconds", "causal", "text", "settings"};
        "text" says whether bytes are of the raw text or of what the tokenizer normalised it to.
    """
    if method not in METHODS:
        raise InputError(f"eval: method must be one of {', '.join(METHODS)}, got {method!r}")
    ranks = distributed.start(device)
    try:
        model, cfg, header = load_model(artifact, ranks.device)
        for setting in settings:
            if not setting.startswith(SCORING_FIELDS):
                raise InputError(
                    f"eval: {setting!r} is not about scoring; the artifact fixes the model and its training"
                )
        cfg = cfg.with_settings(list(settings))
        dataset = Dataset.open(data, tokenizer, vocab_size=cfg.vocab_size)
        if header["tokenizer_sha256"] != dataset.tokenizer.sha256:
            raise InputError(
                f"{data}: its tokenizer is not the one that {artifact} was trained with; use the data of that run"
            )
        scorer: BatchScorer = PerWindowSlot.from_config(cfg) if method == "slot" else score_frozen
        score = score_stream(
            model,
            validation_tokens(cfg, dataset, limit),
            dataset.byte_counts,
            ranks,
            seq_len=cfg.eval_seq_len,
            stride=cfg.eval_seq_len if method == "plain" else cfg.eval_stride,
            batch_windows=cfg.eval_batch_windows,
            score_batch=scorer,
            on_progress=on_progress if ranks.is_main else None,
        )
        result = {
            "method": method,
            "share": "window" if method == "slot" else None,
            **score.as_dict(),
            "causal": True,
            "text": "normalised" if dataset.tokenizer.normalised else "raw",
            "world_size": ranks.world_size,
            "settings": _settings(cfg, method),
            "implementations": dict(dispatch.CHOSEN),
            "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        }
        if ranks.is_main:
            name = f"{method}, first {limit} tokens" if limit else method  # never in place of a whole score
            run.update_json(artifact.parent / run.SCORES, name, result)
        return result
    finally:
        distributed.stop()


def _settings(cfg: Config, method: str) -> dict:
    """The fields that a score of this method depends on."""
    prefixes = ("eval_", "drop_val_tail") + (("slot_",) if method == "slot" else ())
    return {name: value for name, value in json.loads(cfg.to_json()).items() if name.startswith(prefixes)}


def main(argv: list[str] | None = None) -> int:
    from .cli import main as cli

    return cli(["eval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
