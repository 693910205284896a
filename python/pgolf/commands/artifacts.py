"""Weights to the file of limited size, and a look inside: `pgolf pack`, `fit`, `unpack` and `inspect`."""

from argparse import Namespace
from pathlib import Path

from ..errors import InputError
from ..progress import meter, staged_meter
from . import add_command, add_device, add_settings, say


def register(steps) -> None:
    p = add_command(steps, "pack", pack, "quantise and compress a trained run, or an unpacked artifact, into one file")
    p.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory, or a directory made by `pgolf unpack`")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/artifact.pgolf")
    p.add_argument("--allow-oversize", action="store_true", help="write it even above 16,000,000 bytes with its code")
    p.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if GPTQ has to be calibrated now")
    add_settings(p)
    add_device(p)
    p = add_command(steps, "fit", fit, "pack a run with the finest clips that a number of bytes has room for")
    p.add_argument("run_dir", type=Path, metavar="RUN")
    p.add_argument(
        "--target-bytes", required=True, type=int, metavar="N", help="of artifact and code, such as 15990000"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/artifact.pgolf")
    p.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if GPTQ has to be calibrated now")
    add_settings(p)
    add_device(p)
    p = add_command(steps, "unpack", unpack, "an artifact's codes, scales and header as open files")
    p.add_argument("artifact", type=Path, metavar="FILE")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p = add_command(steps, "inspect", inspect, "what an artifact's bytes are spent on")
    p.add_argument("artifact", type=Path, metavar="FILE")


def pack(args: Namespace) -> dict:
    from .. import run
    from ..artifact.pack import pack_run
    from ..artifact.unpack import repack

    out = args.out or args.run_dir / run.ARTIFACT
    if (args.run_dir / run.CONFIG).exists():
        with staged_meter("packing") as on_progress:
            report = pack_run(
                args.run_dir,
                out,
                allow_oversize=args.allow_oversize,
                settings=args.set,
                data=args.data,
                device=args.device,
                on_progress=on_progress,
            )
    elif args.set:
        raise InputError(f"{args.run_dir}: --set needs the weights of a run; an unpacked artifact is coded already")
    else:
        with meter("packing"):
            report = repack(args.run_dir, out, allow_oversize=args.allow_oversize)
    say(args, f"wrote {out}: {report.artifact_bytes:,} bytes ({report.bits_per_parameter:.3f} bits per parameter)")
    for kind, error in report.errors.items():
        say(args, f"{kind:8} {report.bytes_by_kind.get(kind, 0):12,} bytes  relative error {error:.5f}")
    if report.pruned and report.pruned.zeroed:
        done = report.pruned
        say(
            args,
            f"zeroed {done.zeroed:,} of {done.candidates:,} codes of size 1: with the code {done.bytes_before:,} -> "
            f"{done.bytes_after:,} bytes, squared error +{done.cost:.4g}",
        )
    return report.as_dict()


def fit(args: Namespace) -> dict:
    from .. import run
    from ..artifact.fit import fit_run

    out = args.out or args.run_dir / run.ARTIFACT
    with staged_meter("fitting") as on_progress:
        found = fit_run(args.run_dir, args.target_bytes, out, args.set, args.data, args.device, on_progress)
    for multiplier, predicted, actual in found.tries:
        say(args, f"clips x {multiplier:.4f}: predicted {predicted:,} bytes, packed {actual:,}")
    clips = "  ".join(f"{field} {clip}" for field, clip in found.clips.items())
    size, left = found.report.total_bytes, found.target_bytes - found.report.total_bytes
    say(args, f"wrote {out}: {found.report.artifact_bytes:,} bytes, with the code {size:,}, {left:,} below the target")
    say(args, f"{clips} (standard deviations); the prediction was off by {found.error:+.2%}")
    return found.as_dict()


def unpack(args: Namespace) -> dict:
    from ..artifact.unpack import unpack as unpack_artifact

    paths = {name: str(path) for name, path in unpack_artifact(args.artifact, args.out).items()}
    say(args, "\n".join(f"wrote {path}" for path in paths.values()))
    return paths


def inspect(args: Namespace) -> dict:
    from rich.console import Console

    from ..artifact.inspect import inspect as inspect_artifact
    from ..artifact.inspect import table

    result = inspect_artifact(args.artifact)
    if not args.json:
        Console().print(table(result))
    return result
