"""Which programs can load an artifact: all that import reallm or torch, and no other gets random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from artifacts import make
from import_graph import ROOT
from transformers import AutoModelForCausalLM

import reallm  # noqa: F401 - registers with transformers
from reallm.artifacts.weights_guard import KEY, MODEL_TEXT, PART_TEXT

PYPROJECT = ROOT / "pyproject.toml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama-tied", tmp_path_factory.mktemp("made")).folder


def run(code: str, *arguments: Path, **environment: str) -> list[str]:
    """The lines that `code` prints in a process without torch's entry points, unless `environment` says otherwise."""
    settings = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


PLAIN = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
for folder in sys.argv[1:]:
    for load in AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained:
        try:
            load(folder)
            print("loaded")
        except ValueError as error:
            print(error)
    try:
        pipeline("text-generation", model=folder, device="cpu")
        print("loaded")
    except Exception as error:
        print([line for line in str(error).splitlines() if "reallm packed" in line][0])
assert "reallm" not in sys.modules
"""


def test_without_reallm_nothing_loads_and_the_message_names_it(compiled: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compiled)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2
    lines = run(PLAIN, compiled, tmp_path / "saved", tmp_path / "shards")
    assert len(lines) == 12
    assert all(line.endswith(MODEL_TEXT) and "import reallm" in line for line in lines), lines


def test_a_loaded_configuration_has_no_guard_and_a_saved_one_has(compiled: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compiled)
    assert not hasattr(model.config, KEY)
    model.config.save_pretrained(tmp_path)
    assert not hasattr(model.config, KEY)
    for folder in (compiled, tmp_path):
        assert json.loads((folder / "config.json").read_text())[KEY] == MODEL_TEXT


def test_every_configuration_inside_a_configuration_is_guarded(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(quantization_config={"quant_method": "reallm", "version": 1, "formats": {}})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved[KEY] == MODEL_TEXT
    assert saved["text_config"][KEY] == saved["vision_config"][KEY] == PART_TEXT
    assert not hasattr(config, KEY) and not hasattr(config.text_config, KEY)


@pytest.mark.parametrize("value", [MODEL_TEXT, "other.safetensors", 7])
def test_with_reallm_the_entry_has_no_effect(compiled: Path, tmp_path: Path, value: object) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(compiled, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {KEY: value}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(compiled)
    assert all(torch.equal(first, second) for first, second in zip(model.buffers(), expected.buffers(), strict=True))


def test_other_models_are_saved_without_a_guard(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    assert KEY not in json.loads((tmp_path / "config.json").read_text())


REGISTRY_FIRST = """
import json, sys
import reallm
from transformers.quantizers import AutoQuantizationConfig
config = json.load(open(sys.argv[1] + "/config.json"))["quantization_config"]
print(type(AutoQuantizationConfig.from_dict(config)).__name__, "transformers.modeling_utils" in sys.modules)
"""


def test_the_registry_knows_reallm_before_models_are_imported(compiled: Path) -> None:
    """lm-eval asks the registry before it imports models."""
    assert run(REGISTRY_FIRST, compiled) == ["ReallmConfig False"]


@pytest.mark.skipif(not PYPROJECT.exists(), reason="needs the repository, not the wheel")
@pytest.mark.parametrize("first", ["torch", "transformers.quantizers.auto"])
def test_where_reallm_is_installed_nothing_needs_to_import_it(compiled: Path, tmp_path: Path, first: str) -> None:
    """`import torch` calls the entry point; in the second case while the registry itself is being imported."""
    entries = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["torch.backends"]
    installed = tmp_path / "installed-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    lines = "".join(f"{name} = {target}\n" for name, target in entries.items())
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{lines}")
    code = (
        f"import sys, {first}\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head).__name__)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert run(code, compiled, TORCH_DEVICE_BACKEND_AUTOLOAD="1", PYTHONPATH=path) == ["TiedHead"]


def test_importing_reallm_imports_nothing_that_takes_long() -> None:
    names = ("torch", "transformers", "pydantic", "numpy")
    assert run(f"import sys, reallm.runtime.registration\nprint([n for n in {names} if n in sys.modules])") == ["[]"]


def test_an_old_transformers_is_reported_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    from reallm.runtime import registration, transformers_quantizer

    def fails() -> None:
        raise ImportError("cannot import name 'register_quantizer'")

    monkeypatch.setattr(transformers_quantizer, "register", fails)
    with pytest.warns(UserWarning, match="reallm cannot register with the installed transformers .*register_quantizer"):
        registration.register_with_transformers()


def test_weights_files_name_their_format(compiled: Path, tmp_path: Path) -> None:
    """transformers up to 4.57 refuses a file whose format it does not know, and names the format."""
    AutoModelForCausalLM.from_pretrained(compiled).save_pretrained(tmp_path)
    for folder in (compiled, tmp_path):
        with (folder / "model.safetensors").open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        assert header["__metadata__"] == {"format": "reallm"}
