"""The measured table: what `measure` writes to `<work>/table.json` and the planner reads."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Literal

from pydantic import Field

from reallm.kernels.storage.atomic import canonical_json, sha256_text
from reallm.kernels.storage.dtypes import FloatName

from .records import Record

TABLE_FILE = "table.json"
"""Name of the table in the folder that `measure` fills."""
Kind = Literal["linear", "embedding", "head", "expert"]


def _is_empty(value: Sized) -> bool:
    """Fields that few models need are left out of the file where they are empty."""
    return not value


class MatrixRecord(Record):
    """One weight matrix W[rows, cols] of the model; `name` is its module (`<stack>.<index>` for an expert)."""

    name: str
    rows: int = Field(gt=0)
    cols: int = Field(gt=0)
    kind: Kind
    block: int | None = None
    input: str = ""
    """Name of its input; matrices with the same input have the same name here (q, k and v; gate and up)."""
    family: str = ""
    """Its role, the same in all blocks: the name without block and expert numbers. A family can share a codebook."""
    source_bytes: int = Field(gt=0)
    """Bytes of the uncompressed matrix, in the model's own dtype."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


class MeasurementRecord(Record):
    """What it costs to store one matrix in one format, measured on the actual error of the encoder, E = W - W_hat."""

    matrix: str
    format: str
    nbytes: int = Field(gt=0)
    guided: float = Field(ge=0, allow_inf_nan=False)
    """1/2 tr(E H_guided E^T), in nats per token."""
    two_sided: float = Field(ge=0, allow_inf_nan=False)
    """1/2 tr(G E H_guided E^T), in nats per token: the default objective.

    G is the damped second moment of the output gradients, divided by its mean diagonal. Equal to `guided` where there
    is no G (embeddings, heads).
    """
    fisher: float = Field(ge=0, allow_inf_nan=False)
    """1/2 sum(F * E^2) with the diagonal Fisher information F, in nats per token."""
    relative: float = Field(ge=0, allow_inf_nan=False)
    """|E|_F^2 / |W|_F^2."""
    seconds: float = Field(ge=0)
    """Time that encoding took."""
    codes_sha256: str
    """Digest of the packed fields, in order, which `compile` must reproduce."""


class PredictionRecord(Record):
    """The costs of one matrix in a format in which it was not encoded, predicted from other formats."""

    matrix: str
    format: str
    nbytes: int = Field(gt=0)
    guided: float = Field(ge=0, allow_inf_nan=False)
    two_sided: float = Field(ge=0, allow_inf_nan=False)
    fisher: float = Field(ge=0, allow_inf_nan=False)
    relative: float = Field(ge=0, allow_inf_nan=False)
    """`guided` to `relative`: what `MeasurementRecord` defines, without having been measured."""
    deviations: Mapping[str, float]
    """Cost -> standard deviation of its logarithm: 0.05 means that the prediction is right to about 5%."""


class SharedRecord(Record):
    """A codebook that several matrices share; its key is `<format name without modifiers>@<family>`."""

    key: str
    nbytes: int = Field(gt=0)
    sha256: str


class CacheLayer(Record):
    """What the KV cache of one layer keeps, for each sequence."""

    values: int = Field(gt=0)
    """Numbers per token: keys and values of all heads."""
    window: int | None = Field(default=None, gt=0)
    """Maximum number of tokens that are kept (a sliding window); None if all are."""


class MeasuredTable(Record):
    """All results of `measure`, and what they were measured on.

    >>> table = reallm.measure("model", text="train.txt", output="work", space="space.yaml", nsamples=8, seqlen=32)
    >>> sorted({measurement.format for measurement in table.measurements})
    ['int4-g16', 'int8-g16', 'tq3-l8+rot']
    """

    version: Literal[1] = 1
    model: str
    """Path or name the model was loaded from."""
    model_sha256: str
    text: str
    text_sha256: str
    settings: Mapping[str, int | float | str | bool | None]
    dtype: FloatName
    """The model's own dtype, in which uncompressed tensors are stored unless `other_dtypes` says otherwise."""
    other_tensors: Mapping[str, tuple[int, ...]]
    """Name -> shape of every stored tensor that is not in `matrices` (norms, biases, positions)."""
    other_dtypes: Mapping[str, str] = Field({}, exclude_if=_is_empty)
    """Name -> dtype ("f32", "i64", ...) of those of `other_tensors` that are not in the model's own dtype."""
    matrices: tuple[MatrixRecord, ...]
    measurements: tuple[MeasurementRecord, ...]
    shared: tuple[SharedRecord, ...] = ()
    predictions: tuple[PredictionRecord, ...] = Field((), exclude_if=_is_empty)
    """Candidates that were not encoded because their predicted costs are no better than what the plan chose."""
    bounded: Mapping[str, int] = {}
    """Format -> number of matrices not measured in it because screening proved it useless at the requested budgets."""
    kv_cache: tuple[CacheLayer, ...] = ()
    """The KV cache, layer by layer; empty for a model without one."""
    experts_per_token: int | None = None
    """Experts that each token uses in a stack of experts; None where the model does not say."""
    kept: Mapping[str, tuple[str, ...]] = Field({}, exclude_if=_is_empty)
    """Reason -> matrices that calibration could not measure. They keep their dtype, unless a plan pins a format."""
    doubts: tuple[str, ...] = Field((), exclude_if=_is_empty)
    """Why the predicted losses cannot be relied on, one sentence each; plans repeat them."""
    base: Mapping[str, float] = {}
    """Facts about the run: calibration perplexity, peak RSS in bytes, seconds of each stage."""

    def digest(self) -> str:
        """sha256 of everything except `base`, `doubts` and the seconds, which differ from run to run."""
        content = self.model_dump(
            mode="json", exclude={"base": True, "doubts": True, "measurements": {"__all__": {"seconds"}}}
        )
        return sha256_text(canonical_json(content))
