"""Sums over a plan for reports: bits per weight by layer and family, and bytes by what they are used for."""

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
"""Stored field of a matrix -> the part that its bytes are counted in."""
SHARED, REST = "shared codebooks", "all else in the file"
"""Keys of `by_family` that are not families."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over a group of matrices; shared codebooks are not included."""

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
    """Sums for each (layer, family), experts of a layer added up; `outside` has the families outside the layers."""

    layers: tuple[int, ...]
    families: tuple[str, ...]
    cells: Mapping[tuple[int, str], Tally]
    outside: Mapping[str, Tally]


def layer_of(choice: Choice) -> int | None:
    """The matrix's layer: the first number in its name that is not the index of an expert; None outside the layers."""
    parts = choice.matrix.split(".")
    if choice.kind == "expert":
        parts = parts[:-1]
    return next((int(part) for part in parts if part.isascii() and part.isdigit()), None)


def tally(choices: Iterable[Choice]) -> Tally:
    """The sums over `choices`, of which there must be at least one."""
    group = list(choices)
    weights, nbytes = sum(c.rows * c.cols for c in group), sum(c.nbytes for c in group)
    return Tally(len(group), weights, nbytes, sum(c.cost for c in group))


def by_layer(plan: Plan) -> Grid:
    """The sums over each family in each layer, in the order of the plan."""
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
    """Part -> bytes of one matrix; the bytes add up to `choice.nbytes`."""
    fmt = Format.parse(choice.format)
    if isinstance(fmt.codec, DenseCodec):
        return {DENSE: choice.nbytes}
    parts: dict[str, int] = defaultdict(int)
    for field in fmt.fields(choice.rows, choice.cols):
        parts[FIELD_PART[field.name]] += field.nbytes
    return dict(parts)


def by_family(plan: Plan, dense: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Family -> part -> bytes, the largest family first; the bytes add up to the whole weights file.

    `dense` maps a family to the bytes of its matrices that stay uncompressed; without `dense`, REST includes them.
    """
    families: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for choice in plan.choices:
        for part, nbytes in parts_of(choice).items():
            families[choice.family or choice.matrix][part] += nbytes
    if plan.shared:
        families[SHARED][TABLES] += sum(plan.shared.values())
    for family, nbytes in (dense or {}).items():
        families[family][DENSE] += nbytes
    if rest := plan.file_bytes - plan.matrices_bytes - sum((dense or {}).values()):
        families[REST][DENSE] += rest
    order = sorted(families, key=lambda family: (-sum(families[family].values()), natural_key(family)))
    return {family: dict(families[family]) for family in order}


def costliest(plan: Plan, count: int) -> list[Choice]:
    """The `count` matrices with the largest predicted loss."""
    return sorted(plan.choices, key=lambda choice: (-choice.cost, natural_key(choice.matrix)))[:count]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> its shortest ending that keeps all names different; "_proj" is dropped where the names still differ."""
    names, count = tuple(dict.fromkeys(names)), 1
    while True:
        short = {name: ".".join(name.split(".")[-count:]) for name in names}
        if len(set(short.values())) == len(names) or count > max(name.count(".") for name in names):
            break
        count += 1
    bare = {name: label.removesuffix("_proj") or label for name, label in short.items()}
    return bare if len(set(bare.values())) == len(names) else short
