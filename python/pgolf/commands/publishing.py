"""Runs to what others read: `pgolf report`, `stats`, `submit` and `bundle`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import add_command, say


def register(steps) -> None:
    p = add_command(steps, "report", report, "write RUN/report.html, one self-contained page")
    p.add_argument("run_dir", type=Path, metavar="RUN")

    p = add_command(steps, "stats", stats, "mean, spread and tests over the seeds of one config")
    add_seeds(p)
    p.add_argument("--method", action="append", default=[], metavar="M", help="a score to report (default: all causal)")
    p.add_argument("--allow-leaky", action="store_true", help="report scores that are not causal, stamped INVALID")

    p = add_command(steps, "submit", submit, "the folder of a pull request to openai/parameter-golf")
    add_seeds(p)
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder, which must not exist yet")
    p.add_argument("--author", required=True, metavar="NAME")
    p.add_argument("--github-id", required=True, metavar="LOGIN")
    p.add_argument("--name", required=True, metavar="TITLE", help="what the submission is called")
    p.add_argument("--blurb", default="", metavar="TEXT", help="one paragraph on what is different")
    p.add_argument("--method", metavar="M", help="the score that counts (default: the one that is audited)")
    p.add_argument(
        "--track",
        choices=("10min_16mb", "non_record_16mb"),
        default="10min_16mb",
        help="non_record_16mb asks neither for three seeds nor for the clocks (default: 10min_16mb)",
    )

    p = add_command(
        steps, "bundle", bundle, "write one train_gpt.py that holds only what a run uses, and count its bytes"
    )
    p.add_argument("source", type=Path, metavar="RUN", help="a run directory, or an artifact")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="where train_gpt.py goes")
    p.add_argument(
        "--kernels",
        default="run",
        metavar="K",
        help="run (what the run's log and scores name: same bits; default), reference, cpu or gpu",
    )
    p.add_argument(
        "--method", action="append", default=[], metavar="M", help="a way of scoring it must know as well; repeatable"
    )
    p.add_argument(
        "--form",
        default="both",
        metavar="F",
        help="wrapped, plain, or both: train_gpt.py wrapped and train_gpt_plain.py (default)",
    )


def add_seeds(p: ArgumentParser) -> None:
    """The options of commands that report several runs as the seeds of one config."""
    p.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN", help="runs that differ in their seeds")
    p.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="WHAT",
        help='what to beat: a published system ("pr1217"), bits per byte, a JSON file or runs',
    )
    p.add_argument(
        "--allow-unreported", metavar="REASON", help="why started runs of this config are missing; it is published"
    )


def report(args: Namespace) -> dict:
    from ..publish.report import write_report

    path = write_report(args.run_dir)
    say(args, f"wrote {path}")
    return {"report": str(path)}


def stats(args: Namespace) -> dict:
    from ..publish import stats as statistics

    result = statistics.stats(args.run_dirs, args.against, args.method, args.allow_leaky, args.allow_unreported)
    say(args, "\n".join(statistics.lines(result)))
    return result


def submit(args: Namespace) -> dict:
    from ..publish.submission import Author
    from ..publish.submission import submit as write_folder

    result = write_folder(
        args.run_dirs,
        args.out,
        Author(args.author, args.github_id, args.name, args.blurb),
        method=args.method,
        against=args.against,
        track=args.track,
        allow_unreported=args.allow_unreported,
    )
    for name, size in result["files"].items():
        say(args, f"{size:12,} {name}")
    content = result["submission"]
    say(args, f"wrote {result['out']}: val_bpb {content['val_bpb']:.8f}, {content['bytes_total']:,} bytes at most")
    return result


def bundle(args: Namespace) -> dict:
    from ..publish.bundle import PLAIN, write_bundle

    done = write_bundle(args.source, args.out, kernels=args.kernels, methods=args.method, form=args.form)
    ops = ", ".join(f"{op} ({'+'.join(kinds) or 'reference'})" for op, kinds in done.kernels.items())
    where = f" in {PLAIN}" if args.form == "both" else ""
    say(args, f"wrote {done.path}: {done.counted_bytes:,} bytes count")
    say(args, f"plain {done.plain_bytes:,} bytes{where}, wrapped {done.wrapped_bytes:,}")
    say(args, f"{done.modules} modules, {done.native_files} C++ and CUDA files; {ops}")
    return done.as_dict()
