"""Fitting to a number of bytes: what is predicted, that the size falls with the clip, and that the limit holds."""

import json

import pytest
import safetensors.torch
import torch
from test_gptq import correlated

from pgolf import run
from pgolf.artifact import pack
from pgolf.artifact.account import entropy_bits
from pgolf.artifact.fit import MAX_STEP, MAX_TRIES, Predictor, bisect, solve
from pgolf.artifact.quantise import quantise_state
from pgolf.cli import main
from pgolf.config import Config
from pgolf.errors import InputError

SHAPES = {
    "tok_emb.weight": (400, 256),
    "blocks.0.attn.c_q.weight": (320, 256),
    "blocks.0.mlp.fc.weight": (384, 256),
    "blocks.0.attn.gain": (8,),
}
BASE = {"attn": 12.85, "mlp": 12.85, "embed": 20.0}
CONFIG = Config(float16_max_values=1000)


def weights(tails: str) -> dict[str, torch.Tensor]:
    """Rows and columns of uneven scale, of normal or of Student's values with 4 degrees of freedom."""
    g = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in SHAPES.items():
        w = torch.randn(shape, generator=g)
        if tails == "heavy":
            w /= torch.randn(4, *shape, generator=g).square().mean(0).sqrt()
        if len(shape) == 2:
            w *= torch.rand(shape[0], 1, generator=g).add(0.2) * torch.rand(shape[1], generator=g).add(0.5)
        state[name] = 0.05 * w
    return state


def packed(state, tmp_path, multiplier: float) -> int:
    clips = {"int6_clip": 12.85, "mlp_clip": 12.85, "embed_clip": 20.0}
    config = CONFIG.replace(**{field: f"{multiplier * clip:.6g}" for field, clip in clips.items()})
    return pack.pack_state(config, state, "0" * 64, tmp_path / "a", allow_oversize=True).artifact_bytes


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_sizes_fall_with_the_clip_and_one_compression_calibrates_the_prediction(tails, tmp_path):
    state = weights(tails)
    predictor = Predictor(CONFIG, state)
    entropy = {m: predictor.code_bytes({k: m * c for k, c in BASE.items()}) for m in (0.5, 0.7, 1.0, 1.4, 2.0)}
    actual = {m: packed(state, tmp_path, m) for m in entropy}
    for sizes in (entropy, actual):
        assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    errors = {m: (actual[1.0] + entropy[m] - entropy[1.0]) / actual[m] - 1 for m in entropy}
    assert max(map(abs, errors.values())) < 0.02
    # Twice the clip is a bit less for each code.
    codes = sum(w.numel() for w in state.values() if w.ndim == 2)
    assert 8 * (entropy[0.5] - entropy[1.0]) / codes == pytest.approx(1, abs=0.05 if tails == "normal" else 0.2)


def exact_entropy(coded) -> float:
    """Bytes of all codes, each tensor's by its own histogram."""
    return sum(entropy_bits(t.values.numpy()) for t in coded.values() if t.role != "float16") / 8


def test_the_histogram_gives_the_entropy_of_the_codes():
    state = weights("heavy")
    config = CONFIG.replace(int6_clip="9", mlp_clip="11", embed_clip="30", embed_bits=7)
    predicted = Predictor(config, state).code_bytes({"attn": 9, "mlp": 11, "embed": 30})
    assert predicted == pytest.approx(exact_entropy(quantise_state(config, state)), rel=2e-3)


@pytest.mark.parametrize(("clip", "missed"), [(16.0, 0.008), (40.0, 0.06)])
def test_gptq_spreads_the_codes_and_the_histogram_knows(clip, missed):
    """With a coarse step what is fed back from column to column is nearly as large as the weights themselves."""
    state = {name: w for name, w in weights("normal").items() if ".attn.c_q" in name or ".mlp." in name}
    config = CONFIG.replace(attn_gptq=True, mlp_gptq=True, int6_clip=f"{clip:g}", mlp_clip=f"{clip:g}")
    clips, hessians = {"attn": clip, "mlp": clip}, {name: correlated(256, seed) for seed, name in enumerate(state)}
    exact, without = exact_entropy(quantise_state(config, state, hessians)), Predictor(config, state).code_bytes(clips)
    assert Predictor(config, state, hessians).code_bytes(clips) == pytest.approx(exact, rel=4e-3)
    assert without < (1 - missed) * exact
    indefinite = dict.fromkeys(hessians, -torch.eye(256))  # no factor: rounded to the nearest code
    assert Predictor(config, state, indefinite).code_bytes(clips) == without


def test_bisect_finds_the_border():
    assert bisect(lambda m: 100 / m, 40, 0.1, 10) == pytest.approx(2.5, rel=1e-9)
    assert bisect(lambda m: 100 / m, 5, 0.1, 10) == 10
    assert bisect(lambda m: 100 / m, 5000, 0.1, 10) == 0.1


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / run.CONFIG).write_text(CONFIG.to_json())
    (tmp_path / run.TOKENIZER).write_bytes(b"a tokenizer")
    safetensors.torch.save_file(weights("normal"), tmp_path / run.MODEL)
    return tmp_path


def test_the_command_fits_a_run_and_says_how_well_it_predicted(run_dir, capsys):
    program = pack.code_bytes(CONFIG)
    target = program + 190_000
    assert main(["fit", str(run_dir), "--target-bytes", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = (run_dir / run.ARTIFACT).stat().st_size
    header = pack.load_artifact(run_dir / run.ARTIFACT).header
    assert found["artifact_bytes"] == size and found["code_bytes"] == pack.code_bytes(CONFIG.replace(**found["clips"]))
    assert target * 0.995 < found["total_bytes"] <= target
    assert {field: header["config"][field] for field in found["clips"]} == found["clips"]
    clips = {field: float(clip) for field, clip in found["clips"].items()}
    assert clips["embed_clip"] / clips["int6_clip"] == pytest.approx(20 / 12.85, rel=1e-5)
    assert abs(found["error"]) < 0.01 and 1 < len(found["tries"]) <= MAX_TRIES
    assert not list(run_dir.glob("*.candidate"))
    assert run.read_log(run_dir)[-1]["settings"] == [f"{field}={clip}" for field, clip in found["clips"].items()]


def test_a_run_that_quantises_with_gptq_is_fitted_between_two_widths(gptq_run, tmp_path, capsys):
    def size(clip: float) -> int:
        settings = [f"{field}={clip:g}" for field in ("int6_clip", "mlp_clip", "embed_clip")] + ["compressor=lzma"]
        return pack.pack_run(gptq_run, tmp_path / "a", settings=settings).total_bytes

    wide, narrow = size(40), size(12)
    target, out = (wide + narrow) // 2, tmp_path / "b"
    words = ["--set", "int6_clip=12", "--set", "mlp_clip=12", "--set", "embed_clip=12", "--set", "compressor=lzma"]
    assert main(["fit", str(gptq_run), "--target-bytes", str(target), "--out", str(out), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_bytes"] == out.stat().st_size + found["code_bytes"]
    assert target * 0.998 < found["total_bytes"] <= target
    assert all(12 < float(clip) < 40 for clip in found["clips"].values())
    (multiplier, predicted, _), loaded = found["tries"][0], pack.load_run(gptq_run)
    predictor = Predictor(loaded.config, loaded.state, loaded.hessians, found["code_bytes"])  # the Hessians were used
    entropy = predictor.code_bytes(dict.fromkeys(BASE, 12 * multiplier))
    assert entropy + predictor.other_bytes == pytest.approx(predicted, abs=50)
    coded = pack.read_content(out).tensors["blocks.1.mlp.fc.weight"]  # and its codes are GPTQ's
    nearest = (loaded.state["blocks.1.mlp.fc.weight"] / coded.scale.float()[:, None]).round()
    assert (coded.values != nearest).float().mean() > 0.05


def test_a_target_out_of_reach_names_the_smallest_size_and_loses_nothing(run_dir, capsys):
    (run_dir / run.ARTIFACT).write_bytes(b"what was there")
    assert main(["fit", str(run_dir), "--target-bytes", "20000"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("pgolf: fit: the target must be at least ") and "use fewer bits" in message
    smallest = int(message.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert smallest > pack.code_bytes(CONFIG) and f"{MAX_STEP:g} standard deviations" in message
    assert (run_dir / run.ARTIFACT).read_bytes() == b"what was there" and not list(run_dir.glob("*.candidate"))


def test_sizes_that_the_predictor_cannot_know_end_in_a_sentence():
    class Report:
        total_bytes = 10**9

    predictor = Predictor(CONFIG, weights("normal"))
    with pytest.raises(InputError, match=r"the target must be at least|tries must reach"):
        solve(predictor, BASE, 200_000, lambda clips: Report(), lambda: b"")
