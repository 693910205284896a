"""`pgolf audit` from the command line: verdicts, exit codes, the file and the page, a user's evaluator, the budgets."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import run
from pgolf.artifact.pack import pack_run
from pgolf.audit import record, t8_coverage, t10_data, t11_clocks, t12_bytes
from pgolf.audit.case import Budget, Case
from pgolf.audit.controls import TINY, VOCAB, tiny_bytes, tiny_model
from pgolf.audit.protocol import PgolfEvaluator
from pgolf.audit.verdict import TESTS, violated
from pgolf.cli import main
from pgolf.data.dataset import Dataset
from pgolf.data.shards import write_shard
from pgolf.errors import InputError
from pgolf.presets import preset
from pgolf.train import train

DOCS = Path(__file__).parent.parent.parent / "docs/auditing.md"
FAST = ("--tokens", "320", "--flips", "3", "--positions", "6", "--sample-tokens", "96")
IN_PROCESS = ("--tests", "T1,T2,T3,T5,T6,T7,T8,T9,T10,T11,T12")  # all but the two ranks, which take seconds to start


@pytest.fixture(scope="module")
def trained(dataset_dir, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("audit") / "run"
    train(preset("tiny").with_settings(["dtype=float32", "max_steps=20"]), dataset_dir, run_dir, device="cpu")
    pack_run(run_dir, run_dir / run.ARTIFACT)
    return run_dir


@pytest.fixture
def audit(trained, dataset_dir, tmp_path, capsys):
    """Run `pgolf audit` on a copy of the run; returns (exit code, stdout, stderr). `.folder` is the copy."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))

    def call(*options):
        options = ("audit", folder / run.ARTIFACT, "--data", dataset_dir, "--device", "cpu", *options)
        code = main([str(o) for o in options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    call.folder = folder
    return call


def test_a_causal_method_passes_and_is_written_down(audit):
    code, out, err = audit("--method", "slot", *FAST, "--json")
    assert code == 0, out + err
    result = json.loads(out)
    assert [t["name"] for t in result["tests"]] == [f"T{i}" for i in range(1, 13)]
    assert {t["verdict"] for t in result["tests"]} == {"pass"}, result["tests"]
    assert (result["verdict"], result["violated"], result["evaluator"]) == ("pass", [], "pgolf")
    assert result["tokens"] == 320 < result["total_tokens"]
    artifact = audit.folder / run.ARTIFACT
    assert result["bytes"]["artifact"] == artifact.stat().st_size
    assert result["bytes"]["total"] == result["bytes"]["artifact"] + result["bytes"]["code"]
    clocks = result["clocks"]
    assert clocks["eval_cold_seconds"] > clocks["eval_warm_seconds"] > clocks["score_seconds"] > 0
    assert clocks["train_seconds"] > 0 and clocks["pack_seconds"] > 0
    assert result["score"]["tokens"] == 320 and result["score"]["val_bpb"] > 0
    assert result["settings"]["slot_share"] == "window" and "ttt_lr" not in result["settings"]
    two = next(t for t in result["tests"] if t["name"] == "T4")["figures"]
    assert two["scores_changed_on_2_ranks"] == 0

    path = audit.folder / "audit.json"
    assert record.read(path, artifact) == result
    page = (audit.folder / "audit.html").read_text()
    for words in ("Condition 1: strict causal dependence", "T9 Self-sample martingale", result["sha256"]):
        assert words in page
    assert "INVALID" not in page and "<script" not in page

    changed = json.loads(path.read_text())
    changed["tests"][0]["detail"] += "!"
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="audit.json: was changed after the audit wrote it"):
        record.read(path)
    record.write(result, path)
    artifact.write_bytes(artifact.read_bytes() + b"x")
    with pytest.raises(InputError, match="audit.json: is about another artifact"):
        record.read(path, artifact)


def test_a_leaky_method_exits_with_1_and_names_the_conditions(audit):
    code, out, _ = audit("--method", "slot", "--share", "shared-context", "--tests", "T1,T7,T8", *FAST)
    assert code == 1
    assert "violated: Condition 1: strict causal dependence; Condition 3: score before update" in out
    assert re.search(r"^INVALID slot: ", out, re.M) and re.search(r"^T1  fail ", out, re.M)
    result = record.read(audit.folder / "audit.json")
    assert result["violated"] == ["C1", "C3"] and result["verdict"] == "fail"
    assert {t["name"]: t["verdict"] for t in result["tests"]}["T9"] == "not run"
    page = (audit.folder / "audit.html").read_text()
    assert "INVALID: slot" in page and "Violated: Condition 1: strict causal dependence" in page
    assert not (audit.folder / run.SCORES).exists()


def test_published_windows_are_refuted_by_t8_for_the_tail_that_they_rescore(audit):
    """By design: of 320 targets, in windows of 64 that step by 16, the last four windows all score the last 16."""
    code, out, _ = audit("--method", "sliding", "--set", "eval_windows=legacy", "--tests", "T1,T3,T7,T8", *FAST)
    assert code == 1
    result = record.read(audit.folder / "audit.json")
    failed = {t["name"]: t for t in result["tests"] if t["verdict"] == "fail"}
    assert [*failed] == ["T3", "T8"] and result["violated"] == ["C1", "C4"]
    assert "Condition 4: single left-to-right pass" in out
    assert failed["T8"]["detail"] == "16 targets were scored more than once"
    assert failed["T8"]["figures"]["missing"] == 0
    # What is scored again depends on where the text ends, not on what the rest of it says.
    assert failed["T3"]["detail"].startswith("the cut from target ")


def test_what_each_rule_of_windows_rescores():
    model, cfg = tiny_model(), TINY.replace(eval_seq_len=16, eval_stride=4)
    for rule, num_targets, repeated in (("exact", 41, 0), ("legacy", 41, 4), ("legacy-full", 41, 4), ("legacy", 16, 4)):
        evaluator = PgolfEvaluator("sliding", cfg.replace(eval_windows=rule), model, tiny_bytes())
        tokens = torch.arange(num_targets + 1) % VOCAB
        found = t8_coverage.run(Case(evaluator, tokens, VOCAB, tiny_bytes(), torch.device("cpu")))
        assert (found.figures["repeated"], found.figures["missing"]) == (repeated, 0), rule
        assert found.verdict == ("fail" if repeated else "pass")


def test_test_time_training_is_audited_where_it_has_trained(audit):
    options = ("--method", "ttt", "--set", "ttt_chunk_tokens=128", "--set", "ttt_lr=0.05", "--flips", "3")
    code, _, err = audit(*options, "--tokens", "200")
    assert code == 2 and "learns from what it has scored only after 128 tokens; audit at least 384, got 200" in err
    code, out, _ = audit(*options, "--tokens", "400", "--tests", "T1,T3,T6,T7")
    assert code == 0, out


def test_the_example_of_the_documentation_passes(audit, tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1]
    (tmp_path / "my_evaluator.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    # Small batches, so that the cache has something to learn from.
    options = ("--set", "eval_batch_windows=4", *FAST, *IN_PROCESS)
    code, out, err = audit("--evaluator", "my_evaluator:UnigramCache", *options)
    assert code == 0, out + err
    result = record.read(audit.folder / "audit.json")
    assert result["evaluator"] == "my_evaluator:UnigramCache"
    assert {t["verdict"] for t in result["tests"] if t["name"] != "T4"} == {"pass"}


def test_the_example_with_its_update_too_early_is_caught(audit, tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1]
    lines = example.splitlines()
    update = [line for line in lines if "first, end =" in line or "counts +=" in line]
    assert len(update) == 2
    lines = [line for line in lines if line not in update]
    lines[(at := next(i for i, line in enumerate(lines) if "p = 0.98" in line)) : at] = update
    (tmp_path / "early_evaluator.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    code, out, _ = audit("--evaluator", "early_evaluator:UnigramCache", "--tests", "T1,T7", "--tokens", "100")
    assert code == 1 and "Condition 1" in out and "Condition 3" in out
    assert "a learner asked for the targets" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "sliding,slot"), "one method at a time"),
        (("--method", "slt"), "method must be one of"),
        (("--tests", "T1,T14"), "tests are T1 to T12, got T14"),
        (("--evaluator", "my_evaluator"), "must read module:object"),
        (("--evaluator", "no_such_module:Thing"), "could not be loaded"),
        (("--evaluator", "builtins:str"), "must make an object with `score` and `partition`"),
    ],
)
def test_wrong_input_is_one_line(options, message, audit):
    code, out, err = audit(*options)
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert re.search(message, err)
    assert not (audit.folder / "audit.json").exists()


def test_neither_artifact_nor_controls(capsys):
    assert main(["audit"]) == 2
    assert "needs ARTIFACT and --data DIR, or --controls" in capsys.readouterr().err


def tiny_case(**fields) -> Case:
    model, tokens = tiny_model(), torch.arange(41) % VOCAB
    evaluator = PgolfEvaluator("sliding", TINY, model, tiny_bytes())
    return Case(evaluator, tokens, VOCAB, tiny_bytes(), torch.device("cpu"), **fields)


def test_documents_of_both_splits_are_found(dataset_dir, tmp_path):
    """Copy a validation document into the training shards, then take the first BOS away."""
    data = tmp_path / "data"
    shutil.copytree(dataset_dir, data)
    (data / "manifest.json").unlink()
    dataset = Dataset.open(data)
    case = tiny_case(dataset=dataset)
    fine = t10_data.run(case)
    assert fine.verdict == "pass" and fine.figures["shared_documents"] == 0, fine.detail
    documents = list(dataset.documents("val"))
    bos = dataset.tokenizer.bos_id
    extra = np.array([bos, *documents[2], bos, *documents[0]], dtype="<u2")
    write_shard(data / "fineweb_train_000099.bin", extra)
    found = t10_data.run(dataclasses.replace(case, dataset=Dataset.open(data)))
    assert found.verdict == "fail" and found.figures["shared_documents"] == 2
    unread = t10_data.run(dataclasses.replace(case, dataset=Dataset.open(data), budget=Budget(train_tokens=1000)))
    assert unread.verdict == "pass" and unread.figures["train_tokens_read"] < 20_000
    write_shard(data / dataset.val_shards[0].name, dataset.val_tokens()[1:])
    headless = t10_data.run(dataclasses.replace(case, dataset=Dataset.open(data)))
    assert headless.verdict == "fail" and "must begin with BOS" in headless.detail


def test_clocks_and_bytes_over_their_limits(tmp_path, monkeypatch):
    artifact = tmp_path / run.ARTIFACT
    artifact.write_bytes(bytes(1000))
    log = run.RunLog(tmp_path / run.LOG)
    log.write("calibrate", seconds=20.0)
    log.write("end", train_seconds=590.0, step=590)
    log.close()
    clocks = {"load_seconds": 2.0, "score_seconds": 1.0}
    case = tiny_case(artifact=artifact, clocks=dict(clocks), total_targets=40 * 100)
    found = t11_clocks.run(case)
    assert found.verdict == "fail" and "over the limit of 600 s: training" in found.detail
    assert (case.clocks["eval_warm_seconds"], case.clocks["eval_cold_seconds"]) == (100.0, 102.0)
    one_step = tiny_case(artifact=artifact, clocks=dict(clocks), budget=Budget(limit_seconds=609.0))
    assert t11_clocks.run(one_step).verdict == "pass"
    slow = tiny_case(artifact=artifact, clocks=dict(clocks), total_targets=40 * 599, budget=Budget(limit_seconds=600.5))
    assert "over the limit of 600.5 s: training, evaluation" in t11_clocks.run(slow).detail
    for total, verdict in ((16_000_000, "pass"), (16_000_001, "fail")):
        sizes = {"artifact_bytes": 1000, "code_bytes": total - 1000, "total_bytes": total, "limit_bytes": 16_000_000}
        monkeypatch.setattr(t12_bytes, "inspect", lambda path, sizes=sizes: sizes)
        assert t12_bytes.run(case).verdict == verdict


def test_which_conditions_failed_tests_stand_for():
    def results(*failed):
        return [
            {"name": t.NAME, "condition": t.CONDITION, "verdict": "fail" if t.NAME in failed else "pass"} for t in TESTS
        ]

    assert violated(results()) == []
    assert violated(results("T9")) == ["C1"]
    assert violated(results("T5", "T9")) == ["C2"]
    assert violated(results("T8", "T12", "T3")) == ["C1", "C4", "budget"]
    assert violated(results("T9", "T10")) == ["C1", "data"]
