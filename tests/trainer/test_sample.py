"""Sampling against the distribution it draws from, captured steps against plain ones, `pgolf sample` as users do it."""

import io
import json

import numpy as np
import pytest
import torch
from numerics import DEVICES
from scipy.stats import chisquare
from test_kv_cache import TINY, int6_matrices, padded, random_ids, random_model
from test_model import SYSTEMS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf import run
from pgolf.artifact.pack import pack_state
from pgolf.cli import main
from pgolf.data.dataset import Dataset
from pgolf.errors import InputError
from pgolf.generate import choose, draw, generate, packed_is_faster
from pgolf.kv_cache import WINDOW
from pgolf.presets import preset

NOWHERE = "no such thing"


def test_generate_multiplies_by_the_packed_matrices_it_is_given():
    """Other matrices than the model's give other tokens; the model's own give its own."""
    model = random_model(TINY, torch.float32)
    packed, other = int6_matrices(model), int6_matrices(random_model(TINY, torch.float32, seed=5))
    ids = random_ids(model, 2, 3)
    dense = generate(model, ids, 24, temperature=0)
    assert torch.equal(generate(model, ids, 24, temperature=0, packed=packed), dense)
    assert torch.equal(generate(model, ids, 24, temperature=0, packed=other), dense) != packed_is_faster(model, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_depends_on_nothing_beside_it(device):
    model = random_model(TINY, device=device)
    prompts = random_ids(model, 5, 4)
    together = generate(model, prompts, 12, seed=3)
    assert together.shape == (5, 16)
    assert torch.equal(together[:, :4], prompts)
    for n in range(1, 5):
        assert torch.equal(generate(model, prompts[:n], 12, seed=3), together[:n])
    assert torch.equal(generate(model, prompts, 7, seed=3), together[:, :11])
    changed = prompts.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 128
    assert torch.equal(generate(model, changed, 12, seed=3)[1:], together[1:])


def test_the_seed_alone_decides():
    model = random_model(TINY, torch.float32)
    model.train().requires_grad_(True)
    ids = random_ids(model, 2, 1)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    first = generate(model, ids, 30, seed=1)
    torch.rand(7)
    assert torch.equal(generate(model, ids, 30, seed=1), first)
    assert not torch.equal(generate(model, ids, 30, seed=2), first)
    # and calling it changed neither the model nor the caller's generator
    torch.set_rng_state(state)
    drawn = torch.rand(3)
    torch.set_rng_state(state)
    generate(model, ids, 2)
    assert torch.equal(torch.rand(3), drawn)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name]), name


def test_draws_are_streams_of_their_own():
    draws = draw(7, 50, 1000)
    assert draws.dtype == torch.float64
    assert 0 < draws.min() < 1e-3
    assert 0.999 < draws.max() <= 1
    assert torch.equal(draws[:20, :400], draw(7, 20, 400))
    assert draws.unique().numel() == draws.numel()
    assert not torch.isin(draw(8, 50, 1000), draws).any()


def tokens_of(logits: list[float], uniform: list[float], **options) -> list[int]:
    """What each number falls on."""
    rows = torch.tensor(logits).expand(len(uniform), -1)
    return choose(rows, torch.tensor(uniform, dtype=torch.float64)[:, None], **options)[:, 0].tolist()


def log(*probabilities: float) -> list[float]:
    return np.log(probabilities).tolist()


def test_numbers_fall_on_tokens_by_cumulated_probability():
    with np.errstate(divide="ignore"):
        logits = log(0, 0.5, 0, 0.3, 0.2, 0)
    assert tokens_of(logits, [1e-300, 0.49, 0.51, 0.79, 0.81, 1.0], temperature=1) == [1, 1, 3, 3, 4, 4]
    assert tokens_of(log(0.8, 0.2), [0.89, 0.97], temperature=0.5) == [0, 1]  # 16 : 1
    assert tokens_of(log(0.8, 0.2), [0.66, 0.67], temperature=2) == [0, 1]  # 2 : 1
    assert tokens_of(log(0.2, 0.4, 0.4), [1.0], temperature=0) == [1]
    for temperature in (1e-4, 1e-320):
        assert tokens_of([29.0, 30.0, -30.0], [1e-9, 1.0], temperature=temperature) == [1, 1]


def test_top_k_keeps_exactly_the_k_likeliest():
    logits = log(0.1, 0.4, 0.2, 0.2, 0.1)
    grid = torch.linspace(0.001, 1, 1000).tolist()
    assert set(tokens_of(logits, grid, temperature=1, top_k=1)) == {1}
    assert set(tokens_of(logits, grid, temperature=1, top_k=2)) == {1, 2}  # of equals the lowest id
    assert set(tokens_of(logits, grid, temperature=1, top_k=3)) == {1, 2, 3}
    for all_of_them in (0, 5, 6):
        assert set(tokens_of(logits, grid, temperature=1, top_k=all_of_them)) == {0, 1, 2, 3, 4}
    counts = np.bincount(tokens_of(logits, grid, temperature=1, top_k=2), minlength=5)
    np.testing.assert_allclose(counts / 1000, [0, 2 / 3, 1 / 3, 0, 0], atol=0.002)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = log(0.08, 0.5, 0.25, 0.13, 0.04)
    grid = torch.linspace(0.001, 1, 1000).tolist()

    def kept(top_p: float, **options) -> set[int]:
        return set(tokens_of(logits, grid, temperature=1, top_p=top_p, **options))

    assert kept(1e-9) == {1}
    assert kept(0.49) == {1}
    assert kept(0.51) == {1, 2}
    assert kept(0.74) == {1, 2}
    assert kept(0.76) == {1, 2, 3}
    assert kept(0.99) == {0, 1, 2, 3, 4}
    assert kept(0.65, top_k=2) == {1}  # of the two, the first has two thirds
    assert kept(0.67, top_k=2) == {1, 2}
    counts = np.bincount(tokens_of(logits, grid, temperature=1, top_p=0.7), minlength=5)
    np.testing.assert_allclose(counts / 1000, [0, 2 / 3, 1 / 3, 0, 0], atol=0.002)
    # the temperature comes first: at 0.5 the first token has more than 0.7 alone
    assert set(tokens_of(logits, grid, temperature=0.5, top_p=0.7)) == {1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_pairs_of_tokens_have_the_distribution_of_the_full_forward(options, device):
    """6,000 sequences of two tokens over a vocabulary of six, counted against the product of exact probabilities."""
    temperature, num = 0.7, 6000
    model = random_model(TINY.replace(vocab_size=6, bigram_vocab_size=30, logit_softcap=3.0), torch.float32, device)
    prompt = torch.tensor([[2, 5]], device=device)
    pairs = generate(model, prompt.repeat(num, 1), 2, temperature=temperature, seed=11, **options)[:, 2:].cpu()
    observed = np.bincount(6 * pairs[:, 0] + pairs[:, 1], minlength=36)

    def expected(temperature: float) -> np.ndarray:
        joint = np.zeros((6, 6))
        for a in range(6):
            ids = torch.tensor([[2, 5, a]], device=device)
            first, second = (model.logits(ids)[0, 1:].double().cpu() / temperature).softmax(-1)
            joint[a] = limited(first.numpy(), **options)[a] * limited(second.numpy(), **options)
        return num * joint.ravel()

    possible = expected(temperature) > 0
    assert observed[~possible].sum() == 0
    assert chisquare(observed[possible], expected(temperature)[possible]).pvalue > 0.01
    wrong = expected(1.3 * temperature)[possible] + 1e-9
    assert chisquare(observed[possible], wrong * num / wrong.sum()).pvalue < 1e-4, "this test would not see a wrong one"


def limited(p: np.ndarray, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    keep = order[: top_k or None] if top_k else order[before < top_p]
    q = np.zeros_like(p)
    q[keep] = p[keep]
    return q / q.sum()


class Recording(TorchDispatchMode):
    """A CUDA graph on any device: the operations of a step with their very tensors, to be run again, host unseen.

    Operations that write are undone after the recording, because a capture does not run what it captures.
    """

    def __init__(self, step):
        super().__init__()
        self.operations, written = [], []
        self.written = written
        with self:
            step()
        for tensor, value in reversed(written):
            tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def __call__(self):
        for func, args, kwargs, out in self.operations:
            inputs = {
                t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
            }
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["pr675", "pr1333_recurrence_parallel"])
def test_a_captured_step_is_the_step(name, options, monkeypatch):
    """Replays see tensors only: a position, length or token that the host had put into the step would be frozen."""
    for module in ("generate", "kv_cache"):
        monkeypatch.setattr(f"pgolf.{module}.WINDOW", 8)
    model = random_model(SYSTEMS[name], torch.float32)
    prompt, captured, replayed = random_ids(model, 2, 5), [], []

    def capture(step):
        captured.append(recording := Recording(step))

        def replay():
            replayed.append(recording)
            recording()

        return replay

    tokens = generate(model, prompt, 20, capture=capture, **options)
    assert torch.equal(tokens, generate(model, prompt, 20, **options))
    # 24 positions take part: 5 at once, then windows of 8, 16 and 24, the first step of each as it is.
    assert (len(captured), len(replayed)) == (3, 19 - 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_cuda_graph_gives_the_tokens_of_plain_steps(name, dtype, monkeypatch, caplog):
    for module in ("generate", "kv_cache"):
        monkeypatch.setattr(f"pgolf.{module}.WINDOW", 16)
    model = random_model(SYSTEMS[name], dtype, "cuda")
    prompt = random_ids(model, 4, 5)
    tokens = generate(model, prompt, 40, temperature=0.8)
    assert "uncaptured" not in caplog.text
    assert torch.equal(tokens, generate(model, prompt, 40, temperature=0.8, capture=lambda step: step))


def test_a_step_that_cannot_be_captured_runs_as_it_is(caplog):
    model = random_model(TINY)
    prompt = random_ids(model, 2, 5)

    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    tokens = generate(model, prompt, 20, capture=capture)
    assert torch.equal(tokens, generate(model, prompt, 20))
    assert "not permitted when stream is capturing" in caplog.text


def test_more_tokens_than_a_window_holds():
    model = random_model(TINY.replace(train_seq_len=WINDOW + 40, train_batch_tokens=WINDOW + 40))
    tokens = generate(model, random_ids(model, 1, WINDOW - 20), 60, temperature=0, capture=lambda step: step)
    assert torch.equal(tokens[:, WINDOW - 20 :], model.logits(tokens)[:, WINDOW - 21 : -1].argmax(-1))


def test_progress_is_told_token_by_token():
    model, told = random_model(TINY), []
    generate(model, random_ids(model, 1, 2), 5, on_progress=lambda *done: told.append(done))
    assert told == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, r"prompt must be int64 \[B, T0\].*got torch.int64 \(2, 0\)"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"prompt must be int64 \[B, T0\]"),
        ({"prompt": torch.zeros(1, 3)}, "prompt must be int64.*got torch.float32"),
        ({"prompt": torch.tensor([[5, 128]])}, r"tokens must lie in 0..127, got 5..128"),
        ({"prompt": torch.tensor([[-1]])}, r"tokens must lie in 0..127, got -1..-1"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a finite number, at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must lie in \(0, 1\]"),
        ({"seed": -1}, "seed must lie in 0..2\\*\\*63 - 1, got -1"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    model = random_model(TINY)
    arguments = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "num_tokens": 2} | changes
    with pytest.raises(InputError, match=message):
        generate(model, **arguments)


@pytest.fixture(scope="module")
def artifact(dataset_dir, tmp_path_factory):
    """An untrained model of the dataset's vocabulary, wide enough that some of its matrices are stored as int6."""
    folder = tmp_path_factory.mktemp("sample")
    cfg = preset("tiny").replace(dtype="float32", float16_max_values=4096)
    tokenizer = Dataset.open(dataset_dir).tokenizer
    path = folder / run.ARTIFACT
    pack_state(cfg, random_model(cfg, torch.float32).export_state(), tokenizer.sha256, path)
    (folder / run.TOKENIZER).write_bytes(tokenizer.model)
    return path


def test_sample_prints_text_that_begins_with_the_prompt(artifact, capsys):
    command = ["sample", str(artifact), "--prompt", "def main(", "--tokens", "12", "--device", "cpu"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("def main(")
    assert len(text) > len("def main(\n")
    assert main([*command, "--num", "2", "--seed", "0"]) == 0
    two = capsys.readouterr().out
    assert two.startswith(f"--- 1 of 2 ---\n{text}--- 2 of 2 ---\ndef main(")


def test_a_terminal_that_lacks_a_character_still_shows_the_rest(artifact, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", narrow := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["sample", str(artifact), "--prompt", "caf\u00e9 ", "--tokens", "3", "--device", "cpu"]) == 0
    narrow.flush()
    assert narrow.buffer.getvalue().startswith(b"caf? ")


def test_sample_as_json(artifact, dataset_dir, tmp_path, capsys):
    command = ["sample", str(artifact), "--tokens", "9", "--num", "3", "--json", "--device", "cpu", "--top-k", "5"]
    results = []
    for more in ([], ["--data", str(dataset_dir)], ["--seed", "1"]):
        assert main([*command, *more]) == 0
        results.append(json.loads(capsys.readouterr().out))
    first, same, other = results
    assert first["samples"] == same["samples"] != other["samples"]
    assert len(set(first["samples"])) == 3
    assert (first["prompt_tokens"], first["tokens"], first["device"]) == (1, 27, "cpu")
    assert other["settings"] == {"temperature": 0.8, "top_k": 5, "top_p": 1.0, "seed": 1}

    # the text is that of the dequantised model's likeliest tokens, whatever the matrices were multiplied as
    from pgolf.evaluate import load_model

    model, cfg, _ = load_model(artifact, torch.device("cpu"))
    tokenizer = Dataset.open(dataset_dir).tokenizer
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("import")]])
    for _ in range(9):
        ids = torch.cat((ids, model.logits(padded(ids, cfg.train_seq_len))[:, ids.shape[1] - 1 :][:, :1].argmax(-1)), 1)
    assert main(["sample", str(artifact), "--prompt", "import", "--tokens", "9", "--temperature", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == [tokenizer.decode(ids[0].tolist())]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num", "0"], "the number of texts must be at least 1, got 0"),
        (["--tokens", "0"], "num_tokens must be at least 1"),
        (["--temperature", "-1"], "temperature must be a finite number"),
        (["--top-p", "2"], "top_p must lie in (0, 1]"),
        (["--data", NOWHERE], "no such folder"),
        (["--prompt", "caf\udce9"], "the prompt must be text in the terminal's encoding"),
    ],
)
def test_wrong_commands_are_one_line(artifact, capsys, more, message):
    assert main(["sample", str(artifact), *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("pgolf: ")
    assert not captured.out


def test_a_missing_or_foreign_tokenizer_says_so(artifact, tmp_path, capsys):
    alone = tmp_path / "alone.pgolf"
    alone.write_bytes(artifact.read_bytes())
    assert main(["sample", str(alone)]) == 2
    assert "name the data of its run with --data" in capsys.readouterr().err
    golden = np.load(run.Path(__file__).parent.parent / "golden/tokenizer.npz")
    (tmp_path / run.TOKENIZER).write_bytes(golden["spm_model_proto"].tobytes())
    assert main(["sample", str(alone)]) == 2
    assert "not the one that" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / NOWHERE)]) == 2
    assert "cannot be read" in capsys.readouterr().err
