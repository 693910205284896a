"""What each `pgolf` subcommand does: read the arguments, call the one function that does the work, show its result.

Every function returns what --json prints. Heavy imports stay inside, so that `pgolf --help` answers at once.
"""

import os
from argparse import Namespace

from .errors import InputError
from .progress import CONSOLE, meter, show, staged_meter


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(args: Namespace, text: str) -> None:
    """Print for people; with --json stdout belongs to the JSON object."""
    if not args.json and is_main_rank():
        show(text)


def data_stdlib(args: Namespace) -> dict:
    from .data.corpus import stdlib_documents

    return _prepare(args, stdlib_documents())


def data_prepare(args: Namespace) -> dict:
    from .data.corpus import path_documents

    return _prepare(args, path_documents(args.paths))


def _prepare(args: Namespace, corpus) -> dict:
    from .data.prepare import prepare

    with staged_meter("preparing data") as on_progress:
        manifest = prepare(
            corpus,
            args.out,
            vocab_size=args.vocab_size,
            normalization=args.normalization,
            val_share=args.val_share,
            strict=args.strict,
            progress=on_progress,
        )
    changed = manifest["documents_changed"]
    if changed["count"]:
        CONSOLE.print(
            f"warning: {changed['count']} documents do not survive encode and decode, e.g. {changed['example']}; "
            "bits per byte count their normalised text (--strict refuses them)"
        )
    for split in ("train", "val"):
        counts = manifest["splits"][split]
        _say(
            args,
            f"{split:5} {counts['documents']:7,} documents  {counts['bytes']:12,} bytes  {counts['tokens']:11,} tokens",
        )
    _say(args, f"wrote {args.out}")
    return manifest


def data_verify(args: Namespace) -> dict:
    from .data.prepare import verify

    with staged_meter("verifying") as on_progress:
        result = verify(args.dir, progress=on_progress)
    _say(args, f"{args.dir}: every shard and the tokenizer are as the manifest says")
    return result


def train(args: Namespace) -> dict:
    from . import run
    from .presets import preset
    from .train import train as run_training

    if args.resume:
        cfg = run.read_config(args.run_dir)
        if args.preset or args.steps or args.seconds or args.set:
            raise InputError(
                "train: --resume continues the run as it was configured; drop --preset, --steps, --seconds and --set"
            )
    else:
        cfg = preset(args.preset or "demo").with_settings(args.set)
        if args.steps is not None:
            cfg = cfg.replace(max_steps=args.steps, max_seconds=0.0)
        if args.seconds is not None:
            cfg = cfg.replace(max_seconds=args.seconds)
    result = run_training(
        cfg, args.data, args.run_dir, resume=args.resume, device=args.device, tokenizer=args.tokenizer
    )
    _say(
        args,
        f"{result['step']} steps in {result['train_seconds']:.1f} s ({result['tokens_per_second']:,} tokens/s); "
        f"val_loss {result['val_loss']:.4f}  val_bpb {result['val_bpb']:.4f}",
    )
    return result


def pack(args: Namespace) -> dict:
    from . import run
    from .artifact.pack import pack_run, repack

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
    _say(args, f"wrote {out}: {report.artifact_bytes:,} bytes ({report.bits_per_parameter:.3f} bits per parameter)")
    for kind, error in report.errors.items():
        _say(args, f"{kind:8} {report.bytes_by_kind.get(kind, 0):12,} bytes  relative error {error:.5f}")
    if report.pruned and report.pruned.zeroed:
        done = report.pruned
        _say(
            args,
            f"zeroed {done.zeroed:,} of {done.candidates:,} codes of size 1: with the code {done.bytes_before:,} -> "
            f"{done.bytes_after:,} bytes, squared error +{done.cost:.4g}",
        )
    return report.as_dict()


def unpack(args: Namespace) -> dict:
    from .artifact.pack import unpack as unpack_artifact

    paths = {name: str(path) for name, path in unpack_artifact(args.artifact, args.out).items()}
    _say(args, "\n".join(f"wrote {path}" for path in paths.values()))
    return paths


def inspect(args: Namespace) -> dict:
    from rich.console import Console

    from .artifact.inspect import inspect as inspect_artifact
    from .artifact.inspect import table

    result = inspect_artifact(args.artifact)
    if not args.json:
        Console().print(table(result))
    return result


def evaluate(args: Namespace) -> dict:
    from .evaluate import check_request
    from .evaluate import evaluate as run_method
    from .scoring.published import published_settings

    settings = published_settings(args.published) if args.published else []
    settings += [
        f"{field}={value}"
        for field, value in (
            ("eval_stride", args.stride),
            ("slot_share", args.share),
            ("slot_parameters", args.parameters),
            ("slot_steps", args.steps),
            ("slot_lr", args.lr),
            ("slot_half_life", args.half_life),
        )
        if value is not None
    ]
    settings += args.set
    # Before the bar: a refusal is one line and nothing else.
    causal = check_request(args.artifact, args.method, settings, args.allow_leaky).causal
    with meter(f"{'' if causal else 'INVALID '}scoring ({args.method})", enabled=is_main_rank()) as on_progress:
        result = run_method(
            args.artifact,
            args.data,
            args.method,
            settings=settings,
            limit=args.tokens,
            allow_leaky=args.allow_leaky,
            device=args.device,
            tokenizer=args.tokenizer,
            on_progress=on_progress,
        )
    for score in result.get("stages", [result]):
        _say(
            args,
            f"{'' if score['causal'] else 'INVALID '}{score['method']}: val_loss {score['val_loss']:.6f}  "
            f"val_bpb {score['val_bpb']:.6f}  tokens {score['tokens']:,}  bytes {score['bytes']:,}  "
            f"seconds {score['seconds']:.1f}{'' if score['causal'] else '  ' + score['standing']}",
        )
    if "stages" in result:
        _say(args, f"all of it {result['seconds']:.1f} s, reading the artifact {result['load_seconds']:.1f} s")
    return result


def sample(args: Namespace) -> dict:
    from .sample import sample as sample_text

    with meter("sampling", enabled=is_main_rank()) as on_progress:
        result = sample_text(
            args.artifact,
            args.prompt,
            data=args.data,
            num_samples=args.num,
            num_tokens=args.tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            device=args.device,
            on_progress=on_progress,
        )
    for i, text in enumerate(result["samples"], 1):
        _say(args, f"--- {i} of {args.num} ---\n{text}" if args.num > 1 else text)
    return result


def report(args: Namespace) -> dict:
    from .publish.report import write_report

    path = write_report(args.run_dir)
    _say(args, f"wrote {path}")
    return {"report": str(path)}


def presets(args: Namespace) -> list[dict]:
    from rich.console import Console

    from .presets import describe, table

    rows = describe()
    if not args.json:
        Console().print(table(rows))
    return rows


def doctor(args: Namespace) -> dict:
    from .publish.doctor import examine

    result = examine()
    for name, value in result.items():
        _say(args, f"{name:30} {value}")
    return result


def demo(args: Namespace) -> dict:
    from .demo import run_demo

    result = run_demo(args.run_dir, args.data, args.preset, args.set, args.device)
    _say(args, result["table"])
    return result


def bench(args: Namespace) -> list[dict]:
    """In a process of its own: benchmarks set allocator and instruction set before Python starts."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    import pgolf_kernels

    root = Path(pgolf_kernels.__file__).parent.parent
    if not (root / "benchmarks/bench.py").exists():
        raise InputError("bench: benchmarks/ is part of the source checkout, not of the wheel; run it from a clone")
    options = [*args.ops, "--json", "--only", args.only, "--malloc", args.malloc]
    options += ["--check"] * args.check + ["--quick"] * args.quick + ["--peers", *args.peers] * bool(args.peers)
    options += ["--plot", str(Path(args.plot).resolve())] if args.plot else []
    options += ["--isa", args.isa] if args.isa else []
    options += ["--device", args.device] if args.device != "auto" else []
    paths = [str(root), str(root / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # pgolf's own setting for threads that share their cores; here each side has the machine to itself.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "benchmarks.bench", *options]
    finished = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise InputError(f"bench: failed with exit code {finished.returncode}; its message is above")
    return json.loads(finished.stdout)
