"""The benchmarks: every op's small cases run and their rows have the documented columns; tables match the rows."""

import argparse
import csv
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench, machine, plot, table, timing
from pgolf.cli import main as pgolf
from pgolf_kernels import extension

ROOT = Path(__file__).parent.parent
CASES = "benchmarks.ops.bench_newton_schulz"
COLUMNS = {"op", "shape", "impl", "peer", "ratio_median", "ratio_p20", "ratio_p80", "ms", "limit_fraction"}


@pytest.fixture(scope="module")
def limits():
    """Invented ones, because measuring takes seconds and is tested apart."""
    peaks = {torch.float32: 1e11, torch.bfloat16: 1e12}
    return machine.Limits("cpu", [(1e6, 1e11), (float("inf"), 1e10)], peaks)


@pytest.mark.parametrize("op", bench.available_ops())
def test_small_cases_pass_the_gate_and_give_rows(op, limits, monkeypatch):
    monkeypatch.setattr(bench, "measure_limits", lambda device: limits)
    monkeypatch.setattr(bench, "compare_cpu", lambda ours, peers, buffers, quick: [("eager", p, FIXED) for p in peers])
    rows = bench.run([op], quick=True)
    assert rows and all(row.keys() >= COLUMNS for row in rows)


FIXED = timing.Result([1.5, 2.0, 3.0], ms=2.0, peer_ms=4.0)


def test_a_wrong_result_is_not_timed():
    double = {"call": lambda x: 2 * x}
    right = bench.Case("2", torch.float32, lambda: (), double, double, lambda x: 2 * x.double(), flops=1, bytes=1)
    bench.check("op", right, (torch.ones(2),))
    for wrong in (lambda x: 2.1 * x, lambda x: x * torch.nan, lambda x: x[:1]):
        case = dataclasses.replace(right, ours={"ours": wrong})
        with pytest.raises(AssertionError, match="output 0 of 'ours' has relative error"):
            bench.check("op", case, (torch.ones(2),))


def test_limits_use_the_memory_that_holds_the_working_set(limits):
    assert limits.seconds(1e9, 0, torch.bfloat16, working_set=1) == 1e-3
    assert limits.seconds(0, 1e6, torch.bfloat16, working_set=1e6) == 1e-5
    assert limits.seconds(0, 1e6, torch.bfloat16, working_set=2e6) == 1e-4


@pytest.mark.skipif(extension.cpu is None, reason="the CPU extension is not built")
def test_measured_limits_are_in_order():
    levels = machine.measure_limits("cpu").levels
    sizes, rates = zip(*levels, strict=True)
    assert list(sizes) == sorted(sizes) and sizes[-1] == float("inf")
    assert all(1e8 < rate < 1e14 for rate in rates)


def test_another_instruction_set_or_allocator_needs_a_new_process():
    assert machine.environment_for(None, "default") == {}
    assert machine.environment_for("avx2", "tuned").keys() == {
        "ATEN_CPU_CAPABILITY",
        "TORCHINDUCTOR_CACHE_DIR", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "PGOLF_ISA", "GLIBC_TUNABLES",
    }  # fmt: skip
    code = (
        "import torch; from benchmarks.machine import describe_machine as d; m = d('cpu'); print(m['isa'], m['malloc'])"
    )
    environment = {**os.environ, **machine.environment_for("generic", "tuned"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() in (["generic", "tuned"], ["tuned"])  # without the extension there is no level of ours


def test_a_machine_is_named_by_its_generation_too(tmp_path):
    (tmp_path / "cpuinfo").write_text("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel\t: 7\n")
    assert machine._cpu_model(tmp_path / "cpuinfo") == "AMD EPYC (family 25 model 1)"
    assert machine._cpu_model(tmp_path / "none")


def test_the_gate_alone_times_nothing(limits, monkeypatch, capfd):
    monkeypatch.setattr(bench, "measure_limits", lambda device: pytest.fail("nothing is to be timed"))
    assert bench.run(["newton_schulz"], "cpu", quick=True, gate_only=True) == []
    assert "2x128x256" in capfd.readouterr().err

    wrong = dataclasses.replace(next(importlib.import_module(CASES).cases("cpu", True)), ours={"cpu": lambda g: g})
    monkeypatch.setattr(f"{CASES}.cases", lambda device, quick: [wrong])
    with pytest.raises(AssertionError, match="newton_schulz 2x128x256: output 0 of .* has relative error"):
        bench.run(["newton_schulz"], "cpu", quick=True, gate_only=True)


@pytest.fixture
def gpu_run(tmp_path):
    """benchmarks/gpu_run.sh with programs that only write down their arguments: call(*options) -> status, commands."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    for name in ("python3", "compute-sanitizer"):
        stub = bin_folder / name
        stub.write_text(
            f'#!/bin/sh\ncase $1 in -c) exec {sys.executable} "$@" ;; esac\n'
            f'echo "{name} $*" >> {calls}\necho "[]"\ncase "$*" in *"${{FAIL:-nothing}}"*) exit 3 ;; esac\n'
        )
        stub.chmod(0o755)

    def call(*options, fail="nothing"):
        calls.write_text("")
        environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OUT": str(tmp_path), "FAIL": fail}
        command = ["bash", str(ROOT / "benchmarks/gpu_run.sh"), *options]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return run.returncode, calls.read_text().splitlines()

    return call


def test_the_gpu_session_does_everything_once_and_resumes(gpu_run, tmp_path):
    status, commands = gpu_run()
    assert status == 0
    kinds = {"setup.py build_ext": 1, "-m pytest": 1, "compute-sanitizer": 4, "benchmarks.tune": 0, "pgolf demo": 1}
    assert {kind: sum(kind in command for command in commands) for kind in kinds} == kinds
    timed = [command.split() for command in commands if "--json" in command]
    assert [command[3] for command in timed] == bench.available_ops()
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for command in commands:
        if "benchmarks.bench" in command:
            assert parser.parse_args(command.partition("benchmarks.bench ")[2].split()).device == "cuda"
    assert all(json.loads((tmp_path / f"bench-{op}.json").read_text()) == [] for op in bench.available_ops())
    assert (tmp_path / "results/slot.csv").exists()
    assert gpu_run("--resume") == (0, [])
    assert len(gpu_run("bench")[1]) == len(bench.available_ops())

    (tmp_path / "bench-slot.done").unlink()
    status, commands = gpu_run("--resume", fail="benchmarks.bench slot")
    assert status == 1 and len(commands) == 1 and not (tmp_path / "bench-slot.done").exists()
    assert gpu_run("sanitize", fail="racecheck")[0] == 1


def test_the_gpu_session_of_one_op(gpu_run):
    status, commands = gpu_run("--only", "int6_linear", "test", "sanitize", "bench", "tune")
    assert status == 0
    assert sum("tests/cpp/test_int6_linear_cuda.py" in command for command in commands) == 1
    assert {command.partition(" -m ")[2] for command in commands} >= {
        "benchmarks.bench int6_linear --device cuda --json",
        "benchmarks.tune int6_linear --write",
    }
    assert sum(command.startswith("compute-sanitizer") and "int6_linear" in command for command in commands) == 4
    assert len(commands) == 7
    assert gpu_run("--only", "matmul")[0] == gpu_run("--only")[0] == gpu_run("everything")[0] == 2
    assert gpu_run("--help") == (0, [])


def test_rows_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.append_csv({"op": "x", "shape": "1", "ms": 1.0}, "cpu")
    bench.append_csv({"op": "x", "shape": "2", "ms": 2.0}, "cpu")
    with (tmp_path / "x.csv").open() as file:
        assert [row["shape"] for row in csv.DictReader(file)] == ["1", "2"]
    with pytest.raises(ValueError, match="has the columns .* move the file away"):
        bench.append_csv({"op": "x", "other": 3}, "cpu")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op must be one of .*'step'.* got 'matmul'"):
        bench.run(["matmul"])
    assert pgolf(["bench", "matmul", "--quick"]) == 2


def test_the_command_prints_one_json_list(capfd):
    assert pgolf(["bench", "softcapped_cross_entropy", "--quick", "--json", "--peers", "torch eager"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert {row["peer"] for row in rows} == {"torch eager"} and rows[0].keys() >= COLUMNS


def test_committed_tables_are_those_of_the_rows():
    rows = table.newest_rows()
    readme = (ROOT / "README.md").read_text()
    assert table.BEGIN.format("cpu") in readme and table.BEGIN.format("gpu") in readme
    advice = "run `python -m benchmarks.table`"
    assert table.render(readme, rows) == readme, advice
    assert (ROOT / "docs/ratios.md").read_text() == table.RATIOS_INTRO + table.full_table(rows).rstrip() + "\n", advice


def test_only_the_newest_row_counts_and_the_fastest_peer_is_shown(tmp_path):
    base = dict.fromkeys(table.SAME, "same") | {"op": "slot", "isa": "", "malloc": "default", "timing": "eager"}
    base |= {"ratio_p20": 1, "ratio_p80": 2, "ms": 1, "limit_fraction": 0.5, "shape": "a", "dtype": "b", "impl": "cuda"}
    rows = [
        base | {"peer": "slow", "ratio_median": 5, "date": "1"},
        base | {"peer": "fast", "ratio_median": 9, "date": "1"},
        base | {"peer": "fast", "ratio_median": 3, "date": "2"},
    ]
    with (tmp_path / "slot.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = table.gpu_table(table.newest_rows([tmp_path / "slot.csv"])).splitlines()
    assert lines[2:] == ["| `slot` a | b | cuda | 1 | 3.00x [1.00, 2.00] | fast | 50 % |"]


def test_plot_writes_a_picture(tmp_path):
    row = {"op": "slot", "shape": "1", "dtype": "bfloat16", "impl": "cpu", "peer": "torch"}
    row |= {"ratio_median": 2.0, "ratio_p20": 1.5, "ratio_p80": 2.5}
    path = plot.plot([row], tmp_path / "ratios.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.plot([], tmp_path / "none.png")
