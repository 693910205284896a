"""The trainer as its users run it: processes that are killed, resumed, multiplied, and given wrong input."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from safetensors.torch import load_file

from pgolf import distributed, run
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.errors import InputError
from pgolf.optimise import checkpoint
from pgolf.presets import preset
from pgolf.train import train
from pgolf.trainer import micro_batch_windows

STEPS = 12


def losses(run_dir: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in run.read_log(run_dir) if e["event"] == "step"}


def arguments(dataset_dir: Path, run_dir: Path, *more: object) -> list:
    return ["train", "--preset", "tiny", "--data", dataset_dir, "--run", run_dir, "--set", "val_tokens=2048", *more]


@pytest.fixture(scope="module")
def reference_run(dataset_dir, tmp_path_factory) -> Path:
    """One uninterrupted run of STEPS steps on one rank, in float32."""
    out = tmp_path_factory.mktemp("reference") / "run"
    command = arguments(dataset_dir, out, "--steps", STEPS, "--set", "dtype=float32")
    subprocess.run([sys.executable, "-m", "pgolf", *map(str, command)], env=environment(), check=True, timeout=300)
    return out


def test_a_run_directory_holds_what_it_promises(reference_run):
    for name in (run.CONFIG, run.ENVIRONMENT, run.LOG, run.TOKENIZER, run.MODEL):
        assert (reference_run / name).stat().st_size > 0, name
    assert run.read_config(reference_run).preset == "tiny"
    events = run.read_log(reference_run)
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    assert events[-1]["event"] == "end"
    assert np.isfinite(events[-1]["val_bpb"])
    chosen = next(e for e in events if e["event"] == "implementations")["implementations"]
    assert {"leaky_relu2_mlp", "newton_schulz_banks", "softcapped_cross_entropy", "causal_attention"} <= chosen.keys()
    values = list(losses(reference_run).values())
    assert values[0] == pytest.approx(np.log(512), abs=0.2)
    assert values[-1] < values[0] - 0.5


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(reference_run, dataset_dir, tmp_path, run_pgolf):
    """SIGKILL after the checkpoint of step 4, then --resume: every loss and the final weights have the same bits."""
    out = tmp_path / "killed"
    command = arguments(dataset_dir, out, "--steps", STEPS, "--set", "dtype=float32", "--set", "checkpoint_every=4")
    process = subprocess.Popen([sys.executable, "-m", "pgolf", *map(str, command)], env=environment())
    deadline = time.monotonic() + 120
    while not (checkpoint.latest(out) and len(losses(out)) >= 6):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.latest(out).name < f"step_{STEPS:08d}"

    run_pgolf("train", "--data", dataset_dir, "--run", out, "--resume")
    assert losses(out) == losses(reference_run)
    ours, theirs = load_file(out / run.MODEL), load_file(reference_run / run.MODEL)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_that_died_before_its_first_checkpoint_resumes_from_the_start(reference_run, dataset_dir, tmp_path):
    run.write_atomically(tmp_path / run.CONFIG, (reference_run / run.CONFIG).read_bytes())
    train(run.read_config(tmp_path), dataset_dir, tmp_path, resume=True, device="cpu")
    np.testing.assert_allclose([*losses(tmp_path).values()], [*losses(reference_run).values()], rtol=2e-5)


@pytest.mark.parametrize("loader", ["coprime", "sequential"])
def test_two_ranks_give_the_losses_of_one(dataset_dir, tmp_path, run_pgolf, loader):
    """Real processes over gloo. Sums over ranks are ordered differently, so equal to float32 tolerance only."""
    settings = ["--steps", 6, "--set", "dtype=float32", "--set", f"loader={loader}"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_pgolf(*arguments(dataset_dir, one, *settings))
    under_torchrun = ["--run-dir" if a == "--run" else a for a in arguments(dataset_dir, two, *settings)[1:]]
    run_pgolf(*under_torchrun, ranks=2, module="pgolf.train")
    assert losses(one).keys() == losses(two).keys()
    np.testing.assert_allclose([*losses(two).values()], [*losses(one).values()], rtol=2e-5)
    ends = [run.read_log(d)[-1] for d in (one, two)]
    assert ends[0]["val_loss"] == pytest.approx(ends[1]["val_loss"], rel=2e-5)


def test_gradient_accumulation_does_not_change_the_losses(reference_run, dataset_dir, tmp_path, run_pgolf):
    out = tmp_path / "accumulated"
    more = ["--steps", 4, "--set", "dtype=float32", "--set", "micro_batch_tokens=512", "--set", "warmdown_frac=0"]
    run_pgolf(*arguments(dataset_dir, out, *more, "--set", "warmdown_steps=0"))
    first = [losses(reference_run)[step] for step in range(1, 5)]
    np.testing.assert_allclose([*losses(out).values()], first, rtol=2e-5)


@pytest.mark.parametrize(("windows", "tokens", "want"), [(32, 2048, 32), (32, 1024, 16), (30, 1024, 15), (7, 128, 1)])
def test_micro_batches_divide_the_batch(windows, tokens, want):
    assert micro_batch_windows(windows, preset("tiny").replace(micro_batch_tokens=tokens)) == want


def test_a_time_budget_ends_the_run_and_warms_down(dataset_dir, tmp_path, run_pgolf):
    out = tmp_path / "timed"
    run_pgolf(*arguments(dataset_dir, out, "--seconds", 2, "--set", "warmup_steps=1"))
    steps = [e for e in run.read_log(out) if e["event"] == "step"]
    end = run.read_log(out)[-1]
    assert 2.0 <= end["train_seconds"] < 2.0 + 3 * steps[-1]["step_ms"] / 1e3 + 1
    assert steps[0]["lr"] == 1.0
    assert steps[-1]["lr"] < 0.5
    # the warm-up step was undone: the first loss is that of an untrained model
    assert steps[0]["loss"] == pytest.approx(np.log(512), abs=0.2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "dmeo"], "unknown preset 'dmeo'; did you mean 'demo'?"),
        (["--set", "modle_dim=3"], "unknown field 'modle_dim'; did you mean 'model_dim'?"),
        (["--set", "num_layers=many"], "num_layers must be a whole number, got 'many'"),
        (["--set", "num_heads=3"], "must be a multiple of num_heads 3"),
        (["--set", "vocab_size=1024"], "vocab_size must be the tokenizer's 512, got 1024"),
        (["--set", "drop_val_tail=true", "--set", "eval_seq_len=2097152"], "validation needs at least 2097153 tokens"),
        (["--set", "train_seq_len=2097152", "--set", "train_batch_tokens=2097152"], "use more text"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(dataset_dir, tmp_path, capsys, more, message):
    from pgolf.cli import main

    out = tmp_path / "run"
    assert main([str(a) for a in arguments(dataset_dir, out, "--device", "cpu", *more)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not out.exists()


@pytest.fixture
def unreadable(monkeypatch):
    """Whatever opens data fails the test: a refusal must come before."""

    def fail(*arguments, **options):
        pytest.fail("data was opened before the refusal")

    monkeypatch.setattr(Dataset, "open", fail)


@pytest.mark.parametrize(("windows", "ranks"), [(32, 3), (32, 64), (1, 2)])
def test_ranks_that_do_not_divide_the_batch_are_refused_before_data_is_read(
    tmp_path, monkeypatch, unreadable, windows, ranks
):
    monkeypatch.setattr(distributed, "start", lambda device: Ranks(0, ranks, torch.device("cpu")))
    cfg = preset("tiny").replace(train_batch_tokens=64 * windows)
    message = f"train_batch_tokens {64 * windows} must be a multiple of train_seq_len x ranks = 64 x {ranks}; use --set"
    with pytest.raises(InputError, match=message):
        train(cfg, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("recur_layers=1,4", r"recur_layers must name layers below 4, got (1, 4)"),
        ("recur_layers=-1", r"recur_layers must name layers below 4, got (-1,)"),
        ("parallel_start_layer=4", "parallel_start_layer must name a layer below num_layers 4, got 4"),
        ("parallel_start_layer=-1", "parallel_start_layer must be at least 0, got -1"),
        ("attn_bits=4", "attn_bits must lie in 5..8, got 4"),
        ("mlp_bits=9", "mlp_bits must lie in 5..8, got 9"),
        ("embed_bits=1", "embed_bits must lie in 5..8, got 1"),
        ("loader=random", "loader must be one of ['coprime', 'sequential', 'shuffled'], got 'random'"),
        ("average=mean", "average must be one of ['ema', 'lawa', 'none', 'swa'], got 'mean'"),
        ("qat=late", "qat must be one of ['hard', 'none', 'soft'], got 'late'"),
    ],
)
def test_impossible_values_are_refused_before_data_is_read(tmp_path, capsys, unreadable, setting, message):
    from pgolf.cli import main

    assert main([str(a) for a in arguments(tmp_path, tmp_path / "run", "--set", setting)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_preset_is_refused_before_data_is_read(reference_run, tmp_path, unreadable):
    shutil.copytree(reference_run / "checkpoints", tmp_path / "run/checkpoints")
    cfg = preset("demo").replace(max_steps=STEPS)
    run.write_atomically(tmp_path / "run" / run.CONFIG, cfg.to_json().encode())
    with pytest.raises(
        InputError, match="belongs to another run: its preset is 'tiny', this run's 'demo'; put the run's"
    ):
        train(cfg, tmp_path, tmp_path / "run", resume=True, device="cpu")
    theirs = run.read_config(reference_run).replace(seed=99)
    run.write_atomically(tmp_path / "run" / run.CONFIG, theirs.to_json().encode())
    with pytest.raises(InputError, match="its seed is 1337, this run's 99"):
        train(theirs, tmp_path, tmp_path / "run", resume=True, device="cpu")


def test_resume_refuses_another_tokenizer(reference_run, dataset_dir, tmp_path):
    """Of as many pieces, but not the run's."""
    shutil.copytree(reference_run, tmp_path / "run")
    (tmp_path / "run" / run.TOKENIZER).write_bytes(b"another model of 512 pieces")
    with pytest.raises(InputError, match="its tokenizer is not the one that .* was trained with; use the data of that"):
        train(run.read_config(reference_run), dataset_dir, tmp_path / "run", resume=True, device="cpu")


def test_missing_data_says_how_to_make_it(tmp_path, capsys):
    from pgolf.cli import main

    assert main([str(a) for a in arguments(tmp_path / "nowhere", tmp_path / "run")]) == 2
    assert "pgolf data stdlib" in capsys.readouterr().err


def test_a_run_is_never_overwritten(reference_run, dataset_dir, capsys):
    from pgolf.cli import main

    before = (reference_run / run.LOG).read_bytes()
    assert main([str(a) for a in arguments(dataset_dir, reference_run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (reference_run / run.LOG).read_bytes() == before


def test_resume_refuses_other_settings(reference_run, dataset_dir, capsys):
    from pgolf.cli import main

    command = arguments(dataset_dir, reference_run, "--resume")
    assert main([str(a) for a in command]) == 2
    assert "--resume continues the run as it was configured" in capsys.readouterr().err


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on file sizes makes the write fail half way, as a full disk does."""
    tensors = {"w": torch.randn(1000)}
    checkpoint.save(tmp_path, 1, tensors, {"elapsed_s": 1.0})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="the previous one, step_00000001, is untouched"):
            checkpoint.save(tmp_path, 2, {"w": torch.randn(100_000)}, {"elapsed_s": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    kept, state = checkpoint.load(tmp_path)
    assert torch.equal(kept["w"], tensors["w"])
    assert state["step"] == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_damaged_checkpoint_says_so(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.randn(10)}, {})
    path = checkpoint.latest(tmp_path) / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "other")


def test_torn_and_repeated_log_lines(tmp_path):
    lines = [{"event": "step", "step": s, "loss": v} for s, v in ((1, 5.0), (2, 4.0), (3, 3.5), (2, 4.0), (3, 3.25))]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"event": "st'
    (tmp_path / run.LOG).write_text(text)
    assert losses(tmp_path) == {1: 5.0, 2: 4.0, 3: 3.25}
