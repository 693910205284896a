"""What an artifact is worth and what it says: `pgolf eval` and `sample`."""

from argparse import Namespace
from pathlib import Path

from ..progress import meter
from . import add_command, add_data, add_device, add_settings, is_main_rank, say


def register(steps) -> None:
    p = add_command(steps, "eval", evaluate, "score an artifact on a dataset's validation text")
    p.add_argument("artifact", type=Path, metavar="ARTIFACT")
    add_data(p)
    p.add_argument(
        "--method",
        default="sliding",
        metavar="M",
        help="plain, sliding, slot, ttt, slot+ttt, ctw, several with commas, or stages (default: sliding)",
    )
    p.add_argument("--published", metavar="NAME", help="score as a published system did, such as pr1217")
    p.add_argument(
        "--share",
        metavar="S",
        help="slot: what a fit sees: window, frontier, carried; not causal: shared-context, shared-all, scored, ...",
    )
    p.add_argument("--allow-leaky", action="store_true", help="run a method that is not causal; marks it INVALID")
    p.add_argument("--stride", type=int, metavar="N", help="tokens scored per window (default: the artifact's)")
    p.add_argument("--parameters", metavar="P", help="slot: fit delta, bias or both")
    p.add_argument("--optimizer", metavar="O", help="slot: adamw, or lbfgs with a line search per fit")
    p.add_argument("--warm-start", action="store_const", const="true", help="slot: begin with the fit before this one")
    p.add_argument("--steps", type=int, metavar="N", help="slot: optimiser steps per fit")
    p.add_argument("--lr", type=float, metavar="X", help="slot: learning rate")
    p.add_argument("--half-life", type=float, metavar="TOKENS", help="slot: distance that halves a token's weight")
    p.add_argument("--tokens", type=int, default=0, metavar="N", help="score only the first N tokens")
    p.add_argument(
        "--budget", type=float, metavar="S", help="stop as soon as the first batches show that it takes longer than S s"
    )
    add_settings(p)
    add_device(p)

    p = add_command(steps, "sample", sample, "print text that an artifact writes")
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
    add_device(p)


def evaluate(args: Namespace) -> dict:
    from ..evaluate import check_request
    from ..evaluate import evaluate as run_method
    from ..scoring.published import published_settings

    settings = published_settings(args.published) if args.published else []
    settings += [
        f"{field}={value}"
        for field, value in (
            ("eval_stride", args.stride),
            ("slot_share", args.share),
            ("slot_parameters", args.parameters),
            ("slot_optimizer", args.optimizer),
            ("slot_warm_start", args.warm_start),
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
            budget_s=args.budget,
            on_progress=on_progress,
        )
    for score in result.get("stages", [result]):
        say(
            args,
            f"{'' if score['causal'] else 'INVALID '}{score['method']}: val_loss {score['val_loss']:.6f}  "
            f"val_bpb {score['val_bpb']:.6f}  tokens {score['tokens']:,}  bytes {score['bytes']:,}  "
            f"seconds {score['seconds']:.1f}{'' if score['causal'] else '  ' + score['standing']}",
        )
    if "stages" in result:
        say(args, f"all of it {result['seconds']:.1f} s, reading the artifact {result['load_seconds']:.1f} s")
    return result


def sample(args: Namespace) -> dict:
    from ..sample import sample as sample_text

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
        say(args, f"--- {i} of {args.num} ---\n{text}" if args.num > 1 else text)
    return result
