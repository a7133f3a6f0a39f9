"""The repository as other packages see it: import names, what importing loads, and the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from import_graph import INNER, ROOT, imported_names

HEAVY = {"torch", "triton", "transformers"}
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository, not the wheel")


def run_python(code: str, folder: Path, *path: Path) -> str:
    """Standard output of `python -c code` run in `folder`, with `path` in PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(entry) for entry in path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "planner"])
def test_inner_packages_load_without_torch(name: str) -> None:
    modules = [
        ".".join(["reallm", *f.relative_to(ROOT).with_suffix("").parts]) for f in sorted((ROOT / name).rglob("*.py"))
    ]
    assert modules
    code = f"import sys; [__import__(m) for m in {modules}]; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code, ROOT) == "[]"


def test_planning_loads_without_torch() -> None:
    code = f"import sys, reallm.planning.plan; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code, ROOT) == "[]"


def test_no_file_imports_an_inner_package_by_its_bare_name() -> None:
    files = [f for folder in ("reallm", *INNER, "benchmarks", "tests") for f in (ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    for file in files:
        roots = {name.split(".")[0] for name in imported_names(file, "x.y.z.a.b.c")}
        assert not roots & set(INNER), f"{file} must import reallm.{(roots & set(INNER)).pop()}"


def test_hugging_face_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    """Our folders carry no __init__.py, so an installed regular package of that name comes first even from the root."""
    site = tmp_path / "site"
    for name in INNER:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("WHOSE = 'installed'\n")
    code = "import kernels, planner, codegen; print(kernels.WHOSE, planner.WHOSE, codegen.WHOSE)"
    assert run_python(code, ROOT, site) == "installed installed installed"


def test_transformers_finds_the_same_kernels_from_the_root_as_elsewhere(tmp_path: Path) -> None:
    """transformers looks `kernels` up when imported; our folder must not pass for Hugging Face's package."""
    code = (
        "import sys, transformers.integrations.hub_kernels; from transformers import LlamaForCausalLM; "
        "from transformers.utils import is_kernels_available; "
        "print(is_kernels_available(), sorted(n for n in sys.modules if n.startswith('kernels.')))"
    )
    assert run_python(code, ROOT) == run_python(code, tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, links kept as links."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("reallm", *INNER):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(folder / "source")], check=True, capture_output=True)
    (result,) = folder.glob("*.whl")
    return result


def test_wheel_holds_reallm_alone_and_whole(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"reallm"}
    sources = {f"reallm/{f.relative_to(ROOT / 'reallm').as_posix()}" for f in (ROOT / "reallm").glob("**/*.py")}
    sources |= {f"reallm/{f.relative_to(ROOT).as_posix()}" for name in INNER for f in (ROOT / name).rglob("*.py")}
    data = [*(ROOT / "kernels/templates").glob("*"), *(ROOT / "kernels/native").glob("*/*.?pp")]
    sources |= {f"reallm/{f.relative_to(ROOT).as_posix()}" for f in data}
    missing = {name for name in sources if "__pycache__" not in name} - names
    assert not missing
    assert "reallm/py.typed" in names


def test_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from reallm.kernels.formats import formats as f; print(f.__file__, f.Format.parse('int4-g64').nbytes(8, 64))"
    )
    where, nbytes = run_python(code, tmp_path, tmp_path / "site").split()
    assert Path(where).is_relative_to(tmp_path)
    assert nbytes == str(256 + 64)  # 512 codes of 4 bits; 8 fp16 scales, padded to 64 bytes
