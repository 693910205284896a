"""Hessians: the published ones, those of an independent observer, where the text comes from, and what a run keeps."""

import filecmp
import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_gptq import GOLDEN, golden_hessian
from test_model import build, load

from pgolf import model as model_module
from pgolf import run
from pgolf.artifact import calibration, pack
from pgolf.artifact.calibration import (
    HESSIANS,
    collect_hessians,
    generated_batches,
    load_hessians,
    save_hessians,
    training_batches,
)
from pgolf.artifact.quantise import quantise_state, wanted_hessians
from pgolf.cli import main
from pgolf.config import Config
from pgolf.data.dataset import Dataset
from pgolf.data.loader import make_loader
from pgolf.errors import InputError
from pgolf.model import GPT
from pgolf.optimise.schedule import lr_multiplier
from pgolf.presets import preset

ALL = {"attn_gptq": True, "mlp_gptq": True, "embed_gptq": True, "float16_max_values": 0}
TINY = preset("tiny").replace(**ALL | {"float16_max_values": 1000}, dtype="float32", calibration_batches=3)


def wanted_of(config: Config, model: GPT) -> dict[str, int]:
    return wanted_hessians(config, {name: tuple(t.shape) for name, t in model.export_state().items()})


def tiny_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(TINY.replace(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # no layer is silent
    return model


# --- the sums ---


def test_hessians_and_codes_of_the_originals():
    """#1217's collector and GPTQ on its own model, from token ids to codes; it damps what it stores."""
    model = build("pr1217", load("pr1217"), "cpu", torch.float32)
    config = model.cfg.replace(attn_gptq=True, mlp_gptq=True, float16_max_values=0, gptq_damping_times=2)
    ids = torch.from_numpy(GOLDEN["model_calib_ids"].astype(np.int64))[:, :, :-1]
    hessians = collect_hessians(model, ids, wanted_of(config, model))
    assert len(hessians) == 4 * 5
    coded = quantise_state(config, model.export_state(), hessians)
    names = [key.removeprefix("model_q:") for key in GOLDEN.files if key.startswith("model_q:")]
    assert len(names) == 5
    for name in names:
        damped = hessians[name] + 0.01 * hessians[name].diagonal().mean() * torch.eye(len(hessians[name]))
        expected = golden_hessian(f"model_H:{name}")
        torch.testing.assert_close(damped, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        np.testing.assert_array_equal(coded[name].values.numpy(), GOLDEN[f"model_q:{name}"])
        np.testing.assert_array_equal(coded[name].scale.numpy(), GOLDEN[f"model_scale:{name}"])


@pytest.mark.parametrize("name", ["pr1217", "pr675", "pr1333_recurrence_parallel"])
def test_an_independent_observer_sees_the_same(name, monkeypatch):
    """Matrices are told apart by their values; recurrent layers are seen twice; lanes see their own streams."""
    model = build(name, load(name), "cpu", torch.float32)
    config = model.cfg.replace(**ALL)
    seen: dict[int, torch.Tensor] = {}

    def see(x: torch.Tensor, w: torch.Tensor) -> None:
        x = x.flatten(0, -2).double()
        seen[w.data_ptr()] = seen.get(w.data_ptr(), 0) + x.T @ x

    def linear(x, w):
        see(x, w)
        return F.linear(x, w)

    def mlp(x, w_up, w_down, negative_slope):
        hidden = F.leaky_relu(linear(x, w_up), negative_slope).square()
        return linear(hidden, w_down)

    batches = [torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    hessians = collect_hessians(model, batches, wanted_of(config, model))
    monkeypatch.setattr(model_module, "linear", linear)
    monkeypatch.setattr(model_module, "mlp", mlp)
    with torch.no_grad():
        hidden = [model.hidden(ids) for ids in batches]
    see(torch.cat(hidden), model.tok_emb.weight)
    exported = model.export_state()
    assert hessians.keys() == {n for n in exported if n in hessians}
    assert len(hessians) == 4 * config.num_layers + 1
    for key, h in hessians.items():
        expected = (seen[exported[key].data_ptr()] / 2).float()
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        if key.endswith("c_q.weight"):
            values = seen[exported[key.replace("c_q", "c_v")].data_ptr()]
            torch.testing.assert_close(values, 2 * expected.double(), rtol=1e-5, atol=1e-5)


def test_the_model_and_the_cut_into_forwards_do_not_matter():
    model = tiny_model()
    ids = torch.randint(512, (6, 64), generator=torch.Generator().manual_seed(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted, done = wanted_of(TINY, model), []
    whole = collect_hessians(model, [ids], wanted, done.append)
    assert done == [1]
    assert "matrices" not in vars(model)
    assert all(p.equal(before[name]) and p.requires_grad for name, p in model.named_parameters())
    parts = collect_hessians(tiny_model(micro_batch_tokens=64), [ids], wanted)
    split = collect_hessians(model, ids.split(2), wanted)  # three batches: a third each
    for name in wanted:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(3 * split[name], whole[name], rtol=1e-5, atol=1e-4)
    only = collect_hessians(model, [ids], {"blocks.1.mlp.proj.weight": 128})
    assert only.keys() == {"blocks.1.mlp.proj.weight"}
    torch.testing.assert_close(*(h["blocks.1.mlp.proj.weight"] for h in (only, whole)), rtol=1e-5, atol=1e-4)


def test_bad_models_and_no_batches_are_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="at least one batch is needed, got none"):
        collect_hessians(model, [], wanted_of(TINY, model))
    with torch.no_grad():
        model.qo_bank[2, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the input of blocks.2.attn.proj.weight must be finite, got NaN"):
        collect_hessians(model, [torch.zeros(1, 8, dtype=torch.int64)], {"blocks.2.attn.proj.weight": 64})


# --- the text ---


def test_training_batches_are_rank_0s_share(dataset_dir):
    """Of eight ranks when calibration_batch_tokens is an eighth, however many ranks there are here."""
    dataset = Dataset.open(dataset_dir, vocab_size=512)
    for kind in ("coprime", "sequential"):
        config = TINY.replace(loader=kind, calibration_batch_tokens=256)
        loader = make_loader(kind, dataset.train_shards, 64, 2048, 0, 8)
        ours = list(training_batches(config, dataset))
        assert len(ours) == 3
        for ids in ours:
            assert ids.shape == (4, 64)
            assert ids.equal(loader.next_batch()[0])
    whole = next(training_batches(TINY, dataset))  # 98,304 is more than there is
    assert whole.shape == (32, 64)
    uneven = next(training_batches(TINY.replace(calibration_batch_tokens=9 * 64), dataset))
    assert uneven.shape == (16, 64)  # three ranks do not divide 32 windows, two do


def test_generated_batches():
    config, model = TINY.replace(calibration_batches=10, train_seq_len=16, train_batch_tokens=64), tiny_model()
    first = list(generated_batches(config, model))
    assert [ids.shape for ids in first] == [(1, 16)] * 10
    again, other = (torch.cat(list(generated_batches(c, model))) for c in (config, config.replace(seed=7)))
    ids = torch.cat(first)
    assert ids.equal(again)
    assert not ids.equal(other)
    assert len(ids.unique(dim=0)) == 10  # the second eight are not the first eight
    many = torch.cat([i[:, :1] for i in islice(generated_batches(config.replace(calibration_batches=64), model), 64)])
    assert many.min() >= 0
    assert many.unique().numel() > 50  # uniform over 512


# --- what a run keeps ---


def test_saved_hessians_belong_to_a_model_and_a_calibration(tmp_path):
    model = tiny_model()
    wanted = wanted_of(TINY, model)
    hessians = collect_hessians(model, [torch.zeros(1, 8, dtype=torch.int64)], wanted)
    assert load_hessians(tmp_path, TINY, "a", wanted) is None
    save_hessians(tmp_path, TINY, "a", hessians)
    loaded = load_hessians(tmp_path, TINY, "a", wanted)
    assert all(loaded[name].equal(hessians[name]) for name in wanted)
    assert loaded.keys() == wanted.keys()
    assert load_hessians(tmp_path, TINY.replace(mlp_bits=5, gptq_damping=0.02), "a", {"tok_emb.weight": 64}).keys() == {
        "tok_emb.weight"
    }
    assert load_hessians(tmp_path, TINY, "b", wanted) is None
    assert load_hessians(tmp_path, TINY, "a", wanted | {"blocks.9.mlp.fc.weight": 64}) is None
    for change in ({"calibration": "generated"}, {"calibration_batches": 4}, {"calibration_batch_tokens": 64}):
        assert load_hessians(tmp_path, TINY.replace(**change), "a", wanted) is None
    (tmp_path / HESSIANS).write_bytes(b"\xff" * 50)
    with pytest.raises(InputError, match=f"{HESSIANS}: not a safetensors file"):
        load_hessians(tmp_path, TINY, "a", wanted)


def test_training_calibrates_and_packing_needs_no_data(gptq_run, tmp_path, capsys):
    """The Hessians are those of the weights that were written."""
    config = run.read_config(gptq_run)
    (event,) = (e for e in run.read_log(gptq_run) if e["event"] == "calibrate")
    assert event["batches"] == 3
    assert event["seconds"] > 0
    out = tmp_path / "a.pgolf"
    assert main(["pack", str(gptq_run), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["seconds"]) == {"calibrating", "quantising", "compressing", "accounting"}
    assert set(report["errors"]) == {"attn", "mlp", "embed", "float16"}
    assert sum(report["bytes_by_kind"].values()) == report["artifact_bytes"]

    state = pack.load_safetensors(gptq_run / run.MODEL)
    model = GPT(config)
    model.load_export(state)
    sha256 = hashlib.sha256((gptq_run / run.MODEL).read_bytes()).hexdigest()
    hessians = load_hessians(gptq_run, config, sha256, wanted_of(config, model))
    assert hessians is not None
    coded = quantise_state(config, state, hessians)
    packed = pack.read_content(out).tensors
    assert all(packed[name].values.equal(t.values) for name, t in coded.items())

    settings = ["--set", "mlp_bits=5", "--set", "attn_bits=7", "--set", "attn_gptq=false", "--set", "compressor=lzma"]
    assert main(["pack", str(gptq_run), "--out", str(tmp_path / "b.pgolf"), *settings]) == 0
    changed = pack.read_content(tmp_path / "b.pgolf")
    assert changed.header.config == config.replace(mlp_bits=5, attn_bits=7, attn_gptq=False, compressor="lzma")
    assert {changed.tensors[f"blocks.0.{n}.weight"].role for n in ("mlp.fc", "mlp.proj")} == {"int5"}
    assert changed.tensors["blocks.0.attn.c_q.weight"].role == "int7"


def test_gptq_costs_less_than_rounding_where_it_counts(gptq_run, dataset_dir):
    """More plain error, less under the Hessian, with the run's own weights and text."""
    config = run.read_config(gptq_run).replace(attn_bits=5, mlp_bits=5)
    state = pack.load_safetensors(gptq_run / run.MODEL)
    wanted = wanted_hessians(config, {name: tuple(t.shape) for name, t in state.items()})
    hessians = calibration.hessians_of_run(gptq_run, config, state, wanted, None, "cpu")
    ours = quantise_state(config, state, hessians)
    plain = quantise_state(config.replace(attn_gptq=False, mlp_gptq=False, embed_gptq=False), state)
    for name in wanted:
        e = [(state[name] - t[name].dequantize()).double() for t in (ours, plain)]
        weighted = [((x @ hessians[name].double()) * x).sum().item() for x in e]
        assert weighted[0] < 0.9 * weighted[1], name


def test_packing_calibrates_when_the_run_has_not(gptq_run, dataset_dir, tmp_path):
    """Without Hessians: refused, made from --data or by the model; the first equals what training had kept."""
    other = tmp_path / "run"
    other.mkdir()
    for name in (run.CONFIG, run.TOKENIZER, run.MODEL, run.LOG):  # the log: which kernels ran is in the artifact
        (other / name).write_bytes((gptq_run / name).read_bytes())
    with pytest.raises(InputError, match="GPTQ needs Hessians, but .* name the run's dataset with --data"):
        pack.pack_run(other, tmp_path / "a.pgolf")
    pack.pack_run(other, tmp_path / "a.pgolf", data=dataset_dir, device="cpu")
    pack.pack_run(gptq_run, tmp_path / "b.pgolf")
    assert filecmp.cmp(tmp_path / "a.pgolf", tmp_path / "b.pgolf", shallow=False)
    assert (other / HESSIANS).stat().st_size == (gptq_run / HESSIANS).stat().st_size
    settings = ["calibration=generated", "calibration_batches=2"]
    pack.pack_run(other, tmp_path / "c.pgolf", settings=settings, device="cpu")
    assert not filecmp.cmp(tmp_path / "c.pgolf", tmp_path / "b.pgolf", shallow=False)
    with pytest.raises(InputError, match="'num_layers=3' is not about the artifact"):
        pack.pack_run(other, tmp_path / "d.pgolf", settings=["num_layers=3"])


def test_the_reserve_is_taken_from_the_training_clock():
    config = Config(max_seconds=600.0, gptq_reserve_seconds=9.0, warmdown_frac=0.5)
    assert config.train_seconds == 600.0  # nothing to calibrate
    config = config.replace(mlp_gptq=True)
    assert config.train_seconds == 591.0
    assert lr_multiplier(config, 100, 591.0) == 0.0
    assert lr_multiplier(config, 100, 0.75 * 591.0) == pytest.approx(0.5)
    assert config.replace(max_seconds=0.0).train_seconds == 0.0
