"""audit.json: what an audit found, sealed with a hash of itself, beside the artifact that it is about.

The hash finds a changed file, not a forged one: whoever changes a verdict can compute a new hash, but not make `pgolf
audit` give it again. Hence seed, sizes, hashes and environment are in the file.
"""

import hashlib
import json
from pathlib import Path

from .. import run
from ..errors import InputError

AUDIT, VERSION = "audit.json", 1


def seal(record: dict) -> dict:
    """The record with its "sha256": of the canonical JSON (sorted keys, no spaces) of everything else."""
    return {**record, "sha256": _digest(record)}


def write(record: dict, path: Path) -> None:
    """Write a sealed record; what is already there is replaced whole."""
    run.write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def read(path: Path, artifact: Path | None = None) -> dict:
    """A record whose hash holds.

    Args:
        path: audit.json.
        artifact: the file that it must be about; None: any.

    Raises:
        InputError: there is none, it was changed after it was written, or it is about another artifact.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: there is no audit ({error.strerror}); make one with `pgolf audit ARTIFACT --data DIR --method M`"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: must be the JSON that `pgolf audit` writes, got {error}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise InputError(f"{path}: must be an audit of version {VERSION}; run `pgolf audit` again")
    if record.get("sha256") != _digest(record):
        raise InputError(
            f"{path}: was changed after the audit wrote it (its sha256 does not hold); run `pgolf audit` again"
        )
    if artifact is not None:
        found = hashlib.sha256(Path(artifact).read_bytes()).hexdigest()
        if found != record["artifact_sha256"]:
            raise InputError(
                f"{path}: is about another artifact ({record['artifact_sha256'][:12]}...) than {artifact} "
                f"({found[:12]}...); run `pgolf audit` on this one"
            )
    return record


def _digest(record: dict) -> str:
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
