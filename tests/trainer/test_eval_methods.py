"""`pgolf eval` with every method: what leaks is refused or marked, stages have clocks, ranks agree on the bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pgolf import run
from pgolf.artifact.pack import pack_run
from pgolf.cli import main
from pgolf.evaluate import load_model
from pgolf.presets import preset
from pgolf.train import train

TOKENS = ("--tokens", "900")
TTT = ("--set", "ttt_chunk_tokens=256", "--set", "ttt_epochs=1", "--set", "ttt_lr=0.05", "--set", "eval_slices=2")


@pytest.fixture(scope="module")
def trained(dataset_dir, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("methods") / "run"
    cfg = preset("tiny").with_settings(["dtype=float32", "max_steps=30"])
    train(cfg, dataset_dir, run_dir, device="cpu")
    pack_run(run_dir, run_dir / run.ARTIFACT)
    return run_dir


@pytest.fixture
def evaluate(trained, dataset_dir, tmp_path, capsys):
    """Run `pgolf eval` on a copy of the artifact; returns (exit code, stdout, stderr) and the folder."""
    shutil.copy(trained / run.ARTIFACT, tmp_path)

    def call(*options):
        code = main(
            [str(o) for o in ("eval", tmp_path / run.ARTIFACT, "--data", dataset_dir, "--device", "cpu", *options)]
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    call.folder = tmp_path
    return call


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "slot", "--share", "shared-context"),
        ("--method", "slot", "--share", "shared-all"),
        ("--method", "slot", "--share", "scored"),
        ("--method", "slot+ttt", "--share", "shared-context", *TTT),
        ("--method", "sliding,slot", "--share", "scored"),
        ("--method", "slot", "--set", "slot_optimizer=lbfgs-joint"),
        ("--method", "slot", "--set", "slot_optimizer=hypergradient"),
        ("--method", "stages", "--published", "pr1333"),
    ],
)
def test_leaky_methods_are_refused_before_any_work(options, evaluate):
    code, out, err = evaluate(*options, *TOKENS)
    assert code == 2 and out == ""
    assert "INVALID" in err and "--allow-leaky" in err and err.count("\n") == 1
    assert not (evaluate.folder / run.SCORES).exists()


def test_a_leaky_score_is_marked_wherever_it_is_written(evaluate):
    code, out, err = evaluate("--method", "sliding,slot", "--share", "scored", "--allow-leaky", *TOKENS)
    assert code == 0 and all(line.startswith("INVALID") for line in err.splitlines())
    sliding, slot, _ = out.splitlines()
    assert "INVALID" not in sliding and slot.startswith("INVALID slot:")
    code, out, _ = evaluate("--method", "slot", "--share", "scored", "--allow-leaky", "--json", *TOKENS)
    result = json.loads(out)
    assert result["causal"] is False and result["standing"].startswith("INVALID") and result["share"] == "scored"
    kept = json.loads((evaluate.folder / run.SCORES).read_text())
    assert set(kept) == {"sliding, first 900 tokens", "INVALID slot scored, first 900 tokens"}
    assert kept["INVALID slot scored, first 900 tokens"]["causal"] is False
    assert kept["sliding, first 900 tokens"]["standing"] == "causal"
    # It has seen what it predicts, and shows it.
    assert result["val_bpb"] < kept["sliding, first 900 tokens"]["val_bpb"] - 0.1


def test_stages_run_in_order_with_their_clocks(evaluate):
    stages = ("--set", "eval_stages=plain,sliding,ttt,slot+ttt")
    code, out, err = evaluate("--method", "stages", *stages, *TTT, *TOKENS, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [stage["method"] for stage in result["stages"]] == ["plain", "sliding", "ttt", "slot+ttt"]
    assert result["causal"] and result["standing"] == "causal"
    assert all(stage["seconds"] > 0 and stage["tokens"] == 900 for stage in result["stages"])
    assert result["load_seconds"] > 0
    total = sum(stage["seconds"] for stage in result["stages"]) + result["load_seconds"]
    assert result["seconds"] >= total - 0.01
    alone = json.loads(evaluate("--method", "ttt", *TTT, *TOKENS, "--json")[1])
    assert alone["val_loss"] == result["stages"][2]["val_loss"], "an earlier stage changed the model"
    losses = {stage["method"]: stage["val_loss"] for stage in result["stages"]}
    assert losses["ttt"] < losses["sliding"] < losses["plain"]
    assert "ttt_lr" in alone["settings"] and "slot_lr" not in alone["settings"]


def test_published_negative_results_are_one_command_each(evaluate):
    """Each keeps a score of its own beside the method's."""
    options = ("--method", "slot,ttt,ctw", "--set", "slot_buckets=8", "--parameters", "delta", *TTT, *TOKENS)
    assert evaluate(*options, "--set", "ttt_focal_gamma=2")[0] == 0
    assert evaluate("--method", "slot", "--set", "slot_parameters=temperature", "--lr", "0.1", *TOKENS)[0] == 0
    kept = json.loads((evaluate.folder / run.SCORES).read_text())
    names = ("slot hashed", "ttt focal", "ctw", "slot temperature")
    assert {f"{name}, first 900 tokens" for name in names} <= kept.keys()
    assert len({kept[f"{name}, first 900 tokens"]["val_loss"] for name in names}) == 4
    assert all(kept[f"{name}, first 900 tokens"]["causal"] for name in names)


def test_published_scoring_lies_over_an_artifact(evaluate):
    options = ("--set", "eval_stride=16", "--set", "eval_windows=legacy", *TOKENS, "--json")
    code, out, err = evaluate("--method", "slot", "--published", "pr1217-window", *options)
    assert code == 0, err
    result = json.loads(out)
    assert result["tokens"] == 64 + 55 * 16 + 4  # the first window, those from 16 to 880, and the one at 896
    assert result["settings"]["slot_normalize"] == "batch" and result["settings"]["eval_slices"] == 8
    assert evaluate("--method", "slot", "--published", "pr1218")[0] == 2


def test_the_dtype_of_a_score_can_be_set(evaluate):
    losses = {
        dtype: json.loads(evaluate("--method", "plain", "--set", f"dtype={dtype}", *TOKENS, "--json")[1])["val_loss"]
        for dtype in ("float32", "bfloat16")
    }
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 0.02


def test_unknown_methods_are_one_line(evaluate):
    code, _, err = evaluate("--method", "sliding,slt")
    assert code == 2 and "slot+ttt, ctw or stages, got 'slt'" in err and err.count("\n") == 1
    code, _, err = evaluate("--method", "slot", "--share", "everything")
    assert code == 2 and "slot_share must be one of" in err


def test_the_artifacts_model_stays_as_it_is(evaluate):
    before = load_model(evaluate.folder / run.ARTIFACT, torch.device("cpu"))[0].state_dict()
    assert evaluate("--method", "ttt", *TTT, *TOKENS)[0] == 0
    after = load_model(evaluate.folder / run.ARTIFACT, torch.device("cpu"))[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_train_and_score_the_same_bits(evaluate, dataset_dir, run_pgolf):
    """With two slices a rank computes one gradient each; their sum has a fixed order, so has every total."""
    options = ("--data", dataset_dir, "--device", "cpu", "--method", "slot+ttt", *TTT, *TOKENS, "--json")
    two = json.loads(run_pgolf(evaluate.folder / run.ARTIFACT, *options, ranks=2, module="pgolf.evaluate").stdout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of torchrun here
    one = json.loads(evaluate(*options[4:])[1])
    torch.set_num_threads(threads)
    assert (two["world_size"], one["world_size"]) == (2, 1)
    for key in ("val_loss", "val_bpb", "tokens", "bytes"):
        assert two[key] == one[key], key


def test_options_of_a_fit_mean_a_bias(evaluate):
    """The default, a cache, has no steps: an option that would be without effect must not look as if it had one."""

    def parameters(*options: str) -> str:
        code, out, err = evaluate("--method", "slot", "--json", *options, *TOKENS)
        assert code == 0, err
        return json.loads(out)["settings"]["slot_parameters"]

    assert [parameters(*o) for o in ((), ("--share", "carried"))] == ["cache", "cache"]
    assert [parameters(*o) for o in (("--steps", "2"), ("--share", "frontier"))] == ["bias", "bias"]
    assert parameters("--lr", "0.01", "--parameters", "delta") == "delta"
