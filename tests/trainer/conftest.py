"""A small real dataset from a few modules of the standard library and a short run on it, made once per test run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.data.corpus import path_documents
from pgolf.data.prepare import prepare
from pgolf.presets import preset
from pgolf.train import train

STDLIB = Path(os.__file__).parent
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory) -> Path:
    """About 1 MB of text, vocabulary 512."""
    out = tmp_path_factory.mktemp("data") / "small"
    prepare(path_documents([STDLIB / "asyncio", STDLIB / "email", STDLIB / "json"]), out, vocab_size=512, val_share=0.1)
    return out


@pytest.fixture(scope="session")
def gptq_run(dataset_dir, tmp_path_factory) -> Path:
    """A run of four steps that calibrated GPTQ for all its matrices; tests leave its files as they are."""
    out = tmp_path_factory.mktemp("gptq") / "run"
    config = preset("tiny").replace(attn_gptq=True, mlp_gptq=True, embed_gptq=True, float16_max_values=1000)
    config = config.replace(dtype="float32", calibration_batches=3, mlp_mult=3.0)
    train(config.replace(max_steps=4, val_tokens=1024, train_batch_tokens=1024), dataset_dir, out, device="cpu")
    return out


@pytest.fixture
def run_pgolf():
    """Run `python -m pgolf ...` in a process of its own, on the CPU with one thread."""

    def run(*args: object, check: bool = True, ranks: int = 0, module: str = "pgolf") -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m"]
        if ranks:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        process = subprocess.run(
            [*launcher, module, *map(str, args)], capture_output=True, text=True, env=environment(), timeout=300
        )
        assert not check or process.returncode == 0, process.stderr[-3000:]
        return process

    return run


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
