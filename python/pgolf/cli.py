"""The `pgolf` program: one subcommand per step from text to score. Wrong input is one line on stderr, exit code 2."""

import argparse
import json
import sys

from .commands import Refuted, artifacts, data, is_main_rank, machine, publishing, scoring, training
from .errors import FailedElsewhereError, InputError


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        result = args.run(args)
    except FailedElsewhereError:
        return 2
    except InputError as error:
        sys.stderr.write(f"pgolf: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("pgolf: interrupted\n")
        return 130
    if args.json and result is not None and is_main_rank():
        sys.stdout.write(json.dumps(result) + "\n")
    return 1 if isinstance(result, Refuted) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf", description="Train, pack and score small GPTs under hard budgets of bytes and seconds."
    )
    steps = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for part in (data, training, artifacts, scoring, publishing, machine):
        part.register(steps)
    return parser
