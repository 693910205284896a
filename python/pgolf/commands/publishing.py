"""Runs to what others read: `pgolf report` and `stats`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import add_command, say


def register(steps) -> None:
    p = add_command(steps, "report", report, "write RUN/report.html, one self-contained page")
    p.add_argument("run_dir", type=Path, metavar="RUN")

    p = add_command(steps, "stats", stats, "mean, spread and tests over the seeds of one config")
    add_seeds(p)


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
    p.add_argument("--method", action="append", default=[], metavar="M", help="a score to report (default: all causal)")
    p.add_argument("--allow-leaky", action="store_true", help="report scores that are not causal, stamped INVALID")
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
