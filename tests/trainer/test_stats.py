"""Statistics over seeds: published p-values, sums by hand, and everything that must not be reported."""

import hashlib
import json
import math

import pytest
from scipy.stats import t as student

from pgolf import ledger, run
from pgolf.cli import main
from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.presets import FACTS, preset
from pgolf.publish.significance import describe, gain_needed, p_value, seeds_needed
from pgolf.publish.stats import CHALLENGE_BYTES, lines, stats

# Bits per byte of the seeds, from the descriptions of these pull requests.
PR1736 = (1.06610, 1.06473, 1.06563)
PR1769 = (1.06356801, 1.06413130, 1.06466993, 1.06509678, 1.06516558)
PR2014 = (1.05740567, 1.05730104, 1.05807084)
PR2130 = (1.05689587, 1.05654656, 1.05664400)
PR2135 = (1.05679341, 1.05610947, 1.05662016)
TINY = preset("tiny")
TOKENS, BYTES = 1000, 2500


def make_run(path, seed, val_bpb, cfg: Config = TINY, record=True, **changes):
    """A run directory with one score. changes: of that score."""
    cfg = cfg.replace(seed=seed)
    path.mkdir(parents=True)
    (path / run.CONFIG).write_text(cfg.to_json())
    (path / run.ARTIFACT).write_bytes(b"artifact of %d" % seed)
    score = {
        "val_bpb": val_bpb,
        "val_loss": val_bpb * math.log(2) * BYTES / TOKENS,
        "tokens": TOKENS,
        "bytes": BYTES,
        "causal": True,
        "standing": "causal",
        "settings": {"eval_stride": 16},
        "artifact_sha256": hashlib.sha256(b"artifact of %d" % seed).hexdigest(),
    } | changes
    if {"tokens", "bytes"} & changes.keys():
        score["val_bpb"] = score["val_loss"] / math.log(2) * score["tokens"] / score["bytes"]
    (path / run.SCORES).write_text(json.dumps({changes.get("method", "sliding"): score}))
    log = run.RunLog(path / run.LOG)
    log.write("start", data={"sha256": "data", "tokenizer_sha256": "tokenizer"})
    log.close()
    if record:
        with ledger.Recorder(path, cfg, enabled=True) as recorder:
            recorder.start("data", lambda: 10)
    return path


@pytest.fixture
def three(tmp_path):
    return [make_run(tmp_path / f"s{i}", i, bpb) for i, bpb in enumerate((1.0, 1.001, 1.002), 1)]


@pytest.mark.parametrize(
    ("ours", "theirs", "published"),
    [(PR1769, PR1736, 0.063), (PR2135, PR2014, 0.014), (PR2135, PR2130, 0.238)],
    ids=["1769 vs 1736", "2135 vs 2014", "2135 vs 2130"],
)
def test_published_p_values(ours, theirs, published):
    assert p_value(ours, theirs) == pytest.approx(published, abs=0.0006)
    assert p_value(theirs, ours) > 0.5


def test_tests_by_hand():
    """1.000, 1.001, 1.002: mean 1.001, std 0.001, error 0.001 / sqrt(3)."""
    ours, error = (1.0, 1.001, 1.002), 0.001 / math.sqrt(3)
    got = describe(ours)
    assert (got["n"], got["mean"], got["std"]) == (3, pytest.approx(1.001), pytest.approx(0.001))
    assert got["ci95"][1] - got["mean"] == pytest.approx(4.30265 * error, rel=1e-5)
    assert p_value(ours, [1.003]) == pytest.approx(student.sf(0.002 / error, 2))
    assert p_value(ours, [1.003], 0.002) == pytest.approx(0.5)
    # Welch of two threes with the same spread has 4 degrees of freedom.
    assert p_value(ours, (1.004, 1.005, 1.006)) == pytest.approx(student.sf(0.004 / (error * math.sqrt(2)), 4))
    assert describe([1.5]) | {"mean": 0} == {"n": 1, "mean": 0, "std": None, "min": 1.5, "max": 1.5, "ci95": None}
    assert p_value([1.0], [1.1]) is None
    assert p_value([1.0, 1.0], [1.1]) is None


def test_gains_that_the_rules_ask_for():
    """0.00194 bits per byte are 0.005 nats with 8192 tokens; t is 6.965 for three seeds and 3.747 for five."""
    for std in (0.0003, 0.0006, 0.0009):
        assert gain_needed(3, std, 0.00194) == pytest.approx(0.00194 + 6.9646 * std / math.sqrt(3), abs=1e-6)
        assert gain_needed(5, std, 0.00194) == pytest.approx(0.00194 + 3.7469 * std / math.sqrt(5), abs=1e-6)


def test_seeds_needed_is_the_smallest_number_that_suffices():
    """Against a number: with std s and gain g it is the first n with g > t(n - 1) s / sqrt(n)."""
    ours = (1.0, 1.001, 1.002)
    for gap in (0.0015, 0.002, 0.003, 0.005):
        n = seeds_needed(ours, [1.001 + gap])
        assert gap > gain_needed(n, 0.001, 0.0)
        assert n == 3 or gap <= gain_needed(n - 1, 0.001, 0.0)
        certain = seeds_needed(ours, [1.001 + gap], power=0.8)
        assert certain >= n
    assert seeds_needed(ours, [1.0]) is None  # ours are worse
    assert seeds_needed(ours, [1.003], margin=0.002) is None
    # Theirs stay three, so their spread bounds what any number of ours can show.
    assert seeds_needed(PR1769, PR1736) is None
    assert seeds_needed(ours, (1.01, 1.011, 1.012)) == 3


def test_power_is_what_a_simulation_finds():
    import numpy as np
    from scipy.stats import ttest_1samp

    ours = (1.0, 1.001, 1.002)
    n = seeds_needed(ours, [1.0025], power=0.8)
    samples = np.random.default_rng(0).normal(1.001, 0.001, (4000, n))
    share = (ttest_1samp(samples, 1.0025, axis=1, alternative="less").pvalue < 0.01).mean()
    fewer = (ttest_1samp(samples[:, : n - 1], 1.0025, axis=1, alternative="less").pvalue < 0.01).mean()
    assert share > 0.78
    assert fewer < 0.82


def test_the_bar_depends_on_the_tokenizer(three):
    m = stats(three)["methods"]["sliding"]
    assert m["bytes_per_token"] == 2.5
    assert m["bar_bpb"] == pytest.approx(0.005 / math.log(2) / 2.5)
    assert m["val_loss"]["mean"] == pytest.approx(1.001 * math.log(2) * 2.5)
    a = stats(three, ["1.0049"])["methods"]["sliding"]["against"]
    assert (a["test"], a["gain_bpb"]) == ("one-sample t-test", pytest.approx(0.0039))
    assert a["gain_nats"] == pytest.approx(0.0039 * math.log(2) * 2.5)
    assert a["p_bar"] == pytest.approx(p_value((1.0, 1.001, 1.002), [1.0049], m["bar_bpb"]))
    assert not a["passes"]
    assert stats(three, ["1.02"])["methods"]["sliding"]["against"]["passes"]


def test_scores_of_a_published_system_are_of_its_text(three, tmp_path):
    with pytest.raises(InputError, match="151,080,364 bytes, sliding of 2,500"):
        stats(three, ["pr1217"])
    size = {"tokens": 62_021_632, "bytes": CHALLENGE_BYTES - 6000, "val_loss": 1.85}
    ours = [make_run(tmp_path / "real" / f"s{i}", i, 0, **size | {"val_loss": 1.85 + i / 1e4}) for i in (1, 2, 3)]
    a = stats(ours, ["pr1217"])["methods"]["sliding"]["against"]
    assert (a["name"], a["num_scores"], a["test"]) == ("pr1217", 3, "Welch's t-test")
    assert a["mean_bpb"] == pytest.approx(1.10272, abs=5e-6)
    assert a["mean_bpb"] == pytest.approx(FACTS["pr1217"].published_bpb, abs=5e-5)


def test_the_facts_of_all_published_seeds_agree():
    for name in ("pr1217", "pr1128", "pr1333", "pr675"):
        facts = FACTS[name]
        assert len(facts.seed_bpb) == 3
        assert sum(facts.seed_bpb.values()) / 3 == pytest.approx(facts.published_bpb, abs=6e-5), name  # rounded twice
        assert preset(name).seed in facts.seed_bpb


def test_references_from_files_and_runs(three, tmp_path):
    files = {
        "list": {"name": "a list", "val_bpb": [1.01, 1.011, 1.012]},
        "losses": {"val_loss": [1.01 * math.log(2) * 2], "tokens": 1250, "bytes": 2500},
        "submission": {"val_bpb": 1.011, "seed_results": {"1": {"val_bpb": 1.01}, "2": {"val_bpb": 1.012}}},
    }
    means = {}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        a = stats(three, [str(tmp_path / f"{name}.json")])["methods"]["sliding"]["against"]
        means[a["name"]] = (pytest.approx(a["mean_bpb"]), a["num_scores"])
    assert means == {"a list": (1.011, 3), "losses": (1.01, 1), "submission": (1.011, 2)}
    theirs = [make_run(tmp_path / "theirs" / f"s{i}", i, 1.01 + i / 1e4, TINY.replace(matrix_lr=0.1)) for i in (1, 2)]
    a = stats(three, [str(path) for path in theirs])["methods"]["sliding"]["against"]
    assert (a["name"], a["mean_bpb"]) == ("tiny, 2 runs", pytest.approx(1.01015))
    for content in ({"val_loss": [1.0]}, {"val_bpb": []}, {"val_bpb": "1.0"}, [], {"val_bpb": [None]}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"bad\.json: must"):
            stats(three, [str(tmp_path / "bad.json")])
    with pytest.raises(InputError, match=r"published system \(pr1217, pr1128, pr1333, pr675\).*got 'pr12'"):
        stats(three, ["pr12"])


def test_the_best_of_several_is_refused_and_the_others_are_named(three, tmp_path):
    with pytest.raises(InputError, match=r"2 of 3 started runs .*missing: seed 2 \(s2, started .* finished after 10"):
        stats([three[0], three[2]])
    result = stats([three[0], three[2]], allow_unreported="the disk failed")
    assert (result["runs_started"], result["runs_reported"]) == (3, 2)
    assert result["unreported_reason"] == "the disk failed"
    assert any("the disk failed" in line for line in lines(result))
    assert stats(three)["unreported_reason"] is None


def test_a_deleted_and_repeated_run_still_counts(three, tmp_path):
    with ledger.Recorder(three[0], TINY.replace(seed=1), enabled=True) as recorder:
        recorder.start("data", lambda: 10)  # s1 once more, in the same place
    with pytest.raises(InputError, match=r"3 of 4 started runs .*missing: seed 1 \(s1"):
        stats(three)


@pytest.mark.parametrize("kind", ["other config", "other data", "failed before its first step"])
def test_runs_that_do_not_count(three, tmp_path, kind):
    cfg = TINY.replace(seed=9, matrix_lr=0.06 if kind == "other config" else TINY.matrix_lr)
    recorder = ledger.Recorder(tmp_path / "s9", cfg, enabled=True)
    try:
        with recorder:
            recorder.start("other" if kind == "other data" else "data", lambda: 0)
            if kind.startswith("failed"):
                raise RuntimeError("out of memory")
    except RuntimeError:
        pass
    assert stats(three)["runs_started"] == 3


def test_a_run_in_no_ledger_is_said(three, tmp_path):
    alone = make_run(tmp_path / "elsewhere" / "s1", 1, 1.0, record=False)
    result = stats([alone])
    assert result["runs_started"] is None
    assert "in no ledger" in result["notes"][0]


def test_mixed_runs_are_refused_with_the_difference(three, tmp_path):
    def refused(path, pattern):
        with pytest.raises(InputError, match=pattern):
            stats([*three, path], allow_unreported="test")

    refused(
        make_run(tmp_path / "a", 4, 1.0, TINY.replace(matrix_lr=0.06)), "one config, but matrix_lr is 0.05 and 0.06"
    )
    refused(make_run(tmp_path / "b", 3, 1.0), "got seed 3 twice")
    refused(make_run(tmp_path / "c", 5, 1.0, tokens=1001), "same text, but tokens is 1000 and 1001")
    refused(make_run(tmp_path / "d", 6, 1.0, settings={"eval_stride": 8}), "but eval_stride is 16 and 8")
    refused(make_run(tmp_path / "e", 7, 1.0, method="plain"), "has no score 'sliding'")
    refused(make_run(tmp_path / "f", 8, 1.0, artifact_sha256="0" * 64), "another artifact")
    refused(make_run(tmp_path / "g", 9, math.nan), "does not add up")
    refused(make_run(tmp_path / "h", 10, 1.0, val_loss=1.0), "does not add up")
    other = make_run(tmp_path / "i", 11, 1.0)
    (other / run.LOG).write_text(
        json.dumps({"event": "start", "data": {"sha256": "x", "tokenizer_sha256": "tokenizer"}})
    )
    refused(other, "share their training data: data and x")


def test_a_leaky_score_is_reported_only_when_asked_and_then_stamped(tmp_path, capsys):
    leaky = {"method": "INVALID slot scored", "causal": False, "standing": "INVALID: sees its targets"}
    runs = [make_run(tmp_path / f"s{i}", i, 1.0 + i / 1e3, **leaky) for i in (1, 2)]
    with pytest.raises(InputError, match="holds no score to report"):
        stats(runs)
    with pytest.raises(InputError, match="is INVALID: sees its targets"):
        stats(runs, methods=["INVALID slot scored"])
    assert main(["stats", *map(str, runs), "--allow-leaky", "--against", "1.1"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "bits per byte" in line and "bar" not in line]
    assert len(shown) == 2
    assert all("INVALID" in line for line in shown)


def test_the_command_prints_one_object(three, capsys):
    assert main(["stats", *map(str, three), "--against", "1.02", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["methods"]["sliding"]["val_bpb"]["std"] == pytest.approx(0.001)
    assert main(["stats", str(three[0])]) == 2
    assert "missing: seed 2" in capsys.readouterr().err
