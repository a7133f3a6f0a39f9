"""What the commands print: every table can be read at 80 columns, and limits are named as the user gave them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from strategies import make_table
from typer.testing import CliRunner

from reallm.cli import app as app_module
from reallm.cli import artifact as artifact_commands
from reallm.cli import plan as plan_commands
from reallm.cli.main import app
from reallm.cli.plan_tables import print_plan
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.plan import read_plan
from reallm.planner.tables.records import write_record

COSTS = {
    **{"tq1.5-l12+ldl2+rot": 0.09, "tq2.5-l12+ldl2+rot": 0.03, "tq4-l12+ldl2+rot": 0.004},
    **{"lm4-g64-dq8x64+ldl": 0.005, "int8-g64": 0.0001},
}
FAMILIES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.experts.gate_up_proj": (1536, 576)}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with the table of a vision-language model, whose matrices have long names."""
    rows = [
        (
            f"model.language_model.layers.{n}.{name}",
            *shape,
            "linear",
            {f: c * (1 + n % 5) / 10 for f, c in COSTS.items()},
        )
        for n in range(12)
        for name, shape in FAMILIES.items()
    ]
    table = make_table(*rows)
    kept = {"no calibration token reached them": (rows[0][0], rows[1][0])}
    write_record(tmp_path / TABLE_FILE, table.model_copy(update={"kept": kept}))
    return tmp_path


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str | Path) -> str:
    """What a command prints on a console of `width` columns."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for module in (app_module, plan_commands, artifact_commands):
        monkeypatch.setattr(module, "CONSOLE", console)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.stderr} {result.exception!r}"
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def plans(work: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A small plan and a large one."""
    for name, budget in (("small", "2.5bpw"), ("large", "6bpw")):
        shown(monkeypatch, 80, "plan", work, "-b", budget, "-o", work / f"{name}.json")
    return work / "small.json", work / "large.json"


def words(text: str) -> set[str]:
    """The words between blanks and the lines of tables."""
    return set("".join(" " if c in "│┃" else c for c in text).split())


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize(
    "command",
    [
        ["explain", "small.json", "layers.3.self_attn"],
        ["explain", "small.json"],
        ["sweep", ".", "--points", "4"],
        ["inspect", "small.json", "--matrices"],
        ["diff", "small.json", "large.json"],
        ["plan", ".", "-b", "3bpw", "-o", "new.json", "--best", "2"],
    ],
)
def test_no_name_or_number_is_broken(
    command: list[str], width: int, work: Path, plans: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    text = shown(monkeypatch, width, *command)
    assert all(len(line) <= width for line in text.splitlines())
    formats = {*COSTS, "bf16"}
    parts = {"q_proj", "k_proj", "gate_up_proj"}
    for word in words(text):
        if word[0].isdigit() or word[0] in "+-":
            continue
        broken = [name for name in formats if word != name and len(word) > 2 and name.startswith(word)]
        assert not broken or word in formats, f"{word!r} is a piece of {broken}:\n{text}"
        if "proj" in word or word.startswith("layers."):
            assert word.rpartition(".")[2].strip(",:)") in parts | {"layers"}, f"{word!r} is broken:\n{text}"


def test_names_are_shortened_only_where_they_must_be(
    work: Path, plans: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = (shown(monkeypatch, width, "inspect", plans[0], "--matrices") for width in (80, 160))
    assert "all names begin with model.language_model.layers.)" in narrow and "576x576" not in narrow
    assert "model.language_model.layers.11.mlp.experts.gate_up_proj" in wide and "1536x576" in wide


def test_a_sweep_says_whose_size_it_prints(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [
        " ".join(shown(monkeypatch, 80, "sweep", work, "--points", "2", *ends).split("───")[0].split())
        for ends in (("--from", "3bpw", "--to", "4bpw"), ("--from", "7MiB", "--to", "8MiB"))
    ]
    assert "matrices" in heads[0] and "file" not in heads[0]
    assert "weights" in heads[1] and "file" in heads[1] and "matrices" not in heads[1]


def test_limits_are_printed_as_they_were_given(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The capacity in a plan is what the rest of the model leaves of the limit; the user gave the limit."""
    limits = ("--latency", "20ms", "--device", "rtx4090", "--pool", r"gpu0=6MiB:layers\.")
    text = " ".join(shown(monkeypatch, 200, "plan", work, "-b", "8MiB", "-o", work / "p.json", *limits).split())
    plan = read_plan(work / "p.json")
    pool, latency = plan.limits
    assert latency.capacity < 20_000_000 and "ms of 20.000 ms used" in text
    assert pool.capacity < 6 << 20 and "MiB of 6.00 MiB used" in text
    used = 20_000_000 - latency.capacity + latency.used
    assert f"{used / 1e6:.3f} ms of 20.000 ms" in text and "of it by the rest of the model" in text


def test_what_the_plan_leaves_as_it_is_is_shown_with_the_reason(
    work: Path, plans: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason, name = "no calibration token reached them", "model.language_model.layers.0.self_attn.q_proj"
    plan = read_plan(plans[0])
    assert plan.kept == {reason: (name, name.replace("q_proj", "k_proj"))}
    texts = [
        shown(monkeypatch, 200, *command)
        for command in (
            ["plan", work, "-b", "2.5bpw", "-o", work / "again.json"],
            ["inspect", plans[0]],
            ["explain", plans[0]],
            ["explain", plans[0], "self_attn"],
        )
    ]
    for text in texts:
        assert reason in text and name.rpartition(".")[0] in text, text
    assert "no format: 2 matrices" in texts[-1]
    result = CliRunner().invoke(app, ["explain", str(plans[0]), "layers.0.self_attn.q_proj"])
    assert result.exit_code == 2 and reason in result.stderr and "matches no matrix with a format" in result.stderr
    page = work / "report.html"
    assert CliRunner().invoke(app, ["report", str(plans[0]), "-o", str(page)]).exit_code == 0
    assert reason in page.read_text() and name in page.read_text()


def test_brackets_in_notes_and_values_are_not_markup(work: Path, plans: tuple[Path, Path]) -> None:
    console = Console(file=io.StringIO(), width=80)
    plan = read_plan(plans[0]).model_copy(update={"notes": ("a [bold]note[/bold]",), "budget": "2.5[/]bpw"})
    print_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    assert "[bold]note[/bold]" in console.file.getvalue() and "2.5[/]bpw" in console.file.getvalue()
