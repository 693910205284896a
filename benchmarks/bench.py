"""Time our kernels against their peers: `python -m benchmarks.bench [OP ...]`, or `pgolf bench`.

A wrong result is never timed. Rivals take turns in one process, and what is reported is the ratio peer / ours within
each round (median, p20, p80), because absolute times drift with clocks and neighbours far more than ratios do. On a CPU
a round counts only if our threads hardly waited for a core; on a GPU the L2 is flushed before every sample, and each
call is timed both replayed from a CUDA graph (device time) and launched eagerly (what a loop without graphs sees).
On a CPU, --isa lowers the instruction set of both sides, and --malloc tuned spares both the page faults of large
tensors.
"""

import argparse
import csv
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import PEER_ISA, Limits, describe_machine, environment_for, measure_limits
from benchmarks.timing import compare_cpu, compare_cuda

RESULTS = Path(__file__).parent / "results"
PEER_FACTOR = 10.0  # a peer may be this many times less accurate than the baseline before we call it broken


@dataclass(frozen=True)
class Case:
    """One shape of one op. Every callable takes the tensors that `inputs` returns."""

    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple]  # fresh random inputs; called `buffers` times, and samples rotate through them
    ours: dict[str, Callable]  # implementation name -> call
    peers: dict[str, Callable]  # peer name -> call; the first is the baseline that sets the allowed error
    exact: Callable  # float64 result: a tensor or a tuple of tensors
    flops: float  # least arithmetic that the result needs, in operations of `dtype`
    bytes: float  # least memory traffic, inputs read and outputs written once
    buffers: int = 3


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _errors(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative Frobenius error of each output; infinite where a value is not finite or a shape is wrong."""
    errors = []
    for ours, truth in zip(got, exact, strict=True):
        fits = ours.shape == truth.shape and bool(torch.isfinite(ours).all())
        errors.append(((ours.double() - truth).norm() / truth.norm()).item() if fits else float("inf"))
    return errors


def check(op: str, case: Case, inputs: tuple) -> None:
    """The gate: ours at most twice the baseline's error against float64, peers at most PEER_FACTOR times.

    Raises:
        AssertionError: a result is wrong, so nothing is timed.
    """
    exact = _tensors(case.exact(*inputs))
    errors = {name: _errors(_tensors(call(*inputs)), exact) for name, call in (*case.ours.items(), *case.peers.items())}
    baseline = next(iter(case.peers))
    eps = torch.finfo(case.dtype).eps
    for name, found in errors.items():
        factor = 2.0 if name in case.ours else PEER_FACTOR
        for i, (error, allowed) in enumerate(zip(found, errors[baseline], strict=True)):
            # One number, such as a loss, the baseline may hit by luck: rounding once at each stage is no error then.
            most = factor * allowed + eps * (4 if exact[i].numel() == 1 else 1)
            assert error <= most, (
                f"{op} {case.shape}: output {i} of {name!r} has relative error {error:.2e}; "
                f"{baseline!r} has {allowed:.2e}, so at most {most:.2e} is allowed"
            )


def run_case(op: str, case: Case, device: str, quick: bool, limits: Limits, peers: Iterable[str] = ()) -> list[dict]:
    """Check, then time; one row per implementation, peer and way of timing."""
    buffers = [case.inputs() for _ in range(1 if quick else case.buffers)]
    check(op, case, buffers[0])
    compare = compare_cuda if device == "cuda" else compare_cpu
    at_limit_ms = 1e3 * limits.seconds(case.flops, case.bytes, case.dtype, case.bytes * len(buffers))
    rows = []
    for impl, ours in case.ours.items():
        rivals = {name: call for name, call in case.peers.items() if not peers or name in peers}
        for timing, peer, result in compare(ours, rivals, buffers, quick):
            row = {"op": op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "impl": impl}
            row |= {"peer": peer, "timing": timing} | result.columns()
            rows.append(row | {"limit_fraction": round(at_limit_ms / result.ms, 4)})
    return rows


def available_ops() -> list[str]:
    """Every op that has a benchmark, and "step" for whole training and evaluation steps."""
    ops = (path.stem.removeprefix("bench_") for path in (Path(__file__).parent / "ops").glob("bench_*.py"))
    return [*sorted(ops), "step"]


def run(
    ops: Iterable[str] = (),
    device: str = "cpu",
    quick: bool = False,
    report: Callable = lambda row: None,
    only: str = "",
    peers: Iterable[str] = (),
    gate_only: bool = False,
) -> list[dict]:
    """Benchmark the ops (all of them by default) and return the rows; `report` gets each row as it appears.

    Args:
        only: cases whose "shape dtype" contains this.
        peers: names of the peers to time; all by default. The first one of a case sets the allowed error regardless.
        gate_only: check every case and time nothing; there are no rows then.

    Raises:
        ValueError: no benchmark has that name.
        AssertionError: a result is wrong.
    """
    known = available_ops()
    ops = list(ops) or known
    for op in ops:
        if op not in known:
            raise ValueError(f"bench: op must be one of {known}, got {op!r}")
    rows, limits = [], None if gate_only else measure_limits(device)
    for op in ops:
        name = "benchmarks.train_step" if op == "step" else f"benchmarks.ops.bench_{op}"
        cases = importlib.import_module(name).cases
        for case in cases(device, quick):
            if only not in f"{case.shape} {case.dtype}":
                continue
            if gate_only:
                check(op, case, case.inputs())
                print(f"{op:18} {case.shape:22} {case.dtype} is right", file=sys.stderr, flush=True)
                continue
            for row in run_case(op, case, device, quick, limits, peers):
                rows.append(row)
                report(row)
    return rows


def commit() -> str:
    """Short hash of the checkout, with "-dirty" if tracked files other than the results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "") or "no commit"


@functools.cache
def _stamp(device: str) -> dict:
    """When, what and where, the same for all rows of a run."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), "commit": commit()} | describe_machine(device)


def append_csv(row: dict, device: str) -> None:
    """Append to benchmarks/results/<op>.csv at once: a run that is cut short keeps what it measured."""
    RESULTS.mkdir(exist_ok=True)
    path, row = RESULTS / f"{row['op']}.csv", _stamp(device) | row
    fresh = not path.exists()
    with path.open("a+", newline="") as file:
        file.seek(0)
        columns = list(row) if fresh else next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"bench: {path} has the columns {columns}, but a row has {list(row)}; move the file away")
        file.seek(0, 2)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _print_row(row: dict) -> None:
    print(
        f"{row['op']:18} {row['shape']:22} {row['dtype']:9} {row['timing']:6} {row['impl']:10} {row['ms']:9.4f} ms  "
        f"{row['ratio_median']:6.2f}x [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}] of {row['peer']:24} "
        f"{100 * row['limit_fraction']:5.1f} % of the limit"
        + (f"  (waited {row['waited']:.0%})" * (row["waited"] > 0.02)),
        file=sys.stderr,
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    add_arguments(parser)
    options = parser.parse_args(argv)
    unknown = set(options.ops) - set(available_ops())
    if unknown:
        parser.error(f"no benchmark for {sorted(unknown)}; expected {available_ops()}")
    wanted = environment_for(options.isa, options.malloc)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        again = [sys.executable, "-m", "benchmarks.bench", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, again, os.environ | wanted)

    def report(row: dict) -> None:
        _print_row(row)
        if not options.quick:
            append_csv(row, options.device)

    rows = run(options.ops, options.device, options.quick, report, options.only, options.peers, options.check)
    if options.plot:
        from benchmarks.plot import plot

        print(plot(rows, options.plot), file=sys.stderr)
    if options.json:
        print(json.dumps(rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this program, which are those of `pgolf bench`."""
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"one of {', '.join(available_ops())}; all by default")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds, nothing appended to the results")
    parser.add_argument("--check", action="store_true", help="compare with float64 and time nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases whose shape and dtype contain this: "2048x5"')
    parser.add_argument("--peers", nargs="+", default=(), metavar="NAME", help='time only these: "torch.compile"')
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list on stdout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--isa", choices=tuple(PEER_ISA), help="lower both sides to this instruction set (CPU)")
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default", help="see benchmarks/machine.py")


if __name__ == "__main__":
    importlib.import_module("benchmarks.bench").main()  # under its own name, so that cases see the same classes
