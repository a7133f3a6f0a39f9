"""How long a matrix takes in one token's decoding: the kernels' cost model.

A matrix-vector product reads every stored byte once and decodes every weight once, so on a device it takes

    max(bytes / bytes_per_second, weights / weights_per_second[codec]) + launch_seconds

for one token of one sequence (a roofline; Williams et al. 2009). Rates of the GPUs are lanes times clock over the
instructions a weight that our kernels take by the static count of their machine code; bandwidths are data sheets'. They
rank formats and bound plans; a device file with measured rates (`--device my.json`) makes them predictions.
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
from reallm.planner.tables.records import Record

KINDS: Mapping[type[AnyCodec], str] = {
    DenseCodec: "dense",
    ScalarCodec: "scalar",
    KMeansCodec: "table",
    AdditiveCodec: "additive",
    TrellisCodec: "trellis",
    LatticeCodec: "lattice",
    NeuralCodec: "neural",
}
INSTRUCTIONS: Mapping[str, float] = {
    **{"dense": 1.0, "scalar": 5.5, "trellis": 6.2},  # medians of what NAME=triton_kernels counts at 2 to 4 bits
    **{"table": 8.0, "additive": 8.0, "lattice": 12.0, "neural": 8.0},  # guesses: not counted yet
}
"""Machine instructions a weight on a GPU."""


class Device(Record):
    """What decides how long a product takes."""

    name: str
    bytes_per_second: float = Field(gt=0)
    """Of memory, as reached."""
    weights_per_second: Mapping[str, float]
    """Kind of codec (`KINDS`) -> weights decoded and multiplied a second when memory is no limit."""
    launch_seconds: float = Field(ge=0)
    """Fixed cost of one product, and of each rotation of a side."""

    def nanoseconds(self, fmt: Format, numel: int, nbytes: int) -> int:
        """Time of one product with a matrix of `numel` weights in `nbytes` bytes, rounded up."""
        return self.reading(nbytes, numel / self.weights_per_second[KINDS[type(fmt.codec)]], 2 * fmt.rotated + 1)

    def reading(self, nbytes: int, least_seconds: float = 0.0, launches: int = 0) -> int:
        """Nanoseconds to read `nbytes`, no less than `least_seconds`, rounded up."""
        seconds = max(nbytes / self.bytes_per_second, least_seconds) + launches * self.launch_seconds
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
"""GPUs by their data sheets."""
