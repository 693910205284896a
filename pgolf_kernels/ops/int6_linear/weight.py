"""Int6Weight: an immutable int6 matrix, 6 bits per weight in memory and on disk.

Layout of `packed`: row-major, 3 bytes for every 4 neighbouring columns of a row. Codes are stored as code + 32 (1..63)
and the four of a group form one little-endian 24-bit word, the first code in the lowest bits. Other K are padded to a
multiple of 4 with code 0, a weight of zero. Why not a 4-bit and a 2-bit plane: here a group is one unit of 3 bytes, so
kernels that want tiles (16 rows x 4 columns = 48 bytes: one vpermb, one vpmultishiftqb) get them by moving bytes, never
by shifting bits, and a slice of rows is a view.
"""

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch import require, require_tensors
from . import reference

_MAGIC, _VERSION = b"PGI6", 1
_HEADER = struct.Struct("<4sIQQ")  # magic, version, N, K; then the CRC-32 of all the rest, scales, packed codes
_BODY = _HEADER.size + 4


@dataclass(frozen=True, eq=False, repr=False)
class Int6Weight:
    """W[n, k] = scale[n] * q[n, k], q in -31..31.

    packed: uint8 [N, 3 * ceil(K / 4)], contiguous. scale: float16 [N], positive. shape: (N, K).
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        require_tensors("Int6Weight", packed=self.packed, scale=self.scale)
        n, k = self.shape
        packed, scale = self.packed, self.scale
        must = f"packed must be a contiguous uint8 tensor [{n}, {3 * ((k + 3) // 4)}] for shape {(n, k)}"
        ok = packed.dtype == torch.uint8 and packed.shape == (n, 3 * ((k + 3) // 4)) and packed.is_contiguous()
        require(ok, "Int6Weight", must, f"{packed.dtype} {tuple(packed.shape)}")
        must = f"scale must be float16 [{n}] on {packed.device}"
        ok = scale.dtype == torch.float16 and scale.shape == (n,) and scale.device == packed.device
        require(ok, "Int6Weight", must, f"{scale.dtype} {tuple(scale.shape)} on {scale.device}")

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor) -> "Int6Weight":
        """From int8 codes [N, K] in -31..31 and positive, finite float16 scales [N]."""
        require_tensors("Int6Weight", codes=codes, scale=scale)
        ok = codes.dtype == torch.int8 and codes.dim() == 2
        require(ok, "Int6Weight", "codes must be int8 [N, K]", f"{codes.dtype} {tuple(codes.shape)}")
        if codes.numel():
            low, high = (int(t) for t in codes.aminmax())
            require(low >= -31 and high <= 31, "Int6Weight", "codes must lie in -31..31", f"{low}..{high}")
        _require_scales(scale)
        return cls(reference.pack(codes), scale.contiguous(), tuple(codes.shape))

    def codes(self) -> Tensor:
        """q, int8 [N, K]."""
        return reference.unpack(self.packed, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K], exact in float32 and float64, rounded once in narrower types."""
        return reference.dequantize(self.packed, self.scale, self.shape[1], dtype)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> "Int6Weight":
        return Int6Weight(self.packed.to(device), self.scale.to(device), self.shape)

    def to_bytes(self) -> bytes:
        """Header (28 bytes), scales, packed codes; little-endian. `from_bytes` is the inverse."""
        header = _HEADER.pack(_MAGIC, _VERSION, *self.shape)
        body = self.scale.cpu().numpy().astype("<f2").tobytes() + self.packed.cpu().numpy().tobytes()
        return header + struct.pack("<I", zlib.crc32(body, zlib.crc32(header))) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Int6Weight":
        """Read what `to_bytes` wrote. Every field is checked; raises ValueError, and allocates no more than `data`."""
        op = "Int6Weight.from_bytes"
        require(len(data) >= _BODY, op, f"a header of {_BODY} bytes must come first", f"{len(data)} bytes in all")
        magic, version, n, k = _HEADER.unpack_from(data)
        require(magic == _MAGIC, op, f"the first bytes must be {_MAGIC}", magic, "these are no int6 weights")
        require(version == _VERSION, op, f"version must be {_VERSION}", version, "update pgolf_kernels")
        groups = (k + 3) // 4
        size = _BODY + 2 * n + 3 * n * groups
        require(len(data) == size, op, f"a {n} x {k} matrix must take {size} bytes", len(data), "it is cut or padded")
        (crc,), body = struct.unpack_from("<I", data, _HEADER.size), memoryview(data)[_BODY:]
        found = zlib.crc32(body, zlib.crc32(data[: _HEADER.size]))
        require(found == crc, op, f"the CRC-32 must be {crc:#010x}", f"{found:#010x}", "the data is damaged")

        content = torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8)[: len(body)]
        scale = content[: 2 * n].view(torch.float16).clone()  # clones are aligned, the parts of a buffer are not
        packed = content[2 * n :].view(n, 3 * groups).clone()
        _require_scales(scale)
        codes = reference.unpack(packed, 4 * groups)
        require(not (codes == -32).any(), op, "codes must lie in -31..31", -32)
        require(not codes[:, k:].any(), op, "the columns that pad K to a multiple of 4 must be 0", "other codes")
        return cls(packed, scale, (n, k))

    def __copy__(self) -> "Int6Weight":
        return self

    def __deepcopy__(self, memo: dict) -> "Int6Weight":
        return Int6Weight(self.packed.clone(), self.scale.clone(), self.shape)

    def __reduce__(self):
        raise TypeError("Int6Weight is not pickled, because unpickling runs code; use to_bytes() and from_bytes()")

    def __repr__(self) -> str:
        return f"Int6Weight(shape={self.shape}, nbytes={self.nbytes}, device={str(self.device)!r})"


def _require_scales(scale: Tensor) -> None:
    ok = scale.dtype == torch.float16 and bool((scale.isfinite() & (scale > 0)).all())
    require(ok, "Int6Weight", "scale must be positive, finite float16", scale.dtype if not scale.numel() else scale)
