"""The time to decode one token on a device, by a cost model of the kernels; and built-in GPUs from data sheets.

A matrix-vector product reads every stored byte once and decodes every weight once. On a device it takes

    max(bytes / bytes_per_second, weights / weights_per_second[codec]) + launch_seconds

for one token of one sequence (the roofline model; Williams et al. 2009). The rates of the built-in GPUs are
lanes x clock / instructions per weight, with the instructions counted in the machine code of our kernels, and the
bandwidth of the data sheet. Times from these rates serve to rank formats and to bound plans; to predict actual times,
give a device file with measured rates (`--device my.json`).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format

from .records import Record

KINDS: Mapping[type[AnyCodec], str] = {
    DenseCodec: "dense",
    ScalarCodec: "scalar",
    KMeansCodec: "table",
    AdditiveCodec: "additive",
    TrellisCodec: "trellis",
    LatticeCodec: "lattice",
    NeuralCodec: "neural",
}
"""Codec class -> its name in `Device.weights_per_second`."""
INSTRUCTIONS: Mapping[str, float] = {
    **{"dense": 1.0, "scalar": 5.5, "trellis": 6.2},  # medians at 2 to 4 bits (make bench NAME=triton_kernels)
    **{"table": 8.0, "additive": 8.0, "lattice": 12.0, "neural": 8.0},  # estimates: not counted yet
}
"""Kind of codec -> machine instructions per weight on a GPU."""


class Device(Record):
    """The rates that decide how long a matrix-vector product takes."""

    name: str
    bytes_per_second: float = Field(gt=0)
    """Memory bandwidth that a kernel reaches."""
    weights_per_second: Mapping[str, float]
    """Kind of codec (a value of `KINDS`) -> weights decoded and multiplied per second when memory is not the limit."""
    launch_seconds: float = Field(ge=0)
    """Fixed time added for each product, and for each rotation of a product's input or output."""

    def nanoseconds(self, fmt: Format, numel: int, nbytes: int) -> int:
        """Time of one product with a matrix of `numel` weights stored in `nbytes` bytes, rounded up."""
        decode_seconds = numel / self.weights_per_second[KINDS[type(fmt.codec)]]
        return self.read_nanoseconds(nbytes, decode_seconds, launches=2 * fmt.rotated + 1)

    def read_nanoseconds(self, nbytes: int, min_seconds: float = 0.0, launches: int = 0) -> int:
        """The larger of `min_seconds` and the time to read `nbytes` bytes, plus that of `launches` launches; rounded
        up."""
        seconds = max(nbytes / self.bytes_per_second, min_seconds) + launches * self.launch_seconds
        return -int(-seconds * 1e9 // 1)


def _gpu(name: str, terabytes_per_second: float, multiprocessors: int, gigahertz: float) -> Device:
    lanes = multiprocessors * 128 * gigahertz * 1e9
    rates = {kind: lanes / count for kind, count in INSTRUCTIONS.items()}
    return Device(
        name=name, bytes_per_second=terabytes_per_second * 1e12, weights_per_second=rates, launch_seconds=2e-6
    )


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100-80g", 2.039, 108, 1.41),
        _gpu("h100-sxm", 3.35, 132, 1.83),
        _gpu("rtx4090", 1.008, 128, 2.52),
    )
}
"""Name of a built-in GPU -> its rates, from its data sheet."""
