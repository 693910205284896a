"""What `pgolf doctor` says, checked against what then happens."""

import inspect
import json
import stat

import pytest
import torch

import pgolf_kernels
from pgolf.config import Config
from pgolf.model import activation_dtype
from pgolf.publish import doctor
from pgolf_kernels import dispatch, extension

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module")
def facts():
    return doctor.examine()


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_facts_are_flat_and_json(facts):
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(value, str | int) and value != "" for value in facts.values())
    assert facts["torch"] == torch.__version__


def test_examine_prints_nothing(capsys):
    doctor.examine()
    assert capsys.readouterr().out == ""


def test_every_op_is_examined():
    functions = {name: value for name, value in vars(pgolf_kernels).items() if inspect.isfunction(value)}
    ops = {name for name, function in functions.items() if "impl" in inspect.signature(function).parameters}
    assert ops == set(doctor.SAMPLES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", doctor.SAMPLES)
def test_the_named_implementation_is_the_one_that_runs(facts, op, device):
    dtype = activation_dtype(Config(), torch.device(device))
    args, kwargs = doctor.SAMPLES[op](torch.device(device), dtype)
    getattr(pgolf_kernels, op)(*args, **kwargs)
    name, rest = facts[f"{op}.{device}"].split(", ", 1)
    assert name == dispatch.CHOSEN[op]
    assert rest.startswith(str(dtype).removeprefix("torch."))


@pytest.mark.skipif(dispatch.TRITON_INTERPRETED, reason="Triton's interpreter also takes CPU tensors")
def test_refused_implementations_have_reasons(facts):
    for op in doctor.SAMPLES:
        args, kwargs = doctor.SAMPLES[op](torch.device("cpu"), torch.bfloat16)
        for choice in pgolf_kernels.explain(op, *args, **kwargs):
            if choice.name in ("triton", "cuda"):
                assert f"{choice.name}: " in facts[f"{op}.cpu"]


def test_missing_cpu_extension_is_a_sentence(monkeypatch):
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "WHY_NOT_CPU", "the CPU extension was removed by a test")
    facts = doctor.examine()
    assert facts["cpu_extension"] == "the CPU extension was removed by a test"
    assert facts["cpu_kernels"].startswith("none")
    assert facts["cpu_features"].startswith(torch.backends.cpu.get_cpu_capability())


@pytest.mark.skipif(extension.cpu is None, reason=extension.WHY_NOT_CPU or "")
def test_cpu_features_are_those_pytorch_sees(facts):
    """PyTorch's own capability, read from the same processor by other code, must be among ours."""
    needed = {"AVX2": "avx2", "AVX512": "avx512f"}.get(torch.backends.cpu.get_cpu_capability())
    assert needed is None or needed in facts["cpu_features"].split(", ")
    assert facts["cpu_extension"] == "built"


def test_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(program(tmp_path / "works", "echo 'works 1.2.3'; echo more")))
    assert doctor.examine()["compiler"] == f"{tmp_path}/works: works 1.2.3"
    monkeypatch.setenv("CXX", str(program(tmp_path / "broken", "exit 1")))
    assert doctor.examine()["compiler"] == f"{tmp_path}/broken: does not run"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.examine()["compiler"] == "no-such-compiler is not on PATH"


def test_nvcc_of_cuda_home_comes_first(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/nvcc", "echo 'nvcc: NVIDIA'; echo 'release 13.9, V13.9.1'; echo 'Build x'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.examine()["nvcc"] == f"{tmp_path}/bin/nvcc: release 13.9, V13.9.1"


def test_gpu(facts, monkeypatch):
    if torch.cuda.is_available():
        assert torch.cuda.get_device_properties(0).name in facts["gpu"]
        return
    assert facts["gpu"].startswith("none: ")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.examine()["gpu"] == "none: CUDA_VISIBLE_DEVICES is empty, which hides every GPU"
