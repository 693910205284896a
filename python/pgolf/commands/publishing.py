"""Runs to what others read: `pgolf report`."""

from argparse import Namespace
from pathlib import Path

from . import add_command, say


def register(steps) -> None:
    p = add_command(steps, "report", report, "write RUN/report.html, one self-contained page")
    p.add_argument("run_dir", type=Path, metavar="RUN")


def report(args: Namespace) -> dict:
    from ..publish.report import write_report

    path = write_report(args.run_dir)
    say(args, f"wrote {path}")
    return {"report": str(path)}
