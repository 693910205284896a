"""This machine: `pgolf doctor` and `bench`."""

import os
from argparse import Namespace

from ..errors import InputError
from . import add_command, add_device, say


def register(steps) -> None:
    add_command(steps, "doctor", doctor, "what this machine offers and which implementation each op will use")
    p = add_command(steps, "bench", bench, "time the kernels against their peers; needs the source checkout")
    p.add_argument("ops", nargs="*", metavar="OP", help="ops, or `step` for whole training steps (default: all)")
    p.add_argument("--quick", action="store_true", help="small cases, few rounds, nothing added to benchmarks/results")
    p.add_argument("--check", action="store_true", help="compare with float64 and time nothing")
    p.add_argument("--only", default="", metavar="TEXT", help="cases whose shape and dtype contain this")
    p.add_argument("--peers", nargs="+", default=[], metavar="NAME", help='time only these, such as "torch.compile"')
    p.add_argument("--plot", metavar="FILE.png", help="draw the ratios")
    p.add_argument("--isa", metavar="LEVEL", help="lower both sides to this instruction set (CPU)")
    p.add_argument("--malloc", choices=("default", "tuned"), default="default", help="spare page faults (CPU)")
    add_device(p)


def doctor(args: Namespace) -> dict:
    from ..publish.doctor import examine

    result = examine()
    for name, value in result.items():
        say(args, f"{name:30} {value}")
    return result


def bench(args: Namespace) -> list[dict]:
    """In a process of its own: benchmarks set allocator and instruction set before Python starts."""
    import json
    import subprocess
    import sys
    from pathlib import Path

    import pgolf_kernels

    root = Path(pgolf_kernels.__file__).parent.parent
    if not (root / "benchmarks/bench.py").exists():
        raise InputError("bench: benchmarks/ is part of the source checkout, not of the wheel; run it from a clone")
    options = [*args.ops, "--json", "--only", args.only, "--malloc", args.malloc]
    options += ["--check"] * args.check + ["--quick"] * args.quick + ["--peers", *args.peers] * bool(args.peers)
    options += ["--plot", str(Path(args.plot).resolve())] if args.plot else []
    options += ["--isa", args.isa] if args.isa else []
    options += ["--device", args.device] if args.device != "auto" else []
    paths = [str(root), str(root / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # pgolf's own setting for threads that share their cores; here each side has the machine to itself.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "benchmarks.bench", *options]
    finished = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise InputError(f"bench: failed with exit code {finished.returncode}; its message is above")
    return json.loads(finished.stdout)
