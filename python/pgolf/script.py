"""python/train_gpt.py: train, pack and score in one command, configured by environment variables as the originals are.

Every stage is the function behind `pgolf train`, `pack` and `eval`; only the lines on stdout are written here, in the
form of the originals' logs, so that what reads those reads these. The run lies in runs/RUN_ID. `--eval ARTIFACT`
scores a file instead. A program made by `pgolf bundle` is this one with its run's config in place of the presets.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import run
from .commands import add_average, add_settings, is_main_rank
from .config import Config
from .environment import Request, read_environment
from .errors import FailedElsewhereError, InputError
from .parts import MODULES, needed_parts, refuse_missing
from .progress import meter

DEFAULT_PRESET = "pr1217"
# The originals' names of the scores.
LABELS = {
    "plain": "final_int6_roundtrip",
    "sliding": "final_int6_sliding_window",
    "slot": "final_int6_slot",
    "ttt": "legal_ttt",
    "slot+ttt": "legal_ttt_slot",
    "ctw": "final_int6_ctw",
}


def main(argv: list[str] | None = None, config: Config | None = None, parts: set[str] = frozenset(MODULES)) -> int:
    """Run the command line.

    Args:
        config: what the environment changes; None: the preset's that --preset names.
        parts: of parts.py, those that this program has.

    Returns:
        The exit code.
    """
    args = _parser(choose_preset=config is None).parse_args(argv)
    try:
        if args.eval:
            score_artifact(args, parts)
        elif options := [name for name in SCORING_OPTIONS if getattr(args, name)]:
            raise InputError(f"--{options[0].replace('_', '-')} belongs to --eval ARTIFACT; a run takes variables")
        else:
            settings = [*args.set, *([f"average={args.average}"] if args.average else [])]
            request = read_environment(os.environ, config or args.preset, settings)
            refuse_missing(needed_parts(request.config), parts)
            run_stages(request, args.device)
    except FailedElsewhereError:
        return 2
    except InputError as error:
        sys.stderr.write(f"train_gpt: {error}\n")
        return 2
    return 0


SCORING_OPTIONS = ("data", "tokenizer", "method", "tokens", "allow_leaky")


def _parser(choose_preset: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", description="Train, pack and score; the settings are environment variables (SEED=42 ...)."
    )
    if choose_preset:
        from .presets import PRESETS

        known = f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})"
        parser.add_argument("--preset", default=DEFAULT_PRESET, metavar="NAME", help=known)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    add_average(parser)
    add_settings(parser)
    scoring = parser.add_argument_group("scoring an artifact instead")
    scoring.add_argument(
        "--eval", type=Path, metavar="ARTIFACT", help="the file; scores.json beside it keeps the score"
    )
    scoring.add_argument("--data", type=Path, metavar="DIR", help="whose validation text to score")
    scoring.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: where the data's layout has it")
    scoring.add_argument("--method", metavar="M", help="as in `pgolf eval` (default: sliding)")
    scoring.add_argument("--tokens", type=int, default=0, metavar="N", help="score only the first N tokens")
    scoring.add_argument("--allow-leaky", action="store_true", help="run a method that is not causal; marks it INVALID")
    return parser


def score_artifact(args: argparse.Namespace, parts: set[str]) -> dict:
    """What `pgolf eval` does, with the options of `--eval`; prints the originals' lines."""
    from .evaluate import check_request, evaluate

    if not args.data:
        raise InputError("--eval needs --data DIR, the dataset whose validation text is scored")
    method = args.method or "sliding"
    request = check_request(args.eval, method, args.set, args.allow_leaky)
    refuse_missing(needed_parts(request.cfg.replace(eval_stages=",".join(request.methods))), parts)
    with meter(f"scoring ({method})", enabled=is_main_rank()) as on_progress:
        result = evaluate(
            args.eval,
            args.data,
            method,
            settings=args.set,
            limit=args.tokens,
            allow_leaky=args.allow_leaky,
            device=args.device,
            tokenizer=args.tokenizer,
            on_progress=on_progress,
        )
    for score in result.get("stages", [result]):
        for line in score_lines(request.cfg, score["method"], score):
            _say(line)
    return result


def run_stages(request: Request, device: str = "auto", root: Path = Path("runs")) -> Path:
    """Train, pack and score as `request` says. Every rank calls this; rank 0 packs and prints.

    Returns:
        The run directory: root / RUN_ID, or a name that is free.
    """
    from .artifact.pack import LIMIT_BYTES, pack_run
    from .evaluate import evaluate
    from .train import train

    cfg = request.config
    run_dir = root / request.run_id if request.run_id else free_directory(root, cfg)
    for note in request.notes:
        _say(note)
    _say(f"run:{run_dir} preset:{cfg.preset} seed:{cfg.seed}")
    train(cfg, request.data, run_dir, device=device, tokenizer=request.tokenizer, on_event=log_lines(cfg))
    artifact = run_dir / run.ARTIFACT
    if is_main_rank():
        # What was trained for ten minutes is never lost to its size: the line below says if it is too large.
        report = pack_run(run_dir, artifact, allow_oversize=True)
        _say(f"Serialized model int6+{cfg.compressor}: {report.artifact_bytes} bytes")
        verdict = "" if report.headroom_bytes >= 0 else f" (over the limit of {LIMIT_BYTES} bytes)"
        _say(f"Total submission size int6+{cfg.compressor}: {report.total_bytes} bytes{verdict}")
    for method in cfg.eval_stages.split(","):  # joining the job again, the others wait here for rank 0's file
        with meter(f"scoring ({method})", enabled=is_main_rank()) as on_progress:
            result = evaluate(
                artifact,
                request.data,
                method,
                allow_leaky=True,  # these commands ask for what was published; the lines below say what is INVALID
                device=device,
                tokenizer=request.tokenizer,
                on_progress=on_progress,
            )
        for line in score_lines(cfg, method, result):
            _say(line)
    return run_dir


def free_directory(root: Path, cfg: Config) -> Path:
    """root/PRESET_seedN, or the first of root/PRESET_seedN_2, _3, ... that holds no run.

    All ranks find the same one: the directory is made only once every rank has got as far as training.
    """
    name, number = f"{cfg.preset}_seed{cfg.seed}", 1
    while (root / (name if number == 1 else f"{name}_{number}") / run.CONFIG).exists():
        number += 1
    return root / (name if number == 1 else f"{name}_{number}")


def log_lines(cfg: Config, say: Callable[[str], object] | None = None) -> Callable[[str, dict], None]:
    """Says a run's events as the originals do: milliseconds, colons, four digits. say: None prints."""
    say = say or _say

    def line(event: str, values: dict) -> None:
        if event == "start":
            say(f"model_params:{values['parameters']} world_size:{values['world_size']} dtype:{values['dtype']}")
        elif event in ("step", "validate", "end"):
            step, ms = values["step"], 1e3 * values.get("elapsed_s", values.get("train_seconds", 0.0))
            clock = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
            if event == "step":
                say(f"step:{step}/{cfg.max_steps} train_loss:{values['loss']:.4f} {clock}")
                return
            if event == "end" and step < cfg.max_steps:
                say(f"stopping_early: wallclock_cap train_time:{ms:.0f}ms step:{step}/{cfg.max_steps}")
            averaged = event == "end" and cfg.averages
            which = f"DIAGNOSTIC post_{cfg.average}" if averaged else f"step:{step}/{cfg.max_steps}"
            say(f"{which} val_loss:{values['val_loss']:.4f} val_bpb:{values['val_bpb']:.4f} {clock}")

    return line


def score_lines(cfg: Config, method: str, result: dict) -> list[str]:
    """A score rounded, with its time, and again with eight digits."""
    label, ms = LABELS[method], 1e3 * result["seconds"]
    detail = "" if method == "plain" else f" stride:{cfg.eval_stride}"
    if "slot" in method:
        fitted = cfg.slot_parameters != "cache"
        detail += f" steps:{cfg.slot_steps} lr:{cfg.slot_lr:g}" if fitted else f" cache:{cfg.slot_cache_sharpness:g}"
    invalid = "" if result["causal"] else f" {result['standing']}"
    values = f"val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f}"
    exactly = f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}"
    return [
        f"{label} {values}{detail} causal:{str(result['causal']).lower()} eval_time:{ms:.0f}ms{invalid}",
        f"{label}_exact {exactly}{invalid}",
    ]


def _say(text: str) -> None:
    if is_main_rank():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
