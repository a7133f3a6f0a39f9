"""The measured table: what `measure` writes to `<work>/table.json` and the planner reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from reallm.kernels.storage.atomic import canonical_json, sha256_text

from .records import Record

TABLE_FILE = "table.json"
Kind = Literal["linear", "embedding", "head", "expert"]


class MatrixRecord(Record):
    """One weight matrix W[rows, cols] of the model; `name` is the module (for experts with `[index]` appended)."""

    name: str
    rows: int = Field(gt=0)
    cols: int = Field(gt=0)
    kind: Kind
    block: int | None = None
    input: str = ""
    """Name of the distinct input it shares with others (q, k and v; gate and up)."""
    family: str = ""
    """Its role across blocks (the name without block and expert numbers): what shared codebooks are shared over."""
    source_bytes: int = Field(gt=0)
    """Bytes it takes uncompressed, in the model's own dtype."""

    @property
    def numel(self) -> int:
        return self.rows * self.cols


class MeasurementRecord(Record):
    """What storing one matrix in one format costs, measured on the encoder's actual error E = W - W_hat."""

    matrix: str
    format: str
    nbytes: int = Field(gt=0)
    guided: float = Field(ge=0, allow_inf_nan=False)
    """1/2 tr(E H_guided E^T), in nats per token."""
    two_sided: float = Field(ge=0, allow_inf_nan=False)
    """1/2 tr(G E H_guided E^T), G the gradients' damped second moment over its mean diagonal: what is minimised.

    As `guided` where there is no G (embeddings, heads).
    """
    fisher: float = Field(ge=0, allow_inf_nan=False)
    """1/2 sum(F * E^2) with F the diagonal Fisher, in nats per token."""
    relative: float = Field(ge=0, allow_inf_nan=False)
    """|E|_F^2 / |W|_F^2."""
    seconds: float = Field(ge=0)
    codes_sha256: str
    """Digest of the packed fields, in order: what `compile` must reproduce."""


class SharedRecord(Record):
    """A codebook that several matrices share: its key is `<format name without modifiers>@<family>`."""

    key: str
    nbytes: int = Field(gt=0)
    sha256: str


class CacheLayer(Record):
    """What one layer keeps of every token it has seen, for each sequence."""

    values: int = Field(gt=0)
    """Numbers a token: keys and values of all heads."""
    window: int | None = Field(default=None, gt=0)
    """Of how many tokens at most; None for all."""


class MeasuredTable(Record):
    """Everything `measure` found out, and from what."""

    version: Literal[1] = 1
    model: str
    """Path or name the model was loaded from."""
    model_sha256: str
    text: str
    text_sha256: str
    settings: Mapping[str, int | float | str | bool | None]
    dtype: Literal["f16", "bf16", "f32"]
    """The model's own dtype, in which whatever is not compressed is stored."""
    other_tensors: Mapping[str, tuple[int, ...]]
    """Name -> shape of every stored tensor that is not a matrix (norms, biases, positions)."""
    matrices: tuple[MatrixRecord, ...]
    measurements: tuple[MeasurementRecord, ...]
    shared: tuple[SharedRecord, ...] = ()
    bounded: Mapping[str, int] = {}
    """Format -> number of matrices that were not measured in it, as it cannot matter at the budgets asked."""
    kv_cache: tuple[CacheLayer, ...] = ()
    """What each layer's cache of keys and values keeps; empty where the model has none."""
    experts_per_token: int | None = None
    """Of each stack of experts; None where the model does not say."""
    base: Mapping[str, float] = {}
    """Measured facts worth keeping: calibration perplexity, peak RSS in bytes, seconds of each stage."""

    def digest(self) -> str:
        """sha256 of all but `base` and the seconds, which differ from run to run."""
        content = self.model_dump(mode="json", exclude={"base": True, "measurements": {"__all__": {"seconds"}}})
        return sha256_text(canonical_json(content))
