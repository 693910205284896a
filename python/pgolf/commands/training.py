"""Shards to weights: `pgolf train`, `plan` before it, and `demo`, which goes all the way."""

from argparse import Namespace
from pathlib import Path

from ..errors import InputError
from . import add_average, add_command, add_data, add_device, add_settings, say


def register(steps) -> None:
    p = add_command(steps, "train", train, "train a model into a run directory")
    p.add_argument("--preset", metavar="NAME", help="whose values to start from (default: demo); see `pgolf presets`")
    add_data(p)
    # torchrun reads `--run` as an abbreviation of an option of its own, hence the second name.
    p.add_argument(
        "--run", "--run-dir", dest="run_dir", required=True, type=Path, metavar="DIR", help="the run directory"
    )
    p.add_argument("--steps", type=int, metavar="N", help="train N steps, whatever the time they take")
    p.add_argument("--seconds", type=float, metavar="S", help="train S seconds")
    p.add_argument(
        "--budget", type=float, metavar="S", help="refuse, after the warm-up, if training and calibration take longer"
    )
    add_average(p)
    add_settings(p)
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    add_device(p)

    add_command(steps, "presets", presets, "list the named runs")
    p = add_command(steps, "plan", plan, "predict a run's steps, seconds and bytes; exit code 2 if a limit is exceeded")
    p.add_argument("--preset", default="demo", metavar="NAME", help="whose values to start from (default: demo)")
    p.add_argument("--data", type=Path, metavar="DIR", help="measure a few steps and batches of it on this machine")
    p.add_argument(
        "--gpu", default="h100", metavar="KIND", help="without --data: h100, h200, a100, ... (default: h100)"
    )
    p.add_argument("--gpus", type=int, default=8, metavar="N", help="without --data: how many (default: 8)")
    p.add_argument("--budget", type=float, metavar="S", help="seconds for training, and again for scoring")
    add_settings(p)
    add_device(p)
    p = add_command(steps, "demo", demo, "all of it: data, training, packing, scoring and a report")
    p.add_argument("--run", dest="run_dir", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--data", type=Path, default=Path("data/stdlib"), metavar="DIR", help="made if it is not there")
    p.add_argument("--preset", default="demo", metavar="NAME")
    add_settings(p)
    add_device(p)


def train(args: Namespace) -> dict:
    from .. import run
    from ..presets import preset
    from ..train import train as run_training

    if args.resume:
        cfg = run.read_config(args.run_dir)
        if args.preset or args.steps or args.seconds or args.average or args.set:
            raise InputError(
                "train: --resume continues the run as it was configured; "
                "drop --preset, --steps, --seconds, --average and --set"
            )
    else:
        cfg = preset(args.preset or "demo").with_settings(args.set)
        if args.steps is not None:
            cfg = cfg.replace(max_steps=args.steps, max_seconds=0.0)
        if args.seconds is not None:
            cfg = cfg.replace(max_seconds=args.seconds)
        if args.average is not None:
            cfg = cfg.replace(average=args.average)
    result = run_training(
        cfg,
        args.data,
        args.run_dir,
        resume=args.resume,
        device=args.device,
        tokenizer=args.tokenizer,
        budget_s=args.budget,
    )
    say(
        args,
        f"{result['step']} steps in {result['train_seconds']:.1f} s ({result['tokens_per_second']:,} tokens/s); "
        f"val_loss {result['val_loss']:.4f}  val_bpb {result['val_bpb']:.4f}",
    )
    return result


def presets(args: Namespace) -> list[dict]:
    from rich.console import Console

    from ..presets import describe, table

    rows = describe()
    if not args.json:
        Console().print(table(rows))
    return rows


def plan(args: Namespace) -> dict:
    from ..presets import preset
    from ..publish import plan as planning

    cfg = preset(args.preset).with_settings(args.set)
    if args.data:
        result = planning.measure(cfg, args.data, args.device, args.budget)
    else:
        result = planning.plan(cfg, args.gpu, args.gpus, args.budget)
    say(args, "\n".join(planning.lines(result)))
    if result["over"]:
        raise InputError(f"plan: does not fit: {'; '.join(result['over'])}")
    return result


def demo(args: Namespace) -> dict:
    from ..demo import run_demo

    result = run_demo(args.run_dir, args.data, args.preset, args.set, args.device)
    say(args, result["table"])
    return result
