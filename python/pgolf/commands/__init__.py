"""The subcommands of `pgolf`, a file for each part of the way from text to score; cli.py puts them together.

A file holds its options (`register`) and what each command does: read the arguments, call the one function that does
the work, show its result. Every function returns what --json prints. Heavy imports stay inside, so that `pgolf --help`
answers at once.
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from ..progress import show


class Refuted(dict):
    """A result that is complete and says no, such as a failed audit: the exit code is 1."""


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(args: Namespace, text: str) -> None:
    """Print for people; with --json stdout belongs to the JSON object."""
    if not args.json and is_main_rank():
        show(text)


def add_command(steps, name: str, function: Callable[[Namespace], object], help: str) -> ArgumentParser:
    """A subcommand that runs `function` and knows --json."""
    p = steps.add_parser(name, help=help, description=help)
    p.set_defaults(run=function)
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    return p


def add_data(p: ArgumentParser, required: bool = True) -> None:
    p.add_argument(
        "--data", required=required, type=Path, metavar="DIR", help="a dataset of `pgolf data`, or the challenge's"
    )
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: where the data's layout has it")


def add_settings(p: ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the config; repeatable"
    )


def add_average(p: ArgumentParser) -> None:
    p.add_argument(
        "--average", choices=("ema", "swa", "lawa", "none"), help="which average of the weights is exported and scored"
    )


def add_device(p: ArgumentParser) -> None:
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
