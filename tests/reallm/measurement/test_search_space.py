"""Candidate spaces: the presets, files, and mistakes in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.measurement.search_space import DEFAULT_SPACE, PRESETS, load_space


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_under_their_canonical_names(name: str) -> None:
    space = load_space(name)
    linear, vocabulary = PRESETS[name]
    assert space.name == name and set(space.formats) == {"linear", "expert", "embedding", "head"}
    assert [fmt.name for fmt in space.formats["linear"]] == list(linear) and space.formats["linear"]
    assert [fmt.name for fmt in space.formats["embedding"]] == list(vocabulary)
    assert space.formats["expert"] == space.formats["linear"]
    assert space.formats["head"] == space.formats["embedding"]
    assert len(set(linear)) == len(linear) and len(set(vocabulary)) == len(vocabulary)


def test_no_name_is_the_default() -> None:
    assert load_space(None) == load_space(DEFAULT_SPACE)


def test_a_file_gives_every_kind_its_formats(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("linear: [int4-g64, INT4-G64, aq1x8-d4+r16]\nexpert: [int2-g32]\nhead: [int8-g64]\n")
    formats = load_space(path).formats
    assert formats["linear"] == (Format.parse("int4-g64"), Format.parse("aq1x8-d4+r16"))  # the repeated one once
    assert formats["expert"] == (Format.parse("int2-g32"),) and formats["head"] == (Format.parse("int8-g64"),)
    assert formats["embedding"] == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("linear: [int4-g64\n", "not YAML: "),
        ("- int4-g64\n", "expected a mapping with the key `linear`, found list"),
        ("", "expected a mapping with the key `linear`, found NoneType"),
        ("embedding: [int8-g64]\n", r"found the keys \['embedding'\]; expected linear"),
        ("linear: [int4-g64]\nlayers: [int4-g64]\n1: 2\n", r"found the keys \['1', 'layers', 'linear'\]"),
        ("linear: int4-g64\n", "linear is 'int4-g64'; expected a list of format names"),
        ("linear: [4]\n", r"linear is \[4\]; expected a list of format names"),
        ("linear: []\n", "linear is empty; expected at least one format"),
        ("linear: [int9-g64]\n", r"linear: a scalar codec takes \(2, 3, 4, 5, 6, 8\) bits, not 9"),
        ("linear: [int4-g64]\nhead: [best]\n", "head: unknown format 'best'; expected a name"),
    ],
)
def test_mistakes_in_a_file_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_space(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(b"linear: [\xff\xfe]")
    with pytest.raises(UserError, match="not YAML"):
        load_space(path)


@pytest.mark.parametrize("name", ["defualt", "missing.yaml", "."])
def test_an_unknown_name_lists_the_presets(name: str) -> None:
    with pytest.raises(UserError, match=r"--space .*: no such preset or file; the presets are default, quick, "):
        load_space(name)
