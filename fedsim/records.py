"""Between tensors and Flower's records. Everything that crosses the wire is made and read here."""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedsim.observation import Observation
from fedsim.wire import Packet, Packets, from_bytes, nbytes, pack, parts

ARRAYS, PACKETS, BUFFERS, METRICS, CONFIG, SENDER = "arrays", "packets", "buffers", "metrics", "config", "sender"
MASKED, VECTOR, RESTARTED = "masked", "vector", "restarted"

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def arrays_of(*tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as Flower arrays, dtypes kept."""
    return _record({name: array_of(t.detach().cpu().numpy()) for group in tensors for name, t in group.items()})


def computed_arrays_of(arrays: Mapping[str, tuple[np.ndarray, Callable[[], np.ndarray]]]) -> ArrayRecord:
    """Arrays for a strategy in this process: what each is like, and what computes it, anew whenever the strategy looks."""
    return _record({name: _Computed(like, compute) for name, (like, compute) in arrays.items()})


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    made = ArrayRecord()  # given them here, it would make each anew
    made.update(arrays)
    return made


class _Computed(Array):
    def __init__(self, like: np.ndarray, compute: Callable[[], np.ndarray]) -> None:
        self.dtype, self.shape, self.stype = _name_of(like.dtype), like.shape, "numpy.ndarray"
        self.__dict__["compute"] = compute

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return array_of(self.numpy()).data

    def numpy(self) -> np.ndarray:
        return self.__dict__["compute"]()


class _HeldPacket(Array):
    def __init__(self, packet: Packet, size: int) -> None:
        self.dtype, self.shape, self.stype = "uint8", (size,), "numpy.ndarray"
        self.__dict__["packet"] = packet

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return _array_of_packet(self.__dict__["packet"]).data


def packets_of(content: RecordDict) -> Packets:
    """The packets of a client's reply. Raises ValueError for bytes that are none."""
    return {name: _packet(array) for name, array in record(content, ArrayRecord, PACKETS).items()}


def _packet(array: Array) -> Packet:
    return array.__dict__["packet"] if isinstance(array, _HeldPacket) else from_bytes(numpy_of(array).data)


def with_packets(content: RecordDict, packets: Packets) -> RecordDict:
    """The same reply, whose packets were read: whoever wants them next need not, and their bytes are made again if looked at."""
    sizes = {name: array.shape[0] for name, array in record(content, ArrayRecord, PACKETS).items()}
    held = _record({name: _HeldPacket(packet, sizes[name]) for name, packet in packets.items()})
    return RecordDict({**content, PACKETS: held})


def record(content: RecordDict, kind: type[R], name: str) -> R:
    """The record of this name. Raises KeyError without one of its kind.

    Equal to `content.array_records[name]` and the like, which build a checked dictionary of them at each look.
    """
    if not isinstance(found := content.get(name), kind):
        raise KeyError(f"there is no {kind.__name__} {name!r}")
    return found


def array_of(array: np.ndarray) -> Array:
    """Equal to `Array(array)`, which copies the data three times on its way; here it is copied once."""
    return _array(array.dtype, array.shape, np.ascontiguousarray(array).data)


def _array(dtype: np.dtype, shape: tuple[int, ...], *data: bytes | memoryview) -> Array:
    return Array(_name_of(dtype), shape, "numpy.ndarray", b"".join((_npy_header(dtype, shape), *data)))


_name_of = functools.lru_cache(maxsize=64)(str)  # of a dtype: NumPy takes as long for it as for a small array


@functools.lru_cache(maxsize=4096)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def tensors_of(arrays: ArrayRecord, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Flower arrays as tensors of their own. float64 arrives from strategies such as FedAdam; models are float32."""
    return {name: _tensor(numpy_of(array)).to(device) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype == np.float64 else None))


def bytes_of(array: Array) -> bytes:
    """The bytes of an array of uint8."""
    return numpy_of(array).tobytes()


def numpy_of(array: Array) -> np.ndarray:
    """A read-only view of an array's data.

    Equal to `array.numpy()`, which parses the NPY header as Python source, for each tensor of each client: more work than the rest
    of a small client's message. Flower states dtype and shape beside it, so only the header's length is read.
    """
    data = array.data
    if array.stype != "numpy.ndarray" or data[:8] != b"\x93NUMPY\x01\x00" or b"'fortran_order': False" not in data[:128]:
        return array.numpy()
    start = 10 + int.from_bytes(data[8:10], "little")
    return np.frombuffer(data, dtype=array.dtype, offset=start).reshape(array.shape)


def reply_of(
    packets: Packets, buffers: Mapping[str, Tensor], num_examples: int, loss: float, client: int, summed: Sequence[int] = ()
) -> RecordDict:
    """A client's reply: the packets as bytes, BatchNorm statistics as they are, and what the protocol reports.

    summed  of a sum, whose replies it stands for
    """
    return RecordDict(
        {
            PACKETS: _record({name: _array_of_packet(packet) for name, packet in packets.items()}),
            BUFFERS: arrays_of(buffers),
            METRICS: MetricRecord({"num-examples": num_examples, "train-loss": loss}),
            # Strategies average every entry of a MetricRecord, so who sent it stands apart.
            SENDER: ConfigRecord({"client": client, "summed": list(summed)}),
        }
    )


def masked_reply_of(vector: bytes, about: Mapping[str, float], num_examples: int, client: int) -> RecordDict:
    """A client's reply under secure aggregation. `about` says how to read the vector: its `bits`, and the `scale` of an entry."""
    return RecordDict(
        {
            MASKED: _record({VECTOR: array_of(np.frombuffer(vector, np.uint8))}),
            METRICS: MetricRecord({"num-examples": num_examples}),
            SENDER: ConfigRecord({"client": client, "summed": [], **about}),
        }
    )


def is_masked(reply: Message) -> bool:
    """Whether a reply is a masked vector, of which only the sum means anything."""
    return reply.has_content() and isinstance(reply.content.get(MASKED), ArrayRecord)


def with_content(reply: Message, content: RecordDict) -> Message:
    """The same reply, with another content."""
    changed = Message.__new__(Message)
    changed.__dict__.update(reply.__dict__)
    changed.__dict__["_content"] = content
    return changed


def with_error(reply: Message, reason: str) -> Message:
    """The same reply as that of a client which failed."""
    changed = with_content(reply, RecordDict())
    changed.__dict__.update(_content=None, _error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason))
    return changed


def client_of(context: Context) -> int:
    """Which client a node is."""
    return int(context.node_config["partition-id"])


def flattened(update: Mapping[str, Tensor], buffers: Mapping[str, Tensor], loss: float) -> np.ndarray:
    """All that a client reports as one vector (d,), float64: tensors in the order of their names, then the loss."""
    tensors = [*(update[name] for name in sorted(update)), *(buffers[name] for name in sorted(buffers)), torch.tensor([loss])]
    return torch.cat([t.detach().cpu().double().reshape(-1) for t in tensors]).numpy()


def unflattened(
    vector: np.ndarray, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Update, buffers and loss of a vector that `flattened` made; `params` and `buffers` give names, order and shapes. Float32."""
    shapes = [(name, params[name].shape) for name in sorted(params)] + [(name, buffers[name].shape) for name in sorted(buffers)]
    *pieces, loss = torch.from_numpy(vector).split([*(shape.numel() for _, shape in shapes), 1])
    made = {name: piece.reshape(shape).float() for (name, shape), piece in zip(shapes, pieces, strict=True)}
    return {name: made[name] for name in params}, {name: made[name] for name in buffers}, float(loss)


def _array_of_packet(packet: Packet) -> Array:
    return _array(np.dtype(np.uint8), (nbytes(packet),), *parts(packet))


def observation_of(reply: RecordDict, params: dict[str, Tensor], buffers: dict[str, Tensor], round: int) -> Observation:
    """What a reply shows to someone on its way, or a sum of replies. Raises ValueError when the packets are not packets."""
    sender: Any = record(reply, ConfigRecord, SENDER)
    masked = isinstance(reply.get(MASKED), ArrayRecord)
    if masked:
        codes = np.frombuffer(numpy_of(record(reply, ArrayRecord, MASKED)[VECTOR]).data, f"<i{sender['bits'] // 8}")
        moved, changes, _ = unflattened(codes / sender["scale"], params, buffers)
        packets, sent_buffers = pack(moved), {name: t + changes[name] for name, t in buffers.items()}
    else:
        packets, sent_buffers = packets_of(reply), tensors_of(record(reply, ArrayRecord, BUFFERS))
    return Observation(
        params=params,
        packets=packets,
        num_examples=int(record(reply, MetricRecord, METRICS)["num-examples"]),  # type: ignore[arg-type]
        round=round,
        client=sender["client"],
        buffers=buffers,
        sent_buffers=sent_buffers,
        summed=tuple(sender["summed"]),
        masked=masked,
    )


def wire_bytes(content: RecordDict) -> int:
    """Payload bytes of all arrays of a message, without Flower's own framing."""
    return sum(
        math.prod(array.shape) * _itemsize(array.dtype)
        for part in content.values()
        if isinstance(part, ArrayRecord)
        for array in part.values()
    )


@functools.lru_cache(maxsize=64)
def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize
