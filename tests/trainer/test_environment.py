"""The originals' environment variables: which field each sets, what is refused, and their own commands, run small."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file

from pgolf import run
from pgolf.config import FIELDS, Config
from pgolf.data.shards import find_shards, open_shard, shard_name, write_shard
from pgolf.environment import edit_distance, read_environment
from pgolf.environment_names import NAMES, Choice, Detail, Field, Ignored, Same, Switch
from pgolf.errors import InputError
from pgolf.presets import preset
from pgolf.script import free_directory, main

# The commands as published, but for the script's path and --preset.
COMMANDS = {
    "pr1217": "QK_GAIN_INIT=5.0 SLOT_ENABLED=1 SLOT_STEPS=8 SLOT_LR=0.005 SEED=1337",
    "pr1128": (
        "SEED=1337 SLOT_ENABLED=1 SLOT_LR=0.003 SLOT_STEPS=5 CTW_WEIGHT=0 NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=1536 "
        "XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50 ROPE_DIMS=16 LN_SCALE=1 LATE_QAT=1 "
        "LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 TTT_ENABLED=1 TTT_LR=0.002 TTT_EPOCHS=3 "
        "TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0 MUON_WD=0.04 "
        "ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 "
        "MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3500 ITERATIONS=9000 "
        "MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64"
    ),
    "pr1333": (
        "SEED=42 RECUR_LAYERS=4,5 RECUR_START_STEP=3000 PARALLEL_START_LAYER=7 "
        "SLOT_ENABLED=1 SLOT_LR=0.008 SLOT_STEPS=16"
    ),
    "pr675": "SEED=1337",
}
SMALL = (
    "VOCAB_SIZE=512 NUM_LAYERS=9 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4 MLP_MULT=2 VE_DIM=8 VE_LAYERS=8 "
    "TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 EVAL_STRIDE=48 TRAIN_BATCH_TOKENS=1024 WARMUP_STEPS=1 ITERATIONS=2"
)


def variables(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in shlex.split(text))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_asks_for_its_preset(name):
    """The presets hold the published values, so the published commands change nothing."""
    assert read_environment(variables(COMMANDS[name]), name).config == preset(name)


def test_the_table_is_sound():
    for name, rule in NAMES.items():
        assert name == name.upper()
        if isinstance(rule, Field | Switch | Same | Choice | Detail):
            assert rule.name in FIELDS, name
        if isinstance(rule, Field) and rule.scale != 1:
            assert FIELDS[rule.name] is float, name


@pytest.mark.parametrize("name", [name for name, rule in NAMES.items() if isinstance(rule, Field)])
def test_every_field_takes_its_value(name):
    """Each name alone moves its own field and no other."""
    rule, base = NAMES[name], preset("pr1128")
    current = getattr(base, rule.name)
    others = {bool: "0" if current else "1", str: "brotli", tuple[int, ...]: "1,2"}
    text = "0.5" if name == "EMA_DECAY" else others.get(FIELDS[rule.name], str(2 * current or 3))
    if rule.scale != 1:
        text = "3000"
    config = read_environment({name: text}, "pr1128").config
    assert {field for field in FIELDS if getattr(config, field) != getattr(base, field)} == {rule.name}


def test_values_override_the_preset():
    request = read_environment(
        variables("RECUR_LAYERS= GPTQ_RESERVE_MS=2500 LN_SCALE=0 VE_ENABLED=0 VE_DIM=64 ADAM_EPS=1e-6 COMPRESSOR=lzma"),
        "pr1333",
    )
    wanted = {"recur_layers": (), "gptq_reserve_seconds": 2.5, "ln_scale": False, "ve_dim": 0, "adam_eps": 1e-6}
    assert request.config == preset("pr1333").replace(**wanted, compressor="lzma")
    assert read_environment({"VE_ENABLED": "1"}, "pr1333").config.ve_dim == 128
    assert read_environment({"VE_ENABLED": "1", "VE_DIM": "0"}, "pr1333").config.ve_dim == 128


def test_where_data_and_runs_lie():
    assert str(read_environment({}, "pr1333").data) == "data/datasets/fineweb10B_sp4096"
    assert str(read_environment({"DATA_DIR": "/d", "VOCAB_SIZE": "2048"}, "pr1217").data) == (
        "/d/datasets/fineweb10B_sp2048"
    )
    request = read_environment({"DATA_PATH": "here", "TOKENIZER_PATH": "t.model", "RUN_ID": "x"}, "pr675")
    assert (str(request.data), str(request.tokenizer), request.run_id) == ("here", "t.model", "x")


def test_names_without_effect_are_reported_once_each():
    request = read_environment(variables(COMMANDS["pr1128"]), "pr1128")
    reported = [note.partition("=")[0] for note in request.notes]
    assert len(set(reported)) == len(reported)
    assert set(reported) == {
        name for name in variables(COMMANDS["pr1128"]) if isinstance(NAMES[name], Ignored | Detail)
    }
    assert {"EMA_ENABLED", "SWA_EVERY", "LATE_QAT"} < set(reported)
    assert read_environment({"MATRIX_LR_EARLY": "0.025"}, "pr1217").config == preset("pr1217")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SLOT_STEP=8", "unknown name SLOT_STEP; the nearest known one is SLOT_STEPS: rename or unset it"),
        ("SLOT_LEARNING_RATE=1", "unknown name SLOT_LEARNING_RATE; the nearest known one is SLOT_"),
        ("TTT_RANK=96", "unknown name TTT_RANK; the nearest known one is TTT_"),
        ("ITERATOINS=9000", "unknown name ITERATOINS; the nearest known one is ITERATIONS"),
        ("MATRIX_LRS=0.1", "unknown name MATRIX_LRS; the nearest known one is MATRIX_LR"),
        ("SEDE=1", "unknown name SEDE; the nearest known one is SEED"),
        ("seed=1", "unknown name seed; the nearest known one is SEED"),
        ("SEED=", "SEED must be a whole number, got ''"),
        ("NUM_LAYERS=eleven", "NUM_LAYERS must be a whole number, got 'eleven'"),
        ("MATRIX_LR=nan", "MATRIX_LR must be a number, got 'nan'"),
        ("LN_SCALE=maybe", "LN_SCALE must be true or false, got 'maybe'"),
        ("VE_LAYERS=a,b", "VE_LAYERS must be numbers separated by commas, got 'a,b'"),
        ("VE_LAYERS=9,11", "VE_LAYERS=9,11: config: ve_layers must name layers below 11"),
        ("RECUR_LAYERS=4,11", "RECUR_LAYERS=4,11: config: recur_layers must name layers below 11"),
        ("PARALLEL_START_LAYER=11", "PARALLEL_START_LAYER=11: config: parallel_start_layer must name a layer below"),
        ("COMPRESSOR=zip", "COMPRESSOR=zip: config: compressor must be one of"),
        ("MAX_WALLCLOCK_SECONDS=5", "gptq_reserve_seconds must leave some of max_seconds 5"),
        ("TIE_EMBEDDINGS=0", "TIE_EMBEDDINGS must be 1, got '0': an untied head"),
        ("EMBEDDING_DIM=256", "EMBEDDING_DIM must be 512, got 256: projections"),
        ("GPTQ_RESERVE_MS=9000 GPTQ_RESERVE_SECONDS=10", "must agree with GPTQ_RESERVE_MS: both set"),
        ("WARMDOWN_ITERS=4000", "WARMDOWN_ITERS has no effect beside a WARMDOWN_FRAC of 0.667"),
    ],
)
def test_refusals_name_the_variable_and_what_must_hold(text, message, monkeypatch, capsys):
    for name, value in variables(text).items():
        monkeypatch.setenv(name, value)
    assert main(["--preset", "pr1333", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train_gpt: environment: ")
    assert error.count("\n") == 1


def test_an_ordinary_environment_is_left_alone():
    """What shells, schedulers, launchers and libraries set."""
    others = """
        HOME PATH PWD OLDPWD USER LOGNAME LANG TERM TZ SHELL EDITOR MAIL HOSTNAME DISPLAY VIRTUAL_ENV PYTHONPATH
        PYTHONHASHSEED CUDA_VISIBLE_DEVICES NCCL_DEBUG OMP_NUM_THREADS OMP_WAIT_POLICY MASTER_ADDR MASTER_PORT RANK
        LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID TORCH_HOME XDG_DATA_DIRS
        XDG_RUNTIME_DIR SLURM_JOB_ID NUM_WORKERS MODEL_DIR DATA_ROOT WANDB_API_KEY HF_HOME http_proxy PGOLF_ISA
    """
    assert read_environment(dict.fromkeys(others.split(), "1"), "pr675").config == preset("pr675")


def test_an_unknown_preset_says_which_there_are():
    with pytest.raises(InputError, match="unknown preset 'pr1334'; did you mean 'pr1333'"):
        read_environment({}, "pr1334")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "abc", 3), ("SEED", "SEED", 0), ("SEDE", "SEED", 1), ("RATS", "STAR", 3), ("A", "BC", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_a_free_directory_is_found(tmp_path):
    cfg = Config(preset="p", seed=3)
    found = []
    for _ in range(3):
        found.append(free_directory(tmp_path, cfg))
        run.write_atomically(found[-1] / run.CONFIG, b"{}")
    assert [path.name for path in found] == ["p_seed3", "p_seed3_2", "p_seed3_3"]


@pytest.fixture(scope="module")
def short_data(dataset_dir, tmp_path_factory):
    """The dataset with 4,097 validation tokens, in the challenge's layout; the tokenizer lies where that has it."""
    root = tmp_path_factory.mktemp("short")
    folder = root / "datasets/fineweb10B_sp512"
    folder.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    for path in find_shards(dataset_dir, "train"):
        shutil.copy(path, folder)
    write_shard(folder / shard_name("val", 0), open_shard(find_shards(dataset_dir, "val")[0])[:4097])
    shutil.copy(dataset_dir / "tokenizer.model", root / "tokenizers/fineweb_512_bpe.model")
    return folder


def script(data, cwd, settings: str, *arguments: str, ranks: int = 0) -> str:
    """stdout of `SETTINGS [torchrun] python/train_gpt.py ARGUMENTS` with a working directory of its own."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.run(
        [*launcher, str(ROOT / "python/train_gpt.py"), *arguments, "--device", "cpu"],
        env=environment() | variables(settings) | {"DATA_PATH": str(data)},
        **{"cwd": cwd, "capture_output": True, "text": True, "timeout": 300},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_command_of_pr1333_on_two_ranks(short_data, tmp_path):
    """All stages over gloo."""
    out = script(short_data, tmp_path, f"{COMMANDS['pr1333']} {SMALL}", "--preset", "pr1333", ranks=2)
    lines = out.splitlines()
    starts = ["step:0/2 val_loss:", "step:1/2 train_loss:", "step:2/2 train_loss:", "DIAGNOSTIC post_ema val_loss:"]
    starts += [
        "Serialized model int6+brotli: ",
        "Total submission size int6+brotli: ",
        "final_int6_roundtrip val_loss:",
    ]
    starts += ["final_int6_roundtrip_exact ", "final_int6_sliding_window val_loss:", "final_int6_sliding_window_exact "]
    starts += ["final_int6_slot val_loss:", "final_int6_slot_exact "]
    found = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert found == sorted(found)
    assert sum(line.startswith("step:2/2") for line in lines) == 1  # printed by rank 0 only

    folder = tmp_path / "runs/pr1333_seed42"
    scores = json.loads((folder / run.SCORES).read_text())
    leaky = "INVALID slot shared-context"  # as published: its batches see each other's targets
    assert scores.keys() == {"plain", "sliding", leaky}
    (line,) = [line for line in lines if line.startswith("final_int6_slot_exact")]
    assert line.startswith(f"final_int6_slot_exact val_loss:{scores[leaky]['val_loss']:.8f}") and "INVALID" in line
    assert scores[leaky]["settings"]["slot_steps"] == 16
    assert scores[leaky]["world_size"] == 2
    assert run.read_config(folder) == read_environment(variables(f"{COMMANDS['pr1333']} {SMALL}"), "pr1333").config
    assert run.trained_steps(folder) == 2


@pytest.mark.parametrize("name", ["pr1217", "pr1128", "pr675"])
def test_the_other_commands_on_one_rank(short_data, tmp_path, name, monkeypatch, capsys):
    """#1217's is also that of no preset named."""
    for variable, value in variables(f"{COMMANDS[name]} {SMALL}").items():
        monkeypatch.setenv(variable, value)
    shutil.copytree(short_data, tmp_path / "elsewhere")
    monkeypatch.setenv("DATA_PATH", "elsewhere")  # not a name that says where the tokenizer is
    monkeypatch.setenv("TOKENIZER_PATH", str(short_data.parent.parent / "tokenizers/fineweb_512_bpe.model"))
    monkeypatch.setenv("RUN_ID", "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu", *(["--preset", name] if name != "pr1217" else [])]) == 0
    out = capsys.readouterr().out
    stages = [
        line.split()[0] for line in out.splitlines() if line.startswith(("final_", "legal_")) and "_exact" not in line
    ]
    roundtrip, sliding, slot = "final_int6_roundtrip", "final_int6_sliding_window", "final_int6_slot"
    published = {
        "pr1217": [roundtrip, slot, "legal_ttt"],
        "pr1128": [roundtrip, sliding, "legal_ttt_slot"],
        "pr675": [slot],
    }
    assert stages == published[name]
    assert ("EMA_ENABLED=1 has no effect" in out) == (name == "pr1128")
    weights = load_file(tmp_path / "runs/mine" / run.MODEL)
    assert all(
        torch.equal(w, w.bfloat16().float()) for n, w in weights.items() if n.endswith(("emb.weight", "embed.weight"))
    )
    assert not torch.equal(weights["blocks.0.attn.c_q.weight"], weights["blocks.0.attn.c_q.weight"].bfloat16().float())
