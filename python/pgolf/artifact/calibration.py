"""Hessians for GPTQ: H = sum over tokens of x x^T / number of batches, x being what a matrix is multiplied by.

The model runs as it is, with stand-ins for its matrices: PyTorch hands F.linear to them, and they add x x^T to a sum in
float64 before they multiply. So queries, keys and values share one H, a layer that recurrence runs twice counts twice,
and nothing is kept of an input but its K x K sum. The surprise is the divisor: batches, not tokens, as published; only
the ratio of entries matters to GPTQ, for its damping is relative.

RUN/hessians.safetensors keeps the distinct sums in float32 (138 MB for 27 million parameters, of which 104 are the
11 inputs of 1536), so that a run is packed again, with other bits or clips, without its data. Recomputing them would
need the data and a forward over six million tokens; halves of the matrices would save disk only.
Sources: openai/parameter-golf #1217 (training batches), #1019 (generated sequences).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import run
from ..config import Config
from ..data.dataset import Dataset
from ..data.loader import make_loader
from ..errors import InputError
from ..generate import generate, inference_copy
from ..model import BANKS, GPT, activation_dtype
from .quantise import EMBEDDING, wanted_hessians

HESSIANS = "hessians.safetensors"
GENERATED_AT_ONCE, TEMPERATURE = 8, 0.8


class _Observed:
    """Stands for a matrix [N, K] in F.linear, and adds x^T x of every input to `total`, float64 [K, K]."""

    def __init__(self, weight: Tensor, total: Tensor) -> None:
        self.weight, self.total = weight, total

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear or len(args) != 2 or kwargs:
            raise TypeError(f"an observed matrix is only known to F.linear(x, w), not to {func}")
        x, observed = args
        observed.add(x)
        return F.linear(x, observed.weight)

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.total += x.T @ x


@torch.no_grad()
def collect_hessians(
    model: GPT, batches: Iterable[Tensor], wanted: dict[str, int], on_batch: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """Run a model over batches and sum up what its matrices are multiplied by.

    Args:
        model: anywhere; unchanged. Recurrence is as it stands.
        batches: int64 [B, T] each, cut into forwards of cfg.micro_batch_tokens.
        wanted: of `wanted_hessians`.
        on_batch: called with the number of batches done.

    Returns:
        float32 [K, K] on the CPU by name: the sums, divided by the number of batches.

    Raises:
        InputError: there is no batch, or the model makes values that are not finite.
    """
    model = inference_copy(model)
    device = model.tok_emb.weight.device
    totals = {n: torch.zeros(width, width, dtype=torch.float64, device=device) for n, width in wanted.items()}
    matrices = model.matrices()
    observed = {
        kind: [
            _Observed(w, totals[name]) if (name := f"blocks.{layer}.{kind}.weight") in totals else w
            for layer, w in enumerate(matrices[kind])
        ]
        for kinds in BANKS.values()
        for kind in kinds
    }
    model.matrices = lambda: observed
    head = _Observed(model.head_weight(), totals[EMBEDDING]) if EMBEDDING in totals else None
    count = 0
    for ids in batches:
        size = max(model.cfg.micro_batch_tokens // ids.shape[1], 1)
        for part in ids.split(size):
            hidden = model.hidden(part.to(device))
            if head:
                head.add(hidden)
        count += 1
        if on_batch:
            on_batch(count)
    if not count:
        raise InputError("calibration: at least one batch is needed, got none")
    hessians = {name: (total / count).float().cpu() for name, total in totals.items()}
    for name, h in hessians.items():
        if not h.isfinite().all():
            raise InputError(f"calibration: the input of {name} must be finite, got NaN or infinity; training diverged")
    return hessians


def training_batches(config: Config, dataset: Dataset) -> Iterator[Tensor]:
    """The first batches of a fresh loader, int64 [B, T]: of each what rank 0 would get of calibration_batch_tokens.

    The published systems calibrate each of eight ranks on its own share and use rank 0's file, so the share does not
    depend on how many ranks there are here.
    """
    windows = config.train_batch_tokens // config.train_seq_len
    share = max(min(config.calibration_batch_tokens // config.train_seq_len, windows), 1)
    ranks = next(n for n in range(windows // share, 0, -1) if windows % n == 0)
    loader = make_loader(config.loader, dataset.train_shards, config.train_seq_len, config.train_batch_tokens, 0, ranks)
    for _ in range(config.calibration_batches):
        yield loader.next_batch()[0]


def generated_batches(config: Config, model: GPT) -> Iterator[Tensor]:
    """Sequences that the model writes, int64 [1, train_seq_len] each, the first token of each uniform."""
    generator = torch.Generator().manual_seed(config.seed)
    first = torch.randint(config.vocab_size, (config.calibration_batches, 1), generator=generator)
    for tokens in first.to(model.tok_emb.weight.device).split(GENERATED_AT_ONCE):
        seed = int(torch.randint(2**62, (), generator=generator))
        ids = generate(model, tokens, config.train_seq_len - 1, temperature=TEMPERATURE, seed=seed)
        yield from ids.split(1)


def calibrate(
    config: Config, model: GPT, dataset: Dataset | None, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """The Hessians that config's GPTQ needs of a model, from where config.calibration says.

    Raises:
        InputError: config calibrates on training data and dataset is None, or as `collect_hessians`.
    """
    wanted = wanted_hessians(config, {name: tuple(t.shape) for name, t in model.export_state().items()})
    if config.calibration == "generated":
        batches = generated_batches(config, model)
    elif dataset is None:
        raise InputError("calibration: training data is needed, got none; name it with --data")
    else:
        batches = training_batches(config, dataset)
    report = (lambda done: on_progress(done, config.calibration_batches)) if on_progress else None
    return collect_hessians(model, batches, wanted, report)


def save_hessians(run_dir: Path, config: Config, model_sha256: str, hessians: dict[str, Tensor]) -> None:
    """Write RUN/hessians.safetensors. model_sha256: of RUN/model.safetensors, whose inputs they are."""
    content = safetensors.torch.save(hessians, {"made_from": _made_from(config, model_sha256)})
    run.write_atomically(run_dir / HESSIANS, content)


def load_hessians(run_dir: Path, config: Config, model_sha256: str, wanted: dict[str, int]) -> dict[str, Tensor] | None:
    """What `save_hessians` wrote; None if there is nothing for this model, this calibration and all that is wanted.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / HESSIANS
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = set(file.keys())
            if (file.metadata() or {}).get("made_from") != _made_from(config, model_sha256) or not names >= set(wanted):
                return None
            return {name: file.get_tensor(name) for name in wanted}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); delete it and calibrate again") from error


def hessians_of_run(
    run_dir: Path,
    config: Config,
    state: dict[str, Tensor],
    wanted: dict[str, int],
    data: Path | None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """What the run kept, or if that does not serve config, made now and kept: of `data`, or generated.

    Args:
        state: of RUN/model.safetensors. data, device: see `pack_run`.
    """
    model_sha256 = hashlib.sha256((run_dir / run.MODEL).read_bytes()).hexdigest()
    hessians = load_hessians(run_dir, config, model_sha256, wanted)
    if hessians is not None:
        return hessians
    if config.calibration == "train" and data is None:
        raise InputError(
            f"{run_dir}: GPTQ needs Hessians, but {HESSIANS} has none of these weights and this calibration; "
            "name the run's dataset with --data, or use --set calibration=generated"
        )
    place = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(config)
    try:
        model.load_export(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{run_dir}: {run.MODEL} does not fit {run.CONFIG} ({error})") from error
    model = model.to(place).eval().requires_grad_(False)
    model.activation_dtype = activation_dtype(config, torch.device(place))
    model.recurrence_active = config.recurs_after(run.trained_steps(run_dir))
    dataset = None if data is None else Dataset.open(data, vocab_size=config.vocab_size)
    hessians = calibrate(config, model, dataset, on_progress)
    save_hessians(run_dir, config, model_sha256, hessians)
    return hessians


def _made_from(config: Config, model_sha256: str) -> str:
    fields = ("calibration", "calibration_batches", "seed", "train_seq_len", "dtype")
    fields += ("calibration_batch_tokens", "train_batch_tokens", "loader") * (config.calibration == "train")
    values = dataclasses.asdict(config)
    return json.dumps({"model_sha256": model_sha256, **{name: values[name] for name in fields}})
