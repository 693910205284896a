"""Make an artifact fit a number of bytes by its clips: every scale is k standard deviations / the largest code.

    bits per code = entropy of round(w / (k std) x largest code), about b - log2 k + const

One multiplier of all k is solved for. The predictor keeps a histogram of |w| / (standard deviation of its row) for each
kind of tensor, so another k costs no pass over the weights. The surprise is what one real compression corrects: the
coder knows more than the histogram (levels of rows and columns, planes.py), but what it gains is nearly the same number
of bits at every k, so the difference is added, not multiplied. GPTQ moves weights before it rounds them, the further
the coarser its step, so the histogram is smoothed by as much. Source: openai/parameter-golf #1394 ("SDClip").
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import run
from ..config import Config
from ..config_rules import CLIPS
from ..errors import InputError
from . import gptq
from .pack import PackReport, code_bytes, load_run, log_packing, pack_state
from .quantise import Rounding, hessian_name, tensor_kind

CODED_KINDS = ("attn", "mlp", "embed")
CLIP_OF_KIND = {"attn": "int6_clip", "mlp": "mlp_clip", "embed": "embed_clip"}
USUAL_CLIP = {"attn": 12.85, "mlp": 12.85, "embed": 20.0}  # in standard deviations, of #1394
MIN_CLIP = 4.0  # standard deviations: below, more is lost to clipping than a finer step wins
MAX_STEP = 2.0  # standard deviations between two codes: above, hardly a weight is left
BINS, BIN_WIDTH = 16384, 1 / 256  # of the histograms, in standard deviations; the last takes what is beyond
MAX_TRIES = 4
CLOSE_ENOUGH = 5e-4  # of the target: a search ends this near below it, and aims at half of that


@dataclass(frozen=True)
class Fit:
    """clips: by field of Config; sizes in bytes, with the code; tries: (multiplier, predicted, actual)."""

    report: PackReport
    target_bytes: int
    multiplier: float
    clips: dict[str, str]
    predicted_bytes: int
    tries: list[tuple[float, int, int]]

    @property
    def error(self) -> float:
        """Of the prediction, relative to what came out."""
        return self.predicted_bytes / self.report.total_bytes - 1

    def as_dict(self) -> dict:
        """All of it as JSON values."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "report"}
        return {**own, "error": self.error, **self.report.as_dict()}


class Predictor:
    """Bytes of the codes of a state dict by the clip of each kind, from statistics of its rows.

    hessians: of `pack_state`. other_bytes: of the program, the scales and the float16 tensors, as they are before
    compression.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, Tensor],
        hessians: Mapping[str, Tensor] | None = None,
        program_bytes: int = 0,
    ) -> None:
        self.counts = {kind: torch.zeros(BINS, dtype=torch.float64) for kind in CODED_KINDS}
        self.feedback = dict.fromkeys(CODED_KINDS, 0.0)  # sums over weights of variance / step^2, see gptq
        variance = _feedback_by_hessian(config, hessians or {})
        self.code_max = {kind: Rounding.of(config, kind).code_max for kind in CODED_KINDS}
        self.other_bytes = program_bytes
        for name, tensor in state.items():
            shape = tuple(tensor.shape)
            kind = tensor_kind(config, name, shape)
            if kind == "float16":
                self.other_bytes += 2 * tensor.numel()
                continue
            w = tensor.detach().float().cpu().reshape(shape[0], -1)
            self.other_bytes += 2 * len(w)
            ratio = w.abs() / w.std(1, keepdim=True, correction=min(1, w.shape[1] - 1)).clamp_min(1e-30)
            bins = (ratio / BIN_WIDTH).long().clamp(max=BINS - 1)
            self.counts[kind] += torch.bincount(bins.flatten(), minlength=BINS).double()
            self.feedback[kind] += w.numel() * variance.get(hessian_name(config, name, shape), 0.0)

    def code_bytes(self, clips: Mapping[str, float]) -> float:
        """Entropy of all codes in bytes. clips: in standard deviations by kind."""
        return sum(self._bits(kind, clips[kind]) for kind in CODED_KINDS if self.counts[kind].sum()) / 8

    def _bits(self, kind: str, clip: float) -> float:
        """Codes are symmetric about 0: the entropy of their size, and a sign for those that are not 0."""
        largest, total = self.code_max[kind], self.counts[kind].sum()
        edges = (torch.arange(largest, dtype=torch.float64) + 0.5) * clip / largest
        sizes = torch.diff(torch.cat([torch.zeros(1), self._within(kind, edges, clip / largest), total[None]]))
        share = sizes[sizes > 0] / total
        return float(total * -(share * share.log2()).sum() + total - sizes[0])

    def _within(self, kind: str, edges: Tensor, step: float) -> Tensor:
        """How many weights are within each edge of 0 when they are rounded; all in standard deviations."""
        counts = self.counts[kind]
        if self.feedback[kind]:
            spread = step * math.sqrt(2 * self.feedback[kind] / float(counts.sum()))
            used = counts.nonzero().flatten()
            middles = (used + 0.5) * BIN_WIDTH
            near, far = ((edges[:, None] + sign * middles) / spread for sign in (-1, 1))
            return (torch.erf(near) + torch.erf(far)) @ counts[used] / 2
        cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0)])
        edges = (edges / BIN_WIDTH).clamp(max=BINS)
        below = edges.floor().long().clamp(max=BINS - 1)
        return cumulated[below] + (edges - below) * (cumulated[below + 1] - cumulated[below])


def _feedback_by_hessian(config: Config, hessians: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over columns of `gptq.feedback_variance`; 0 where GPTQ has no factor and rounds to the nearest code."""
    damping = gptq.Damping(config.gptq_damping, config.gptq_damping_times)
    factors = {name: gptq.factorise(h, damping) for name, h in hessians.items()}
    return {name: float(gptq.feedback_variance(f).mean()) if f else 0.0 for name, f in factors.items()}


def fit_run(
    run_dir: Path,
    target_bytes: int,
    out: Path,
    settings: list[str] = (),
    data: Path | None = None,
    device: str = "auto",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Fit:
    """Pack a run with the finest clips that artifact and code have room for.

    Args:
        target_bytes: of both together, as `pack.code_bytes` counts the code.
        out: the artifact; written only if it fits.
        settings, data, device, on_progress: of `pack_run`.

    Raises:
        InputError: the target is out of reach, or as `pack_run`.
    """
    loaded = load_run(run_dir, settings, data, device, on_progress)
    config = loaded.config.replace(target_bytes=0)
    candidate = Path(out).with_name(Path(out).name + ".candidate")

    def measure(clips: dict[str, str]) -> PackReport:
        how = config.replace(**clips)
        rest = (loaded.extra, loaded.hessians, on_progress)
        return pack_state(how, loaded.state, loaded.tokenizer, candidate, True, *rest)

    try:
        predictor = Predictor(config, loaded.state, loaded.hessians, code_bytes(config, loaded.extra))
        fit, content = solve(predictor, base_clips(config), target_bytes, measure, candidate.read_bytes)
    finally:
        candidate.unlink(missing_ok=True)
    run.write_atomically(Path(out), content)
    seconds = {**loaded.seconds, **fit.report.seconds}
    fit = dataclasses.replace(fit, report=dataclasses.replace(fit.report, path=Path(out), seconds=seconds))
    log_packing(run_dir, fit.report, [*settings, *(f"{field}={clip}" for field, clip in fit.clips.items())])
    return fit


def base_clips(config: Config) -> dict[str, float]:
    """The clips by kind to begin with: the config's where they are numbers, else the usual ones."""
    texts = {kind: getattr(config, field) for kind, field in CLIP_OF_KIND.items()}
    texts["mlp"] = texts["mlp"] or texts["attn"]
    return {kind: USUAL_CLIP[kind] if text in CLIPS else float(text) for kind, text in texts.items()}


def solve(
    predictor: Predictor,
    base: Mapping[str, float],
    target_bytes: int,
    measure: Callable[[dict[str, str]], PackReport],
    content: Callable[[], bytes],
) -> tuple[Fit, bytes]:
    """The multiplier of the clips `base` that fits, measured at most MAX_TRIES times, and the file made with it.

    Raises:
        InputError: the target is out of reach.
    """
    low = max(MIN_CLIP / clip for clip in base.values())
    high = max(low, min(MAX_STEP * predictor.code_max[kind] / clip for kind, clip in base.items()))
    known: list[tuple[float, int, int]] = []
    best: tuple[Fit, bytes] | None = None

    def predict(multiplier: float) -> float:
        """From the measured size that is nearest; before there is one, without what compression adds and saves."""
        size = predictor.code_bytes({kind: multiplier * clip for kind, clip in base.items()})
        if not known:
            return size + predictor.other_bytes
        at, _, actual = min(known, key=lambda one: abs(math.log(one[0] / multiplier)))
        return actual + size - predictor.code_bytes({kind: at * clip for kind, clip in base.items()})

    multiplier = bisect(predict, target_bytes, low, high)
    while len(known) < MAX_TRIES:
        clips = {CLIP_OF_KIND[kind]: f"{multiplier * clip:.6g}" for kind, clip in base.items()}
        predicted = round(predict(multiplier))
        report = measure(clips)
        known.append((multiplier, predicted, report.total_bytes))
        left = target_bytes - report.total_bytes
        if left >= 0 and (best is None or report.total_bytes > best[0].report.total_bytes):
            best = Fit(report, target_bytes, multiplier, clips, predicted, known), content()
        if left < 0 and multiplier == high:
            raise InputError(
                f"fit: the target must be at least {report.total_bytes:,} bytes, what artifact and code take with "
                f"steps of {MAX_STEP:g} standard deviations, got {target_bytes:,}; use fewer bits (attn_bits, "
                "mlp_bits, embed_bits) or a smaller model"
            )
        if 0 <= left <= CLOSE_ENOUGH * target_bytes or (left >= 0 and multiplier == low):
            break
        multiplier = bisect(predict, target_bytes * (1 - CLOSE_ENOUGH / 2), low, high)
    if best is None:
        raise InputError(
            f"fit: {MAX_TRIES} tries must reach {target_bytes:,} bytes, got {min(size for _, _, size in known):,} at "
            "least; raise the target by the difference"
        )
    return best


def bisect(predict: Callable[[float], float], target_bytes: float, low: float, high: float) -> float:
    """The smallest multiplier in low..high whose predicted size is at most the target; high if there is none."""
    if predict(low) <= target_bytes:
        return low
    if predict(high) > target_bytes:
        return high
    bottom, top = low, high
    for _ in range(50):
        middle = math.sqrt(bottom * top)
        bottom, top = (bottom, middle) if predict(middle) <= target_bytes else (middle, top)
    return top
