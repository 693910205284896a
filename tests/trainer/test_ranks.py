"""The trainer on 2 and 3 ranks, real processes over gloo, in every muon_comms: the same run as on one."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pgolf import distributed
from pgolf.cli import main
from pgolf.data.dataset import Dataset
from pgolf.distributed import Ranks
from pgolf.errors import FailedElsewhereError, InputError
from pgolf.optimise import checkpoint
from pgolf.presets import preset
from pgolf.train import train
from pgolf.trainer import Trainer

STEPS = 2  # before the checkpoint, and after it
# Six windows for 1, 2 and 3 ranks, and banks of 3 and 6 matrices, which 2 and 3 do not all share equally.
CFG = preset("tiny").replace(
    dtype="float32", num_layers=3, ve_layers=(2,), model_dim=32, train_batch_tokens=384, muon_projections=True
)
WAYS = {
    "shared": CFG,
    "round_robin": CFG.replace(muon_comms="round_robin"),
    # Clipping what a rank has is not clipping the mean, so it is off here: the number of ranks would show.
    "parallel": CFG.replace(muon_comms="parallel", grad_clip_per_rank=True, grad_clip_norm=0.0),
}


def advance(trainer) -> list[float]:
    """Losses, over all ranks, of STEPS steps."""
    losses = []
    for _ in range(STEPS):
        loss, _ = trainer.run_step(1.0, 0.9)
        trainer.step += 1
        losses.append(sum(trainer.ranks.gather(loss.item())))
    return losses


# Of a weight: AdamW divides noise by noise where a gradient is as small as eps, and its steps are as large as 0.035.
TOLERANCE = 5e-4


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def on_rank(rank, world, data, out):
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        ranks = Ranks(rank, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
        for name, cfg in WAYS.items():
            trainer = Trainer(cfg, Dataset.open(data), ranks)
            losses = advance(trainer)
            trainer.save(out / name)
            losses += advance(trainer)
            resumed = Trainer(cfg, Dataset.open(data), ranks)
            resumed.resume(out / name)
            assert advance(resumed) == losses[STEPS:]
            assert torch.equal(weights(resumed), weights(trainer))
            if rank == 0:
                torch.save((losses, weights(trainer)), out / f"{name}.pt")
        (out / "a file").touch()
        with pytest.raises(InputError) as caught:
            trainer.save(out / "a file")  # no folder can be made there, but only rank 0 tries
        (out / f"failure{rank}").write_text(f"{caught.type.__name__}: {caught.value}")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # a gloo process that merely initialises and exits aborts about once in 200 times (torch 2.13)


@pytest.fixture(scope="module", params=[2, 3])
def several(request, dataset_dir, tmp_path_factory):
    """The folder in which so many ranks have left their losses, weights and checkpoints."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(on_rank, args=(request.param, dataset_dir, out), nprocs=request.param)
    return out


@pytest.mark.parametrize("name", WAYS)
def test_a_run_does_not_depend_on_its_ranks(several, dataset_dir, name):
    losses, end = torch.load(several / f"{name}.pt")
    trainer = Trainer(WAYS[name], Dataset.open(dataset_dir), Ranks(0, 1, torch.device("cpu")))
    assert advance(trainer) + advance(trainer) == pytest.approx(losses, rel=2e-5)
    torch.testing.assert_close(weights(trainer), end, rtol=0, atol=TOLERANCE)

    resumed = Trainer(WAYS[name], Dataset.open(dataset_dir), Ranks(0, 1, torch.device("cpu")))
    resumed.resume(several / name)
    assert advance(resumed) == pytest.approx(losses[STEPS:], rel=2e-5)
    torch.testing.assert_close(weights(resumed), end, rtol=0, atol=TOLERANCE)


def test_a_checkpoint_of_several_ranks_is_that_of_one(several, dataset_dir):
    """Momentum above all, for a factor in it would not show in the weights: Muon forgets the scale of its gradients."""
    for name, cfg in WAYS.items():
        trainer = Trainer(cfg, Dataset.open(dataset_dir), Ranks(0, 1, torch.device("cpu")))
        advance(trainer)
        one, (tensors, _) = trainer.checkpoint_tensors(), checkpoint.load(several / name)
        assert tensors.keys() == one.keys()
        for key in filter(lambda key: key.startswith("optimiser."), one):
            scale = one[key].float().abs().max().item()
            torch.testing.assert_close(tensors[key], one[key], rtol=0, atol=1e-4 * scale)


def test_a_checkpoint_that_rank_0_cannot_write_ends_all_ranks(several):
    """Each with the same words, rank 0 as the one that says them; without that the others would wait for it."""
    first, *others = ((several / f"failure{rank}").read_text() for rank in range(len(list(several.glob("failure*")))))
    kind, words = first.split(": ", 1)
    assert kind == "InputError" and "could not be written" in words and "no earlier checkpoint exists" in words
    assert others and set(others) == {f"FailedElsewhereError: {words}"}


def test_only_rank_0_says_why_it_failed(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise FailedElsewhereError("rank 0's words")

    monkeypatch.setattr("pgolf.train.train", fail)
    assert main(["train", "--preset", "tiny", "--data", str(tmp_path), "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == ""


def test_ranks_that_do_not_divide_the_batch_are_refused_before_data_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "start", lambda device: Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(InputError, match=r"train_batch_tokens 2048 must be a multiple of .* = 64 x 3; use --set"):
        train(preset("tiny"), tmp_path / "no data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parallel_cannot_clip_the_mean():
    with pytest.raises(InputError, match="muon_comms 'parallel' .* grad_clip_per_rank must be true, got false"):
        preset("tiny").replace(muon_comms="parallel")


def test_presets_share_muons_work_as_published():
    comms = {name: preset(name).muon_comms for name in ("pr1217", "pr1128", "pr1333", "pr675")}
    assert comms == {"pr1217": "parallel", "pr1128": "parallel", "pr1333": "round_robin", "pr675": "round_robin"}
    low = {name for name in comms if preset(name).muon_momentum_dtype == "bfloat16"}
    assert low == {"pr1217", "pr1128"}
