"""What an artifact is made of: bytes by kind of content, bits per parameter, room left under the limit.

The bytes of a kind are exact but where compressed pieces are shared, see account.py; the kinds add up to the file.
"""

import hashlib
from pathlib import Path

from rich.table import Table

from ..errors import InputError
from . import account, container
from .pack import LIMIT_BYTES, code_bytes, read_bytes
from .quantise import CODE_MAX


def inspect(path: Path) -> dict:
    """Describe an artifact as JSON values.

    Returns:
        {"path", "sha256", "version", "compressor", "artifact_bytes", "code_bytes" (see pack.code_bytes),
        "total_bytes", "limit_bytes", "headroom_bytes", "parameters", "bits_per_parameter", "config",
        "tokenizer_sha256", "extra", "kinds": [{"kind", "tensors", "parameters", "content_bytes", "stored_bytes"}],
        "tensors": [{"name", "role", "dtype", "shape"}]}. Kinds: "header", "levels" and "scales" (what codes need beside
        themselves), then "int5" to "int8" as far as they occur, "float16". stored_bytes: after compression, see above.

    Raises:
        InputError: the file cannot be read or is damaged; the text begins with the path.
    """
    data = read_bytes(path)
    try:
        compressor, raw, _ = container.unfold(data)
        tensors = container.parse(compressor, raw).tensors
        header, where = container.locate(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    where = {"header": slice(0, where["levels"].start), **where}
    stored = account.plane_bytes(data)
    kinds = []
    for kind, part in where.items():
        of_kind = [t.values.numel() for t in tensors.values() if t.role == kind]
        if kind in CODE_MAX and not of_kind:
            continue
        sizes = {"content_bytes": part.stop - part.start, "stored_bytes": stored[kind]}
        kinds.append({"kind": kind, "tensors": len(of_kind), "parameters": sum(of_kind), **sizes})
    parameters, total = sum(k["parameters"] for k in kinds), len(data) + code_bytes(header.config, header.extra)
    description = header.as_dict()
    return {
        "path": str(path),
        "sha256": hashlib.sha256(data).hexdigest(),
        "version": container.VERSION,
        "compressor": compressor,
        "artifact_bytes": len(data),
        "code_bytes": total - len(data),
        "total_bytes": total,
        "limit_bytes": LIMIT_BYTES,
        "headroom_bytes": LIMIT_BYTES - total,
        "parameters": parameters,
        "bits_per_parameter": 8 * len(data) / max(1, parameters),
        **{key: description[key] for key in ("config", "tokenizer_sha256", "extra")},
        "kinds": kinds,
        "tensors": [
            {
                "name": e.name,
                "role": e.role,
                "dtype": "int8" if e.role in CODE_MAX else e.role,
                "shape": list(e.shape),
            }
            for e in header.tensors
        ],
    }


def table(description: dict) -> Table:
    """What `inspect` found, for a terminal."""
    result = Table(title=description["path"])
    result.add_column("kind")
    for heading in ("tensors", "parameters", "stored bytes", "bits each", "share"):
        result.add_column(heading, justify="right")
    size = description["artifact_bytes"]
    for kind in description["kinds"]:
        count, stored = kind["parameters"], kind["stored_bytes"]
        bits = f"{8 * stored / count:.2f}" if count else ""
        counts = (f"{kind['tensors']:,}", f"{count:,}") if count else ("", "")
        result.add_row(kind["kind"], *counts, f"{stored:,}", bits, f"{stored / size:.1%}")
    result.add_section()
    tensors, parameters = f"{len(description['tensors']):,}", f"{description['parameters']:,}"
    result.add_row("artifact", tensors, parameters, f"{size:,}", f"{description['bits_per_parameter']:.2f}", "100.0%")
    result.add_row("code, bundled", "", "", f"{description['code_bytes']:,}")
    result.add_row(f"left of {description['limit_bytes']:,}", "", "", f"{description['headroom_bytes']:,}")
    return result
