"""Submissions: what the folder of three real runs holds, and every check that must stop one."""

import dataclasses
import hashlib
import json
import re
import shutil

import pytest

from pgolf import ledger, run
from pgolf.audit import record
from pgolf.cli import main
from pgolf.errors import InputError
from pgolf.presets import preset
from pgolf.publish import submission
from pgolf.publish.clocks import clocks
from pgolf.publish.compliance import AUDIT
from pgolf.publish.seeds import read_seeds
from pgolf.publish.submission import NON_RECORD, Author, submit

AUTHOR = Author("A Name", "login", "Tiny", "Three tiny runs.")
TESTS = (("T1", "C1"), ("T5", "C2"), ("T6", "C3"), ("T8", "C4"), ("T10", "data"), ("T12", "budget"))
CODE_BYTES = 1234


def write_audit(run_dir, signed=True, **changes):
    """An audit.json as `pgolf audit` writes it, passed but for `changes`."""
    score = json.loads((run_dir / run.SCORES).read_text())["sliding"]
    audit = {
        "version": 1,
        "evaluator": "pgolf",
        "artifact_sha256": score["artifact_sha256"],
        "method": score["method"],
        "settings": score["settings"],
        "tokens": 2048,
        "tests": [{"name": n, "title": f"title of {n}", "condition": c, "verdict": "pass"} for n, c in TESTS],
        "verdict": "pass",
        "violated": [],
    } | changes
    (run_dir / AUDIT).write_text(json.dumps(record.seal(audit) if signed else audit | {"sha256": "0" * 64}))


@pytest.fixture(scope="module")
def trained(dataset_dir, tmp_path_factory):
    """Three seeds of a few steps, packed and scored."""
    from pgolf.artifact.pack import pack_run
    from pgolf.evaluate import evaluate
    from pgolf.train import train

    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        cfg = preset("tiny").replace(seed=seed, max_steps=3, val_tokens=1024, eval_seq_len=64, eval_stride=64)
        train(cfg, dataset_dir, root / f"s{seed}", device="cpu")
        pack_run(root / f"s{seed}", root / f"s{seed}" / run.ARTIFACT)
        evaluate(root / f"s{seed}" / run.ARTIFACT, dataset_dir, "sliding", device="cpu")
        write_audit(root / f"s{seed}")
    return root


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy that a test may spoil; the bundle is a file of CODE_BYTES bytes."""

    def write_program(run_dir, out):
        (out / submission.PROGRAM).write_bytes(b"#" * CODE_BYTES)
        return CODE_BYTES

    monkeypatch.setattr(submission, "write_program", write_program)
    shutil.copytree(trained, tmp_path / "runs")
    return [tmp_path / "runs" / f"s{seed}" for seed in (1, 2, 3)]


def refused(runs, out, pattern, **options):
    with pytest.raises(InputError, match=pattern):
        submit(runs, out, AUTHOR, **options)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_event(run_dir, event, **values):
    events = [json.loads(line) for line in (run_dir / run.LOG).read_text().splitlines()]
    lines = [json.dumps(e | values if e["event"] == event else e) for e in events]
    (run_dir / run.LOG).write_text("\n".join(lines) + "\n")


def test_the_folder_of_three_seeds(runs, tmp_path):
    out = tmp_path / "records" / "2026-01-01_Tiny"
    result = submit(runs, out, AUTHOR, against=["2.9"])
    names = {"README.md", "submission.json", "requirements.txt", submission.PROGRAM, run.TOKENIZER}
    names |= {f"{kind}_seed{s}.{end}" for s in (1, 2, 3) for kind, end in (("train", "log"), ("audit", "json"))}
    assert {p.name for p in out.iterdir()} == names == set(result["files"])

    content = json.loads((out / "submission.json").read_text())
    scores = [json.loads((r / run.SCORES).read_text())["sliding"] for r in runs]
    assert content["val_bpb"] == pytest.approx(sum(s["val_bpb"] for s in scores) / 3, abs=1e-8)
    assert content["val_loss"] == pytest.approx(sum(s["val_loss"] for s in scores) / 3, abs=1e-8)
    sizes = [(r / run.ARTIFACT).stat().st_size for r in runs]
    assert content["bytes_total"] == max(sizes) + CODE_BYTES
    assert content["bytes_code"] == CODE_BYTES
    assert content["seeds"] == [1, 2, 3]
    assert content["seed_results"]["2"]["val_bpb"] == pytest.approx(scores[1]["val_bpb"], abs=1e-8)
    assert (content["runs_started"], content["runs_reported"]) == (3, 3)
    kinds = {
        "val_bpb": float,
        "val_bpb_std": float,
        "bytes_total": int,
        "track": str,
        "seeds": list,
        "compliance": dict,
    }
    assert all(type(content[name]) is kind for name, kind in kinds.items())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    assert all(type(value) is bool for value in content["compliance"].values())
    assert content["compliance"]["c1_causal"] is True
    assert content["compliance"]["no_slot"] is True
    assert content["compliance"]["score_first_ttt"] is False  # there is no TTT in this method
    assert content["delta_bpb"] == pytest.approx(content["val_bpb"] - 2.9, abs=1e-8)

    requirements = (out / "requirements.txt").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", requirements, re.M)
    log = (out / "train_seed2.log").read_text()
    assert "seed:2 preset:tiny" in log
    assert re.search(rf"^train_shards:1 train_tokens:\d+ val_tokens:{scores[1]['tokens']}$", log, re.M)
    assert re.search(r"^step:3/3 train_loss:\d\.\d{4} train_time:\d+ms", log, re.M)
    assert f"final_int6_sliding_window_exact val_loss:{scores[1]['val_loss']:.8f}" in log
    assert re.search(r"^Serialized model int6\+brotli: \d+ bytes \(quantising:", log, re.M)


def test_the_readme_has_the_order_that_reviewers_expect(runs, tmp_path):
    submit(runs, tmp_path / "out", AUTHOR, against=["2.9"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.isascii()
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    want = ["Record: Tiny - val_bpb", "Results", "Difference to 2.9", "What changed", "Architecture", "Compliance"]
    want += ["Data", "Requirements", "Run", "Lineage", "Files"]
    assert [h[: len(w)] for h, w in zip(heads, want, strict=True)] == want
    content = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert f"**val_bpb: {content['val_bpb']:.5f}** (3-seed mean, std " in text
    assert "| Condition 1: strict causal dependence | pass | pass | pass | T1 title of T1 |" in text
    assert "| `max_steps` | 3 | 200 |" in text
    assert "3 runs are reported of 3 started" in text
    assert "one-sample t-test, one-sided, better at all: p = " in text
    assert "quantised BPB" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_compliance_is_what_the_audits_say(runs, tmp_path):
    tests = [{"name": n, "title": "", "condition": c, "verdict": "pass" if c != "C2" else "not run"} for n, c in TESTS]
    write_audit(runs[1], tests=tests)
    submit(runs, tmp_path / "out", AUTHOR)
    content = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert content["compliance"]["c2_normalised"] is False
    assert content["compliance"]["c1_causal"] is True
    assert "| pass | not run | pass |" in (tmp_path / "out" / "README.md").read_text()


def test_audits_that_stop_a_submission(runs, tmp_path):
    out = tmp_path / "out"
    write_audit(runs[0], signed=False)
    refused(runs, out, "was changed after the audit")
    write_audit(runs[0], verdict="fail", violated=["C1"])
    refused(runs, out, "did not pass; violated: C1")
    write_audit(runs[0], artifact_sha256="1" * 64)
    refused(runs, out, "is about another artifact .111111111111")
    write_audit(runs[0], settings={})
    refused(runs, out, "audits other settings: drop_val_tail is None there and False in the score")
    write_audit(runs[0], evaluator="mine:Evaluator")
    refused(runs, out, "audits the evaluator 'mine:Evaluator'")
    write_audit(runs[1], method="slot")
    write_audit(runs[0])
    refused(runs, out, "audits the method 'slot', the score is of 'sliding'")
    (runs[0] / AUDIT).unlink()
    refused(runs, out, "there is no audit")


def test_a_tampered_artifact_is_refused(runs, tmp_path):
    artifact = runs[1] / run.ARTIFACT
    damaged = bytearray(artifact.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    artifact.write_bytes(damaged)
    refused(runs, tmp_path / "out", "another artifact than artifact.pgolf, which has changed since")
    change(
        runs[1] / run.SCORES,
        sliding=json.loads((runs[1] / run.SCORES).read_text())["sliding"]
        | {"artifact_sha256": hashlib.sha256(damaged).hexdigest()},
    )
    refused(runs, tmp_path / "out", r"artifact\.pgolf: ")


def test_budgets_that_stop_a_submission(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    change_event(runs[2], "end", train_seconds=598.0, step=1000)
    submit(runs, tmp_path / "fits", AUTHOR)
    change_event(runs[2], "pack", seconds={"calibrating": 4.5, "quantising": 100.0})
    refused(runs, out, r"s3: training and calibration may take 600 s, took 601.9 s, 1.9 s too long")
    submit(runs, tmp_path / "slow", AUTHOR, track=NON_RECORD)
    content = json.loads((tmp_path / "slow" / "submission.json").read_text())
    assert content["compliance"]["train_under_600s"] is False
    assert content["track"] == NON_RECORD
    change_event(runs[2], "pack", seconds={})
    monkeypatch.setattr(submission, "write_program", lambda run_dir, out: 16_000_000)
    refused(runs, out, r"together, got [\d,]+ \+ 16,000,000 = [\d,]+, [\d,]+ too many")


def test_runs_that_stop_a_submission(runs, tmp_path):
    out = tmp_path / "out"
    refused(runs[:2], out, "2 of 3 started runs of this config are given; missing: seed 3")
    refused(runs[:2], out, "a record takes 3 seeds, got 2", allow_unreported="the third diverged")
    submit(runs[:2], tmp_path / "two", AUTHOR, track=NON_RECORD, allow_unreported="the third diverged")
    assert "The reason given for the difference: the third diverged" in (tmp_path / "two" / "README.md").read_text()
    (runs[0].parent / ledger.LEDGER).rename(tmp_path / "kept")
    refused(runs, out, "is in no ledger")
    (tmp_path / "kept").rename(runs[0].parent / ledger.LEDGER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InputError, match="new or an empty folder"):
        submit(runs, tmp_path / "full", AUTHOR)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (runs[2] / run.ARTIFACT).unlink()
    refused(runs, out, "holds no artifact.pgolf")
    change(runs[2] / run.CONFIG, matrix_lr=0.06)
    refused(runs, out, "one config, but matrix_lr is 0.05 and 0.06")


def test_clocks_by_hand(runs):
    change_event(runs[0], "end", train_seconds=590.0)
    change_event(runs[0], "pack", seconds={"calibrating": 6.5, "quantising": 3.0, "compressing": 20.0})
    change_event(runs[0], "eval", load_seconds=1.25)
    seed = read_seeds(runs).runs[0]
    seconds = seed.scores["sliding"]["seconds"]
    assert clocks(seed, "sliding") == {
        "step": round(590.0 / 3, 6),
        "train_lenient": 590.0,
        "train_strict": 596.5,
        "artifact": 619.5,
        "eval_lenient": seconds,
        "eval_strict": round(seconds + 1.25, 3),
    }
    calibrated = {"event": "calibrate", "seconds": 2.0, "batches": 64}
    seed = dataclasses.replace(seed, events=[*seed.events, calibrated])
    assert clocks(seed, "sliding")["train_strict"] == 598.5


def test_the_command(runs, tmp_path, capsys):
    words = ["submit", *map(str, runs), "--author", "A", "--github-id", "a", "--name", "T"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["submission"]["author"] == "A"
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
