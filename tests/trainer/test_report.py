"""The report of a run: complete, partial, killed, hostile. Every page is parsed, and must be well-formed and alone."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from pgolf import run
from pgolf.artifact.inspect import inspect
from pgolf.artifact.pack import pack_state
from pgolf.config import Config
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.presets import PRESETS
from pgolf.publish import charts
from pgolf.publish.page import element
from pgolf.publish.report import write_report

HOSTILE = "<script>alert(1)</script>&\"'"
IMPLEMENTATIONS = {"newton_schulz": "triton", "causal_attention": "reference"}
LOSS_PER_BPB = math.log(2) * 1765432 / 654321  # ln 2 x bytes / tokens of the synthetic scores
SCORING = {"eval_seq_len": 64, "eval_stride": 16}
SLOT = {"slot_parameters": "bias", "slot_steps": 8, "slot_lr": 0.06, "slot_half_life": 96.0}
ENVIRONMENT = {
    "python": "3.12.1",
    "versions": {"torch": "2.11.0", "triton": None},
    "cpu": "Example CPU 9000",
    "device": "cuda",
    "world_size": 8,
    "gpu": "Example GPU",
    "gpu_memory_bytes": 80 * 2**30,
}


def start_event(step: int = 0, **values) -> dict:
    event = {"event": "start", "time": 1763664000.0, "step": step, "parameters": 123456, "dtype": "bfloat16"}
    return event | {"implementations": IMPLEMENTATIONS} | values


def step_event(step: int, **values) -> dict:
    event = {"event": "step", "time": 1763664000.0 + step, "step": step, "loss": 2.5 + 4 / step, "grad_norm": 0.5}
    return event | {"lr": 1.0, "step_ms": 100.0 + step % 3, "elapsed_s": 0.1 * step} | values


def end_event(step: int) -> dict:
    event = {"event": "end", "time": 1763664999.0, "step": step, "train_seconds": 321.5}
    return event | {"tokens_per_second": 54321, "val_loss": LOSS_PER_BPB * 1.234567, "val_bpb": 1.234567}


def score(method: str, val_bpb: float, **values) -> dict:
    settings = SCORING | (SLOT if method == "slot" else {})
    result = {
        "method": method,
        "val_loss": LOSS_PER_BPB * val_bpb,
        "val_bpb": val_bpb,
        "tokens": 654321,
        "bytes": 1765432,
    }
    return result | {"seconds": 98.7, "causal": True, "settings": settings} | values


def make_run(path, events, cfg: Config = PRESETS["tiny"], environment=ENVIRONMENT, scores=None, torn=""):
    """A run directory that holds what is given, and nothing for None."""
    path.mkdir(parents=True)
    (path / run.CONFIG).write_text(cfg.to_json())
    if environment is not None:
        (path / run.ENVIRONMENT).write_text(json.dumps(environment))
    if scores is not None:
        (path / run.SCORES).write_text(json.dumps({s["method"]: s for s in scores}))
    if events is not None:
        (path / run.LOG).write_text("".join(json.dumps(e) + "\n" for e in events) + torn)
    return path


class Page(HTMLParser):
    """Parses a page, refusing tags that do not match and anything that would be fetched or run."""

    VOID = {"meta", "!doctype"}

    def __init__(self, markup: str):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(markup)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id is used twice"
        fetched = re.findall(r"https?:|@import|url\((?!#)", markup)
        assert not fetched, f"the page refers to something outside: {fetched}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self._look_at(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._look_at(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def _look_at(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "img", "object")
        self.tags.append(tag)
        for name, value in attrs:
            assert name != "src" and not name.startswith("on"), f"{name}={value!r} in <{tag}>"
            assert not name.endswith("href") or value.startswith("#"), f"{name}={value!r} in <{tag}>"
            if name == "id":
                self.ids.append(value)


def page_of(run_dir) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def full_events(steps: int = 300) -> list[dict]:
    events = [start_event()]
    for step in range(1, steps + 1):
        events.append(step_event(step, step_ms=900.0 if step == 77 else 100.0 + step % 3))
    events.append({"event": "validate", "time": 1.0, "step": 100, "elapsed_s": 10.0, "val_loss": 2.9, "val_bpb": 1.4})
    return [*events, end_event(steps)]


def test_full_run(tmp_path):
    cfg = PRESETS["tiny"].replace(matrix_lr=0.0625, ve_layers=(2, 3))
    scores = [
        score("plain", 1.2411, text="raw"),
        score("sliding", 1.2022, text="raw"),
        score("slot", 1.1913, text="raw"),
    ]
    page = page_of(make_run(tmp_path / "first-run", full_events(), cfg, scores=scores))
    for expected in (
        "first-run",
        "preset tiny",
        "2025-11-20 18:40 UTC",
        "Trained weights 1.2346",
        "After int6 1.2411 +0.0065 bits/byte",
        "Sliding window 1.2022 \N{MINUS SIGN}0.0389 bits/byte",
        "Sliding + SLOT 1.1913 \N{MINUS SIGN}0.0109 bits/byte",
        "5 min 22 s 300 steps",
        "54,321 tokens per second",
        "0.12 M 123,456, trained in bfloat16",
        "1 of 300 log entries took over 1.5 times that, the slowest 900 ms per step at step 77",
        "654,321 1,765,432 98.7 windows of 64 tokens, stride 16",
        "8 steps on bias, lr 0.06, half-life 96 tokens",
        "Bits per byte are of the raw UTF-8 text.",
        "newton_schulz triton",
        "GPU memory 80.0 GiB",
        "triton none",
        "matrix_lr 0.0625 0.05",
        "ve_layers 2, 3 3",
    ):
        assert expected in page.text, expected
    assert page.tags.count("svg") == 6  # loss in two proportions, learning rate, step time, gradient norm, stages
    assert "not finished" not in page.text
    assert "muon_wd 0.04 0.04" not in page.text  # a field that is as in the preset is not listed as changed


def pack(run_dir, cfg: Config) -> dict:
    """A real artifact of fresh weights beside a synthetic log. Returns what `inspect` says about it."""
    torch.manual_seed(0)
    pack_state(cfg, GPT(cfg).export_state(), "0" * 64, run_dir / run.ARTIFACT)
    return inspect(run_dir / run.ARTIFACT)


def test_artifact(tmp_path):
    cfg = PRESETS["tiny"].replace(vocab_size=2048, mlp_mult=32.0)  # large enough for int6 and int8 tensors
    run_dir = make_run(tmp_path / "packed", full_events(), cfg)
    found = pack(run_dir, cfg)
    page = page_of(run_dir)
    size = found["artifact_bytes"]
    assert f"Artifact {size / 1e6:.2f} MB {size:,} bytes, {size / 16e6:.1%} of 16,000,000" in page.text
    assert f"{found['bits_per_parameter']:.3f} bits per value" in page.text
    for kind in found["kinds"]:
        assert f"{kind['kind']} {kind['stored_bytes']:,} {kind['stored_bytes'] / size:.1%}" in page.text
    assert {kind["kind"] for kind in found["kinds"] if kind["parameters"]} == {"int6", "int8", "float16"}
    assert "over the limit" not in page.text
    assert "The artifact has not been scored" in page.text


def test_oversize_artifact_is_said(tmp_path, monkeypatch):
    run_dir = make_run(tmp_path / "large", None)
    monkeypatch.setattr("pgolf.artifact.inspect.LIMIT_BYTES", 1000)
    found = pack(run_dir, PRESETS["tiny"])
    assert f"{-found['headroom_bytes']:,} bytes over the limit" in page_of(run_dir).text


def test_damaged_artifact_is_a_sentence(tmp_path):
    run_dir = make_run(tmp_path / "damaged", full_events())
    pack(run_dir, PRESETS["tiny"])
    data = bytearray((run_dir / run.ARTIFACT).read_bytes())
    data[-1] ^= 1
    (run_dir / run.ARTIFACT).write_bytes(data)
    assert "The artifact could not be read" in page_of(run_dir).text


def test_every_logged_step_is_drawn(tmp_path):
    """Curves come from the numbers: one far-off entry near the end widens the axis and moves the line."""
    events = full_events()
    before = write_report(make_run(tmp_path / "a" / "run", events)).read_text()
    events[290]["loss"] += 3.0
    after = write_report(make_run(tmp_path / "b" / "run", events)).read_text()
    assert before != after


def test_same_run_gives_same_bytes(tmp_path):
    run_dir = make_run(tmp_path / "run", full_events(), scores=[score("plain", 1.3)])
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_killed_run_reports_what_was_logged(tmp_path):
    events = [start_event(), *(step_event(step) for step in range(1, 41))]
    page = page_of(make_run(tmp_path / "killed", events, torn='{"event": "step", "time": 17636'))
    assert "Training has not finished: the log ends at step 40." in page.text
    assert f"{40 * PRESETS['tiny'].train_batch_tokens / 4.0:,.0f} tokens per second" in page.text
    assert "The artifact has not been scored" in page.text
    assert "The run has not been packed" in page.text
    assert page.tags.count("svg") == 5


def test_resumed_run_names_the_step_and_draws_repeated_steps_once(tmp_path):
    events = [start_event(), *(step_event(s) for s in (1, 2, 3)), start_event(step=2), *(step_event(s) for s in (3, 4))]
    page = page_of(make_run(tmp_path / "resumed", events))
    assert "interrupted and resumed at step 2." in page.text
    assert "no log entry took over" in page.text


@pytest.mark.parametrize("events", [None, [], [start_event()]], ids=["no log", "empty log", "start only"])
def test_run_without_steps(tmp_path, events):
    page = page_of(make_run(tmp_path / "empty", events, environment=None))
    assert "The log holds no training step" in page.text
    assert "no environment.json" in page.text
    assert "svg" not in page.tags


def test_single_step(tmp_path):
    assert page_of(make_run(tmp_path / "one", [start_event(), step_event(1), end_event(1)])).tags.count("svg") == 5


def test_directory_without_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_loss_that_is_not_finite(tmp_path):
    events = [step_event(s, loss=float("nan") if s > 30 else 3.0, grad_norm=float("inf")) for s in range(1, 61)]
    page = page_of(make_run(tmp_path / "nan", [start_event(), *events]))
    assert "not a finite number at step 31" in page.text
    assert "No logged gradient norm is a positive number" in page.text


def test_partial_scores_and_what_they_cover(tmp_path):
    scores = [score("plain", 1.3, tokens=1000), score("slot", 1.2, tokens=2000, text="normalised", causal=False)]
    page = page_of(make_run(tmp_path / "partial", full_events(), scores=scores))
    assert "Not scored yet: Sliding window; Sliding + SLOT." in page.text
    assert "INVALID Sliding + SLOT 1.200000" in page.text
    assert "marked INVALID is not causal" in page.text
    assert "Bits per byte are of normalised text" in page.text
    assert "do not say whether their bytes are of raw or of normalised text" in page.text
    assert "+0.0654 bits/byte" in page.text
    assert "Sliding + SLOT 1.2000" not in page.text.replace("1.200000", ""), "an INVALID score among the stages"
    scores = [score("plain", 1.3, tokens=1000), score("slot", 1.2, tokens=2000)]
    page = page_of(make_run(tmp_path / "parts", full_events(), scores=scores))
    assert "not all of the same tokens" in page.text
    assert "+0.0654" not in page.text, "a difference between scores of different texts"


def test_every_score_is_in_the_table(tmp_path):
    """All methods, variants, parts and forms that leak; only valid scores of all the text are stages."""
    ttt = {"ttt_epochs": 3, "ttt_lr": 0.002, "ttt_chunk_tokens": 32768, "ttt_focal_gamma": 2.0}
    leaky = {"causal": False, "standing": "INVALID: one fit serves overlapping windows"}
    tree = {"ctw_depth": 4, "ctw_weight": 0.1}
    results = {
        "INVALID slot shared-context": score("slot", 0.9, **leaky),
        "INVALID slot+ttt scored, first 900 tokens": score("slot+ttt", 0.8, **leaky, tokens=900),
        "sliding, first 900 tokens": score("sliding", 1.11, tokens=900),
        "ctw": score("ctw", 1.2022, settings=SCORING | tree),
        "ttt focal": score("ttt", 1.2055, settings=SCORING | ttt),
        "ttt": score("ttt", 1.1999, settings=SCORING | ttt | {"ttt_focal_gamma": 0.0}),
        "slot hashed": score("slot", 1.1888, settings=SCORING | SLOT | {"slot_buckets": 128}),
        "slot temperature": score("slot", 1.1944),
        "sliding": score("sliding", 1.2111),
        "plain": score("plain", 1.2433),
        "something new": score("something", 1.3),
    }
    run_dir = make_run(tmp_path / "all", full_events())
    (run_dir / run.SCORES).write_text(json.dumps(results))
    page = page_of(run_dir)
    titles = [
        *("Trained weights 1.234567", "After int6 1.243300", "Sliding window 1.211100"),
        *("Sliding + SLOT (hashed) 1.188800", "Sliding + SLOT (temperature) 1.194400", "Sliding + TTT 1.199900"),
        *("Sliding + TTT (focal) 1.205500", "Sliding + context tree 1.202200", "something (new) 1.300000"),
        *("Sliding window, first 900 tokens 1.110000", "INVALID Sliding + SLOT (shared-context) 0.900000"),
        "INVALID SLOT + TTT (scored), first 900 tokens 0.800000",
    ]
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    for words in (
        "INVALID: one fit serves overlapping windows",
        "a table of 128 hashed shifts",
        "3 epochs of SGD, lr 0.002, on every 32,768 tokens, focal loss, gamma 2",
        "contexts of 4 tokens, weight 0.1 at most",
    ):
        assert words in page.text
    above = page.text[: places[0]]  # the large figures and the chart
    assert "1.1999" in above and "INVALID" not in above.replace("marked INVALID", "")
    assert "0.9000" not in above and "1.1100" not in above
    assert "Not scored yet: Sliding + SLOT." in page.text  # its variants are not it


def test_scores_of_another_part_of_the_text_are_not_subtracted(tmp_path):
    """The log has no token count, but another part of the text has another number of bytes per token."""
    same, other = score("plain", 1.3), score("plain", 1.3, val_loss=1.0001 * LOSS_PER_BPB * 1.3)
    page = page_of(make_run(tmp_path / "same", full_events(), scores=[same]))
    assert "+0.0654 bits/byte" in page.text and "not all of the same tokens" not in page.text
    page = page_of(make_run(tmp_path / "other", full_events(), scores=[other]))
    assert "+0.0654 bits/byte" not in page.text and "not all of the same tokens" in page.text


def test_validation_of_a_part_is_said(tmp_path):
    page = page_of(make_run(tmp_path / "part", full_events(), PRESETS["tiny"].replace(val_tokens=4096)))
    assert "The trained weights were scored on 4,096 validation tokens at most." in page.text


def test_custom_config_is_compared_with_the_defaults(tmp_path):
    page = page_of(make_run(tmp_path / "custom", None, Config(num_layers=5)))
    assert "field this run default num_layers 5 11" in page.text


def test_unchanged_preset(tmp_path):
    assert "Every field is that of the preset tiny." in page_of(make_run(tmp_path / "same", None)).text


def test_hostile_text_stays_text(tmp_path):
    environment = {"python": HOSTILE, "versions": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE}
    events = [start_event(dtype=HOSTILE, implementations={HOSTILE: HOSTILE}), step_event(1)]
    scores = [score("slot", 1.2, settings=SCORING | SLOT | {"slot_parameters": HOSTILE})]
    run_dir = make_run(tmp_path / HOSTILE.replace("/", "|"), events, Config(preset=HOSTILE), environment, scores)
    page = page_of(run_dir)
    assert "script" not in page.tags
    assert run_dir.name in page.text
    assert page.text.count(HOSTILE) >= 8


def test_attributes_are_escaped():
    assert element("p", class_=HOSTILE) == f'<p class="{html.escape(HOSTILE)}"></p>'


def test_running_mean_is_the_mean_of_its_window():
    values = np.arange(10.0) ** 2
    smooth = charts.running_mean(values, 5)
    assert smooth[4] == pytest.approx(values[2:7].mean())
    assert smooth[0] == pytest.approx(values[:3].mean())  # fewer entries at the ends
    assert smooth[-1] == pytest.approx(values[-3:].mean())
