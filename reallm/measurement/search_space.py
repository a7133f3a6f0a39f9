"""Search spaces: the candidate formats for each kind of matrix.

A space is the name of a preset or a YAML file:

    linear: [tq2-l12+ldl2+rot, tq3-l12+ldl2+rot, lm4-g64+ldl]    # also for experts, unless a key `expert` lists others
    embedding: [int4-g64+ldl, int8-g64]                          # also for the head, unless a key `head` lists others
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.formats.fields import FormatError
from reallm.kernels.formats.formats import Format
from reallm.planner.tables.measured_table import Kind

_VOCABULARY = ("lm3-g64-dq6x64+ldl", "lm4-g64-dq6x64+ldl", "lm6-g64-dq6x64+ldl", "int8-g64")

_SCALAR = (
    "lm2-g32-dq6x64+ldl",
    "lm3-g128-dq6x64+ldl",
    "lm3-g32-dq6x64+ldl",
    "lm4-g128-dq6x64+ldl",
    "lm4-g32-dq6x64+ldl",
    "lm5-g32-dq6x64+ldl",
    "lm6-g64-dq6x64+ldl",
    "int8-g64",
)


def _trellis(state_bits: int, *rates: float) -> tuple[str, ...]:
    return tuple(f"tq{rate:g}-l{state_bits}+ldl2+rot" for rate in rates)


_QUICK = (*_trellis(10, 2, 2.5, 3, 3.5, 4, 5), "int8-g64")
_DEFAULT = (
    *_trellis(12, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 4, 4.5, 5),
    "lm4-g64-dq6x64+ldl",
    "lm6-g64-dq6x64+ldl",
    "int8-g64",
)


def _asymmetric(method: str) -> tuple[str, ...]:
    return tuple(f"uint{bits}-g{group}{method}" for bits in (2, 3, 4) for group in (128, 64))


_REALLM = (
    *(f"nd1x{codes}-d2-c{decoder}-w8+ldl+rot" for codes, decoder in ((3, "32x1-t4"), (4, "32x1-t3"), (6, "32x1-t2"))),
    "nd1x4-d2-c32x1-t3-w8+ldl+perm",
    "nd1x4-d2-c64x2-t3-w8+ldl+rot",
    "nd1x4-d2-c32x1-t3-w8+ldl+rot+r16i8",
    "nd1x4-d2-c32x1-t3-w4+ldl+rot",
    "aq1x8-d4-shared",
    "aq1x8-d4-shared+perm+r16i8",
    "aq2x6-d4",
    "lm4-g64-dq6x64+ldl",
)


def _integers(*groups: int) -> tuple[str, ...]:
    return tuple(f"int{bits}-g{group}{'' if bits == 8 else '+ldl'}" for bits in (2, 3, 4, 5, 6, 8) for group in groups)


PRESETS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": (_DEFAULT, _VOCABULARY),
    "quick": (_QUICK, _VOCABULARY[1:]),
    "scalar": (_SCALAR, _VOCABULARY),
    "qlora": (("nf4-g64-dq8x256",), ("nf4-g64-dq8x256",)),
    "loftq": (tuple(f"nf{b}-g64-dq8x256+svd+r{r}" for b in (2, 3, 4) for r in (16, 32)), ("nf4-g64-dq8x256",)),
    "gptq": ((*_asymmetric("+ldl"), "uint8-g64+ldl"), ("uint4-g64", "uint8-g64")),
    "awq": ((*_asymmetric("+cs"), "uint8-g64+cs"), ("uint4-g64", "uint8-g64")),
    "omniquant": ((*_asymmetric("+lwc"), "uint8-g64"), ("uint4-g64", "uint8-g64")),
    "squeezellm": (tuple(f"km{b}{sparse}" for b in (2, 3, 4) for sparse in ("", "+o5")), ("km4", "int8-g64")),
    "spqr": (
        tuple(f"uint{b}-g16-dq4x16+ldl{sparse}" for b in (2, 3, 4) for sparse in ("", "+o10")),
        ("uint4-g16-dq4x16", "int8-g64"),
    ),
    "lq-lora": (tuple(f"nf{b}-g{g}-dq8x256+r32" for b in (2, 3, 4, 8) for g in (16, 32, 64)), ("nf8-g64-dq8x256",)),
    "quip#": (("e8p2+ldl+rot", "e8p3+ldl+rot", "e8p4+ldl+rot"), ("int8-g64",)),
    "qtip": (tuple(f"tq{bits}-l12+ldl+rot" for bits in ("1", "1.5", "2", "2.5", "3", "3.5", "4")), ("int8-g64",)),
    "reallm": (_REALLM, _VOCABULARY),
    "gguf": (("int4-g32+ldl", "int5-g32+ldl", "int8-g32"), ("int4-g32+ldl", "int5-g32+ldl", "int8-g32")),
    "vllm": (
        (*_integers(64), *(f"uint{bits}-g64+ldl" for bits in (2, 3, 4)), "int4-g32+ldl"),
        (),
    ),
    "sglang": (("int4-g64+ldl", "int4-g32+ldl", "int8-g64"), ()),
    "mlx": (_integers(64, 32), ("int4-g64+ldl", "int6-g64+ldl", "int8-g64")),
    "aqlm": (("aq1x8-d8", "aq2x8-d8", "aq3x8-d8", "aq4x8-d8"), ("int8-g64",)),
}
"""Preset name -> (formats of linear layers, formats of embedding and head). Some are those of a target."""

DEFAULT_SPACE = "default"


@dataclass(frozen=True)
class Space:
    """The candidate formats for every kind of matrix, in the order in which the user or the preset lists them."""

    name: str
    formats: Mapping[Kind, tuple[Format, ...]]


def _formats(names: object, where: str) -> tuple[Format, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{where} is {names!r}; expected a list of format names such as [int4-g64, lm3-g32-dq6x64+ldl]")
    try:
        return tuple(dict.fromkeys(Format.parse(name) for name in names))
    except FormatError as error:
        raise UserError(f"{where}: {error}") from None


def _build(name: str, lists: Mapping[str, object]) -> Space:
    unknown = set(lists) - {"linear", "embedding", "expert", "head"}
    if unknown or "linear" not in lists:
        raise UserError(
            f"space {name}: found the keys {sorted(map(str, lists))}; expected linear (and embedding, expert, head)"
        )
    linear = _formats(lists["linear"], f"space {name}: linear")
    if not linear:
        raise UserError(f"space {name}: linear is empty; expected at least one format")
    embedding = _formats(lists.get("embedding", []), f"space {name}: embedding")
    expert = _formats(lists["expert"], f"space {name}: expert") if "expert" in lists else linear
    head = _formats(lists["head"], f"space {name}: head") if "head" in lists else embedding
    return Space(name, {"linear": linear, "expert": expert, "embedding": embedding, "head": head})


def load_space(space: str | Path | Space | None = None) -> Space:
    """Load the preset called `space`, or the YAML file of that name; None for the default preset.

    A Space is returned as it is.

    Raises UserError for an unknown name and for a file that does not describe a space.
    """
    if isinstance(space, Space):
        return space
    name = str(space or DEFAULT_SPACE)
    if name in PRESETS:
        linear, vocabulary = PRESETS[name]
        return _build(name, {"linear": list(linear), "embedding": list(vocabulary)})
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--space {name}: no such preset or file; the presets are {', '.join(PRESETS)}")
    import yaml  # presets do not need it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with the key `linear`, found {type(content).__name__}")
    return _build(name, content)
