"""The `pgolf` program: one subcommand per step from text to score. Wrong input is one line on stderr, exit code 2."""

import argparse
import json
import sys
from pathlib import Path

from . import commands
from .errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        result = args.run(args)
    except InputError as error:
        sys.stderr.write(f"pgolf: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("pgolf: interrupted\n")
        return 130
    if args.json and result is not None and commands.is_main_rank():
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf", description="Train, pack and score small GPTs under hard budgets of bytes and seconds."
    )
    steps = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(group, name: str, function, help: str) -> argparse.ArgumentParser:
        p = group.add_parser(name, help=help, description=help)
        p.set_defaults(run=function)
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
        return p

    data = steps.add_parser("data", help="prepare and check datasets").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    for name, function, help in (
        ("stdlib", commands.data_stdlib, "make a dataset of this Python's standard library sources; needs no network"),
        ("prepare", commands.data_prepare, "make a dataset of text files, directories or .jsonl with a text field"),
    ):
        p = command(data, name, function, help)
        if name == "prepare":
            p.add_argument("paths", nargs="+", type=Path, metavar="PATH")
        p.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the dataset goes")
        p.add_argument("--vocab-size", type=int, default=1024, metavar="N", help="tokenizer size (default: 1024)")
        p.add_argument(
            "--normalization",
            choices=("identity", "nmt_nfkc"),
            default="identity",
            help="identity keeps every byte; nmt_nfkc is the challenge's way, scored on normalised text",
        )
        p.add_argument("--val-share", type=float, default=0.05, metavar="X", help="share of documents (default: 0.05)")
        p.add_argument("--strict", action="store_true", help="refuse text that does not survive encode and decode")
    p = command(data, "verify", commands.data_verify, "re-hash and re-check a dataset")
    p.add_argument("dir", type=Path, metavar="DIR")

    p = command(steps, "train", commands.train, "train a model into a run directory")
    p.add_argument("--preset", metavar="NAME", help="whose values to start from (default: demo); see `pgolf presets`")
    p.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="a dataset of `pgolf data`, or the challenge's"
    )
    # torchrun reads `--run` as an abbreviation of an option of its own, hence the second name.
    p.add_argument(
        "--run", "--run-dir", dest="run_dir", required=True, type=Path, metavar="DIR", help="the run directory"
    )
    _add_tokenizer(p)
    p.add_argument("--steps", type=int, metavar="N", help="train N steps, whatever the time they take")
    p.add_argument("--seconds", type=float, metavar="S", help="train S seconds")
    _add_settings(p)
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    _add_device(p)

    p = command(
        steps, "pack", commands.pack, "quantise and compress a trained run, or an unpacked artifact, into one file"
    )
    p.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory, or a directory made by `pgolf unpack`")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/artifact.pgolf")
    p.add_argument("--allow-oversize", action="store_true", help="write it even above 16,000,000 bytes with its code")
    p.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if GPTQ has to be calibrated now")
    _add_settings(p)
    _add_device(p)
    p = command(steps, "unpack", commands.unpack, "an artifact's codes, scales and header as open files")
    p.add_argument("artifact", type=Path, metavar="FILE")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p = command(steps, "inspect", commands.inspect, "what an artifact's bytes are spent on")
    p.add_argument("artifact", type=Path, metavar="FILE")

    p = command(steps, "eval", commands.evaluate, "score an artifact on a dataset's validation text")
    p.add_argument("artifact", type=Path, metavar="ARTIFACT")
    p.add_argument("--data", required=True, type=Path, metavar="DIR")
    _add_tokenizer(p)
    p.add_argument(
        "--method",
        default="sliding",
        metavar="M",
        help="plain, sliding, slot, ttt, slot+ttt, ctw, several with commas, or stages (default: sliding)",
    )
    p.add_argument("--published", metavar="NAME", help="score as a published system did, such as pr1217")
    p.add_argument(
        "--share", metavar="S", help="slot: what a fit sees: window (causal), shared-context, shared-all, scored, ..."
    )
    p.add_argument("--allow-leaky", action="store_true", help="run a method that is not causal; marks it INVALID")
    p.add_argument("--stride", type=int, metavar="N", help="tokens scored per window (default: the artifact's)")
    p.add_argument("--parameters", metavar="P", help="slot: fit delta, bias or both")
    p.add_argument("--steps", type=int, metavar="N", help="slot: optimiser steps per window")
    p.add_argument("--lr", type=float, metavar="X", help="slot: learning rate")
    p.add_argument("--half-life", type=float, metavar="TOKENS", help="slot: distance that halves a token's weight")
    p.add_argument("--tokens", type=int, default=0, metavar="N", help="score only the first N tokens")
    _add_settings(p)
    _add_device(p)

    p = command(steps, "sample", commands.sample, "print text that an artifact writes")
    p.add_argument("artifact", type=Path, metavar="ARTIFACT")
    p.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with (default: nothing)")
    p.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens behind the prompt (default: 256)")
    p.add_argument("--num", type=int, default=1, metavar="N", help="texts, sampled side by side (default: 1)")
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (default: 0.8)"
    )
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: all)")
    p.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold P (default: 1)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="same seed and device: same text (default: 0)")
    p.add_argument("--data", type=Path, metavar="DIR", help="whose tokenizer to use (default: the artifact's folder's)")
    _add_device(p)

    p = command(steps, "report", commands.report, "write RUN/report.html, one self-contained page")
    p.add_argument("run_dir", type=Path, metavar="RUN")
    command(steps, "presets", commands.presets, "list the named runs")
    command(steps, "doctor", commands.doctor, "what this machine offers and which implementation each op will use")
    p = command(steps, "bench", commands.bench, "time the kernels against their peers; needs the source checkout")
    p.add_argument("ops", nargs="*", metavar="OP", help="ops, or `step` for whole training steps (default: all)")
    p.add_argument("--quick", action="store_true", help="small cases, few rounds, nothing added to benchmarks/results")
    p.add_argument("--check", action="store_true", help="compare with float64 and time nothing")
    p.add_argument("--only", default="", metavar="TEXT", help="cases whose shape and dtype contain this")
    p.add_argument("--peers", nargs="+", default=[], metavar="NAME", help='time only these, such as "torch.compile"')
    p.add_argument("--plot", metavar="FILE.png", help="draw the ratios")
    p.add_argument("--isa", metavar="LEVEL", help="lower both sides to this instruction set (CPU)")
    p.add_argument("--malloc", choices=("default", "tuned"), default="default", help="spare page faults (CPU)")
    _add_device(p)
    p = command(steps, "demo", commands.demo, "all of it: data, training, packing, scoring and a report")
    p.add_argument("--run", dest="run_dir", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--data", type=Path, default=Path("data/stdlib"), metavar="DIR", help="made if it is not there")
    p.add_argument("--preset", default="demo", metavar="NAME")
    _add_settings(p)
    _add_device(p)
    return parser


def _add_tokenizer(p: argparse.ArgumentParser) -> None:
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: where the data's layout has it")


def _add_settings(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change one field of the config; repeatable"
    )


def _add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
