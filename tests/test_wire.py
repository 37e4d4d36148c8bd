"""Packets on the wire: nothing is lost, what is counted is what is sent, and bytes that are no packet say so."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses import UniformQuantization
from fedsim.records import METRICS, PACKETS, packets_of, record, reply_of, wire_bytes, with_packets
from fedsim.seeding import generator
from fedsim.wire import (
    FORMATS,
    MAX_BITS,
    Codebook,
    Floats,
    Grid,
    Lattice,
    Multiples,
    Packet,
    from_bytes,
    nbytes,
    pack,
    to_bytes,
    unpack,
)

SHAPES = [(), (1,), (0,), (7,), (3, 5, 7)]
# One entry in 50 is cheaper by its index (7 bits of 105, 3 of 7), half of them by a bitmap (1 bit each).
SUPPORTS = {"dense": None, "few, as indices": 0.02, "half, as a bitmap": 0.5}
QUICK = settings(max_examples=150, deadline=None, derandomize=True)
# A lattice of each kind, and how many codes stand for a number of their own.
LATTICES: dict[str, tuple[Lattice, int]] = {
    "multiples, 1 bit": (Multiples(0.3, 1), 2),
    "multiples, 5 bits": (Multiples(0.0013, 5), 32),
    "multiples, 24 bits": (Multiples(0.0013, MAX_BITS), 2**MAX_BITS),
    "a codebook of 1": (Codebook((0.7,)), 1),
    "a codebook of 3": (Codebook((-0.2, 0.0, 3.0)), 3),
    "a codebook of 257": (Codebook(tuple(i / 7 for i in range(-100, 157))), 257),
    "fp16": (Floats("fp16"), 0x7C00),  # the positive finite numbers; infinity is 0x7c00
    "bf16": (Floats("bf16"), 0x7F80),
    "fp8_e4m3": (Floats("fp8_e4m3"), 0x7F),  # has no infinity; 0x7f is not a number
    "fp8_e5m2": (Floats("fp8_e5m2"), 0x7C),
}


def packet_of(
    shape: tuple[int, ...], share: float | None, grid: int | str | None, seed: int = 0, rank: int | None = None
) -> Packet:
    """A random packet; `share` of its entries are sent, all for None; on a `Grid` of so many bits, or a lattice of `LATTICES`."""
    rng = generator(seed, "packet", *shape)
    n = Packet(torch.zeros(0), shape, rank=rank).places
    k = n if share is None else min(n, max(1, round(share * n)))
    support = None if share is None else torch.randperm(n, generator=rng)[:k].sort().values
    if grid is None:
        return Packet(torch.randn(k, generator=rng), shape, support, rank=rank)
    lattice, codes = LATTICES[grid] if isinstance(grid, str) else (Grid(-0.7, 0.0013, grid), 2**grid)
    return Packet(lattice.decode(torch.randint(codes, (k,), generator=rng)), shape, support, lattice, rank)


def assert_same(found: Packet, sent: Packet) -> None:
    assert found.shape == sent.shape
    assert found.grid == sent.grid
    assert found.rank == sent.rank
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values, sent.values)
    assert (found.support is None) == (sent.support is None)
    if sent.support is not None and found.support is not None:
        assert found.support.dtype == torch.int64
        assert torch.equal(found.support, sent.support)
    assert torch.equal(found.dense(), sent.dense())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("grid", [None, 1, 3, 8, MAX_BITS, *LATTICES])
def test_a_packet_arrives_as_it_was_sent(shape, share, grid):
    sent = packet_of(shape, share, grid)
    data = to_bytes(sent)
    assert len(data) == nbytes(sent)
    assert_same(from_bytes(data), sent)


@pytest.mark.parametrize(("shape", "rank"), [((7, 5), 1), ((7, 5), 5), ((5, 3, 2, 2), 3), ((1, 13), 1)])
@pytest.mark.parametrize("share", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("grid", [None, 3, "a codebook of 3", "fp16"])
def test_a_packet_of_factors_arrives_as_it_was_sent(shape, rank, share, grid):
    sent = packet_of(shape, share, grid, rank=rank)
    data = to_bytes(sent)
    assert len(data) == nbytes(sent)
    assert_same(from_bytes(data), sent)
    assert torch.linalg.matrix_rank(sent.dense().flatten(1)) <= rank


@QUICK
@given(
    shape=st.lists(st.integers(0, 13), max_size=4).map(tuple),
    share=st.none() | st.floats(0, 1),
    grid=st.none() | st.integers(1, MAX_BITS) | st.sampled_from(list(LATTICES)),
    seed=st.integers(0, 2**31),
)
def test_counted_bytes_are_real_bytes_of_any_packet(shape, share, grid, seed):
    sent = packet_of(shape, share, grid, seed)
    data = to_bytes(sent)
    assert len(data) == nbytes(sent)
    assert_same(from_bytes(data), sent)


def test_a_packet_without_values_arrives():
    sent = Packet(torch.zeros(0), (3, 5), torch.zeros(0, dtype=torch.int64))
    assert_same(from_bytes(to_bytes(sent)), sent)


SIZES = {
    # flags and number of dimensions: 2 bytes, 4 a dimension; then what the layout says
    "2 of 64 x 64 as indices": ((64, 64), 0.0005, None, 2 + 2 * 4 + 4 + 3 + 2 * 4),  # places 0..4095 take 12 bits, two 3 bytes
    "floats": ((3, 5, 7), None, None, 2 + 3 * 4 + 105 * 4),
    "4 bits": ((3, 5, 7), None, 4, 2 + 3 * 4 + 9 + 53),  # 105 * 4 bits are 52.5 bytes
    "2 of 105 as indices": ((3, 5, 7), 0.02, None, 2 + 3 * 4 + 4 + 2 + 2 * 4),  # 2 indices of 7 bits are 14 bits
    "52 of 105 as a bitmap": ((3, 5, 7), 0.5, None, 2 + 3 * 4 + 4 + 14 + 52 * 4),  # 105 bits are 14 bytes, 52 * 7 bits would be 46
    "52 of 105 as a bitmap, 4 bits": ((3, 5, 7), 0.5, 4, 2 + 3 * 4 + 4 + 14 + 9 + 26),
    "multiples, 5 bits": ((3, 5, 7), None, "multiples, 5 bits", 2 + 3 * 4 + 5 + 66),  # 525 bits are 65.6 bytes
    "a codebook of 3": ((3, 5, 7), None, "a codebook of 3", 2 + 3 * 4 + 2 + 3 * 4 + 27),  # 2 bits: 210 are 26.25 bytes
    "a codebook of 257": ((3, 5, 7), None, "a codebook of 257", 2 + 3 * 4 + 2 + 257 * 4 + 119),  # 9 bits: 945 are 118.1 bytes
    "a codebook of 1": ((3, 5, 7), None, "a codebook of 1", 2 + 3 * 4 + 2 + 4 + 14),  # never less than 1 bit
    "fp16": ((3, 5, 7), None, "fp16", 2 + 3 * 4 + 1 + 2 * 105),
    "fp8": ((3, 5, 7), None, "fp8_e5m2", 2 + 3 * 4 + 1 + 105),
    "52 of 105 as a bitmap, fp8": ((3, 5, 7), 0.5, "fp8_e4m3", 2 + 3 * 4 + 4 + 14 + 1 + 52),
}


@pytest.mark.parametrize(("shape", "share", "grid", "expected"), SIZES.values(), ids=SIZES)
def test_a_packet_takes_the_bytes_its_layout_says(shape, share, grid, expected):
    assert len(to_bytes(packet_of(shape, share, grid))) == expected


def test_factors_take_their_entries_and_a_rank():
    # flags and dimensions, 4 of 4 bytes, the rank; P has 5 x 3 entries and Q 12 x 3
    assert len(to_bytes(packet_of((5, 3, 2, 2), None, None, rank=3))) == 2 + 4 * 4 + 4 + 4 * 3 * (5 + 12)


@pytest.mark.parametrize("name", LATTICES)
def test_every_code_is_a_value_and_every_value_its_code(name):
    lattice, count = LATTICES[name]
    codes = torch.arange(0, count, 1 if count < 2**17 else 1009)
    assert torch.equal(lattice.encode(lattice.decode(codes)), codes)


def test_multiples_count_to_either_side_of_an_exact_zero():
    # two's complement of 3 bits: 0, 1, 2, 3, -4, -3, -2, -1
    assert Multiples(0.1, 3).decode(torch.arange(8)).tolist() == pytest.approx([0, 0.1, 0.2, 0.3, -0.4, -0.3, -0.2, -0.1])
    assert Multiples(0.1, 3).decode(torch.tensor([0])).item() == 0


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_a_float_format_has_the_numbers_its_definition_gives(name):
    # sign, exponents e of so many bits, mantissas of so many: 2**(1 - bias) m / 2**mantissa for e = 0, else 2**(e - bias) (1 + ...)
    exponent, mantissa = {"fp16": (5, 10), "bf16": (8, 7), "fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2)}[name]
    bias = 2 ** (exponent - 1) - 1
    positive = {
        (m if e == 0 else 2**mantissa + m) * 2.0 ** (max(e, 1) - bias - mantissa)
        for e in range(2**exponent - (name != "fp8_e4m3"))  # the last exponent means infinity, but for e4m3
        for m in range(2**mantissa - (name == "fp8_e4m3" and e == 15))  # whose last number is none
    }
    levels = Floats(name).levels()
    assert levels.tolist() == sorted(positive | {-x for x in positive})
    assert Floats(name).largest == max(positive)


def test_sixteen_levels_cost_half_a_byte_an_entry_and_a_header():
    update = {"weight": torch.randn(31, 37, generator=generator(0, "levels"))}
    packets, _ = UniformQuantization(16)(pack(update), {}, generator(0, "unused"))
    # 1147 entries are 573.5 bytes; 2 bytes, 2 dimensions of 4, and a grid of 9
    assert len(to_bytes(packets["weight"])) == 574 + 2 + 2 * 4 + 9


def test_flower_counts_what_we_count_but_for_a_constant_a_tensor():
    def over(scale: int) -> list[int]:
        packets = {f"layer{i}": packet_of((scale * (i + 2), 11), *how) for i, how in enumerate([(None, 4), (0.02, None), (0.5, 8)])}
        content = reply_of(packets, {}, 3, 0.5, 1)
        ours = sum(map(nbytes, packets.values()))
        assert wire_bytes(content) == ours
        # Arrays travel in numpy's format, whose header has 128 bytes whatever the size, besides a dtype and a shape.
        theirs = content.array_records[PACKETS].count_bytes()
        return [theirs - ours, len(packets)]

    (small, tensors), (large, _) = over(1), over(101)
    assert small // tensors <= 200
    assert abs(large - small) <= 8 * tensors  # a longer shape is written in a digit more


def test_packets_that_were_read_are_those_that_were_sent_and_can_be_sent_on():
    packets = {f"layer{i}": packet_of((i + 2, 11), *how) for i, how in enumerate([(None, 4), (0.02, None), (0.5, 8), (None, None)])}
    sent = reply_of(packets, {}, 3, 0.5, 1)
    read = with_packets(sent, packets_of(sent))
    assert wire_bytes(read) == wire_bytes(sent)
    found = packets_of(read)
    assert all(found[name] is packets_of(read)[name] for name in packets)  # not read again
    for name, array in record(read, ArrayRecord, PACKETS).items():
        assert array.data == record(sent, ArrayRecord, PACKETS)[name].data
        assert torch.equal(found[name].dense(), packets[name].dense())


def test_a_record_of_another_kind_is_not_there():
    content = reply_of({}, {}, 3, 0.5, 1)
    assert record(content, MetricRecord, METRICS)["num-examples"] == 3
    for kind, name in ((ArrayRecord, METRICS), (MetricRecord, "unknown")):
        with pytest.raises(KeyError, match=f"there is no {kind.__name__} '{name}'"):
            record(content, kind, name)


def test_weights_would_not_keep_the_levels_of_an_update():
    weights = torch.randn(10_007, generator=generator(0, "weights"))
    grid = Grid(-1e-3, 2e-3 / 15, 4)
    update = grid.decode(torch.randint(16, (10_007,), generator=generator(0, "codes")))
    # float32 keeps w - u to half a unit in the last place of w, about 3e-8, so each level becomes many.
    assert len(update.unique()) == 16
    assert len((weights - (weights - update)).unique()) > 100
    assert len(unpack({"w": from_bytes(to_bytes(Packet(update, (10_007,), None, grid)))})["w"].unique()) == 16


@QUICK
@given(
    low=st.floats(-10, 10, width=32),
    step=st.floats(2**-13, 10, width=32),
    bits=st.integers(1, 13),
    seed=st.integers(0, 2**31),
)
def test_values_on_a_grid_are_what_their_codes_say(low, step, bits, seed):
    grid = Grid(low, step, bits)
    # 2**-13 is many times the spacing 1e-6 of floats at 10, so a code can be read off a value.
    codes = torch.randint(2**bits, (53,), generator=generator(seed, "codes"))
    values = grid.decode(codes)
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.decode(grid.encode(values)), values)


def test_a_grid_finer_than_floats_still_gives_back_its_values():
    grid = Grid(1.0, 1e-9, MAX_BITS)  # floats above 1 lie 1.2e-7 apart: 119 codes share a value
    values = grid.decode(torch.arange(0, 2**MAX_BITS, 1009))
    assert torch.equal(grid.decode(grid.encode(values)), values)


@pytest.mark.parametrize("bits", [0, MAX_BITS + 1])
def test_a_grid_takes_1_to_24_bits(bits):
    with pytest.raises(ValueError, match=f"must lie in 1..24, got {bits}"):
        Grid(0.0, 1.0, bits)


WRONG_BOOKS = {
    "descends": (1.0, 0.5),
    "twice": (1.0, 1.0),
    "too close": (1.0, 1.0 + 1e-9),
    "none": (),
    "no number": (0.0, math.nan),
}


@pytest.mark.parametrize("values", WRONG_BOOKS.values(), ids=WRONG_BOOKS)
def test_a_codebook_ascends_in_float32(values):
    with pytest.raises(ValueError, match="finite values that ascend"):
        Codebook(values)


def test_an_unknown_float_format_is_named_with_the_others():
    with pytest.raises(ValueError, match="unknown float format 'fp15': did you mean 'fp16'"):
        Floats("fp15")


# Bytes that are no packet ------------------------------------------------------------------------------------------------------


def read(data: bytes) -> Packet | None:
    """The packet in `data`, or None. Fails on anything but ValueError, and on memory out of proportion to `data`."""
    tracemalloc.start()
    try:
        return from_bytes(data)
    except ValueError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A bit becomes one int64 on the way: 64 bytes for each byte, some at once.
        assert peak < 100_000 + 500 * len(data), f"{peak} bytes for {len(data)}"


@QUICK
@given(st.binary(max_size=200))
def test_random_bytes_are_no_packet_or_one_that_can_be_read(data):
    read(data)


@QUICK
@given(
    share=st.sampled_from(list(SUPPORTS.values())),
    grid=st.sampled_from([None, 1, 3, MAX_BITS, "multiples, 5 bits", "a codebook of 3", "bf16", "fp8_e4m3"]),
    rank=st.sampled_from([None, 2]),
    flips=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 255)), min_size=1, max_size=5),
)
def test_a_packet_with_flipped_bits_is_refused_or_well_formed(share, grid, rank, flips):
    data = bytearray(to_bytes(packet_of((3, 5, 7), share, grid, rank=rank)))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    found = read(bytes(data))
    if found is not None and found.support is not None:
        places = found.support
        assert len(places) == len(found.values)
        assert not len(places) or 0 <= int(places[0]) <= int(places[-1]) < found.places
        assert bool((places.diff() > 0).all()), "places must ascend, each once"
    if found is not None and found.support is None:
        assert len(found.values) == found.places


@pytest.mark.parametrize("share", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("grid", [None, 3, "multiples, 5 bits", "a codebook of 3", "fp16", "fp8_e5m2"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_truncated_or_padded_packet_is_refused(share, grid, rank):
    data = to_bytes(packet_of((3, 5, 7), share, grid, rank=rank))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="packet"):
            from_bytes(data[:length])
    with pytest.raises(ValueError, match="ends at byte"):
        from_bytes(data + b"\0")


def sparse(dimensions: list[int], places: bytes, k: int, values: bytes) -> bytes:
    """A sparse packet of floats, written by hand."""
    return struct.pack(f"<BB{len(dimensions)}I", 1, len(dimensions), *dimensions) + struct.pack("<I", k) + places + values


ONE = np.float32(1).tobytes()
REFUSED = {
    "a place beyond the end": sparse([7], bytes([0b111]), 1, ONE),
    "a place twice": sparse([7], bytes([0b010_010]), 2, 2 * ONE),
    "places that descend": sparse([7], bytes([0b001_010]), 2, 2 * ONE),
    "more entries than a machine can hold": sparse([2**32 - 1] * 3, bytes(12), 1, ONE),
    "255 dimensions": sparse([2**32 - 1] * 255, bytes(1020), 1, ONE),
    "a dense tensor of 16 gigabytes": struct.pack("<BBI", 0, 1, 2**32 - 1) + ONE,
    "a bitmap with too few places": struct.pack("<BBII", 3, 1, 7, 2) + bytes([0b1]) + 2 * ONE,
    "flags nobody sets": struct.pack("<BBI", 128, 1, 1) + ONE,
    "a grid of 0 bits": struct.pack("<BBIffB", 4, 1, 1, 0, 1, 0),
    "a grid of 25 bits": struct.pack("<BBIffB", 4, 1, 1, 0, 1, 25) + bytes(4),
    "multiples of 0 bits": struct.pack("<BBIfB", 8, 1, 1, 1, 0),
    "a code beyond its codebook": struct.pack("<BBIH3fB", 12, 1, 1, 2, -1, 0, 1, 0b11),
    "a codebook that descends": struct.pack("<BBIH2fB", 12, 1, 1, 1, 1, 0, 0b1),
    "a codebook longer than the packet": struct.pack("<BBIH", 12, 1, 1, 65535) + bytes(100),
    "a float format there is not": struct.pack("<BBIBB", 16, 1, 1, len(FORMATS), 0),
    "a kind of lattice there is not": struct.pack("<BBIBB", 20, 1, 1, 0, 0),
    "factors of rank 0": struct.pack("<BBIII", 32, 2, 1, 1, 0),
    "factors of more columns than the matrix": struct.pack("<BBIII", 32, 2, 1, 1, 2) + bytes(16),
    "factors of a vector": struct.pack("<BBII", 32, 1, 2, 1) + bytes(12),
    "factors of nothing": struct.pack("<BBIII", 32, 2, 0, 3, 1) + bytes(12),
    "factors of a matrix too large": struct.pack("<BBIII", 32, 2, 2**31, 2**31, 1) + bytes(12),
    "nothing at all": b"",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_packet_is_refused(data):
    assert read(data) is None


def test_factors_multiply_to_the_tensor():
    left, right = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    packet = Packet(torch.cat([left.flatten(), right.flatten()]), (3, 2, 2), rank=2)
    # row 0 of P, (1, 2), with the rows of Q: 1, 2, 3, 2; row 1, (0, 3): 0, 3, 3, 0; row 2, (1, 1): 1, 1, 2, 2
    assert packet.dense().tolist() == [[[1, 2], [3, 2]], [[0, 3], [3, 0]], [[1, 1], [2, 2]]]
    assert bool(packet.sent().all())


def test_sent_tells_which_entries_were():
    assert Packet(torch.zeros(2), (2, 3), torch.tensor([1, 5])).sent().tolist() == [[False, True, False], [False, False, True]]
    assert bool(Packet(torch.zeros(6), (2, 3)).sent().all())


def test_dense_puts_each_value_in_its_place():
    packet = Packet(torch.tensor([2.0, -3.0]), (2, 3), torch.tensor([1, 5]))
    expected: Tensor = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -3.0]])
    assert torch.equal(packet.dense(), expected)
