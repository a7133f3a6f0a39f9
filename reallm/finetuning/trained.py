"""What is being trained of a packed model, as one thing to start, fold back into its bytes, and start over.

- factors   the low-rank terms, new ones where a matrix has none and the rank is not 0 (`factors`); with `dora` the
            magnitudes of rows beside them (`runtime.magnitude`), which only an adapter can store
- scales    a gain on every fp16 scale that a format stores by itself: not one byte more
- norms     a gain on every weight of a normalisation: not one byte more
- codebooks the fp16 values of codebooks and of tables of levels: not one byte more (`codebooks`)
- embeddings  a square map on what is stored of them as plain floats: not one byte more (`maps`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from reallm.decoding.decode import codebook_field, decode_factors, scale_count
from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.models.loaded import LoadedModel

from .codebooks import Codebooks
from .embedding_maps import EmbeddingMaps, plain_weights
from .factors import Init, Modules, Snapshot, fold_all, restore, snapshot, start_factors

Part = Literal["factors", "scales", "norms", "codebooks", "embeddings"]
PARTS: tuple[Part, ...] = get_args(Part)


def check_parts(parts: Sequence[str]) -> tuple[Part, ...]:
    """`parts` in their own order, each once. Raises UserError for an unknown one, or none."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--train {unknown[0]}: expected {', '.join(PARTS)}")
    if not parts:
        raise UserError(f"--train: nothing is to be trained; expected one or more of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def nothing_of(parts: Sequence[Part]) -> UserError:
    """That an artifact has nothing of `parts`."""
    return UserError(
        f"--train {','.join(parts)}: the artifact has nothing of that; give --rank 8 for new factors, or train scales "
        "and norms"
    )


def formats_hold(parts: Sequence[Part], term: LowRank | None, formats: Iterable[tuple[Format, int, int]]) -> bool:
    """Whether a model with linears of these formats, rows and columns may have some of `parts`."""
    if term is not None or {"norms", "embeddings"} & set(parts):
        return True
    return any(
        ("factors" in parts and fmt.low_rank is not None)
        or ("scales" in parts and scale_count(fmt, rows, cols) > 0)
        or ("codebooks" in parts and codebook_field(fmt, rows, cols) is not None)
        for fmt, rows, cols in formats
    )


class _Gain(nn.Module):
    """w + unit * gain, gain float32 and 0 at first; unit is the effective weight, which is 1 + w in Gemma's norms."""

    def __init__(self, weight: Tensor, about_one: bool) -> None:
        super().__init__()
        self.unit = torch.ones_like(weight) if about_one else weight.detach().clone()
        self.gain = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use, in the dtype of `weight`."""
        return (weight.float() + self.unit.float() * self.gain).to(weight.dtype)


def _weight(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of `model` that normalise with a weight of one dimension, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 1  # as was asked for above
    }


@dataclass
class Trained:
    """The parts being trained of one packed model."""

    model: PreTrainedModel
    modules: Modules
    parts: tuple[Part, ...]
    term: LowRank | None
    """Of the new factors; None for none."""
    stored: torch.dtype
    """The dtype in which norms are stored."""
    init: Init = "lq-lora"
    """Where new factors start."""
    dora: bool = False
    """Whether rows have trained magnitudes beside the factors."""
    _before: dict[str, tuple[Format, dict[str, Tensor]]] = field(default_factory=dict)
    _norms_before: dict[str, Tensor] = field(default_factory=dict)
    _plain_before: dict[str, Tensor] = field(default_factory=dict)
    _fresh: Snapshot = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps = EmbeddingMaps(self.model)
        self.codebooks = Codebooks(self.model, self.modules)

    def start(self, original: LoadedModel, moments: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """Make every part trainable; the parameters. Raises UserError when there is none."""
        self._before = {n: (m.format, {k: raw.clone() for k, raw in m.fields.items()}) for n, m in self.modules.items()}
        self._norms_before = {name: _weight(norm).clone() for name, norm in norms_of(self.model).items()}
        if "embeddings" in self.parts:
            self._plain_before = {n: w.detach().clone() for n, w in plain_weights(self.model).items()}
            self.maps.start()
        if "factors" in self.parts:
            start_factors(original, self._with_factors(), moments, self.term, self.init)
            self._fresh = snapshot(self._with_factors())
            if self.dora:
                for module in self._with_factors().values():
                    module.train_magnitude()
        if "scales" in self.parts:
            for module in self.modules.values():
                if module.has_scales:
                    module.train_scales()
        if "codebooks" in self.parts:
            self.codebooks.start()
        if "norms" in self.parts:
            for norm in norms_of(self.model).values():
                about_one = "gemma" in type(norm).__name__.lower()
                parametrize.register_parametrization(norm, "weight", _Gain(_weight(norm), about_one), unsafe=True)
        found = self.parameters()
        if not found:
            raise nothing_of(self.parts)
        return found

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by what moves alike: "factors", "gains" (scales and norms), "codebooks", "maps" (embeddings).

        Magnitudes go with the factors, at one rate, as in DoRA.
        """
        modules = self.modules.values()
        factors = [p for m in modules for p in (m.left_factor, m.right_factor, m.magnitude) if p is not None]
        gains = [m.scale_gain for m in modules if m.scale_gain is not None]
        gains += [gain.gain for gain in self._gains().values()]
        maps = list(self.maps.maps.values())
        return {"factors": factors, "gains": gains, "codebooks": self.codebooks.parameters(), "maps": maps}

    def groups_within(self, part: nn.Module) -> dict[str, list[nn.Parameter]]:
        """As `groups`, of what lies in `part` of the model alone."""
        inside = {id(parameter) for parameter in part.parameters()}
        return {name: [p for p in group if id(p) in inside] for name, group in self.groups().items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of all that is being trained, by its place in `parameters`."""
        return {str(index): p.detach().clone().cpu() for index, p in enumerate(self.parameters())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on what `state` gave."""
        for index, parameter in enumerate(self.parameters()):
            parameter.copy_(state[str(index)])

    def parameters(self) -> list[nn.Parameter]:
        """All that is being trained, in the order of `groups`."""
        return [parameter for group in self.groups().values() for parameter in group]

    def _gains(self) -> dict[str, _Gain]:
        found = {}
        for name, module in self.model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                gain = module.parametrizations.weight[0]
                if isinstance(gain, _Gain):
                    found[name] = gain
        return found

    def _with_factors(self) -> Modules:
        return {name: m for name, m in self.modules.items() if self.term is not None or m.format.low_rank}

    def finite(self) -> bool:
        """Whether every value being trained is."""
        return all(bool(p.isfinite().all()) for p in self.parameters())

    def fold(self) -> None:
        """Write what was trained back into bytes. Raises ValueError for a value that cannot be stored."""
        if "factors" in self.parts:
            fold_all(self._with_factors(), self.term)
        for module in self.modules.values():
            if module.scale_gain is not None:
                module.fold_scales()
        self.codebooks.fold()
        values = {name: self.model.get_submodule(name).weight.detach().clone() for name in self._gains()}
        self._drop_gains()
        for name, value in values.items():
            self._set_norm(name, value)
        self.maps.fold(self.stored)

    def fresh(self) -> None:
        """Go back to where training started, new factors folded in."""
        self._drop_gains()
        for name, module in self.modules.items():
            module.revert(*self._before[name])
        self.codebooks.restore()
        for name, value in self._norms_before.items():
            self._set_norm(name, value)
        self.maps.drop()
        with torch.no_grad():
            for name, weight in plain_weights(self.model).items():
                if name in self._plain_before:
                    weight.copy_(self._plain_before[name])
        if self._fresh:
            restore(self.modules, self._fresh)
            fold_all(self._with_factors(), self.term)

    def _drop_gains(self) -> None:
        for name in self._gains():
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight", leave_parametrized=False)

    @torch.no_grad()
    def _set_norm(self, name: str, value: Tensor) -> None:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(value.to(self.stored))

    def added_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """L [rows, rank] and R [rank, cols] by module: the term now stored less the one before training."""
        added = {}
        for name, module in self._with_factors().items():
            left, right = decode_factors(module.format, module.fields, module.rows, module.cols)
            fmt, fields = self._before[name]
            old_left, old_right = decode_factors(fmt, fields, module.rows, module.cols)
            added[name] = (torch.cat([left, -old_left], dim=1), torch.cat([right, old_right]))
        return added

    def magnitudes(self) -> dict[str, Tensor] | None:
        """m [rows] by module, of the matrices in `added_factors`; None without `dora`."""
        return {name: m.magnitudes() for name, m in self._with_factors().items()} if self.dora else None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> value of every norm's weight, and of plain embeddings, as the artifact stores them."""
        norms = {f"{name}.weight": _weight(norm) for name, norm in norms_of(self.model).items()}
        plain = {name: weight.detach() for name, weight in plain_weights(self.model).items()}
        return {name: value.to("cpu", self.stored) for name, value in (norms | plain).items()}
