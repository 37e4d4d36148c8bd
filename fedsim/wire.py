"""Packets: the tensors of an update as they are sent, and their bytes.

A sparsifier sets a packet's `support`, a quantizer its `grid`, noise clears the grid. How many bytes that takes is decided
here, once, for every defense and every composition of them: `nbytes(packet) == len(to_bytes(packet))`.

Layout, little-endian: flags (u8), number of dimensions (u8), dimensions (u32 each); with a support: k (u32), then a bitmap of n
bits or k indices of ceil(log2 n) bits, whichever is shorter; with a grid: low and step (f32 each), bits (u8), then k codes of
`bits` bits; without: k values (f32).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.updates import Update

MAX_BITS = 24  # a float32 has 24 bits of precision: finer grids are floats


@dataclass(frozen=True)
class Grid:
    """The lattice `low + step * code`, `0 <= code < 2**bits`, in float32."""

    low: float
    step: float
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"a grid's bits must lie in 1..{MAX_BITS}, got {self.bits}")
        # What travels is float32, so that is what the grid is made of.
        object.__setattr__(self, "low", float(np.float32(self.low)))
        object.__setattr__(self, "step", float(np.float32(self.step)))

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes` (k,), float32."""
        return (self.low + self.step * codes.double()).float()

    def encode(self, values: Tensor) -> Tensor:
        """Codes (k,) int64 of `values` that lie on the grid."""
        if self.step == 0:
            return torch.zeros_like(values, dtype=torch.int64)
        return ((values.double() - self.low) / self.step).round().clamp(0, 2**self.bits - 1).long()


@dataclass(frozen=True)
class Packet:
    """One tensor as it is sent.

    values   (k,) float32, the entries sent, in flat order
    shape    the tensor's shape; n = prod(shape)
    support  (k,) int64 ascending flat positions of the values, or None when all n are sent
    grid     the lattice the values lie on, or None for raw floats
    """

    values: Tensor
    shape: tuple[int, ...]
    support: Tensor | None = None
    grid: Grid | None = None

    @property
    def size(self) -> int:
        """n, the number of entries of the tensor."""
        return math.prod(self.shape)

    def dense(self) -> Tensor:
        """The tensor a receiver makes of the packet: zero where nothing was sent."""
        if self.support is None:
            return self.values.reshape(self.shape)
        flat = torch.zeros(self.size, dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy(0, self.support, self.values).reshape(self.shape)


Packets = dict[str, Packet]


def pack(update: Mapping[str, Tensor]) -> Packets:
    """An update as it would be sent without any defense."""
    return {name: Packet(t.detach().reshape(-1).float(), tuple(t.shape)) for name, t in update.items()}


def unpack(packets: Mapping[str, Packet]) -> Update:
    """The update a receiver makes of packets."""
    return {name: packet.dense() for name, packet in packets.items()}


def nbytes(packet: Packet) -> int:
    """Bytes of `packet` on the wire."""
    k, n = packet.values.numel(), packet.size
    head = 2 + 4 * len(packet.shape)
    support = 0 if packet.support is None else 4 + min(_bytes_of(n, 1), _bytes_of(k, _index_bits(n)))
    values = 4 * k if packet.grid is None else 9 + _bytes_of(k, packet.grid.bits)
    return head + support + values


def to_bytes(packet: Packet) -> bytes:
    """The packet as it travels; `from_bytes` gives back an equal packet."""
    return b"".join(parts(packet))


def parts(packet: Packet) -> list[bytes | memoryview]:
    """What `to_bytes` joins: raw floats are not copied, for those who put something around them."""
    n = packet.size
    support, grid = packet.support, packet.grid
    bitmap = support is not None and _bytes_of(n, 1) <= _bytes_of(len(support), _index_bits(n))
    flags = (support is not None) | bitmap << 1 | (grid is not None) << 2
    made: list[bytes | memoryview] = [struct.pack(f"<BB{len(packet.shape)}I", flags, len(packet.shape), *packet.shape)]
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
        made.append(struct.pack("<ffB", grid.low, grid.step, grid.bits))
        made.append(_pack_bits(grid.encode(packet.values).cpu().numpy(), grid.bits))
    return made


def from_bytes(data: bytes | memoryview) -> Packet:
    """The packet that `to_bytes` wrote. Raises ValueError when the bytes are not a packet."""
    try:
        return _read(memoryview(data))
    except (struct.error, IndexError) as error:
        raise ValueError(f"{len(data)} bytes are not a packet: {error}") from None


def _read(data: memoryview) -> Packet:
    flags, dimensions = struct.unpack_from("<BB", data)
    if flags > 7 or flags & 3 == 2:
        raise ValueError(f"a packet has no flags {flags:#x}")
    at = 2
    shape = struct.unpack_from(f"<{dimensions}I", data, at)
    at += 4 * dimensions
    k = n = math.prod(shape)
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
    grid = None
    if flags & 4:
        grid = Grid(*struct.unpack_from("<ffB", data, at))
        at += 9
        length = _bytes_of(k, grid.bits)
        values = grid.decode(torch.from_numpy(_unpack_bits(_slice(data, at, length), k, grid.bits)))
    else:
        length = 4 * k
        values = torch.from_numpy(_slice(data, at, length).view("<f4").astype(np.float32))
    if at + length != len(data):
        raise ValueError(f"a packet ends at byte {at + length} of {len(data)}")
    return Packet(values, tuple(shape), support, grid)


def _slice(data: memoryview, at: int, length: int) -> np.ndarray:
    if at + length > len(data):
        raise ValueError(f"a packet ends after {len(data)} of {at + length} bytes")
    return np.frombuffer(data[at : at + length], dtype=np.uint8)


def _bytes_of(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _index_bits(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _pack_bits(codes: np.ndarray, bits: int) -> bytes:
    planes = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def _unpack_bits(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))
