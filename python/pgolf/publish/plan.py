"""`pgolf plan`: what a run will take before it is started, from published figures or from a few steps on this machine.

Published systems as they are, on eight H100s: their own figures. Anything else on GPUs is scaled from them, by
operations and the chip's peak; each system's step time predicted from the other three is at most a fifth off. With
data, this machine is measured. Bytes of anything unpublished are a guess until there are weights.
"""

import contextlib
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from .. import budget, distributed
from ..artifact.pack import code_bytes, pack_state
from ..config import Config
from ..data.dataset import Dataset
from ..errors import InputError
from ..ledger import differing_fields
from ..presets import FACTS, PRESETS

PEAK_TFLOPS = {  # dense bfloat16, from the makers' data sheets
    "h100": 989,
    "h200": 989,
    "a100": 312,
    "l40s": 362,
    "4090": 165,
    "b200": 2250,
}
PUBLISHED_ON = ("h100", 8)
CHALLENGE_TARGETS = {1024: 62_021_632, 4096: 45_508_608}  # validation tokens by vocabulary, as scored
SLIDING_SHARE = 0.22  # of the peak, in #1128's and #1333's sliding windows
# One forward and backward of score-first TTT in 11 eager layers, whose launches take longer than their arithmetic: what
# #1217, #1128 (SLOT off) and #549 took over their sliding windows, 372, 265 and 323 s for 5,676 steps.
TTT_MICRO_BATCH_S, TTT_LAYERS = 0.057, 11
MEASURES = "--budget` measures it"
BITS_PER_PARAMETER = 4.68  # median of the published int6 artifacts without pruning


def plan(cfg: Config, gpu: str = "h100", gpus: int = 8, budget_s: float | None = None) -> dict:
    """Predict from published figures.

    Returns:
        {"preset", "on", "stages": {name: {"seconds" (None: unknown), "from"}}, "steps", "step_ms", "total_bytes",
        "bytes_from", "memory_bytes" (None: unknown), "over": what exceeds a limit and by how much, as sentences}

    Raises:
        InputError: an unknown GPU.
    """
    if gpu not in PEAK_TFLOPS:
        raise InputError(f"plan: --gpu must be one of {', '.join(PEAK_TFLOPS)}, got {gpu!r}")
    facts = FACTS.get(cfg.preset)
    known = facts and facts.step_ms and not differing_fields(cfg, PRESETS[cfg.preset]) and (gpu, gpus) == PUBLISHED_ON
    how = f"published, #{cfg.preset.removeprefix('pr')}" if known else "scaled from the published systems"
    if known:
        step_seconds = {False: facts.step_ms / 1e3, True: facts.step_ms / 1e3}
    else:
        seconds = predicted_step_ms(cfg, gpu, gpus) / 1e3
        step_seconds = {False: seconds, True: seconds}  # of all steps on average
    training = budget.plan_training(cfg, step_seconds, (facts.calibration_seconds or 0.0) if known else 0.0)
    stages = {"training": {"seconds": training.train_seconds, "from": how}}
    if cfg.uses_gptq:
        seconds = facts.calibration_seconds if known else None
        stages["calibration"] = {"seconds": seconds, "from": how if seconds else f"unknown: `pgolf train {MEASURES}"}
    for method in cfg.eval_stages.split(","):
        seconds = facts.stage_seconds.get(method) if known else None
        stages[method] = {"seconds": seconds, "from": how} if seconds else _scaled_stage(cfg, method, gpu, gpus)
    return _finish(cfg, f"{gpus}x {gpu}", training, stages, budget_s, facts if known else None)


def measure(cfg: Config, data: Path, device: str = "auto", budget_s: float | None = None) -> dict:
    """Predict from a few training steps, calibration batches and scored batches of an untrained model here.

    Returns: as `plan`.
    """
    from ..evaluate import score_method
    from ..scoring.validation import validation_tokens
    from ..trainer import Trainer

    dataset = Dataset.open(data, vocab_size=cfg.vocab_size)
    ranks = distributed.Ranks(0, 1, distributed.start(device).device)
    trainer, how = Trainer(cfg, dataset, ranks), "measured here"
    step_seconds = trainer.warm_up(budget.FEWEST_STEPS)
    calibration_s = budget.measure_calibration(cfg, trainer.model, dataset)
    training = budget.plan_training(cfg, step_seconds, calibration_s)
    stages = {"training": {"seconds": training.train_seconds, "from": how}}
    if cfg.uses_gptq:
        stages["calibration"] = {"seconds": calibration_s, "from": how}
    stages["packing"] = {"seconds": _packing_seconds(cfg, trainer.model), "from": how}
    model, tokens = trainer.model.eval().requires_grad_(False), validation_tokens(cfg, dataset)
    for method in cfg.eval_stages.split(","):
        pace, started = budget.Pace(method, ranks.device), time.perf_counter()
        scoring = cfg.replace(ttt_epochs=0)  # TTT's training lies between chunks, beyond the first batches
        with contextlib.suppress(_EnoughError):
            score_method(method, scoring, model, tokens, dataset.byte_counts, ranks, on_progress=_Stop(pace))
        seconds = pace.predicted_s or time.perf_counter() - started
        if "ttt" in method.split("+"):
            seconds += measure_ttt_training(cfg, model, tokens, ranks)
        stages[method] = {"seconds": seconds, "from": how}
    return _finish(cfg, f"this machine's {ranks.device.type}", training, stages, budget_s, None)


class _EnoughError(Exception):
    """The pace is known."""


class _Stop:
    """A progress callback that ends the loop once `pace` has its prediction."""

    def __init__(self, pace: budget.Pace):
        self.pace = pace

    def __call__(self, done: int, total: int) -> None:
        self.pace(done, total)
        if self.pace.predicted_s:
            raise _EnoughError


def measure_ttt_training(cfg: Config, model, tokens: torch.Tensor, ranks: distributed.Ranks) -> float:
    """Seconds that score-first TTT will train on `tokens` between its chunks, from a few epochs on the first chunk.

    Args:
        tokens: the whole stream, [N + 1] int64 on the CPU. The model stays as it is.
    """
    chunks = math.ceil((len(tokens) - 1) / cfg.ttt_chunk_tokens)
    if chunks < 2:
        return 0.0  # nothing is scored behind the last chunk, so nothing is learnt from it
    from ..scoring.gate import TokenGate
    from ..scoring.ttt import ScoreFirst

    gate = TokenGate(tokens[: cfg.ttt_chunk_tokens + 1], ranks.device, strict=False)  # nothing is scored here
    learner, seconds = ScoreFirst(cfg.replace(ttt_epochs=1)), []
    learner.begin(model)
    for _ in range(budget.FEWEST_STEPS):
        started = time.perf_counter()
        learner.train(0, gate, ranks)  # ends with a loss on the CPU, so its kernels are done
        seconds.append(time.perf_counter() - started)
    return budget.median_after_first(seconds) * cfg.ttt_epochs * (chunks - 1)


def _packing_seconds(cfg: Config, model) -> float:
    """Of the untrained weights, without GPTQ and pruning, whose time depends on what training makes of them."""
    state = {name: tensor.detach().float().cpu() for name, tensor in model.export_state().items()}
    cfg = cfg.replace(attn_gptq=False, mlp_gptq=False, embed_gptq=False, target_bytes=0)
    with tempfile.TemporaryDirectory() as folder:
        report = pack_state(cfg, state, "0" * 64, Path(folder) / "artifact", allow_oversize=True)
    return sum(report.seconds.values())


def _finish(cfg: Config, on: str, training: budget.TrainingPlan, stages: dict, budget_s: float | None, facts) -> dict:
    from ..model import GPT

    packed = int(GPT.count_parameters(cfg) * BITS_PER_PARAMETER / 8)
    total = facts.artifact_bytes if facts else packed + code_bytes(cfg)
    result = {
        "preset": cfg.preset,
        "on": on,
        "stages": {name: {**s, "seconds": s["seconds"] and round(s["seconds"], 2)} for name, s in stages.items()},
        "steps": training.steps,
        "step_ms": round(training.step_ms, 2),
        "total_bytes": total,
        "bytes_from": "published" if facts else f"a guess: {BITS_PER_PARAMETER} bits per parameter, and the bundle",
        "memory_bytes": facts.peak_mib and facts.peak_mib * 2**20 if facts else None,
    }
    return result | {"over": _excess(cfg, result, budget_s)}


def _excess(cfg: Config, result: dict, budget_s: float | None) -> list[str]:
    """What does not fit."""
    found, known = [], {name: s["seconds"] or 0.0 for name, s in result["stages"].items()}
    if budget_s is not None:
        clocks = {"training and calibration": known["training"] + known.get("calibration", 0.0)}
        clocks["scoring"] = sum(known.get(method, 0.0) for method in cfg.eval_stages.split(","))
        for name, seconds in clocks.items():
            if seconds > budget_s:
                found.append(f"{name}: {seconds:.1f} s of {budget_s:g} s, {seconds - budget_s:.1f} s too long")
    return found


def forward_flops(cfg: Config, seq_len: int, recurrent: bool) -> float:
    """Operations of one forward per token: matrices, head and attention."""
    kv = cfg.num_kv_heads * cfg.head_dim
    layer = 2 * cfg.model_dim * (cfg.model_dim + kv + cfg.mlp_dim)
    attention = cfg.model_dim * seq_len  # half of seq_len keys, twice: products and sums
    layers = cfg.num_layers + (len(cfg.recur_layers) if recurrent else 0)
    return 2 * (layers * (layer + attention) + cfg.model_dim * cfg.vocab_size)


def step_flops(cfg: Config, steps: float) -> float:
    """Operations of a training step, on average over a run of so many steps; a backward is two forwards."""
    share = min(cfg.recur_start_step / steps, 1.0) if cfg.recur_layers else 1.0
    plain, recurrent = (forward_flops(cfg, cfg.train_seq_len, r) for r in (False, True))
    return 3 * cfg.train_batch_tokens * (share * plain + (1 - share) * recurrent)


def published_shares(without: str = "") -> dict[str, float]:
    """Share of the peak that each published system's training reaches, from its step time."""
    shares = {}
    for name, facts in FACTS.items():
        if facts.step_ms and name != without:
            cfg = PRESETS[name]
            steps = 1e3 * cfg.train_seconds / facts.step_ms
            gpu, gpus = PUBLISHED_ON
            shares[name] = step_flops(cfg, steps) / (facts.step_ms / 1e3) / (gpus * PEAK_TFLOPS[gpu] * 1e12)
    return shares


def predicted_step_ms(cfg: Config, gpu: str, gpus: int, without: str = "") -> float:
    """Scaled from the published systems, `without` one of them; recurrence at its share of the steps."""
    rate = statistics.median(published_shares(without).values()) * gpus * PEAK_TFLOPS[gpu] * 1e12
    steps = cfg.max_steps
    for _ in range(10):  # how long a step takes decides how many there are, and that the share of recurrent ones
        seconds = step_flops(cfg, steps) / rate
        steps = min(cfg.max_steps, cfg.train_seconds / seconds) if cfg.train_seconds else cfg.max_steps
    return 1e3 * seconds


def _num_targets(cfg: Config) -> float:
    """Of the challenge's validation text, by the size of the vocabulary."""
    return np.interp(math.log(cfg.vocab_size), [math.log(v) for v in CHALLENGE_TARGETS], [*CHALLENGE_TARGETS.values()])


def sliding_seconds(cfg: Config, gpu: str, gpus: int) -> float:
    """Sliding windows over the challenge's validation text."""
    forwards = _num_targets(cfg) / cfg.eval_stride * cfg.eval_seq_len
    flops = forwards * forward_flops(cfg, cfg.eval_seq_len, bool(cfg.recur_layers))
    return flops / (SLIDING_SHARE * gpus * PEAK_TFLOPS[gpu] * 1e12)


def ttt_training_seconds(cfg: Config, gpu: str, gpus: int) -> float:
    """Score-first TTT's training between the chunks of that text: a forward and backward per slice and step."""
    chunks = math.ceil(_num_targets(cfg) / cfg.ttt_chunk_tokens)
    per_slice = math.ceil(cfg.ttt_chunk_tokens // cfg.eval_seq_len / cfg.eval_slices)  # sequences
    steps = (chunks - 1) * cfg.ttt_epochs * math.ceil(per_slice / cfg.ttt_batch_seqs)
    recurrent = bool(cfg.recur_layers)
    tokens = min(per_slice, cfg.ttt_batch_seqs) * cfg.eval_seq_len
    flops = 3 * tokens * forward_flops(cfg, cfg.eval_seq_len, recurrent)
    computing = flops / (statistics.median(published_shares().values()) * PEAK_TFLOPS[gpu] * 1e12)
    launching = TTT_MICRO_BATCH_S * (cfg.num_layers + len(cfg.recur_layers)) / TTT_LAYERS
    return steps * math.ceil(cfg.eval_slices / gpus) * max(computing, launching)


def _scaled_stage(cfg: Config, method: str, gpu: str, gpus: int) -> dict:
    """A stage of which nothing is published as it is; what a fit or a context tree adds is not known."""
    parts = method.split("+")
    if method == "plain":
        return {"seconds": None, "from": f"unknown: `pgolf eval {MEASURES}"}
    seconds = sliding_seconds(cfg, gpu, gpus)
    seconds += ttt_training_seconds(cfg, gpu, gpus) if "ttt" in parts else 0.0
    extra = {"slot": "SLOT", "ctw": "the context tree"}.get(parts[0])
    scaled = "scaled from the published systems"
    at_least = f"at least, for {extra} is not in it: {scaled}; `pgolf eval {MEASURES}"
    return {"seconds": seconds, "from": at_least if extra else scaled}


def lines(result: dict) -> list[str]:
    """The plan for people."""
    found = [f"{result['preset']} on {result['on']}: {result['steps']:,} steps of {result['step_ms']:.1f} ms"]
    for name, stage in result["stages"].items():
        seconds = "?" if stage["seconds"] is None else f"{stage['seconds']:.1f} s"
        found.append(f"{name:12} {seconds:>10}  {stage['from']}")
    found.append(f"{'bytes':12} {result['total_bytes']:>10,}  {result['bytes_from']}")
    if result["memory_bytes"]:
        found.append(f"{'memory':12} {result['memory_bytes'] / 2**30:>6.1f} GiB  published peak per GPU")
    return found
