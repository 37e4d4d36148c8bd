"""Between tensors and Flower's records. Everything that crosses the wire is made and read here."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.observation import Observation
from fedsim.wire import Packets, from_bytes, to_bytes

ARRAYS, PACKETS, BUFFERS, METRICS, CONFIG, SENDER = "arrays", "packets", "buffers", "metrics", "config", "sender"


def arrays_of(*tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as Flower arrays, dtypes kept."""
    return ArrayRecord({name: Array(t.detach().cpu().numpy()) for group in tensors for name, t in group.items()})


def tensors_of(arrays: ArrayRecord, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Flower arrays as tensors of their own. float64 arrives from strategies such as FedAdam; models are float32."""
    return {name: _tensor(numpy_of(array)).to(device) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32 if array.dtype == np.float64 else None))


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


def reply_of(packets: Packets, buffers: Mapping[str, Tensor], num_examples: int, loss: float, client: int) -> RecordDict:
    """A client's reply: the packets as bytes, BatchNorm statistics as they are, and what the protocol reports."""
    return RecordDict(
        {
            PACKETS: ArrayRecord({name: Array(np.frombuffer(to_bytes(p), dtype=np.uint8)) for name, p in packets.items()}),
            BUFFERS: arrays_of(buffers),
            METRICS: MetricRecord({"num-examples": num_examples, "train-loss": loss}),
            # Strategies average every entry of a MetricRecord, so who sent it stands apart.
            SENDER: ConfigRecord({"client": client}),
        }
    )


def observation_of(reply: RecordDict, params: dict[str, Tensor], buffers: dict[str, Tensor], round: int) -> Observation:
    """What a reply shows to someone on its way. Raises ValueError when the packets are not packets."""
    packets = {name: from_bytes(numpy_of(array).data) for name, array in reply.array_records[PACKETS].items()}
    return Observation(
        params=params,
        packets=packets,
        num_examples=int(reply.metric_records[METRICS]["num-examples"]),  # type: ignore[arg-type]
        round=round,
        client=int(reply.config_records[SENDER]["client"]),  # type: ignore[arg-type]
        buffers=buffers,
        sent_buffers=tensors_of(reply.array_records[BUFFERS]),
    )


def wire_bytes(content: RecordDict) -> int:
    """Payload bytes of all arrays of a message, without Flower's own framing."""
    return sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for record in content.array_records.values()
        for array in record.values()
    )
