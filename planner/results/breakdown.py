"""What a plan holds, added up for people: bits by layer and role, bytes by what they are for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import natural_key
from reallm.planner.tables.plan import Choice, Plan

CODES, TABLES, FACTORS, OUTLIERS, TRANSFORMS, DENSE = PARTS = (
    "codes",
    "scales and tables",
    "low-rank factors",
    "outliers",
    "transforms",
    "uncompressed",
)
FIELD_PART: Mapping[str, str] = {
    **dict.fromkeys(("codes", "words", "residuals"), CODES),
    **dict.fromkeys(("scales", "scale_codes", "scale_ranges", "scale_min", "zeros"), TABLES),
    **dict.fromkeys(("widths", "levels", "codebooks"), TABLES),
    **dict.fromkeys(("left", "right", "left_scales", "right_scales"), FACTORS),
    **dict.fromkeys(("sparse_counts", "sparse_cols", "sparse_values"), OUTLIERS),
    **dict.fromkeys(("permutation", "channel_scales"), TRANSFORMS),
    "values": DENSE,
}
"""Field of a format -> what its bytes are for."""
SHARED, REST = "shared codebooks", "all else in the file"


@dataclass(frozen=True, slots=True)
class Tally:
    """Some matrices added up; shared codebooks are left out."""

    matrices: int
    weights: int
    nbytes: int
    cost: float

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True, slots=True)
class Grid:
    """A plan by layer and family, the experts of a layer together; `outside` are the families without a layer."""

    layers: tuple[int, ...]
    families: tuple[str, ...]
    cells: Mapping[tuple[int, str], Tally]
    outside: Mapping[str, Tally]


def layer_of(choice: Choice) -> int | None:
    """The first number in the matrix's name, the index of an expert left out; None outside the layers."""
    parts = choice.matrix.split(".")
    if choice.kind == "expert":
        parts = parts[:-1]
    return next((int(part) for part in parts if part.isascii() and part.isdigit()), None)


def tally(choices: Iterable[Choice]) -> Tally:
    """`choices`, one or more, added up."""
    group = list(choices)
    weights, nbytes = sum(c.rows * c.cols for c in group), sum(c.nbytes for c in group)
    return Tally(len(group), weights, nbytes, sum(c.cost for c in group))


def by_layer(plan: Plan) -> Grid:
    """Every layer's share of every family, in the order of the plan."""
    inside: dict[tuple[int, str], list[Choice]] = defaultdict(list)
    outside: dict[str, list[Choice]] = defaultdict(list)
    for choice in plan.choices:
        layer = layer_of(choice)
        if layer is None:
            outside[choice.family or choice.matrix].append(choice)
        else:
            inside[layer, choice.family].append(choice)
    return Grid(
        layers=tuple(sorted({layer for layer, _ in inside})),
        families=tuple(dict.fromkeys(family for _, family in inside)),
        cells={key: tally(group) for key, group in inside.items()},
        outside={family: tally(group) for family, group in outside.items()},
    )


def parts_of(choice: Choice) -> dict[str, int]:
    """What the bytes of one matrix are for; they add up to `choice.nbytes`."""
    fmt = Format.parse(choice.format)
    if isinstance(fmt.codec, DenseCodec):
        return {DENSE: choice.nbytes}
    found: dict[str, int] = defaultdict(int)
    for field in fmt.fields(choice.rows, choice.cols):
        found[FIELD_PART[field.name]] += field.nbytes
    return dict(found)


def by_family(plan: Plan, dense: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Family -> part -> bytes of the whole weights file, most bytes first; they add up to `plan.file_bytes`.

    `dense` has the families of the matrices that took no part, with their bytes; without it they are in the rest.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for choice in plan.choices:
        for part, nbytes in parts_of(choice).items():
            found[choice.family or choice.matrix][part] += nbytes
    if plan.shared:
        found[SHARED][TABLES] += sum(plan.shared.values())
    for family, nbytes in (dense or {}).items():
        found[family][DENSE] += nbytes
    if rest := plan.file_bytes - plan.matrices_bytes - sum((dense or {}).values()):
        found[REST][DENSE] += rest
    order = sorted(found, key=lambda family: (-sum(found[family].values()), natural_key(family)))
    return {family: dict(found[family]) for family in order}


def costliest(plan: Plan, most: int) -> list[Choice]:
    """The `most` matrices of the largest predicted loss."""
    return sorted(plan.choices, key=lambda choice: (-choice.cost, natural_key(choice.matrix)))[:most]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> its last parts, as few as tell the names apart, and without `_proj` where that still does."""
    names, count = tuple(dict.fromkeys(names)), 1
    while True:
        short = {name: ".".join(name.split(".")[-count:]) for name in names}
        if len(set(short.values())) == len(names) or count > max(name.count(".") for name in names):
            break
        count += 1
    bare = {name: label.removesuffix("_proj") or label for name, label in short.items()}
    return bare if len(set(bare.values())) == len(names) else short
