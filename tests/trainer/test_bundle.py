"""`pgolf bundle`: one file that scores to the same bits where nothing of ours is installed, and its counted bytes."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf import run
from pgolf.artifact import pack
from pgolf.cli import main
from pgolf.errors import InputError
from pgolf.parts import needed_parts
from pgolf.presets import preset
from pgolf.publish import bundle, inline, native
from pgolf.publish.bundle import PLAIN, PROGRAM, unwrap, write_bundle
from pgolf.train import train

TOKENS = ("--tokens", "900")


@pytest.fixture(scope="module")
def trained(dataset_dir, tmp_path_factory) -> Path:
    """A packed run whose matrices and embedding are coded."""
    run_dir = tmp_path_factory.mktemp("bundle") / "run"
    cfg = preset("tiny").with_settings(["dtype=float32", "max_steps=3", "warmup_steps=0", "float16_max_values=512"])
    train(cfg, dataset_dir, run_dir, device="cpu")
    pack.pack_run(run_dir, run_dir / run.ARTIFACT)
    return run_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Run a script in an interpreter that has this one's libraries, and neither pgolf nor pgolf_kernels."""
    libraries = tmp_path_factory.mktemp("libraries")
    for folder in map(Path, sys.path):
        for entry in folder.iterdir() if folder.name == "site-packages" else ():
            ours = entry.name.lower().replace("-", "_").startswith(("pgolf", "__editable__"))
            if not ours and entry.suffix != ".pth" and not (libraries / entry.name).exists():
                (libraries / entry.name).symlink_to(entry)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONPATH": str(libraries), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(libraries / ".cache")}

    def call(folder: Path, *arguments: object, settings: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-S", *map(str, arguments)],  # -S: no site-packages, and no .pth file in them
            cwd=folder,
            env=environment | (settings or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    probe = "import importlib.util as u, torch; print([u.find_spec(n) for n in ('pgolf', 'pgolf_kernels')])"
    found = call(libraries, "-c", probe)
    assert found.stdout == "[None, None]\n", found.stderr
    return call


def scores(folder: Path) -> dict:
    return json.loads((folder / run.SCORES).read_text())


def alone(source: Path, folder: Path, form: str = "wrapped", **options) -> bundle.BundleReport:
    """A folder with the bundle and the artifact, and nothing else."""
    report = write_bundle(source, folder, form=form, **options)
    shutil.copy(source / run.ARTIFACT, folder)
    assert sorted(p.name for p in folder.iterdir()) == [run.ARTIFACT, PROGRAM]
    return report


def test_compiled_kernels_score_to_the_same_bits_in_an_empty_directory(copy, dataset_dir, tmp_path, elsewhere):
    assert main(["eval", str(copy / run.ARTIFACT), "--data", str(dataset_dir), "--device", "cpu", *TOKENS]) == 0
    folder = tmp_path / "empty"
    report = alone(copy, folder)
    assert report.kernels["leaky_relu2_mlp"] == ["cpu"] and "slot" not in report.kernels
    arguments = (PROGRAM, "--eval", run.ARTIFACT, "--data", dataset_dir, "--device", "cpu", *TOKENS)
    done = elsewhere(folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = scores(copy)["sliding, first 900 tokens"], scores(folder)["sliding, first 900 tokens"]
    assert (
        theirs["implementations"].items() <= ours["implementations"].items()
        and "cpu" in theirs["implementations"].values()
    )
    assert (theirs["val_loss"], theirs["val_bpb"]) == (ours["val_loss"], ours["val_bpb"])
    assert done.stderr.count("compiling") == 1 and "setup.py" not in done.stderr
    assert "compiling" not in elsewhere(folder, *arguments).stderr


def test_reference_kernels_need_no_compiler(copy, dataset_dir, tmp_path, elsewhere):
    folder = tmp_path / "empty"
    report = alone(copy, folder, "plain", kernels="reference")
    assert report.native_files == 0 and report.counted_bytes == report.plain_bytes == (folder / PROGRAM).stat().st_size
    options = ("--eval", run.ARTIFACT, "--data", dataset_dir, "--device", "cpu", *TOKENS)
    done = elsewhere(folder, PROGRAM, *options, settings={"CXX": "no-compiler"})
    assert done.returncode == 0, done.stderr[-3000:]
    from pgolf.evaluate import evaluate
    from pgolf_kernels import dispatch

    with dispatch.forced("reference"):
        ours = evaluate(copy / run.ARTIFACT, dataset_dir, "sliding", limit=900, device="cpu")
    assert scores(folder)["sliding, first 900 tokens"]["val_loss"] == ours["val_loss"]


def test_it_trains_packs_and_scores_by_variables_and_counts_itself(copy, dataset_dir, tmp_path, elsewhere):
    folder = tmp_path / "empty"
    report = alone(copy, folder, kernels="reference")
    variables = {"SEED": "7", "ITERATIONS": "2", "DATA_PATH": str(dataset_dir), "RUN_ID": "mine", "EVAL_STRIDE": "64"}
    done = elsewhere(folder, PROGRAM, "--device", "cpu", settings=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("final_"))
    assert {"final_int6_roundtrip_exact", "final_int6_sliding_window_exact"} <= set(lines)
    cfg = run.read_config(folder / "runs/mine")
    assert (cfg.seed, cfg.max_steps, cfg.eval_stride) == (7, 2, 64)
    size = (folder / "runs/mine" / run.ARTIFACT).stat().st_size
    assert f"Total submission size int6+brotli: {size + report.counted_bytes} bytes" in done.stdout


def test_what_was_left_out_is_refused_before_any_work(copy, dataset_dir, tmp_path, elsewhere):
    folder = tmp_path / "empty"
    alone(copy, folder, kernels="reference")
    options = ("--data", dataset_dir, "--device", "cpu", *TOKENS)
    done = elsewhere(folder, PROGRAM, "--eval", run.ARTIFACT, "--method", "slot", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "must do without slot_cache" in done.stderr
    variables = {"TTT_ENABLED": "1", "DATA_PATH": str(dataset_dir)}
    done = elsewhere(folder, PROGRAM, "--set", "loader=shuffled", settings=variables)
    assert done.returncode == 2 and "must do without shuffled loader, ttt" in done.stderr
    assert not (folder / "runs").exists()
    damaged = bytearray((folder / run.ARTIFACT).read_bytes())
    damaged[-1] ^= 1
    (folder / run.ARTIFACT).write_bytes(damaged)
    done = elsewhere(folder, PROGRAM, "--eval", run.ARTIFACT, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "SHA-256" in done.stderr


def test_tracebacks_name_modules_and_show_their_lines(copy, tmp_path, elsewhere):
    alone(copy, tmp_path / "empty", "plain", kernels="reference")
    code = "import runpy; runpy.run_path('train_gpt.py'); import pgolf.model as m, inspect"
    code += "; print(inspect.getsource(m.mlp)); from pgolf_kernels import extension as e"
    code += "; print(e.WHY_NOT_CPU); print(e.WHY_NOT_CUDA); m.GPT(None)"
    done = elsewhere(tmp_path / "empty", "-c", code)
    assert done.stdout.startswith("def mlp(x, w_up, w_down, negative_slope):")
    # There is no setup.py beside a bundle.
    for line, name, kernels in zip(done.stdout.splitlines()[-2:], ("CPU", "CUDA"), ("cpu", "gpu"), strict=True):
        assert line == (
            f"the {name} extension is not available (this program was bundled without it; `pgolf bundle RUN --kernels "
            f"{kernels}` makes one with it)"
        )
    assert "train_gpt.py/pgolf/model.py" in done.stderr and "AttributeError" in done.stderr


def test_the_wrapper_unfolds_to_the_plain_program(copy, tmp_path):
    report = write_bundle(copy, tmp_path / "out", kernels="reference")
    wrapped, plain = ((tmp_path / "out" / name).read_bytes() for name in (PROGRAM, PLAIN))
    assert (report.wrapped_bytes, report.plain_bytes, report.counted_bytes) == (len(wrapped), len(plain), len(wrapped))
    assert unwrap(wrapped) == plain and wrapped.count(b"\n") == 2
    assert b"rich" not in b"".join(line for line in plain.splitlines() if line.startswith(b"import"))


def test_stripping_keeps_every_module_as_it_is_but_for_words():
    """A stripped module differs from its source in docstrings and in the annotations of functions alone."""
    modules = inline.gather(("pgolf.script",), bundle.NEVER)
    assert len(modules.sources) > 80
    for name, stripped in modules.sources.items():
        tree = ast.parse(inline._file(name).read_text())
        if not inline._hands_on(tree):
            expected = ast.unparse(ast.fix_missing_locations(inline._Stripper().visit(tree)))
            assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(expected)), name


def test_sources_that_are_not_here_and_records_that_say_nothing_are_sentences(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CSRC", tmp_path / "no-sources")
    bundle._render.cache_clear()
    with pytest.raises(InputError, match="used compiled kernels of .*leaky_relu2_mlp.* installed without them"):
        write_bundle(copy, tmp_path / "out")
    (copy / run.LOG).unlink()
    with pytest.raises(InputError, match="neither a log nor scores.json says which implementations"):
        write_bundle(copy, tmp_path / "out")
    damaged = bytearray((copy / run.ARTIFACT).read_bytes())
    damaged[-1] ^= 1
    (copy / run.ARTIFACT).write_bytes(damaged)
    with pytest.raises(InputError, match="SHA-256"):
        write_bundle(copy, tmp_path / "out", kernels="reference")
    assert not (tmp_path / "out").exists()


def test_an_artifact_alone_says_what_its_run_used(copy, tmp_path):
    whole = write_bundle(copy, tmp_path / "a", form="wrapped")
    (tmp_path / "alone").mkdir()
    shutil.copy(copy / run.ARTIFACT, tmp_path / "alone")
    report = write_bundle(tmp_path / "alone" / run.ARTIFACT, tmp_path / "b", form="wrapped")
    assert (tmp_path / "a" / PROGRAM).read_bytes() == (tmp_path / "b" / PROGRAM).read_bytes()
    assert report.kernels == whole.kernels
    header = pack.load_artifact(copy / run.ARTIFACT).header
    assert report.counted_bytes == pack.code_bytes(run.read_config(copy), header["extra"])


def test_parts_follow_the_config_and_the_methods():
    cfg = preset("tiny")
    assert needed_parts(cfg) == {"coprime loader"}
    assert needed_parts(cfg.replace(loader="shuffled"), ["slot+ttt"]) == {"shuffled loader", "slot_cache", "ttt"}
    assert needed_parts(cfg.replace(slot_parameters="bias"), ["slot"]) == {"coprime loader", "slot"}
    assert needed_parts(cfg.replace(attn_gptq=True, calibration="generated", target_bytes=1)) == {
        "coprime loader",
        "gptq",
        "generated",
        "pruning",
    }
