"""Packets: the tensors of an update as they are sent, and their bytes.

A sparsifier sets a packet's `support`, a quantizer its `grid`, a factorization its `rank`; noise clears the grid. How many bytes
that takes is decided here, once, for every defense and every composition of them: `nbytes(packet) == len(to_bytes(packet))`.

Layout, little-endian: flags (u8), number of dimensions (u8), dimensions (u32 each); with a rank: r (u32); with a support: k (u32),
then a bitmap of n bits or k indices of ceil(log2 n) bits, whichever is shorter; with a grid: its header, then k codes of exactly
`bits` bits; without: k values (f32). Headers: of a `Grid` low and step (f32 each) and bits (u8), of `Multiples` the step (f32) and
bits (u8), of a `Codebook` its size less one (u16) and its values (f32 each), of `Floats` the number of the format (u8).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fedsim.checks import one_of
from fedsim.updates import Update

MAX_BITS = 24  # a float32 has 24 bits of precision: finer grids are floats
MAX_BOOK = 2**16  # values of a codebook
FORMATS = {  # of floats: the type, its bits, its largest number
    "fp16": (torch.float16, 16, 65504.0),
    "bf16": (torch.bfloat16, 16, torch.finfo(torch.bfloat16).max),
    "fp8_e4m3": (torch.float8_e4m3fn, 8, 448.0),
    "fp8_e5m2": (torch.float8_e5m2, 8, 57344.0),
}


class Lattice(Protocol):
    """The values that entries can have, and a code for each."""

    @property
    def bits(self) -> int:
        """Bits of a code, at least 1: codes of none would let a few bytes stand for any number of entries."""
        ...

    def header(self) -> bytes:
        """What a receiver must know to decode, besides the kind of lattice."""
        ...

    @classmethod
    def read(cls, data: memoryview) -> tuple[Self, int]:
        """The lattice whose header `data` begins with, and the header's length. Raises ValueError or struct.error if it is none."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Codes (k,) int64 of `values` that lie on the lattice."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes` (k,), float32. Raises ValueError for a code that stands for nothing."""
        ...


@dataclass(frozen=True)
class Grid:
    """The lattice `low + step * code`, `0 <= code < 2**bits`, in float32."""

    low: float
    step: float
    bits: int

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        # What travels is float32, so that is what the grid is made of.
        object.__setattr__(self, "low", _float32(self.low))
        object.__setattr__(self, "step", _float32(self.step))

    def header(self) -> bytes:
        return struct.pack("<ffB", self.low, self.step, self.bits)

    @classmethod
    def read(cls, data: memoryview) -> tuple[Self, int]:
        return cls(*struct.unpack_from("<ffB", data)), 9

    def encode(self, values: Tensor) -> Tensor:
        if self.step == 0:
            return torch.zeros_like(values, dtype=torch.int64)
        return ((values.double() - self.low) / self.step).round().clamp(0, 2**self.bits - 1).long()

    def decode(self, codes: Tensor) -> Tensor:
        return (self.low + self.step * codes.double()).float()


@dataclass(frozen=True)
class Multiples:
    """The lattice `step * i`, `-2**(bits - 1) <= i < 2**(bits - 1)`, in float32; i travels as two's complement.

    Unlike on a `Grid`, 0 lies on it exactly.
    """

    step: float
    bits: int

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        object.__setattr__(self, "step", _float32(self.step))

    def header(self) -> bytes:
        return struct.pack("<fB", self.step, self.bits)

    @classmethod
    def read(cls, data: memoryview) -> tuple[Self, int]:
        return cls(*struct.unpack_from("<fB", data)), 5

    def encode(self, values: Tensor) -> Tensor:
        if self.step == 0:
            return torch.zeros_like(values, dtype=torch.int64)
        half = 2 ** (self.bits - 1)
        return (values.double() / self.step).round().clamp(-half, half - 1).long() % (2 * half)

    def decode(self, codes: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return self.at((codes + half) % (2 * half) - half)

    def at(self, multiples: Tensor) -> Tensor:
        """The values of whole `multiples` of the step, float32."""
        return (self.step * multiples.double()).float()


@dataclass(frozen=True)
class Codebook:
    """Any values, listed once in ascending order, in float32."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float32)
        if not 1 <= len(values) <= MAX_BOOK or not (np.diff(values) > 0).all() or not np.isfinite(values).all():
            raise ValueError(f"a codebook holds 1..{MAX_BOOK} finite values that ascend, got {len(values)}: {values}")
        object.__setattr__(self, "values", tuple(values.tolist()))

    @property
    def bits(self) -> int:
        return _index_bits(len(self.values))

    def header(self) -> bytes:
        return struct.pack(f"<H{len(self.values)}f", len(self.values) - 1, *self.values)

    @classmethod
    def read(cls, data: memoryview) -> tuple[Self, int]:
        size = struct.unpack_from("<H", data)[0] + 1
        return cls(struct.unpack_from(f"<{size}f", data, 2)), 2 + 4 * size

    def encode(self, values: Tensor) -> Tensor:
        return torch.searchsorted(self._book(values), values.contiguous()).clamp(max=len(self.values) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        if len(codes) and int(codes.max()) >= len(self.values):
            raise ValueError(f"a codebook of {len(self.values)} values has no value {int(codes.max())}")
        return self._book(codes)[codes]

    def _book(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values, device=like.device)


@dataclass(frozen=True)
class Floats:
    """The numbers of a short float format, a key of `FORMATS`; codes are their bits."""

    format: str

    def __post_init__(self) -> None:
        one_of("float format", self.format, FORMATS)

    @property
    def bits(self) -> int:
        return FORMATS[self.format][1]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return FORMATS[self.format][2]

    def header(self) -> bytes:
        return bytes([list(FORMATS).index(self.format)])

    @classmethod
    def read(cls, data: memoryview) -> tuple[Self, int]:
        if data[0] >= len(FORMATS):
            raise ValueError(f"there is no float format {data[0]}")
        return cls(list(FORMATS)[data[0]]), 1

    def encode(self, values: Tensor) -> Tensor:
        return values.to(FORMATS[self.format][0]).view(self._integers).long() % 2**self.bits

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(self._integers).view(FORMATS[self.format][0]).float()

    def levels(self) -> Tensor:
        """All finite numbers, ascending, each once."""
        return _levels(self)

    @property
    def _integers(self) -> torch.dtype:
        return torch.int16 if self.bits == 16 else torch.uint8


@cache
def _levels(floats: Floats) -> Tensor:
    numbers = floats.decode(torch.arange(2**floats.bits))
    return numbers[numbers.isfinite()].unique()


LATTICES: tuple[type[Lattice], ...] = (Grid, Multiples, Codebook, Floats)  # in the order in which flags number them, from 1


@dataclass(frozen=True)
class Packet:
    """One tensor as it is sent.

    values   (k,) float32, the entries sent, in flat order
    shape    the tensor's shape; n = prod(shape)
    support  (k,) int64 ascending flat positions of the values, or None when all n are sent
    grid     the lattice the values lie on, or None for raw floats
    rank     r when what is sent are not the entries of the tensor but, one after the other, those of two factors P (m, r) and
             Q (n / m, r), whose product P Q' is the tensor as a matrix of m = shape[0] rows; positions are then places in the
             n = r (m + n / m) entries of the factors. None otherwise
    """

    values: Tensor
    shape: tuple[int, ...]
    support: Tensor | None = None
    grid: Lattice | None = None
    rank: int | None = None

    @property
    def size(self) -> int:
        """n, the number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def places(self) -> int:
        """How many entries there are to send: those of the tensor, or of its factors."""
        return self.size if self.rank is None else self.rank * (self.shape[0] + self.size // self.shape[0])

    def dense(self) -> Tensor:
        """The tensor a receiver makes of the packet: zero where nothing was sent."""
        flat = self.values
        if self.support is not None:
            flat = torch.zeros(self.places, dtype=flat.dtype, device=flat.device).index_copy(0, self.support, flat)
        if self.rank is not None:
            left, right = flat[: self.rank * self.shape[0]], flat[self.rank * self.shape[0] :]
            flat = left.reshape(-1, self.rank) @ right.reshape(-1, self.rank).T
        return flat.reshape(self.shape)

    def sent(self) -> Tensor:
        """Which entries of the tensor were sent, bool in its shape; of factors, every one."""
        mask = torch.full((self.size,), self.support is None or self.rank is not None, device=self.values.device)
        if self.support is not None and self.rank is None:
            mask[self.support] = True
        return mask.reshape(self.shape)


Packets = dict[str, Packet]


def pack(update: Mapping[str, Tensor]) -> Packets:
    """An update as it would be sent without any defense."""
    return {name: Packet(t.detach().reshape(-1).float(), tuple(t.shape)) for name, t in update.items()}


def unpack(packets: Mapping[str, Packet]) -> Update:
    """The update a receiver makes of packets."""
    return {name: packet.dense() for name, packet in packets.items()}


def nbytes(packet: Packet) -> int:
    """Bytes of `packet` on the wire."""
    k, n = packet.values.numel(), packet.places
    head = 2 + 4 * len(packet.shape) + 4 * (packet.rank is not None)
    support = 0 if packet.support is None else 4 + min(_bytes_of(n, 1), _bytes_of(k, _index_bits(n)))
    values = 4 * k if packet.grid is None else len(packet.grid.header()) + _bytes_of(k, packet.grid.bits)
    return head + support + values


def to_bytes(packet: Packet) -> bytes:
    """The packet as it travels; `from_bytes` gives back an equal packet."""
    return b"".join(parts(packet))


def parts(packet: Packet) -> list[bytes | memoryview]:
    """What `to_bytes` joins: raw floats are not copied, for those who put something around them."""
    n = packet.places
    support, grid = packet.support, packet.grid
    bitmap = support is not None and _bytes_of(n, 1) <= _bytes_of(len(support), _index_bits(n))
    kind = 0 if grid is None else 1 + LATTICES.index(type(grid))
    flags = (support is not None) | bitmap << 1 | kind << 2 | (packet.rank is not None) << 5
    made: list[bytes | memoryview] = [struct.pack(f"<BB{len(packet.shape)}I", flags, len(packet.shape), *packet.shape)]
    if packet.rank is not None:
        made.append(struct.pack("<I", packet.rank))
    if support is not None:
        made.append(struct.pack("<I", len(support)))
        places = support.cpu().numpy()
        if bitmap:
            mask = np.zeros(n, dtype=np.uint8)
            mask[places] = 1
            made.append(np.packbits(mask, bitorder="little").tobytes())
        else:
            made.append(_pack_bits(places, _index_bits(n)))
    if grid is None:
        made.append(np.ascontiguousarray(packet.values.detach().cpu().numpy(), dtype="<f4").data)
    else:
        made.append(grid.header())
        made.append(_pack_bits(grid.encode(packet.values.detach()).cpu().numpy(), grid.bits))
    return made


def from_bytes(data: bytes | memoryview) -> Packet:
    """The packet that `to_bytes` wrote. Raises ValueError when the bytes are not a packet."""
    try:
        return _read(memoryview(data))
    except (struct.error, IndexError) as error:
        raise ValueError(f"{len(data)} bytes are not a packet: {error}") from None


def _read(data: memoryview) -> Packet:
    flags, dimensions = struct.unpack_from("<BB", data)
    kind = flags >> 2 & 7
    if flags >= 64 or flags & 3 == 2 or kind > len(LATTICES):
        raise ValueError(f"a packet has no flags {flags:#x}")
    at = 2
    shape = struct.unpack_from(f"<{dimensions}I", data, at)
    at += 4 * dimensions
    k = n = math.prod(shape)
    rank = None
    if flags & 32 and n < 2**32:
        (rank,) = struct.unpack_from("<I", data, at)
        at += 4
        if dimensions < 2 or not 1 <= rank <= min(shape[0], n // max(1, shape[0])):
            raise ValueError(f"a packet of shape {shape[:8]} cannot have rank {rank}")
        k = n = rank * (shape[0] + n // shape[0])
    if n >= 2**32:
        raise ValueError(f"a packet has fewer than 2**32 entries, got more in {dimensions} dimensions")
    support = None
    if flags & 1:
        (k,) = struct.unpack_from("<I", data, at)
        at += 4
        if flags & 2:
            length = _bytes_of(n, 1)
            mask = np.unpackbits(_slice(data, at, length), count=n, bitorder="little")
            support = torch.from_numpy(np.flatnonzero(mask))
        else:
            length = _bytes_of(k, _index_bits(n))
            support = torch.from_numpy(_unpack_bits(_slice(data, at, length), k, _index_bits(n)))
        at += length
        if len(support) != k or (k and int(support[-1]) >= n) or bool((support.diff() <= 0).any()):
            raise ValueError(f"a packet of {n} entries claims {k} values at {len(support)} places, some twice or beyond its end")
    grid: Lattice | None = None
    if kind:
        grid, length = LATTICES[kind - 1].read(data[at:])
        at += length
        length = _bytes_of(k, grid.bits)
        values = grid.decode(torch.from_numpy(_unpack_bits(_slice(data, at, length), k, grid.bits)))
    else:
        length = 4 * k
        values = torch.from_numpy(_slice(data, at, length).view("<f4").astype(np.float32))
    if at + length != len(data):
        raise ValueError(f"a packet ends at byte {at + length} of {len(data)}")
    return Packet(values, tuple(shape), support, grid, rank)


def _slice(data: memoryview, at: int, length: int) -> np.ndarray:
    if at + length > len(data):
        raise ValueError(f"a packet ends after {len(data)} of {at + length} bytes")
    return np.frombuffer(data[at : at + length], dtype=np.uint8)


def _bytes_of(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _index_bits(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _pack_bits(codes: np.ndarray, bits: int) -> bytes:
    if bits in (8, 16):  # whole bytes, where packing bit by bit comes to the same
        return codes.astype(f"<u{bits // 8}").tobytes()
    planes = np.unpackbits(codes.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, count=bits, bitorder="little")
    return np.packbits(planes, bitorder="little").tobytes()


def _unpack_bits(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    if bits in (8, 16):
        return data.view(f"<u{bits // 8}").astype(np.int64)
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"a grid's bits must lie in 1..{MAX_BITS}, got {bits}")


def _float32(value: float) -> float:
    return float(np.float32(value))
