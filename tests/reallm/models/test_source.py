"""Loading from folders, shards, GGUF and names; each bad source gives one clear line."""

import json

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, save_tiny, tiny_model

from reallm.errors import UserError
from reallm.models import source
from reallm.models.checkpoint import read_checkpoint
from reallm.models.loaded import load_model, model_digest

LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def folder(tmp_path):
    """A tiny llama saved in bfloat16."""
    return save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)


def error_message(path) -> str:
    """The message of the UserError that loading `path` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite_config(folder, **changes):
    """Change some values of config.json in `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_with_its_weights_dtype_and_tokenizer(architecture, tmp_path):
    loaded = load_model(save_tiny(architecture, tmp_path, dtype=torch.bfloat16))
    assert loaded.dtype == torch.bfloat16
    assert loaded.digest == model_digest(tiny_model(architecture, dtype=torch.bfloat16))
    assert loaded.tokenizer is not None
    assert loaded.notes == ()
    assert not loaded.model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept_whatever_the_configuration_says(dtype, tmp_path):
    folder = save_tiny("llama", tmp_path, dtype=dtype)
    rewrite_config(folder, dtype="bfloat16")
    assert load_model(folder).dtype == dtype
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_without_tokenizer_loads(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    assert load_model(folder).tokenizer is None


def test_an_encoder_is_recognised_by_its_architectures_or_its_type(tmp_path):
    folder = save_tiny("roberta", tmp_path)
    rewrite_config(folder, architectures=None)
    assert load_model(folder).is_encoder


def test_unknown_folder(tmp_path):
    assert "does not exist" in error_message(tmp_path / "nowhere")
    assert "does not exist" in error_message("./nowhere")
    assert "does not exist" in error_message("nowhere.gguf")


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    def unreachable(name, allow_patterns):
        raise LocalEntryNotFoundError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(source, "snapshot_download", unreachable)
    assert "cannot be fetched from the hub" in error_message("nobody/nothing")


def test_a_hub_name_loads_what_was_fetched(monkeypatch, folder):
    names = []
    monkeypatch.setattr(source, "snapshot_download", lambda name, allow_patterns: names.append(name) or str(folder))
    assert load_model("somebody/model").source == "somebody/model"
    assert names == ["somebody/model"]


def test_a_bad_hub_name_is_one_line():
    assert "hub" in error_message("what ever/this is")


def test_folder_without_configuration_or_weights(folder):
    (folder / "config.json").rename(folder / "renamed.json")
    assert "has no config.json" in error_message(folder)
    (folder / "renamed.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in error_message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in error_message(folder)


def test_a_file_that_is_not_a_model(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    assert "expected a .gguf file" in error_message(tmp_path / "a.pt")


def test_damaged_configuration(folder):
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in error_message(folder)
    (folder / "config.json").write_text("[]")
    assert "expected an object" in error_message(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -64])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is truncated or damaged" in error_message(folder)


def test_trailing_bytes_in_safetensors(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "truncated or damaged" in error_message(folder)


def test_header_agrees_with_the_library(folder):
    tensors = load_file(folder / "model.safetensors")
    stored = read_checkpoint(folder)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: t.shape for n, t in stored.items()}
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}


def test_a_missing_shard_and_a_false_index(tmp_path):
    folder = save_tiny("llama", tmp_path, max_shard_size="60KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].rename(tmp_path / "kept")
    assert f"lacks the shard {shards[1].name}" in error_message(folder)
    (tmp_path / "kept").rename(shards[1])
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {"ghost": shards[0].name}}))
    assert "'ghost'" in error_message(folder)
    index.write_text(json.dumps(good | {"weight_map": {"x": "../model.safetensors"}}))
    assert "'../model.safetensors'" in error_message(folder)
    index.write_text("{}")
    assert "has no weight_map" in error_message(folder)


def test_weights_that_the_file_lacks_are_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = error_message(folder)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "random" in message


def test_stored_tensors_that_the_model_lacks_are_noted(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (note,) = load_model(folder).notes
    assert "model.extra.weight" in note


def test_weights_of_another_shape(folder):
    rewrite_config(folder, intermediate_size=96)
    assert "cannot be loaded" in error_message(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][2, :3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = error_message(folder)
    assert "3 of the 3840 values of model.layers.0.mlp.up_proj.weight are NaN or infinite" in message


def test_large_finite_weights_are_accepted(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, but their float32 sum overflows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder)
    assert loaded.model.model.norm.weight.isfinite().all()
    assert not loaded.model.model.norm.weight.sum(dtype=torch.float32).isfinite()


def test_compressed_and_quantised_models_are_refused(folder):
    rewrite_config(folder, quantization_config={"quant_method": "reallm", "version": 1})
    assert "already compressed by reallm" in error_message(folder)
    rewrite_config(folder, quantization_config={"quant_method": "aqlm"})
    assert "already quantised (aqlm)" in error_message(folder)


def test_a_configuration_that_names_another_weights_file_is_refused(folder):
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    rewrite_config(folder, transformers_weights="other.safetensors")
    assert "transformers_weights = 'other.safetensors'" in error_message(folder)


def test_an_adapter_beside_or_in_place_of_a_model_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in error_message(folder)
    (folder / "config.json").unlink()
    assert "holds an adapter" in error_message(folder)


def test_integer_weights_are_refused(folder):
    save_file({"w": torch.zeros(9, dtype=torch.int8)}, folder / "model.safetensors")
    assert "stores its weights as I8" in error_message(folder)


def test_unsupported_architectures(folder):
    rewrite_config(folder, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in error_message(folder)
    rewrite_config(folder, architectures=["TotallyNewForCausalLM"], model_type="totally_new")
    assert "not a configuration that transformers" in error_message(folder)


def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path):
    proof = tmp_path / "ran"
    (folder / "configuration_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    rewrite_config(folder, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    error_message(folder)
    assert not proof.exists()


def test_damaged_tokenizer(folder):
    whole = (folder / "tokenizer.json").read_text()
    for content in ("{}", whole[: len(whole) // 2], whole.replace('"BPE"', '"??"')):
        (folder / "tokenizer.json").write_text(content)
        assert "the tokenizer of" in error_message(folder)


def write_gguf(path, model):
    """Write `model`, a tiny tied llama, as llama.cpp stores it: q and k rows interleaved for its rotary embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, config.vocab_size))])
    writer.add_token_merges(["t 1"])
    for name, tensor in model.model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _gguf_rows(name, tensor.float().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, block, rest = name.split(".", 2)
    return f"blk.{block}.{LLAMA_NAMES[rest.removesuffix('.weight')]}.weight"


def _gguf_rows(name, weight, config):
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def test_gguf_loads_as_the_model_it_was_made_from_and_can_be_saved(tmp_path):
    model = tiny_model("llama-tied", dtype=torch.bfloat16)
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_model(tmp_path / "tiny.gguf")
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    for (name, tensor), other in zip(loaded.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").digest == loaded.digest
    assert any("quantised weights" in note for note in loaded.notes)


def test_the_header_of_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama-tied"))
    calls = []
    for name in ("GGUFReader", "get_tensor_name_map"):
        original = getattr(gguf, name)
        monkeypatch.setattr(
            gguf, name, lambda *given, name=name, original=original: calls.append(name) or original(*given)
        )
    counting = (gguf.GGUFReader, gguf.get_tensor_name_map)
    load_model(tmp_path / "tiny.gguf")
    assert sorted(calls) == ["GGUFReader", "get_tensor_name_map"]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == counting
    load_model(tmp_path / "tiny.gguf")  # a file may have changed since
    assert sorted(calls) == ["GGUFReader", "GGUFReader", "get_tensor_name_map", "get_tensor_name_map"]
    with pytest.raises(UserError):
        load_model(tmp_path / "nowhere.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == counting


def test_bad_gguf(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama-tied"))
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for keep in (10, 900, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:keep])
        assert "cut.gguf" in error_message(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK" + whole)
    assert "does not begin with GGUF" in error_message(tmp_path / "other.gguf")
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in error_message(tmp_path / "tiny.gguf")


def test_checkpoint_of_a_folder_lists_every_tensor(tmp_path):
    whole = save_tiny("mixtral", tmp_path / "whole")
    sharded = save_tiny("mixtral", tmp_path / "sharded", max_shard_size="60KB")
    one, many = (
        {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in read_checkpoint(path).items()}
        for path in (whole, sharded)
    )
    assert one == many
