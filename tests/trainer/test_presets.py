"""The four published systems as presets: their sizes, the models they select, and what the table says of them.

A preset selects the model of its golden arrays if it reproduces them after nothing but its sizes were changed.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_model import SYSTEMS, load

from pgolf import run
from pgolf.cli import main
from pgolf.config import Config
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.environment import read_environment
from pgolf.errors import InputError
from pgolf.model import GPT, rotary_table
from pgolf.optimise.averaging import ExponentialAverage
from pgolf.optimise.gradients import GradientBuffer
from pgolf.optimise.groups import Optimisers
from pgolf.optimise.schedule import lr_multiplier, muon_momentum
from pgolf.presets import FACTS, PRESETS, preset
from pgolf.scoring.published import PUBLISHED as SCORING
from pgolf.trainer import Trainer

PUBLISHED = {"pr1217": 27_041_372, "pr1128": 26_928_220, "pr1333": 34_401_372, "pr675": 26_862_694}
# Counts and positions that a small model has to choose anew; everything else of a golden model is the preset's.
SIZES = (
    *("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "rope_dims", "train_seq_len"),
    *("train_batch_tokens", "xsa_last_n", "bigram_vocab_size", "bigram_dim", "ve_dim", "ve_layers"),
    *("recur_layers", "parallel_start_layer"),
)


def small(name: str, **changes: object) -> Config:
    """A preset at the size of the golden models, in float32."""
    golden = SYSTEMS[{"pr1333": "pr1333_recurrence_parallel", "pr1128": "pr1217"}.get(name, name)]
    sizes = {field: getattr(golden, field) for field in SIZES}
    return preset(name).replace(**sizes | {"bf16_tables": False, "bf16_skip_gates": False} | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert GPT.count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["pr1217", "pr675", "pr1333_recurrence_parallel", "pr1333_no_recurrence_parallel"])
def test_a_preset_selects_the_model_of_its_golden_arrays(name):
    """Logits to the arrays' own float32 rounding. #1333 is inactive before recur_start_step and active from it on."""
    arrays = load(name)
    model = GPT(small(name.partition("_")[0]))
    weights = {k[2:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w:")}
    (model.load_state_dict if "qo_bank" in weights else model.load_export)(weights)
    assert not model.recurrence_active
    model.recurrence_active = name == "pr1333_recurrence_parallel"
    model.activation_dtype = torch.float64
    logits = model.double().logits(torch.from_numpy(arrays["input_ids"]).long())
    np.testing.assert_allclose(logits.detach().numpy(), arrays["logits"], atol=4e-5)


def test_the_options_of_a_model_without_golden_arrays():
    """#1128 is #1217 with plain skips, XSA in the last four layers and the small gain."""
    a, b = preset("pr1128"), preset("pr1217")
    differ = {"skip_gates", "xsa_last_n", "qk_gain_init", "bigram_vocab_size", "bigram_dim", "bf16_skip_gates"}
    model_fields = list(Config.__dataclass_fields__)
    model_fields = model_fields[model_fields.index("vocab_size") : model_fields.index("loader")]
    assert {f for f in model_fields if getattr(a, f) != getattr(b, f)} == differ
    with torch.device("meta"):
        layers = [layer for layer, block in enumerate(GPT(a).blocks) if block.attn.exclude_self]
    assert layers == [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("name", "base"), [("pr1217", 22081.790273), ("pr1128", 22081.790273), ("pr1333", 10000.0), ("pr675", 22081.790273)]
)
def test_rope_base_at_the_training_length(name, base):
    """At position 1 the second pair of dimensions turns by base^(-2/16)."""
    cos, sin = rotary_table(preset(name), 2048, torch.device("cpu"))
    angle = torch.atan2(sin[1, 1].double(), cos[1, 1].double()).item()
    assert angle ** -(16 / 2) == pytest.approx(base, rel=1e-5)


def test_rope_of_pr1333_follows_the_training_length():
    shorter = preset("pr1333").replace(train_seq_len=512)
    raised, plain = (rotary_table(cfg, 1024, torch.device("cpu"))[0] for cfg in (shorter, preset("pr1333")))
    assert not torch.equal(raised, plain)
    assert torch.equal(raised, rotary_table(Config(rope_train_len=512), 1024, torch.device("cpu"))[0])


def test_schedules_are_those_of_the_logs():
    """Training ends at 591, 600, 590 and 600 s; #1333 warms down over two thirds of its 590."""
    assert [preset(name).train_seconds for name in PUBLISHED] == [591.0, 600.0, 590.0, 600.0]
    for share, multiplier in ((0.2, 1.0), (0.5, 0.7496), (0.8, 0.2999), (0.99, 0.0150), (1.0, 0.0)):
        assert lr_multiplier(preset("pr1333"), 2000, 590.0 * share) == pytest.approx(multiplier, abs=1e-4)
    assert lr_multiplier(preset("pr1128"), 6612, 555.8) == pytest.approx(0.1498, abs=5e-4)
    starts = next(step for step in range(7000) if lr_multiplier(preset("pr1128"), step, 0.0842 * step) < 1)
    assert starts == pytest.approx(3626, abs=1)
    assert lr_multiplier(preset("pr1217"), 6654, 591.0) == 0.0
    for name in PUBLISHED:
        momenta = [muon_momentum(preset(name), step) for step in (0, 500, 750, 1500)]
        assert momenta == pytest.approx([0.92, 0.943333, 0.955, 0.99], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "muon", "rates"),
    [
        ("pr1217", {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}, (0.03, 0.04, 0.035, 0.04, 0.025, 0.04)),
        ("pr1128", {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}, (0.025, 0.04, 0.035, 0.04, 0.025, 0.04)),
        (
            "pr1333",
            {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "ve_shared.proj.weight"},
            (0.02, 0.09, 0.03, 0.09, 0.02, 0.02),
        ),
        (
            "pr675",
            {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "bigram.proj.weight", "ve_shared.proj.weight"},
            (0.025, 0.04, 0.035, 0.04, 0.025, 0.04),
        ),
    ],
)
def test_parameter_groups_are_the_published_ones(name, muon, rates):
    model = GPT(small(name))
    optimisers = Optimisers(model, model.cfg, torch.float32)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [*optimisers.muon.param_groups, *optimisers.adamw.param_groups]
    owned = [{names[id(p)] for p in group["params"]} for group in groups]
    assert owned[0] == muon
    tables = {"tok_emb.weight", "ve_shared.embed.weight"} | ({"bigram.embed.weight"} if name != "pr1333" else set())
    assert owned[1] == tables
    assert sum(map(len, owned)) == len(names)
    assert set.union(*owned) == set(names.values())
    assert tuple(v for group in groups for v in (group["base_lr"], group["weight_decay"])) == rates
    assert optimisers.muon.param_groups[0]["row_normalize"] is (name in ("pr1217", "pr1333"))


def test_projections_of_pr675_start_scaled():
    torch.manual_seed(0)
    scaled = GPT(small("pr675"))
    torch.manual_seed(0)
    plain = GPT(small("pr675", scaled_proj_init=False))
    for (name, a), (_, b) in zip(scaled.named_parameters(), plain.named_parameters(), strict=True):
        wanted = b / math.sqrt(2 * 5) if name.endswith("proj.weight") else b
        torch.testing.assert_close(a, wanted, rtol=1e-6, atol=0)


def test_weights_start_and_tables_stay_in_bfloat16():
    torch.manual_seed(0)
    cfg = small("pr1217").replace(bf16_tables=True, bf16_skip_gates=True)
    model = GPT(cfg)
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight", "skip_gates"}
    assert {p.dtype for n, p in model.named_parameters() if n not in low} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p, p.bfloat16().to(p.dtype)), name

    gradients, optimisers = GradientBuffer(model), Optimisers(model, cfg, torch.float32)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(0, 128, (2, 32))
    for _ in range(2):  # the second has gradients behind the output projections, which start at zero
        gradients.zero()
        model(ids, ids.roll(-1, 1)).backward()
        everything = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        norm = gradients.clip(0.01)
        assert norm.item() == pytest.approx(everything.norm().item(), rel=1e-5)
        clipped = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        assert clipped.norm().item() == pytest.approx(min(0.01, norm.item()), rel=5e-3)  # bfloat16 rounds the tables'
        optimisers.step(1.0, 0.9)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == low
    assert not torch.equal(model.tok_emb.weight, start["tok_emb.weight"])
    average = ExponentialAverage(model, 0.75)
    average.load_state_tensors(start)
    average.update(1, 1.0)
    table = average.average["tok_emb.weight"]
    torch.testing.assert_close(table, 0.75 * start["tok_emb.weight"].float() + 0.25 * model.tok_emb.weight.float())
    assert not torch.equal(table, table.bfloat16().float())  # the average itself is float32
    average.copy_to_model()
    assert torch.equal(model.tok_emb.weight, table.bfloat16())
    moments = optimisers.state_tensors()
    assert moments["tok_emb.weight.exp_avg"].dtype == torch.bfloat16
    assert moments["blocks.0.attn_scale.exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "stages"),
    [
        ("pr1217", {}, "plain,slot,ttt"),
        ("pr1217", {"SLOT_ENABLED": "0", "TTT_ENABLED": "0"}, "plain,sliding"),
        ("pr1217", {"TTT_ENABLED": "0"}, "plain,slot"),
        ("pr1128", {}, "plain,sliding,slot+ttt"),
        ("pr1128", {"SLOT_ENABLED": "0"}, "plain,sliding,ttt"),
        ("pr1128", {"TTT_ENABLED": "0", "SLOT_ENABLED": "1"}, "plain,sliding,slot"),
        ("pr1333", {}, "plain,sliding,slot"),
        ("pr1333", {"SLIDING_WINDOW_ENABLED": "0"}, "plain,slot"),
        ("pr1333", {"TTT_ENABLED": "1"}, "plain,sliding,slot,ttt"),
        ("pr675", {}, "slot"),
        ("pr675", {"SLOT_ENABLED": "0"}, "sliding"),
    ],
)
def test_stages_after_training_are_the_published_ones(name, settings, stages):
    assert read_environment(settings, name).config.eval_stages == stages


@pytest.mark.parametrize("name", PUBLISHED)
def test_scoring_is_the_published_one(name):
    cfg = preset(name)
    assert {field: getattr(cfg, field) for field in SCORING[name]} == SCORING[name]


def test_presets_as_json_and_as_a_table(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == PRESETS.keys() == FACTS.keys()
    for name, parameters in PUBLISHED.items():
        assert rows[name]["parameters"] == parameters
        assert rows[name]["causal"] is False
        assert rows[name]["published_bpb"] < rows[name]["bpb_without_slot"]
        assert rows[name]["artifact_bytes"] < 16_000_000
    assert [rows[name]["published_bpb"] for name in PUBLISHED] == [1.1027, 1.1154, 1.0766, 0.5793]
    assert [rows[name]["standing"].partition(",")[0] for name in PUBLISHED] == ["open", "open", "open", "closed"]
    assert rows["demo"]["published_bpb"] is None
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}" in text and f"{parameters:,}" in text for name, parameters in PUBLISHED.items())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_knows_its_name_and_survives_json(name):
    assert preset(name).preset == name
    assert Config.from_json(preset(name).to_json()) == preset(name)


def test_a_published_preset_trains_at_small_sizes_from_the_command_line(dataset_dir, tmp_path, capsys):
    """Through `pgolf train --steps 3`, with recurrence from the second step on; `pgolf eval` scores what came out."""
    sizes = "vocab_size=512 num_layers=9 model_dim=32 num_heads=4 num_kv_heads=2 rope_dims=4 ve_dim=8 ve_layers=8"
    sizes += " train_seq_len=64 train_batch_tokens=1024 eval_seq_len=64 val_tokens=2048 warmup_steps=1"
    settings = [part for size in [*sizes.split(), "recur_start_step=1"] for part in ("--set", size)]
    data, out = str(dataset_dir), str(tmp_path / "run")
    tokenizer = ["--tokenizer", str(dataset_dir / "tokenizer.model"), "--device", "cpu"]
    train = ["train", "--preset", "pr1333", "--steps", "3", "--data", data, "--run", out]
    assert main([*train, *settings, *tokenizer]) == 0
    assert main(["pack", out]) == 0
    assert main(["eval", f"{out}/artifact.pgolf", "--data", data, "--tokens", "512", "--json", *tokenizer]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 512
    steps = [event for event in run.read_log(tmp_path / "run") if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3]  # the first ten are logged whatever log_every says
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=0.05)
    assert steps[2]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("name", ["pr1217", "pr1333"])
def test_gradients_are_clipped_before_or_after_the_mean_over_ranks(dataset_dir, name):
    """#1217 clips what each rank has, #1333 the mean: the step is taken by two ranks in turn, without a group."""
    dataset, limit = Dataset.open(dataset_dir), 0.01
    cfg = preset("tiny").replace(grad_clip_norm=limit, dtype="float32")
    cfg = cfg.replace(grad_clip_per_rank=preset(name).grad_clip_per_rank)
    sums, raw, norms = [], [], []
    for clip in (0.0, limit):
        for rank in range(2):
            trainer = Trainer(cfg.replace(grad_clip_norm=clip), dataset, Ranks(rank, 2, torch.device("cpu")))
            norm = trainer.run_step(1.0, 0.9)[1]
            (sums if clip else raw).append(trainer.gradients.flat.clone())
            norms.append(norm.item())
    for share, clipped, norm in zip(raw, sums, norms[2:], strict=True):
        own = 2 * share.norm() if name == "pr1217" else share.norm()  # a rank's share is half of its mean gradient
        assert norm == pytest.approx(own.item(), rel=1e-5)
        torch.testing.assert_close(clipped, share * limit / own)
        assert own > limit


def test_a_preset_takes_its_first_shards(dataset_dir):
    dataset = Dataset.open(dataset_dir)
    many = dataclasses.replace(dataset, train_shards=dataset.train_shards * 12)
    for shards, used in ((0, 12), (10, 10), (80, 12)):
        trainer = Trainer(preset("tiny").replace(train_shards=shards), many, Ranks(0, 1, torch.device("cpu")))
        assert len(trainer.loader.shards) == used
    assert [preset(name).train_shards for name in PUBLISHED] == [80, 80, 80, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seconds": 10.0}, "gptq_reserve_seconds must leave some of max_seconds 10 for training, got 10"),
        ({"recur_start_step": -1}, "recur_start_step must be at least 0, got -1"),
        ({"recur_layers": (4, 11)}, r"recur_layers must name layers below 11, got \(4, 11\)"),
        ({"parallel_start_layer": 11}, "parallel_start_layer must name a layer below num_layers 11, got 11"),
    ],
)
def test_impossible_changes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        preset("pr1333").replace(**changes)
