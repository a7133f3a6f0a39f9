"""The parts of a packed model that fine-tuning trains: make them trainable, write them back into bytes, or reset them.

- factors     the low-rank terms; a matrix without one gets new factors if the rank is not 0 (`factors`). With DoRA also
              the magnitudes of rows (`runtime.training.part`), which only an adapter can store
- scales      a gain on every fp16 scale that a format stores directly; does not change the size
- norms       a gain on every normalisation weight; does not change the size (`norms`)
- codebooks   the fp16 values of codebooks and level tables; does not change the size (`codebooks`)
- embeddings  a square map on embeddings that are stored as plain floats; does not change the size (`embedding_maps`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.decoding.decode import decode_factors
from reallm.decoding.scales import codebook_field, scale_count
from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.models.loaded import LoadedModel
from reallm.runtime.training.finish import revert, write_back_scales
from reallm.runtime.training.start import current_magnitudes, has_scales, train_magnitude, train_scales

from .codebooks import TrainableCodebooks
from .embedding_maps import EmbeddingMaps, plain_weights
from .factors import FactorValues, PackedLinears, copy_factors, restart_factors, start_factors, write_back_factors
from .norms import norm_weight, norms_of, remove_gains, set_norms, start_norms, trained_norms, write_back_norms
from .settings import FactorInit, Part


def nothing_to_train(parts: Sequence[Part]) -> UserError:
    """The error for an artifact that has none of `parts`."""
    return UserError(
        f"--train {','.join(parts)}: the artifact has none of these parts; give --rank 8 for new factors, or train "
        "scales and norms"
    )


def formats_have(
    parts: Sequence[Part], new_factors: LowRank | None, formats: Iterable[tuple[Format, int, int]]
) -> bool:
    """Whether a model whose linears have these (format, rows, columns) can have at least one of `parts`."""
    if new_factors is not None or {"norms", "embeddings"} & set(parts):
        return True
    return any(
        ("factors" in parts and fmt.low_rank is not None)
        or ("scales" in parts and scale_count(fmt, rows, cols) > 0)
        or ("codebooks" in parts and codebook_field(fmt, rows, cols) is not None)
        for fmt, rows, cols in formats
    )


@dataclass
class TrainableParts:
    """The trained parts of one packed model."""

    model: PreTrainedModel
    linears: PackedLinears
    parts: tuple[Part, ...]
    new_factors: LowRank | None
    """The low-rank term that linears without factors get; None for no new factors."""
    stored_dtype: torch.dtype
    """The dtype in which the artifact stores norms and plain embeddings."""
    init: FactorInit = "lq-lora"
    """How new factors are initialised."""
    dora: bool = False
    """Whether row magnitudes are trained beside the factors."""
    _linears_before: dict[str, tuple[Format, dict[str, Tensor]]] = field(default_factory=dict)
    _norms_before: dict[str, Tensor] = field(default_factory=dict)
    _embeddings_before: dict[str, Tensor] = field(default_factory=dict)
    _initial_factors: FactorValues = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps = EmbeddingMaps(self.model)
        self.codebooks = TrainableCodebooks(self.model, self.linears)

    def start(self, dense: LoadedModel, moments: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """Make every part trainable and return the parameters.

        `dense` is the model that the artifact was made from; `moments` are those of `factors.input_moments`. Raises
        UserError if there is nothing to train.
        """
        self._remember()
        if "embeddings" in self.parts:
            self.maps.start()
        if "factors" in self.parts:
            self._start_factors(dense, moments)
        if "scales" in self.parts:
            for linear in self.linears.values():
                if has_scales(linear):
                    train_scales(linear)
        if "codebooks" in self.parts:
            self.codebooks.start()
        if "norms" in self.parts:
            start_norms(self.model)
        parameters = self.parameters()
        if not parameters:
            raise nothing_to_train(self.parts)
        return parameters

    def _remember(self) -> None:
        self._linears_before = {
            name: (linear.format, {key: raw.clone() for key, raw in linear.fields.items()})
            for name, linear in self.linears.items()
        }
        self._norms_before = {name: norm_weight(norm).clone() for name, norm in norms_of(self.model).items()}
        if "embeddings" in self.parts:
            self._embeddings_before = {n: w.detach().clone() for n, w in plain_weights(self.model).items()}

    def _start_factors(self, dense: LoadedModel, moments: Mapping[str, Tensor]) -> None:
        linears = self._linears_with_factors()
        start_factors(dense, linears, moments, self.new_factors, self.init)
        self._initial_factors = copy_factors(linears)
        if self.dora:
            for linear in linears.values():
                train_magnitude(linear)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each learning rate: "factors", "gains" (scales, norms), "codebooks", "maps" (embeddings).

        DoRA's magnitudes are in the group "factors", so they have the factors' learning rate.
        """
        linears = self.linears.values()
        training = [linear.training_part for linear in linears if linear.training_part is not None]
        factors = [p for m in training for p in (m.left_factor, m.right_factor, m.magnitude) if p is not None]
        gains = [part.scale_gain for part in training if part.scale_gain is not None]
        gains += [gain.gain for gain in trained_norms(self.model).values()]
        maps = list(self.maps.maps.values())
        return {"factors": factors, "gains": gains, "codebooks": self.codebooks.parameters(), "maps": maps}

    def parameter_groups_within(self, part: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Like `parameter_groups`, but only the parameters inside `part` of the model."""
        inside = {id(parameter) for parameter in part.parameters()}
        return {name: [p for p in group if id(p) in inside] for name, group in self.parameter_groups().items()}

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of `parameter_groups`."""
        return [parameter for group in self.parameter_groups().values() for parameter in group]

    def state(self) -> dict[str, Tensor]:
        """Copies of all trained parameters, by their index in `parameters`."""
        return {str(index): p.detach().clone().cpu() for index, p in enumerate(self.parameters())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to what `state` returned."""
        for index, parameter in enumerate(self.parameters()):
            parameter.copy_(state[str(index)])

    def _linears_with_factors(self) -> PackedLinears:
        return {name: m for name, m in self.linears.items() if self.new_factors is not None or m.format.low_rank}

    def is_finite(self) -> bool:
        """Whether every trained value is finite."""
        return all(bool(p.isfinite().all()) for p in self.parameters())

    def write_back(self) -> None:
        """Write the trained values into bytes and end training. Raises ValueError if a value cannot be stored."""
        if "factors" in self.parts:
            write_back_factors(self._linears_with_factors(), self.new_factors)
        for linear in self.linears.values():
            if linear.training_part is not None and linear.training_part.scale_gain is not None:
                write_back_scales(linear)
        self.codebooks.write_back()
        write_back_norms(self.model, self.stored_dtype)
        self.maps.write_back(self.stored_dtype)

    def reset_to_initial(self) -> None:
        """Return to the state in which training started, with the initial factors written back."""
        remove_gains(self.model)
        for name, linear in self.linears.items():
            revert(linear, *self._linears_before[name])
        self.codebooks.reset_shared()
        set_norms(self.model, self._norms_before, self.stored_dtype)
        self.maps.remove()
        with torch.no_grad():
            for name, weight in plain_weights(self.model).items():
                if name in self._embeddings_before:
                    weight.copy_(self._embeddings_before[name])
        if self._initial_factors:
            restart_factors(self.linears, self._initial_factors)
            write_back_factors(self._linears_with_factors(), self.new_factors)

    def added_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of a linear -> L [rows, rank] and R [rank, cols], whose product is what training added to the stored
        low-rank term.
        """
        added = {}
        for name, linear in self._linears_with_factors().items():
            left, right = decode_factors(linear.format, linear.fields, linear.rows, linear.cols)
            fmt, fields = self._linears_before[name]
            old_left, old_right = decode_factors(fmt, fields, linear.rows, linear.cols)
            added[name] = (torch.cat([left, -old_left], dim=1), torch.cat([right, old_right]))
        return added

    def magnitudes(self) -> dict[str, Tensor] | None:
        """The DoRA magnitude m [rows] of each linear in `added_factors`, by name; None without DoRA."""
        return {name: current_magnitudes(m) for name, m in self._linears_with_factors().items()} if self.dora else None

    def stored_tensors(self) -> dict[str, Tensor]:
        """Name -> value of every norm's weight and of the plain embeddings, as the artifact stores them."""
        norms = {f"{name}.weight": norm_weight(norm) for name, norm in norms_of(self.model).items()}
        plain = {name: weight.detach() for name, weight in plain_weights(self.model).items()}
        return {name: value.to("cpu", self.stored_dtype) for name, value in (norms | plain).items()}
