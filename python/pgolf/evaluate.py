"""Score an artifact: `torchrun --standalone --nproc_per_node=N -m pgolf.evaluate ...`, or `pgolf eval ...`.

The model, its shape and the settings of the method come from the artifact alone; the text comes from the dataset.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pgolf_kernels import dispatch

from . import distributed, run
from .artifact.container import Content
from .artifact.pack import read_content
from .artifact.quantise import dequantise_state
from .budget import Pace
from .config import Config
from .data.byte_counts import ByteCounts
from .data.dataset import Dataset
from .errors import InputError
from .model import GPT, activation_dtype
from .scoring.context_tree import ContextTree
from .scoring.gate import TokenGate
from .scoring.objective import standing
from .scoring.slot import Slot
from .scoring.slot_autograd import AutogradSlot
from .scoring.slot_cache import CacheSlot
from .scoring.stream import BatchScorer, Score, score_stream
from .scoring.ttt import ScoreFirst
from .scoring.validation import validation_tokens

METHODS = ("plain", "sliding", "slot", "ttt", "slot+ttt", "ctw")
# prefixes of the fields that --set may change here
SCORING_FIELDS = ("eval_", "slot_", "ttt_", "ctw_", "drop_val_tail", "dtype")


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
    allow_leaky: bool = False,
    device: str = "auto",
    tokenizer: Path | None = None,
    budget_s: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Score an artifact and record the result in scores.json beside it.

    Args:
        method: "plain" (no overlap), "sliding", "slot" (sliding, adapted to each window's context), "ttt" (sliding,
            with training on each chunk behind its scoring), "slot+ttt" or "ctw" (sliding, mixed with a context tree);
            several, separated by commas; or "stages", the config's eval_stages.
        settings: `field=value` overrides of the artifact's config, for what concerns scoring.
        limit: score only the first targets; 0: all.
        tokenizer: the model file, where it does not lie with the data.
        allow_leaky: run a method that is not causal, too; its result is marked INVALID.
        budget_s: seconds that reading and all scoring may take; what the first batches show to take longer is stopped.

    Returns:
        {"method", "share", "val_loss", "val_bpb", "tokens", "bytes", "seconds", "causal", "standing", "text",
        "settings", ...}; "text" says whether bytes are of the raw text or of what the tokenizer normalised it to.
        Of several methods {"stages": their results, "load_seconds", "seconds": of everything, "causal", "standing"}.

    Raises:
        InputError: an unknown method or setting, other data, or a method that is not causal without allow_leaky.
    """
    started = time.perf_counter()
    ranks = distributed.start(device)  # first: under train_gpt.py the other ranks wait here for rank 0's file
    try:
        request = check_request(artifact, method, settings, allow_leaky)
        cfg, methods = request.cfg, request.methods
        model, dataset = open_request(request, artifact, data, tokenizer, ranks.device)
        tokens = validation_tokens(cfg, dataset, limit)
        loaded = time.perf_counter()
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        results = []
        for i, name in enumerate(methods):
            progress = _share_of(on_progress, i, len(methods)) if on_progress and ranks.is_main else None
            left = None if budget_s is None else budget_s - (time.perf_counter() - started)
            pace = Pace(name, ranks.device, left, budget_s, progress)
            score = score_method(name, cfg, model, tokens, dataset.byte_counts, ranks, on_progress=pace)
            found = standing(cfg, name)
            result = {
                "method": name,
                "share": cfg.slot_share if "slot" in name else None,
                **score.as_dict(),
                "predicted_seconds": pace.predicted_s and round(pace.predicted_s, 3),
                "causal": found.causal,
                "standing": "causal" if found.causal else f"INVALID: {found.reason}",
                "text": "normalised" if dataset.tokenizer.normalised else "raw",
                "world_size": ranks.world_size,
                "settings": scoring_settings(cfg, name),
                "implementations": dict(dispatch.CHOSEN),
                "artifact_sha256": digest,
            }
            if ranks.is_main:
                run.update_json(artifact.parent / run.SCORES, _record_name(name, cfg, found.causal, limit), result)
                _log_clock(artifact, result, loaded - started)
            results.append(result)
        if len(results) == 1 and method != "stages":
            return results[0]
        leaky = [r["method"] for r in results if not r["causal"]]
        return {
            "stages": results,
            "load_seconds": round(loaded - started, 3),
            "seconds": round(time.perf_counter() - started, 3),
            "causal": not leaky,
            "standing": f"INVALID: not causal are {', '.join(leaky)}" if leaky else "causal",
        }
    finally:
        distributed.stop()


class Request(NamedTuple):
    """What is to be scored, checked: cfg is the artifact's with the settings over it."""

    content: Content
    cfg: Config
    methods: list[str]

    @property
    def causal(self) -> bool:
        return all(standing(self.cfg, name).causal for name in self.methods)


def check_request(artifact: Path, method: str, settings: list[str] = (), allow_leaky: bool = False) -> Request:
    """Refuse what `evaluate` would refuse about its method and settings, before any work; its arguments and errors."""
    if method != "stages":
        _check_methods(method)
    content = read_content(artifact)
    for setting in settings:
        if not setting.startswith(SCORING_FIELDS):
            raise InputError(f"eval: {setting!r} is not about scoring; the artifact fixes the model and its training")
    cfg = content.header.config.with_settings(list(settings))
    methods = _check_methods(cfg.eval_stages if method == "stages" else method)
    for name in methods:
        if not (found := standing(cfg, name)).causal and not allow_leaky:
            raise InputError(
                f"eval: {name} as configured is not causal ({found.reason}): its score is INVALID; "
                "--allow-leaky computes it all the same"
            )
        if "ttt" in name:
            ScoreFirst(cfg)
        if name == "ctw":
            ContextTree(cfg)
    return Request(content, cfg, methods)


def open_request(
    request: Request, artifact: Path, data: Path, tokenizer: Path | None, device: torch.device
) -> tuple[GPT, Dataset]:
    """The model and the text that a request is about. Raises InputError if the text is of another tokenizer."""
    model = build_model(artifact, request.content, device)
    model.activation_dtype = activation_dtype(request.cfg, device)
    dataset = Dataset.open(data, tokenizer, vocab_size=request.cfg.vocab_size)
    if request.content.header.tokenizer_sha256 != dataset.tokenizer.sha256:
        raise InputError(
            f"{data}: its tokenizer is not the one that {artifact} was trained with; use the data of that run"
        )
    return model, dataset


def score_method(
    method: str,
    cfg: Config,
    model: GPT,
    tokens: torch.Tensor | TokenGate,
    byte_counts: ByteCounts,
    ranks: distributed.Ranks,
    **callbacks: Callable | None,
) -> Score:
    """score_stream with what `method` and the fields of cfg mean: windows, scorer, learner. The model stays as it is.

    Args:
        tokens: the stream. Its gate is strict if the method is causal; or a gate of the caller's.
        callbacks: on_progress, on_nll of score_stream.
    """
    parts = method.split("+")
    if not isinstance(tokens, TokenGate):
        tokens = TokenGate(tokens, ranks.device, strict=standing(cfg, method).causal)
    return score_stream(
        model,
        tokens,
        byte_counts,
        ranks,
        seq_len=cfg.eval_seq_len,
        stride=cfg.eval_seq_len if method == "plain" else cfg.eval_stride,
        batch_windows=cfg.eval_batch_windows,
        rule="exact" if method == "plain" else (method == "slot" and cfg.slot_windows) or cfg.eval_windows,
        slices=cfg.eval_slices,
        interleave=cfg.eval_interleave and "ttt" not in parts,
        scorer=_make_scorer(parts, cfg),
        learner=ScoreFirst(cfg) if "ttt" in parts else None,
        **callbacks,
    )


def _make_scorer(parts: list[str], cfg: Config) -> BatchScorer | None:
    if "ctw" in parts:
        return ContextTree(cfg)
    if "slot" in parts:
        by_gradient = cfg.slot_buckets or cfg.slot_parameters == "temperature"
        return (CacheSlot if cfg.slot_parameters == "cache" else AutogradSlot if by_gradient else Slot)(cfg)
    return None


def _check_methods(methods: str) -> list[str]:
    names = methods.split(",")
    for name in names:
        if name not in METHODS:
            raise InputError(f"eval: method must be one of {', '.join(METHODS)} or stages, got {name!r}")
    return names


def _log_clock(artifact: Path, result: dict, load_seconds: float) -> None:
    """Where the artifact lies in its run directory, its log has the clocks of every stage."""
    if (artifact.parent / run.CONFIG).exists():
        log = run.RunLog(artifact.parent / run.LOG)
        known = {name: result[name] for name in ("method", "val_loss", "val_bpb", "tokens", "seconds", "standing")}
        log.write("eval", **known, load_seconds=round(load_seconds, 3), artifact_sha256=result["artifact_sha256"])
        log.close()


def _share_of(on_progress: Callable[[int, int], None], i: int, n: int) -> Callable[[int, int], None]:
    """Progress of the i-th of n stages as progress of them all."""
    return lambda done, total: on_progress(i * total + done, n * total)


def _record_name(method: str, cfg: Config, causal: bool, limit: int) -> str:
    """The key of a score in scores.json; a variant, partial or leaky one never takes the place of the method's own."""
    parts = method.split("+")
    words = [method]
    words += [cfg.slot_share] if not causal else []
    words += ["temperature"] if "slot" in parts and cfg.slot_parameters == "temperature" else []
    words += ["hashed"] if "slot" in parts and cfg.slot_buckets else []
    words += ["focal"] if "ttt" in parts and cfg.ttt_focal_gamma else []
    name = " ".join(words if causal else ["INVALID", *words])
    return f"{name}, first {limit} tokens" if limit else name


def scoring_settings(cfg: Config, method: str) -> dict:
    """The fields that a score of this method depends on."""
    prefixes = ("eval_", "drop_val_tail", *(f"{part}_" for part in method.split("+") if part in ("slot", "ttt", "ctw")))
    return {name: value for name, value in json.loads(cfg.to_json()).items() if name.startswith(prefixes)}


def main(argv: list[str] | None = None) -> int:
    from .cli import main as cli

    return cli(["eval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
