"""Figures: readable colours, a drawing for every plan, the same bytes each time, hostile names shown as text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_of

from reallm.planner.results.breakdown import by_family, by_layer
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint
from reallm.reporting.figures.bars import bytes_bars, costliest_bars, measured_bars
from reallm.reporting.figures.curve import Curve, curve_of, pareto
from reallm.reporting.figures.heat import heat_map
from reallm.reporting.figures.paint import (
    DARK,
    LIGHT,
    NARROW,
    STEPS,
    WIDE,
    Drawing,
    Paint,
    contrast,
    inline_svg,
    luminance,
    plain,
    png,
    shortened,
    steps,
    svg,
)

HOSTILE = '</svg><script>alert("1")</script>$\\frac{1}{0}$&\x01\N{RIGHT-TO-LEFT OVERRIDE}'


def point(nbytes: int, loss: float, status: str = "optimal") -> Point:
    return Point(f"{nbytes}B", nbytes, nbytes, nbytes / 1000, loss, loss, status, 0.0, "", None)


def elements(drawing: Drawing, width: int) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(inline_svg(drawing, "x", "label", width)).iter())


def texts(drawing: Drawing, width: int = WIDE) -> list[str]:
    return [element.text or "" for element in elements(drawing, width) if element.tag == "text"]


@pytest.mark.parametrize("paint", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_contrast_and_the_ramp_works_in_greyscale(paint: Paint) -> None:
    for ink in ("ink", "muted", "accent", "warm"):
        assert contrast(paint[ink], paint["paper"]) >= 4.5, ink  # WCAG 2, AA
    assert contrast(paint["muted"], paint["raised"]) >= 4.5
    for step in range(STEPS):
        assert contrast(paint[f"on{step}"], paint[f"heat{step}"]) >= 4.5, step
    shades = [luminance(paint[f"heat{step}"]) for step in range(STEPS)]
    assert all(a > b for a, b in itertools.pairwise(shades)) or all(a < b for a, b in itertools.pairwise(shades))


def test_contrast_of_black_on_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@given(st.lists(st.floats(0.5, 64), min_size=1, max_size=20))
def test_shades_rise_with_the_values_and_span_the_ramp(values: list[float]) -> None:
    shades = steps(values)
    assert all(0 <= step < STEPS for step in shades)
    ordered = sorted(zip(values, shades, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(ordered))
    if max(values) > min(values) * 1.1:
        assert ordered[0][1] == 0 and ordered[-1][1] == STEPS - 1


@given(st.text(max_size=60), st.integers(3, 40))
def test_shortened_text_is_short_printable_and_keeps_its_ends(text: str, length: int) -> None:
    short = shortened(text, length)
    assert len(short) <= length and short.isprintable() | (short == "")
    if len(text) > length:
        assert short[0] == plain(text)[0] and short[-1] == plain(text)[-1]


PLANS = {
    "one matrix outside any layer": [("lm_head", "int4-g64", 64, 64)],
    "one layer, one matrix": [("layers.0.q", "int4-g64", 64, 64)],
    "dense and two bits": [("layers.0.q", "bf16", 64, 64), ("layers.0.k", "int2-g64", 64, 64)],
    "thirty by seven": [
        (f"model.layers.{i}.self_attn.{n}_proj", f"tq{2 + i % 5 / 4:g}-l12+ldl2+rot", 64, 64)
        for i in range(30)
        for n in ("q", "k", "v", "o", "gate", "up", "down")
    ],
    "many layers": [(f"layers.{i}.q", f"int{2 + i % 3}-g64", 16, 16) for i in range(126)],
    "experts": [(f"layers.{i}.experts.{e}.up", f"int{2 + e}-g64", 16, 16) for i in range(3) for e in range(3)],
    "layers with gaps": [("layers.0.q", "int4-g64", 16, 16), ("layers.7.moe", "int4-g64", 16, 16)],
    "long names": [(f"layers.{i}.{'very_' * 30}long", "aq1x4-d4-shared", 64, 64) for i in range(2)],
    "hostile": [(HOSTILE, "int4-g64", 64, 64), (f"layers.0.{HOSTILE}x", "int8-g64+r1", 64, 64)],
}


@pytest.mark.parametrize("rows", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_every_plan_is_drawn_within_its_width(rows: Sequence[tuple[str, str, int, int]], width: int) -> None:
    plan = plan_of(*rows)
    for drawing in (heat_map(by_layer(plan)), bytes_bars(by_family(plan)), costliest_bars(plan.choices[:10], 0.0)):
        root = elements(drawing, width)[0]
        _, _, drawn, height = map(float, root.attrib["viewBox"].split())
        assert drawn == pytest.approx(width) and 20 < height < 3000
        for text in elements(drawing, width):
            if text.tag == "text" and "x" in text.attrib:
                assert -1 <= float(text.attrib["x"]) <= width + 1


def test_the_heat_map_shows_the_bits_of_every_cell() -> None:
    plan = plan_of(*PLANS["thirty by seven"])
    shown = texts(heat_map(by_layer(plan)))
    for cell in by_layer(plan).cells.values():
        assert f"{cell.bits:.2f}" in shown
    assert {"q", "k", "v", "o", "gate", "up", "down", "29"} <= set(shown)


def test_inline_figures_use_variables_and_have_no_addresses() -> None:
    plan = plan_of(*PLANS["hostile"])
    for drawing in (heat_map(by_layer(plan)), bytes_bars(by_family(plan)), pareto(CURVE)):
        element = inline_svg(drawing, "name", HOSTILE, NARROW)
        root = ElementTree.fromstring(element)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"] == plain(HOSTILE)
        assert "var(--" in element and "http" not in element and "<script" not in element
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(set(ids)) == len(ids) and all(name.startswith("name-") for name in ids)
        referred = {part.split(")")[0] for part in element.split("url(#")[1:]}
        referred |= {part.split('"')[0] for part in element.split('href="#')[1:]}
        assert referred <= set(ids)
        assert not re.search("#01[0-9a-f]{2}fe", element)


CURVE = curve_of(
    [point(2000, 0.9), point(3000, 0.2), point(4000, 0.05), point(5000, 0.0)],
    [
        UniformPoint("int2-g64", 2500, 2.5, 0.8),
        UniformPoint("int3-g64", 3500, 3.5, 0.3),
        UniformPoint("far", 3600, 3.6, 80.0),
        UniformPoint("large", 9000, 9.0, 0.01),
    ],
    "matrices",
    None,
)


def test_the_curve_leaves_out_what_a_logarithm_cannot_show_and_counts_it() -> None:
    assert CURVE.points == ((2.0, 0.9), (3.0, 0.2), (4.0, 0.05))
    assert [name for _, _, name in CURVE.uniforms] == ["int2-g64", "int3-g64"]
    assert CURVE.beyond == 2
    assert {"int2-g64", "int3-g64", "best mix", "one format", "bits per weight"} <= set(texts(pareto(CURVE)))


@pytest.mark.parametrize(
    "curve",
    [
        Curve(((3.0, 0.1),), (), 0, "bits per weight", None),
        Curve(((3.0, 0.1),), (), 0, "bits per weight", (3.0, 0.1)),
        Curve(((3.0, 1e-12), (3.1, 1e-12)), ((3.05, 1e-12, HOSTILE),), 0, "bits per weight", None),
        Curve(((1.0, 50.0), (6.0, 1e-9)), (), 0, "MiB of the weights file", (2.0, 0.1)),
    ],
    ids=["a point", "the plan alone", "flat and hostile", "ten decades"],
)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_odd_curves_are_drawn(curve: Curve, width: int) -> None:
    assert curve.unit in texts(pareto(curve), width)


def test_a_curve_of_the_file_is_in_mib_or_gib() -> None:
    small = curve_of([point(3 << 20, 0.1)], [], "file", None)
    assert small.points == ((3.0, 0.1),) and small.unit == "MiB of the weights file"
    large = curve_of([point(8 << 30, 0.1)], [], "file", None)
    assert large.points == ((8.0, 0.1),) and large.unit == "GiB of the weights file"


@pytest.mark.parametrize("tried", [[("plan", 0.0, 0.0)], [("uniform int4-g64", 0.4, 0.9), (HOSTILE, 0.3, 0.2)]])
def test_measured_plans_are_drawn(tried: list[tuple[str, float, float]]) -> None:
    shown = texts(measured_bars(tried))
    assert shortened(tried[0][0], 48) in shown
    assert any(f"{tried[0][2]:.4g} measured" in text for text in shown)


def test_the_same_drawing_gives_the_same_bytes_whatever_the_users_settings_are() -> None:
    first = [inline_svg(pareto(CURVE), "x", "l", WIDE).encode(), svg(pareto(CURVE)), png(pareto(CURVE))]
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "other", "savefig.dpi": 10}):
        again = [inline_svg(pareto(CURVE), "x", "l", WIDE).encode(), svg(pareto(CURVE)), png(pareto(CURVE))]
    assert first == again
    assert first[2].startswith(b"\x89PNG")
    ElementTree.fromstring(first[1])
