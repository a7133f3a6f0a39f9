"""Which matrices are found in every architecture, which of them share an input, and which tensors remain."""

import math

import pytest
import torch
from tiny import ARCHITECTURES, BLOCKS, EXPERTS, HIDDEN, VOCAB, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig

from reallm.models.loaded import LoadedModel, model_digest, stored_tensors
from reallm.models.matrices import discover, find_blocks

# matrices per block, distinct inputs per block, whether head and embedding are tied, other matrices outside the blocks
EXPECTED = {
    "llama": (7, 4, False, 0),
    "llama-tied": (7, 4, True, 0),
    "mistral": (7, 4, False, 0),
    "qwen2": (7, 4, False, 0),
    "qwen3": (7, 4, True, 0),
    "gemma": (7, 4, True, 0),
    "gemma2": (7, 4, True, 0),
    "gemma3": (7, 4, True, 0),
    "phi3": (4, 4, False, 0),
    "opt": (6, 4, True, 0),
    "gpt2": (4, 4, True, 0),
    "mixtral": (4 + 2 * EXPERTS, 2 + 2 * EXPERTS, False, 0),
    "qwen3_moe": (4 + 2 * EXPERTS, 2 + 2 * EXPERTS, False, 0),
    "roberta": (6, 4, True, 1),
}
SHARED_INPUTS = {
    "llama": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"mlp.gate_proj", "mlp.up_proj"}],
    "gemma2": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"mlp.gate_proj", "mlp.up_proj"}],
    "opt": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}],
    "roberta": [{"attention.self.query", "attention.self.key", "attention.self.value"}],
    "mixtral": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}],
    "phi3": [],
    "gpt2": [],
}


def loaded_from(model) -> LoadedModel:
    """`model` with the matrices that are found in it."""
    blocks, matrices = discover(model)
    return LoadedModel(model, None, "", "", model.dtype, blocks, matrices)


@pytest.fixture(scope="module")
def tiny():
    """Architecture -> its tiny model with the matrices found in it; made once, tests must not change it."""
    return {name: loaded_from(tiny_model(name)) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_is_found_once(tiny, architecture):
    in_block, inputs, tied, outside = EXPECTED[architecture]
    loaded = tiny[architecture]
    assert len(loaded.blocks) == BLOCKS
    for block in range(BLOCKS):
        inside = [matrix for matrix in loaded.matrices if matrix.block == block]
        assert len(inside) == in_block
        assert len({matrix.input for matrix in inside}) == inputs
        assert all(matrix.name.startswith(loaded.blocks[block] + ".") for matrix in inside)
    assert len([m for m in loaded.matrices if m.block is None]) == outside + (1 if tied else 2)
    kinds = [matrix.kind for matrix in loaded.matrices]
    assert kinds.count("embedding") == 1
    assert kinds.count("head") == (0 if tied else 1)
    assert len({matrix.name for matrix in loaded.matrices}) == len(loaded.matrices)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_and_other_tensors_make_up_the_whole_model(tiny, architecture):
    loaded = tiny[architecture]
    names = {matrix.parameter for matrix in loaded.matrices} | {n for m in loaded.matrices for n in m.tied}
    others = loaded.other_tensors()
    assert not names & set(others)
    unique = {id(tensor): tensor for _, tensor in stored_tensors(loaded.model)}
    numel = sum(matrix.numel for matrix in loaded.matrices) + sum(math.prod(shape) for shape in others.values())
    assert numel == sum(tensor.numel() for tensor in unique.values())
    assert all(matrix.source_bytes == 4 * matrix.numel for matrix in loaded.matrices)


@pytest.mark.parametrize("architecture", SHARED_INPUTS)
def test_matrices_that_share_an_input(tiny, architecture):
    for block in range(BLOCKS):
        groups: dict[str, set[str]] = {}
        for matrix in tiny[architecture].matrices:
            if matrix.block == block:
                groups.setdefault(matrix.input, set()).add(matrix.family)
        shared = sorted(sorted(group) for group in groups.values() if len(group) > 1)
        assert shared == sorted(sorted(group) for group in SHARED_INPUTS[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_is_what_the_module_multiplies_by(tiny, architecture):
    loaded = tiny[architecture]
    for matrix in loaded.matrices:
        weight = loaded.weight(matrix)
        assert weight.dtype == torch.float32
        assert weight.shape == (matrix.rows, matrix.cols)
        if matrix.kind in ("linear", "head"):
            module = loaded.model.get_submodule(matrix.name)
            x = torch.randn(5, matrix.cols)
            expected = x @ weight.T if module.bias is None else x @ weight.T + module.bias
            # both sum `cols` products in float32: each errs by at most cols + 1 roundings of the sum of magnitudes
            bound = 2 * (matrix.cols + 1) * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T + 1)
            assert ((module(x) - expected).abs() <= bound).all()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_an_expert_computes_with_its_slices_of_the_stacks(tiny, architecture):
    loaded = tiny[architecture]
    by_name = {matrix.name: matrix for matrix in loaded.matrices}
    path = next(matrix.parameter for matrix in loaded.matrices if matrix.kind == "expert").rpartition(".")[0]
    module, x = loaded.model.get_submodule(path), torch.randn(4, HIDDEN)
    for expert in range(EXPERTS):
        gate_up = loaded.weight(by_name[f"{path}.gate_up_proj.{expert}"])
        down = loaded.weight(by_name[f"{path}.down_proj.{expert}"])
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        expected = (module.act_fn(gate) * up) @ down.T
        result = module(x, torch.full((4, 1), expert), torch.ones(4, 1))
        # two chained products of at most 80 terms with values of order one: 1e-5 is 80 roundings
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_conv1d_is_transposed_and_fused_qkv_one_matrix(tiny):
    matrix = next(m for m in tiny["gpt2"].matrices if m.family == "attn.c_attn")
    assert (matrix.rows, matrix.cols, matrix.transposed) == (3 * HIDDEN, HIDDEN, True)
    assert torch.equal(tiny["gpt2"].weight(matrix), tiny["gpt2"].model.transformer.h[0].attn.c_attn.weight.T)


def test_a_tied_embedding_is_one_matrix_that_reads_what_the_head_reads(tiny):
    embedding = tiny["llama-tied"].matrices[0]
    assert (embedding.name, embedding.kind, embedding.tied) == ("model.embed_tokens", "embedding", ("lm_head.weight",))
    assert (embedding.rows, embedding.cols, embedding.input) == (VOCAB, HIDDEN, "lm_head")
    untied = tiny["llama"].matrices
    assert (untied[0].input, untied[0].tied, untied[-1].input, untied[-1].kind) == ("", (), "lm_head", "head")


def test_routers_positions_and_biases_are_not_matrices(tiny):
    assert "model.layers.0.mlp.gate.weight" in tiny["mixtral"].other_tensors()
    assert "transformer.wpe.weight" in tiny["gpt2"].other_tensors()
    assert "model.decoder.embed_positions.weight" in tiny["opt"].other_tensors()
    assert "roberta.embeddings.position_embeddings.weight" in tiny["roberta"].other_tensors()
    assert "model.layers.1.self_attn.q_proj.bias" in tiny["qwen2"].other_tensors()
    biases = [name for name in tiny["roberta"].other_tensors() if name.startswith("lm_head") and "bias" in name]
    assert "lm_head.bias" in biases
    assert "lm_head.decoder.bias" not in biases  # the same tensor as lm_head.bias


def test_families_are_the_same_in_every_block(tiny):
    for loaded in tiny.values():
        families = [{m.family for m in loaded.matrices if m.block == block} for block in range(BLOCKS)]
        assert families[0] == families[1]
    assert {m.family for m in tiny["mixtral"].matrices if m.kind == "expert"} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_transposed_expert_stacks_are_recognised():
    """gpt_oss declares that its stacks are [E, in, out]; llama4 does not, but multiplies them with bmm."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "head_dim": 16}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 40, "num_local_experts": 3, "num_experts_per_tok": 1}
    gpt_oss = GptOssConfig(**sizes)
    llama4 = Llama4TextConfig(**sizes, intermediate_size_mlp=40, moe_layers=[0], pad_token_id=0)
    for config in (gpt_oss, llama4):
        loaded = loaded_from(AutoModelForCausalLM.from_config(config).eval())
        experts = [matrix for matrix in loaded.matrices if matrix.kind == "expert"]
        assert [(m.rows, m.cols, m.transposed) for m in experts] == [(80, 48, True)] * 3 + [(48, 40, True)] * 3
        stack = loaded.model.get_parameter(experts[1].parameter)
        assert torch.equal(loaded.weight(experts[1]), stack[1].T)


def test_the_family_drops_indices_into_a_module_list_but_keeps_those_into_a_sequential():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.extra = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)])
    families = [m.family for m in discover(model)[1] if "extra" in m.name]
    assert families == ["mlp.extra.0", "mlp.extra.2"] * 2 * BLOCKS


def test_blocks_are_the_children_of_a_list_that_contain_matrices():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
            self.large = nn.ModuleList([nn.ModuleList([nn.Linear(30, 30)]), nn.ModuleList([nn.Linear(30, 30)])])

    assert find_blocks(Odd()) == ("large.0", "large.1")


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "roberta"])
def test_discovery_leaves_the_model_as_it_was(architecture):
    model = tiny_model(architecture).train()
    before, experts = model_digest(model), model.get_experts_implementation()
    discover(model)
    assert model.training
    assert model_digest(model) == before
    assert model.get_experts_implementation() == experts
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_dead_input_is_not_shared():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    inputs = {m.family: m.input for m in discover(model)[1] if m.block == 0}
    assert inputs["self_attn.o_proj"] != inputs["self_attn.q_proj"]  # both are all zero and have the same shape


def test_a_record_has_the_fields_of_the_matrix(tiny):
    matrix = tiny["mixtral"].matrices[5]
    record = matrix.record()
    assert (record.name, record.rows, record.cols) == (matrix.name, matrix.rows, matrix.cols)
    assert (record.kind, record.block, record.input, record.family) == ("expert", 0, matrix.input, matrix.family)
