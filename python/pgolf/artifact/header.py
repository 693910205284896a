"""The artifact's header: JSON that says what the file holds. Read from a file that may say anything, so all is checked.

{"config": {...}, "tokenizer_sha256": "...", "tensors": [[name, role, shape], ...], "extra": {...}}
The limits below are far beyond any model; they bound what a malicious file makes the reader allocate.
"""

import json
import math
import typing
from dataclasses import dataclass

from ..config import FIELDS, Config, nearest
from ..errors import InputError
from .quantise import ROLES

MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 10_000
MAX_ELEMENTS = 2**40  # of one tensor, zeros of its shape aside


@dataclass(frozen=True)
class TensorEntry:
    """One line of the table; tensors lie in the planes in its order."""

    name: str
    role: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return self.num_rows * self.num_columns

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def num_columns(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Header:
    """`extra`: whatever else the writer wanted recorded, as JSON values."""

    config: Config
    tokenizer_sha256: str
    tensors: tuple[TensorEntry, ...]
    extra: dict

    def __post_init__(self) -> None:
        if not (len(self.tokenizer_sha256) == 64 and set(self.tokenizer_sha256) <= set("0123456789abcdef")):
            raise InputError(f"tokenizer_sha256 must be 64 hexadecimal digits, got {self.tokenizer_sha256[:80]!r}")
        if len(self.tensors) > MAX_TENSORS:
            raise InputError(f"there may be at most {MAX_TENSORS:,} tensors, got {len(self.tensors):,}")

    def as_dict(self) -> dict:
        """The JSON object of the file."""
        return {
            "config": json.loads(self.config.to_json()),
            "tokenizer_sha256": self.tokenizer_sha256,
            "tensors": [[t.name, t.role, list(t.shape)] for t in self.tensors],
            "extra": self.extra,
        }

    def to_json(self) -> bytes:
        """Compact UTF-8. Raises InputError if extra or config hold what JSON cannot."""
        try:
            text = json.dumps(self.as_dict(), separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"config and extra must hold JSON values only ({error})") from error
        if len(text) > MAX_HEADER_BYTES:
            raise InputError(f"the header may take {MAX_HEADER_BYTES:,} bytes, got {len(text):,}; shorten extra")
        return text

    @classmethod
    def from_json(cls, text: bytes) -> "Header":
        """Raises InputError, saying what is wrong, on anything that to_json cannot have written."""
        if len(text) > MAX_HEADER_BYTES:
            raise InputError(f"the header may take {MAX_HEADER_BYTES:,} bytes, got {len(text):,}")
        try:
            values = json.loads(text.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the header is not valid JSON ({error})") from error
        kinds = {"config": dict, "tokenizer_sha256": str, "tensors": list, "extra": dict}
        if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != kinds:
            raise InputError(f"the header must be an object of exactly {', '.join(kinds)}, of the right types")
        entries = tuple(_read_entry(row) for row in values["tensors"])
        if len({entry.name for entry in entries}) != len(entries):
            raise InputError("two tensors of the table have the same name")
        return cls(_read_config(values["config"]), values["tokenizer_sha256"], entries, values["extra"])


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _read_entry(row: object) -> TensorEntry:
    match row:
        case [str(name), str(role), [*shape]] if role in ROLES and len(shape) <= 8:
            if all(type(n) is int and n >= 0 for n in shape) and math.prod(max(n, 1) for n in shape) <= MAX_ELEMENTS:
                entry = TensorEntry(name, role, tuple(shape))
                if role == "float16" or (shape and entry.num_values):
                    return entry
    raise InputError(f"every row of the table must be [name, one of {', '.join(ROLES)}, shape], with codes not empty")


def _read_config(values: dict) -> Config:
    for name, value in values.items():
        if name not in FIELDS:
            raise InputError(f"config: unknown field {name!r}{nearest(name, FIELDS)}")
        if not _has_type(value, FIELDS[name]):
            raise InputError(f"config: {name} must be of type {FIELDS[name].__name__}, got {type(value).__name__}")
    try:
        return Config.from_json(json.dumps(values))
    except ArithmeticError as error:  # a zero where a size belongs
        raise InputError(f"config: impossible values ({error})") from error


def _has_type(value: object, kind: type) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) in ((int, float) if kind is float else (kind,))
