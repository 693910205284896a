"""Take an artifact apart into open files, to look inside or change it, and pack them again: the same bytes."""

import json
from pathlib import Path

import safetensors.torch

from .. import run
from ..errors import InputError
from .header import Header
from .pack import PackReport, load_safetensors, pack_tensors, read_bytes, read_content
from .quantise import CodedTensor

CODES, HEADER = "codes.safetensors", "header.json"
_SCALE = "#scale"  # codes.safetensors holds a tensor's codes or values under its name, its scales under name + this


def unpack(path: Path, out_dir: Path) -> dict[str, Path]:
    """Take an artifact apart into out_dir: codes.safetensors (int8 codes, float16 scales and tensors), header.json.

    Returns:
        {"codes": path, "header": path}; `repack` makes the same bytes of them again.
    """
    content = read_content(path)
    tensors = {name: t.values for name, t in content.tensors.items()}
    tensors |= {name + _SCALE: t.scale for name, t in content.tensors.items() if t.scale is not None}
    paths = {"codes": Path(out_dir) / CODES, "header": Path(out_dir) / HEADER}
    run.write_atomically(paths["codes"], safetensors.torch.save(tensors))
    run.write_atomically(paths["header"], json.dumps(content.header.as_dict(), indent=1).encode())
    return paths


def repack(directory: Path, out: Path, allow_oversize: bool = False) -> PackReport:
    """Pack what `unpack` wrote. Raises InputError if the two files do not fit each other."""
    text = read_bytes(Path(directory) / HEADER)
    try:
        header = Header.from_json(text)
    except InputError as error:
        raise InputError(f"{directory}/{HEADER}: {error}") from error
    stored = load_safetensors(Path(directory) / CODES)
    names = {e.name for e in header.tensors} | {e.name + _SCALE for e in header.tensors if e.role != "float16"}
    if names != set(stored):
        odd = sorted(names ^ set(stored))
        raise InputError(f"{directory}: {HEADER} and {CODES} must name the same tensors, but differ in {odd[:5]}")
    tensors = {}
    for e in header.tensors:
        try:
            tensors[e.name] = CodedTensor(e.role, e.shape, stored[e.name], stored.get(e.name + _SCALE))
        except InputError as error:
            raise InputError(f"{directory}/{CODES}: {e.name}: {error}") from error
    return pack_tensors(header.config, tensors, header.tokenizer_sha256, out, allow_oversize, header.extra)
