"""The house rules a machine can check: an op is found at the same places as every other op, and files stay short."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(path.parent.name for path in (ROOT / "pgolf_kernels/ops").glob("*/op.py"))
CODE = {".py", ".cpp", ".cu", ".h", ".cuh", ".inl"}
FOLDERS = ("csrc", "pgolf_kernels", "python", "benchmarks", "tests")
MAX_LINES = 500


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    for path in (
        f"pgolf_kernels/ops/{op}/reference.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/ops/bench_{op}.py",
    ):
        assert (ROOT / path).exists(), f"op {op!r} has no {path}"


def test_every_test_and_benchmark_belongs_to_an_op():
    for folder, prefix in (("tests/ops", "test_"), ("benchmarks/ops", "bench_")):
        named = {path.stem.removeprefix(prefix) for path in (ROOT / folder).glob(f"{prefix}*.py")}
        assert named <= set(OPS), f"{folder} has files for {sorted(named - set(OPS))}, which are no ops"


def test_native_code_is_in_the_folder_of_its_op():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders <= set(OPS), f"csrc has folders for {sorted(folders - set(OPS))}, which are no ops"


def test_every_listed_package_exists_and_every_package_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    base = {"pgolf_kernels": ROOT / "pgolf_kernels", "pgolf": ROOT / "python/pgolf"}
    folders = {name: base[name.split(".")[0]].joinpath(*name.split(".")[1:]) for name in setuptools["packages"]}
    for name, folder in folders.items():
        assert (folder / "__init__.py").exists(), f"pyproject.toml lists {name}, but {folder} is no package"
    for root in base.values():
        for path in root.rglob("__init__.py"):
            assert path.parent in folders.values(), f"pyproject.toml does not list the package {path.parent}"


def test_code_files_are_short():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    assert len(paths) > len(FOLDERS), f"found only {paths}"
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines: {too_long}"
