"""What an artifact is worth, whether that can be believed, and what it says: `pgolf eval`, `audit` and `sample`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from ..errors import InputError
from ..progress import meter, staged_meter
from . import Refuted, add_command, add_data, add_device, add_settings, is_main_rank, say


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
    _add_method(p)
    p.add_argument("--allow-leaky", action="store_true", help="run a method that is not causal; marks it INVALID")
    p.add_argument("--tokens", type=int, default=0, metavar="N", help="score only the first N tokens")
    p.add_argument(
        "--budget", type=float, metavar="S", help="stop as soon as the first batches show that it takes longer than S s"
    )
    add_device(p)

    p = add_command(steps, "audit", audit, "prove that an artifact's score leaks, or try to; exit code 1 if it does")
    p.add_argument("artifact", nargs="?", type=Path, metavar="ARTIFACT")
    add_data(p, required=False)
    p.add_argument("--method", default="sliding", metavar="M", help="as for eval, one of them (default: sliding)")
    _add_method(p)
    p.add_argument("--evaluator", metavar="MODULE:OBJECT", help="audit your own evaluator, see docs/auditing.md")
    p.add_argument("--controls", action="store_true", help="audit evaluators whose verdicts are known, on a tiny model")
    p.add_argument("--tests", default="", metavar="T1,T9", help="only these tests (default: T1 to T12)")
    p.add_argument("--tokens", type=int, default=0, metavar="N", help="audit the first N tokens (default: 4096 or so)")
    p.add_argument("--sample-tokens", type=int, default=0, metavar="N", help="T9: tokens to sample (default: as many)")
    p.add_argument("--flips", type=int, metavar="N", help="T1: tokens to replace, one at a time (default: 8)")
    p.add_argument("--positions", type=int, metavar="N", help="T5: targets to try the vocabulary at (default: 48)")
    p.add_argument("--limit-seconds", type=float, metavar="S", help="T11: of training, and of scoring (default: 600)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of places and of the sampled text (default: 0)")
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


def _add_method(p: ArgumentParser) -> None:
    """The options that say how a method scores."""
    p.add_argument("--published", metavar="NAME", help="score as a published system did, such as pr1217")
    p.add_argument(
        "--share",
        metavar="S",
        help="slot: what it learns from: window, carried, frontier; not causal: shared-context, scored, ... "
        "All but the first two, and the options of a fit below, mean --parameters bias unless that is given",
    )
    p.add_argument("--stride", type=int, metavar="N", help="tokens scored per window (default: the artifact's)")
    p.add_argument(
        "--parameters", metavar="P", help="slot: a cache of the context (no fit), or fit bias, delta or both"
    )
    p.add_argument("--optimizer", metavar="O", help="slot: adamw, or lbfgs with a line search per fit")
    p.add_argument("--warm-start", action="store_const", const="true", help="slot: begin with the fit before this one")
    p.add_argument("--steps", type=int, metavar="N", help="slot: optimiser steps per fit")
    p.add_argument("--lr", type=float, metavar="X", help="slot: learning rate")
    p.add_argument("--half-life", type=float, metavar="TOKENS", help="slot: distance that halves a token's weight")
    add_settings(p)


def _settings(args: Namespace) -> list[str]:
    """The options of _add_method as `field=value` settings."""
    from ..scoring.published import published_settings

    settings = published_settings(args.published) if args.published else []
    of_a_fit = (
        args.share if args.share not in ("window", "carried") else None,
        args.optimizer,
        args.warm_start,
        args.steps,
        args.lr,
        args.half_life,
    )
    if not (args.published or args.parameters) and any(value is not None for value in of_a_fit):
        settings.append("slot_parameters=bias")
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
    return settings + args.set


def evaluate(args: Namespace) -> dict:
    from ..evaluate import check_request
    from ..evaluate import evaluate as run_method

    settings = _settings(args)
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


def audit(args: Namespace) -> dict:
    from ..audit.audit import PAGE, prepare
    from ..audit.audit import audit as run_audit
    from ..audit.case import Budget
    from ..audit.record import AUDIT
    from ..audit.verdict import CONDITIONS

    if args.controls:
        return _controls(args)
    if args.artifact is None or args.data is None:
        raise InputError("audit: needs ARTIFACT and --data DIR, or --controls")
    wanted = {"flips": args.flips, "positions": args.positions, "limit_seconds": args.limit_seconds}
    budget = Budget(sample_tokens=args.sample_tokens, **{k: v for k, v in wanted.items() if v is not None})
    # Before the bar: a refusal is one line and nothing else.
    prepared = prepare(
        args.artifact,
        args.data,
        args.method,
        evaluator=args.evaluator,
        settings=_settings(args),
        tokens=args.tokens,
        seed=args.seed,
        budget=budget,
        device=args.device,
        tokenizer=args.tokenizer,
        tests=[name for name in args.tests.split(",") if name],
    )
    with staged_meter(f"auditing {args.evaluator or args.method}") as on_test:
        result = run_audit(prepared, on_test)
    score, folder = result["score"], args.artifact.parent
    for test in result["tests"]:
        say(args, f"{test['name']:4}{test['verdict']:8}{test['seconds']:6.1f} s  {test['title']}: {test['detail']}")
    say(
        args,
        f"{'INVALID ' if result['violated'] else ''}{args.evaluator or args.method}: val_bpb {score['val_bpb']:.6f} on "
        f"{score['tokens']:,} audited tokens, scored in {score['seconds']:.1f} s, audited in {result['seconds']:.1f} s",
    )
    failed = [CONDITIONS[name] for name in result["violated"]]
    say(args, f"violated: {'; '.join(failed)}" if failed else "nothing found against it")
    say(args, f"wrote {folder / AUDIT} and {folder / PAGE}")
    return Refuted(result) if failed else result


def _controls(args: Namespace) -> dict:
    from ..audit.controls import run_controls, table

    with staged_meter("auditing the controls") as on_control:
        results = run_controls(seed=args.seed, on_control=on_control)
    if not args.json:
        Console().print(table(results))
    wrong = [r["name"] for r in results if not r["as_expected"]]
    say(args, f"not as expected: {', '.join(wrong)}" if wrong else "every verdict is as expected")
    result = {"controls": results, "verdict": "fail" if wrong else "pass"}
    return Refuted(result) if wrong else result


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
