"""Compiled models of every architecture: planned bytes, the logits of the decoded weights, generation, round trips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Made, make, mixed
from packing import Codes
from tiny import ARCHITECTURES, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.trainer_utils import validate_quantization_for_training

import reallm  # noqa: F401 - registers with transformers
from reallm.artifacts.inspect import inspect
from reallm.artifacts.verify import read_bytes, verify
from reallm.compilation.compile import biased_matrices, compile_plan
from reallm.errors import CodegenError, UserError
from reallm.kernels.storage.safetensors_reader import read_folder
from reallm.models.loaded import load_model
from reallm.models.sizes import artifact_sizes
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record, write_record
from reallm.runtime.install import packed_modules, set_decode_mode
from reallm.runtime.load import load
from reallm.runtime.modules import CompressedEmbedding, TiedHead
from reallm.runtime.open_model import open_model

CASES = [*ARCHITECTURES, "llama-tied with its embedding as it is", "mixtral, experts only"]
TOKENS = torch.arange(3, 40)[None] % 261


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    architecture = request.param.partition(" ")[0].rstrip(",")
    kinds = ("linear", "embedding", "head", "expert")
    if "as it is" in request.param:
        kinds = ("linear",)
    if "experts only" in request.param:
        kinds = ("expert",)
    yield make(architecture, tmp_path_factory.mktemp("made"), mixed(kinds))


def from_pretrained(folder: Path, **options: object) -> Any:
    masked = '"RobertaForMaskedLM"' in (folder / "config.json").read_text()
    return (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_every_matrix_takes_the_bytes_its_plan_counted(made: Made) -> None:
    plan, tensors = read_record(made.folder / "plan.json", Plan, "plan"), read_folder(made.folder)
    for choice in plan.choices:
        stored = [t for name, t in tensors.items() if name.rpartition(".")[0] == choice.matrix and t.dtype == "U8"]
        assert sum(tensor.stop - tensor.start for tensor in stored) == choice.nbytes
    assert sum(path.stat().st_size for path in made.folder.glob("*.safetensors")) == plan.file_bytes
    view = inspect(made.folder)
    assert view.file_bytes == plan.matrices_bytes + view.other_bytes + view.header_bytes
    assert verify(made.folder).matrices == len(plan.choices)


def test_logits_are_those_of_the_decoded_weights(made: Made) -> None:
    expected, found = logits(made.replaced()), logits(from_pretrained(made.folder))
    # Both run in float32. Two blocks and a head are at most 15 products in a row, each of at most 261 terms that are
    # rounded (2^-24) in another order, or have weights rounded in another place; norms keep errors from growing.
    bound = 15 * 261 * 2.0**-24 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    original = logits(load_model(made.source).model)
    assert (found - original).abs().max() > 100 * bound  # the codes are random: the test sees them


def test_nothing_is_missing_and_nothing_is_left_over(made: Made) -> None:
    model, info = from_pretrained(made.folder, output_loading_info=True, device_map="cpu")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    validate_quantization_for_training(model)  # transformers' Trainer asks this


def test_both_ways_to_decode_give_the_same_logits(made: Made) -> None:
    model = from_pretrained(made.folder)
    kept = logits(model)
    set_decode_mode(model, "call")
    # the embedding reads other rows of the same products, the expert stack the same ones
    torch.testing.assert_close(logits(model), kept, rtol=0, atol=15 * 261 * 2.0**-24 * kept.abs().max().item())
    assert all(not packed.decoded.numel() for _, packed in packed_modules(model))


def test_generate_continues_and_repeats(made: Made) -> None:
    model, tokenizer = load(made.folder)
    assert tokenizer is not None
    if not model.can_generate():
        pytest.skip("an encoder does not generate")
    runs = [model.generate(TOKENS[:, :5], max_new_tokens=6, do_sample=False, eos_token_id=-1) for _ in range(2)]
    assert runs[0].shape == (1, 11) and torch.equal(runs[0], runs[1])


def test_save_pretrained_gives_the_same_weights_bit_for_bit(made: Made, tmp_path: Path) -> None:
    model = from_pretrained(made.folder)
    before = logits(model)  # decodes, which must not be saved
    model.save_pretrained(tmp_path / "saved")
    first, second = read_folder(made.folder), read_folder(tmp_path / "saved")
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape)
        assert read_bytes(tensor).tobytes() == read_bytes(second[name]).tobytes(), name
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_respected_and_the_codes_untouched(made: Made, dtype: torch.dtype) -> None:
    model = from_pretrained(made.folder, dtype=dtype)
    assert model.dtype == dtype and logits(model).dtype == dtype
    stored = read_folder(made.folder)
    for name, packed in packed_modules(model):
        assert packed.decoded.dtype == dtype
        for field, raw in packed.fields.items():
            assert raw.numpy().tobytes() == read_bytes(stored[f"{name}.{field}"]).tobytes()


def test_a_tied_head_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    made = make("llama-tied", tmp_path)
    model = from_pretrained(made.folder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, TiedHead) and isinstance(embedding, CompressedEmbedding)
    assert torch.equal(head.weight, embedding.weight) and model.config.tie_word_embeddings is False
    assert not any(name.startswith("lm_head") for name in read_folder(made.folder))


def test_compiling_twice_gives_identical_bytes(tmp_path: Path) -> None:
    made = make("qwen2", tmp_path)
    second = made.again(tmp_path / "elsewhere" / "twin")
    names = sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file())
    for name in names:
        assert (second / name).read_bytes() == (made.folder / name).read_bytes(), name


def test_a_plan_of_dense_formats_keeps_the_tensors_of_the_model(tmp_path: Path) -> None:
    made = make("mixtral", tmp_path, lambda matrix: "fp32" if matrix.kind == "expert" else "bf16")
    names = set(read_folder(made.folder))
    assert "model.layers.0.mlp.experts.gate_up_proj" in names and not any(n.endswith(".values") for n in names)
    found = logits(from_pretrained(made.folder))
    original = tiny_model("mixtral")
    with torch.no_grad():
        for matrix in made.loaded.matrices:
            if matrix.kind != "expert":
                parameter = original.get_parameter(matrix.parameter)
                parameter.copy_(parameter.bfloat16())
    # the same float32 weights in the same order
    assert torch.equal(found, logits(original))


def test_a_dense_expert_among_packed_ones_is_packed_too(tmp_path: Path) -> None:
    made = make("qwen3_moe", tmp_path, lambda m: None if m.kind != "expert" else "bf16" if m.expert == 1 else "int4-g8")
    model = from_pretrained(made.folder)
    stack = model.get_submodule("model.layers.1.mlp.experts.down_proj")
    matrix = next(m for m in made.loaded.matrices if m.name == "model.layers.1.mlp.experts.down_proj.1")
    assert torch.equal(stack[1], made.loaded.weight(matrix).bfloat16().float())
    assert verify(made.folder).matrices == len(made.packed.names)


def test_base_class_loads_without_the_head(tmp_path: Path) -> None:
    from transformers import AutoModel

    made = make("llama", tmp_path)
    base = AutoModel.from_pretrained(made.folder)
    whole = from_pretrained(made.folder)
    with torch.no_grad():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    other = save_tiny("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another model"):
        compile_plan(made.plan, tmp_path / "new", model=other, codes=Codes(made.packed), kernels=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["codes", "size", "file_bytes", "choice"])
def test_what_the_plan_did_not_measure_is_not_compiled(tmp_path: Path, damage: str) -> None:
    made = make("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj"
    fields = dict(made.packed.fields[name])
    plan = read_record(made.plan, Plan, "plan")
    if damage == "codes":
        made.packed.fields[name] = {**fields, "codes": fields["codes"] ^ 1}
    elif damage == "size":
        made.packed.fields[name] = {**fields, "codes": fields["codes"][:-64]}
    elif damage == "file_bytes":
        write_record(made.plan, plan.model_copy(update={"file_bytes": plan.file_bytes + 64}))
    else:
        wrong = plan.choices[0].model_copy(update={"matrix": "model.no_such"})
        write_record(made.plan, plan.model_copy(update={"choices": (wrong, *plan.choices[1:])}))
    with pytest.raises(UserError, match=r"plan|measure"):
        made.again(tmp_path / "new")
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*new*"))


def test_generated_kernels_come_with_the_artifact(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    made = make(
        "opt", tmp_path, lambda m: "int4-g16" if m.name.endswith("layers.0.self_attn.q_proj") else None, kernels=True
    )
    assert biased_matrices(made.loaded) >= set(made.packed.names)
    assert {path.suffix for path in (made.folder / "kernels").iterdir()} == {".py", ".json"}
    codes = Codes(made.packed)
    objects = compile_plan(made.plan, tmp_path / "objects", model=made.loaded, codes=codes, objects=("sm_90",))
    assert {path.suffix for path in (objects / "kernels").iterdir()} == {".py", ".cubin", ".json"}
    assert verify(objects).files > verify(made.folder).files > 8


def test_objects_that_cannot_be_compiled_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = make("llama", tmp_path, lambda m: "int4-g16" if m.kind == "linear" else None)
    codes = Codes(made.packed)
    with pytest.raises(CodegenError, match="mps"):
        compile_plan(made.plan, tmp_path / "new", model=made.loaded, codes=codes, objects=("mps",))
    with pytest.raises(UserError, match="leave out --no-kernels"):
        compile_plan(made.plan, tmp_path / "new", model=made.loaded, codes=codes, objects=("sm_90",), kernels=False)
    assert not (tmp_path / "new").exists()


def test_bfloat16_models_keep_their_dtype(tmp_path: Path) -> None:
    made = make("gemma2", tmp_path, dtype=torch.bfloat16)
    model, _ = load(made.folder)
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()
    assert read_folder(made.folder)["model.norm.weight"].dtype == "BF16"


@pytest.mark.parametrize("kept", [None, "fp32"], ids=["left out", "chosen dense"])
def test_a_transposed_matrix_that_stays_dense_keeps_the_models_shape(tmp_path: Path, kept: str | None) -> None:
    made = make("gpt2", tmp_path, lambda m: "int4-g16" if "c_proj" in m.name else kept if m.kind == "linear" else None)
    model, _ = load(made.folder)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, made.loaded.model.transformer.h[0].attn.c_attn.weight)


def test_a_measured_dense_format_is_loaded(tmp_path: Path) -> None:
    made = make("llama", tmp_path, lambda m: "fp16" if "q_proj" in m.name else None)
    plan = read_record(made.plan, Plan, "plan")
    digest = "0" * 64  # as for every measured format; the weights file holds the tensor itself
    measured = [c.model_copy(update={"codes_sha256": digest}) for c in plan.choices]
    write_record(made.plan, plan.model_copy(update={"choices": tuple(measured)}))
    model, _ = load(made.again(tmp_path / "again"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), made.loaded.model.get_parameter(name).half().float())


def test_a_dense_stack_of_experts_is_counted_once(tmp_path: Path) -> None:
    made = make("qwen3_moe", tmp_path, lambda m: "fp32" if m.kind == "expert" else None)
    assert artifact_sizes(made.folder).weights == sum(p.numel() for p in made.loaded.model.parameters())


def test_a_device_that_is_not_there_is_refused_for_an_artifact_too(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    with pytest.raises(UserError, match="--device nowhere cannot be used here"):
        open_model(made.folder, device="nowhere")
