"""MLX folders are judged by mlx and mlx_lm where these are installed; config.json by what mlx_lm reads of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import Made
from packing import Codes, PackedModel
from tiny import tiny_model, tiny_tokenizer

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.models.loaded import Matrix, load_model
from reallm.runtime.load import load
from reallm.targets.export import export
from reallm.targets.mlx.model_settings import MODELS, mlx_settings, window_note

SETTINGS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
THETA = {"rope_type": "default", "rope_theta": 777.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
FORMATS = ("int4-g32", "int3-g32+ldl", "int5-g32", "int2-g32", "int8-g32", "int6-g32")
INSTALL = "mlx_lm is not installed"


def build(folder: Path, architecture: str, rope: dict[str, Any], dense_embedding: bool = False) -> Made:
    """A tiny model whose other weights are exact in fp16, compiled in all formats that MLX holds."""
    source = folder / "model"
    settings = SETTINGS | {"head_dim": 16, "rope_parameters": dict(rope), "sliding_window": 4096}
    model = tiny_model(architecture, settings=settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    loaded = load_model(source)
    order = {matrix.name: index for index, matrix in enumerate(loaded.matrices)}

    def choose(matrix: Matrix) -> str | None:
        if matrix.kind == "linear":
            return FORMATS[order[matrix.name] % len(FORMATS)]
        return "int8-g64" if matrix.kind in ("embedding", "head") and not dense_embedding else None

    packed = PackedModel(loaded, choose)
    for fields in packed.fields.values():
        scales = fields["scales"].view("<f2")
        scales[(np.abs(scales) < 0.03) & (scales != 0)] = 0.03  # fp16 holds 1/128 of it exactly
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)
    return Made(output, source, plan, loaded, packed)


CASES = [
    ("llama", THETA, False),
    ("llama", LLAMA3, False),
    ("llama", YARN, True),
    ("llama-tied", LINEAR, False),
    ("llama-tied", THETA, True),
    ("mistral", THETA, False),
    ("qwen2", YARN, False),
    ("qwen3", THETA, False),
    ("gemma", THETA, False),
    ("gemma2", THETA, False),
    ("phi3", THETA, False),
    ("phi3", THETA | {"partial_rotary_factor": 0.5}, False),
]


@pytest.mark.parametrize("architecture,rope,dense_embedding", CASES)
def test_mlx_lm_computes_our_logits(
    tmp_path: Path, architecture: str, rope: dict[str, Any], dense_embedding: bool
) -> None:
    mx = pytest.importorskip("mlx.core", reason=INSTALL)
    utils = pytest.importorskip("mlx_lm.utils", reason=INSTALL)
    mx.set_default_device(mx.cpu)
    made = build(tmp_path, architecture, rope, dense_embedding)
    ids = torch.tensor([[5 + (7 * i * i + 3 * i) % 250 for i in range(40)]])
    model, _ = load(made.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(ids).logits[0].numpy()
    theirs, _ = utils.load_model(export(made.folder, tmp_path / "mlx", target="mlx").path)
    theirs.set_dtype(mx.float32)
    logits = np.array(theirs(mx.array(ids.numpy()))[0])
    bound = 1e-4 if architecture == "gemma" else 1e-5  # mlx_lm computes another approximation of GELU in gemma
    assert np.abs(logits - expected).max() < bound * np.abs(expected).max()


def test_mlx_dequantises_every_format_to_our_values(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason=INSTALL)
    mx.set_default_device(mx.cpu)
    made = build(tmp_path, "llama", THETA)
    folder = export(made.folder, tmp_path / "mlx", target="mlx").path
    tensors = mx.load(str(folder / "model.safetensors"))
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization"]
    for matrix in made.loaded.matrices:
        scales, biases = (tensors[f"{matrix.name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        values = mx.dequantize(tensors[f"{matrix.name}.weight"], scales, biases, **quantization[matrix.name])
        assert np.array_equal(np.array(values), made.reference(matrix).numpy()), matrix.name


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh" if model_type.startswith("gemma") else "silu"
    return {"model_type": model_type, "hidden_act": activation, "rope_parameters": THETA} | changes


@pytest.mark.parametrize("model_type", MODELS)
def test_the_base_of_the_rotary_angles_is_where_mlx_lm_reads_it(model_type: str) -> None:
    assert mlx_settings(config(model_type)) == {"rope_theta": 777.0}


def test_scaling_has_the_names_of_transformers_4() -> None:
    expected = {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}}
    del expected["rope_scaling"]["rope_theta"]  # type: ignore[attr-defined]
    assert mlx_settings(config(rope_parameters=LINEAR)) == expected
    old = config(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    del old["rope_parameters"]
    assert mlx_settings(old) == expected


REFUSED = [
    (config("gpt2"), "model_type gpt2 cannot be exported for mlx; expected one of gemma, "),
    (config("mixtral"), "model_type mixtral"),
    (config(hidden_act="gelu"), "computes silu in llama, not gelu"),
    (config(rope_parameters={"full_attention": THETA}), "rope_parameters has no rope_theta for all layers"),
    (config(rope_parameters=THETA | {"rope_type": "longrope"}), "not longrope"),
    (config("gemma", rope_parameters=LINEAR), "gemma with the rope_type default, not linear"),
    (config(rope_parameters=THETA | {"partial_rotary_factor": 0.5}), "without partial_rotary_factor, but it is 0.5"),
    (config(rope_parameters=YARN | {"attention_factor": 2.0}), "without attention_factor of rope_parameters"),
    (config(rope_parameters=LINEAR | {"rope_type": "yarn"}), "with original_max_position_embeddings in rope_param"),
]


@pytest.mark.parametrize("settings,message", REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_mlx_lm_would_compute_differently_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mlx_settings(settings)


def test_a_sliding_window_is_reported() -> None:
    (note,) = window_note(config("mistral", sliding_window=4096))
    assert "only to 4096" in note
    assert window_note(config("mistral", sliding_window=None)) == ()
    assert window_note(config("qwen2", sliding_window=4096, use_sliding_window=False)) == ()
    assert window_note(config("gemma2", sliding_window=4096, layer_types=["full_attention"])) == ()
    assert window_note(config("gemma2", sliding_window=4096, layer_types=["sliding_attention"]))
