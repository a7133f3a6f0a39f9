"""The report: one well-formed file that needs no other, with the plan's numbers, and reproducible to the byte."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plans import plan_of
from strategies import make_table

from reallm.errors import UserError
from reallm.planner.results.breakdown import by_family, by_layer, costliest
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Measured, Plan
from reallm.planner.tables.records import RecordError, read_record, write_record
from reallm.planner.tables.units import PlanError
from reallm.planning.plan import plan as make_plan
from reallm.reporting.report import report
from reallm.reporting.report_data import COSTLIEST, collect_report_data
from reallm.reporting.sweep import sweep

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
COSTS = {"uint4-g64+ldl": 0.1, "uint2-g64+ldl": 0.9, "tq3-l12+ldl2+rot": 0.2, "int8-g64": 0.001}
HOSTILE = "<script>alert('1')</script>"
MEASURED = Measured(
    text="held.txt",
    text_sha256="a" * 64,
    windows=2,
    seqlen=64,
    kl=0.75,
    uniform_kl=0.9,
    tried=(("uniform int4-g64", 0.5, 0.9), ("plan", 0.25, 0.75)),
)


class Page(HTMLParser):
    """The page as a browser parses it; asserts that every tag is closed once."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.values += [value or "" for name, value in attrs if tag == "data" and name == "value"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def layered_table(layers: int, name: str = "layers.{}.{}") -> MeasuredTable:
    every = [(i, n, scale) for i in range(layers) for n, scale in (("q_proj", 1.0), ("up_proj", 0.3))]
    costs = [{f: s * c / (1 + i) for f, c in COSTS.items()} for i, _, s in every]
    matrices = [(name.format(i, n), 128, 64, "linear", each) for (i, n, _), each in zip(every, costs, strict=True)]
    return make_table(*matrices, ("embed", 64, 64, "embedding", {"int8-g64": 0.01}))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_record(tmp_path / "work" / TABLE_FILE, layered_table(6))
    return tmp_path / "work"


def plan_file(work: Path, budget: str = "4.5bpw") -> Path:
    make_plan(work, budget=budget, output=work.parent / "plan.json")
    return work.parent / "plan.json"


def page(path: Path, work: Path | None = None) -> Page:
    report(path, output=path.parent / "report.html", work=work)
    return Page((path.parent / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_complete_and_needs_no_other_file(work: Path) -> None:
    html = page(plan_file(work))
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(html.tags)
    text = (work.parent / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text
    for tag, name, value in html.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value is not None and value.startswith("#"), (tag, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = [value for _, name, value in html.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert html.tags["svg"] == 2 * 4  # bits, pareto, bytes, costliest; each narrow and wide
    assert html.tags["table"] == 5  # the same and the next MiB
    labels = [value for tag, name, value in html.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == html.tags["svg"] and all(labels)


@pytest.mark.parametrize("budget", ["4.5bpw", "60KiB"])
def test_it_shows_the_numbers_of_the_plan(work: Path, budget: str) -> None:
    path = plan_file(work, budget)
    plan, html = read_record(path, Plan, "plan"), page(path)
    expected = [plan.bits_per_weight, plan.file_bytes, plan.predicted_loss, plan.bound.mip_gap]
    assert [float(value) for value in html.values] == expected
    for fact in (plan.model_sha256, plan.table_sha256, plan.bound.status, plan.bound.solver, plan.budget, plan.work):
        assert fact in html.text
    for number in (plan.budget_bytes, plan.counted_bytes, plan.matrices_bytes, plan.file_bytes):
        assert f"{number:,}" in html.text
    assert f"{plan.bound.best_bound:.6g}" in html.text and f"{plan.bound.shadow_price:.4g}" in html.text
    assert plan.uniform is not None and plan.uniform.format in html.text
    for parts in by_family(plan).values():
        assert f"{sum(parts.values()):,}" in html.text
    for cell in by_layer(plan).cells.values():
        assert f"{cell.bits:.2f}" in html.texts
    for choice in costliest(plan, COSTLIEST):
        assert choice.matrix in html.texts and f"{choice.cost:.4g}" in html.texts
        assert choice.runner_up is None or choice.runner_up in html.texts


def test_the_sweep_and_the_next_mib_come_from_the_planner(work: Path) -> None:
    path = plan_file(work)
    data, html = collect_report_data(read_record(path, Plan, "plan")), page(path)
    plan = data.plan
    assert (plan.counted_bytes, plan.predicted_loss) in [(p.counted_bytes, p.predicted_loss) for p in data.points]
    assert {u.format for u in data.uniforms} == {*COSTS, "bf16"}
    for each in (*data.points, *data.uniforms):
        assert f"{each.counted_bytes:,}" in html.texts and f"{each.predicted_loss:.4g}" in html.texts
    assert data.richer is not None and data.richer.budget_bytes == plan.budget_bytes + (1 << 20)
    assert f"to {data.richer.predicted_loss:.4g} nats per token" in html.text
    for name, other in data.runners_up.items():
        assert {c.matrix: c.runner_up for c in plan.choices}[name] == other.format and other.format in html.texts


def test_the_same_plan_gives_the_same_bytes(work: Path, tmp_path: Path) -> None:
    path = plan_file(work)
    for folder in ("one", "two"):
        report(path, output=tmp_path / folder / "report.html", png_folder=tmp_path / folder)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["bits.png", "bytes.png", "costliest.png", "pareto.png", "report.html"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_measured_losses_are_shown_or_how_to_measure_them(work: Path) -> None:
    path = plan_file(work)
    assert "No plan was measured" in page(path).text and "--refit 2 --refit-text held.txt" in page(path).text
    plan = read_record(path, Plan, "plan").model_copy(update={"measured": MEASURED, "corrections": {"q_proj": 1.5}})
    write_record(path, plan)
    html = page(path)
    assert "No plan was measured" not in html.text and html.tags["svg"] == 2 * 5
    assert str(MEASURED.kl) in html.values
    for fact in ("uniform int4-g64", "0.25 predicted, 0.75 measured, 3.00 times", "1.800", "q_proj 1.50", "a" * 64):
        assert fact in html.text, fact


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    table = layered_table(2, name=HOSTILE + ".{}.{}").model_copy(update={"model": f'"><b>{HOSTILE}\x07'})
    write_record(tmp_path / "<i>work" / TABLE_FILE, table)
    html = page(plan_file(tmp_path / "<i>work"))
    assert not {"script", "b", "i"} & set(html.tags)
    assert HOSTILE in html.text and "\x07" not in html.text


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(("lm_head", "int4-g64", 64, 64)),
        plan_of(("layers.0.q", "bf16", 64, 64)),
        plan_of(*((f"layers.{i}.mlp.experts.up.{e}", "int4-g64", 16, 16) for i in range(4) for e in range(5))),
        plan_of(*((f"layers.{i}.q", "aq1x4-d4-shared", 16, 16) for i in range(3))).model_copy(update={"dense": ("x",)}),
        plan_of((HOSTILE, "int4-g64", 64, 64), ("$a$.`b`.\x00", "int4-g64", 64, 64)),
    ],
    ids=["a single matrix", "dense", "experts", "shared codebooks", "hostile names"],
)
def test_odd_plans_have_pages(plan: Plan, tmp_path: Path) -> None:
    write_record(tmp_path / "plan.json", plan.model_copy(update={"work": str(tmp_path / "gone")}))
    html = page(tmp_path / "plan.json")
    assert "No matrix is predicted to lose anything" in html.text  # plan_of has no costs
    assert html.tags["svg"] == 2 * 2 and html.tags["script"] == 0


def test_without_its_table_the_rest_is_drawn_and_the_way_out_is_named(work: Path, tmp_path: Path) -> None:
    path = plan_file(work)
    whole = page(path).text
    work.rename(tmp_path / "moved")
    html = page(path)
    assert "are left out" in html.text and "reallm report plan.json --work FOLDER" in html.text
    assert html.tags["svg"] == 2 * 3 and "The costliest matrices" in html.text
    assert page(path, work=tmp_path / "moved").text == whole
    with pytest.raises(RecordError, match=r"`reallm measure` makes it"):
        report(path, output=tmp_path / "report.html", work=tmp_path / "nowhere")


def test_another_table_is_noted_or_refused_when_named(work: Path, tmp_path: Path) -> None:
    path = plan_file(work)
    write_record(work / TABLE_FILE, layered_table(5))
    html = page(path)
    assert "is not the table that the plan" in html.text and f"reallm plan {work} --budget 4.5bpw" in html.text
    with pytest.raises(PlanError, match="another measured table"):
        report(path, output=tmp_path / "report.html", work=work)


@pytest.mark.parametrize("name", ["plan.json", "report", "folder.html"])
def test_an_invalid_output_is_refused_before_anything_is_written(work: Path, tmp_path: Path, name: str) -> None:
    path, folder = plan_file(work), tmp_path / "folder.html"
    folder.mkdir()
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"expected the name of an \.html file"):
        report(path, output=tmp_path / name)
    with pytest.raises(UserError, match="expected a folder"):
        report(path, output=tmp_path / "report.html", png_folder=path)
    assert path.read_bytes() == before and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_the_ending_of_the_name_decides_how_a_sweep_is_drawn(work: Path, tmp_path: Path, ending: str) -> None:
    files = [tmp_path / f"{which}.{ending}" for which in ("one", "two")]
    for file in files:
        points = sweep(work, first="2.5bpw", last="9bpw", points=5, figure=file)
    data = files[0].read_bytes()
    assert data == files[1].read_bytes()
    if ending == "html":
        html = Page(data.decode())
        assert html.tags["svg"] == 2
        assert all(f"{point.counted_bytes:,}" in html.texts for point in points)
    else:
        assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])


def test_a_sweep_that_cannot_be_drawn_says_why(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--figure .*pareto\.pdf: expected .*\.png, \.svg, \.html"):
        sweep(work, first="3bpw", last="9bpw", figure=tmp_path / "pareto.pdf", output=tmp_path / "pareto.csv")
    assert not (tmp_path / "pareto.csv").exists()
    with pytest.raises(UserError, match="predicted loss of zero"):
        sweep(work, first="16bpw", last="20bpw", points=2, figure=tmp_path / "pareto.png")
