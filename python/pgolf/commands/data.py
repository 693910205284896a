"""Text to shards: `pgolf data stdlib`, `prepare` and `verify`."""

from argparse import Namespace
from pathlib import Path

from ..progress import note, staged_meter
from . import add_command, say


def register(steps) -> None:
    data = steps.add_parser("data", help="prepare and check datasets").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    for name, function, help in (
        ("stdlib", stdlib, "make a dataset of this Python's standard library sources; needs no network"),
        ("prepare", prepare, "make a dataset of text files, directories or .jsonl with a text field"),
    ):
        p = add_command(data, name, function, help)
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
    p = add_command(data, "verify", verify, "re-hash and re-check a dataset")
    p.add_argument("dir", type=Path, metavar="DIR")


def stdlib(args: Namespace) -> dict:
    from ..data.corpus import stdlib_documents

    return _prepare(args, stdlib_documents())


def prepare(args: Namespace) -> dict:
    from ..data.corpus import path_documents

    return _prepare(args, path_documents(args.paths))


def _prepare(args: Namespace, corpus) -> dict:
    from ..data.prepare import prepare

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
        note(
            f"warning: {changed['count']} documents do not survive encode and decode, e.g. {changed['example']}; "
            "bits per byte count their normalised text (--strict refuses them)"
        )
    for split in ("train", "val"):
        counts = manifest["splits"][split]
        say(
            args,
            f"{split:5} {counts['documents']:7,} documents  {counts['bytes']:12,} bytes  {counts['tokens']:11,} tokens",
        )
    say(args, f"wrote {args.out}")
    return manifest


def verify(args: Namespace) -> dict:
    from ..data.prepare import verify

    with staged_meter("verifying") as on_progress:
        result = verify(args.dir, progress=on_progress)
    say(args, f"{args.dir}: every shard and the tokenizer are as the manifest says")
    return result
