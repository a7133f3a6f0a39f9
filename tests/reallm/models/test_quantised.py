"""Quantised inputs: each known scheme against float64 arithmetic written out here, and refusals of what is not known.

The references work on numpy arrays, element by element or bit by bit, and share no code with the package.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM

from reallm.errors import UserError
from reallm.models.loaded import load_model
from reallm.models.quantised.blocks import powers_of_two
from reallm.models.quantised.find import METHODS
from reallm.models.source import load_dense, locate
from reallm.system.scratch import Scratch

NAME = "model.layers.1.mlp.down_proj"
ROWS, COLS = 48, 80
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture
def folder(tmp_path):
    """A tiny llama saved in bfloat16."""
    return save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def replace_weight(folder, settings, stored, name=NAME):
    """Replace a weight of the model in `folder` by the tensors `stored`, and describe them by `settings`."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{name}.weight"]
    tensors |= {name + end: tensor.contiguous() for end, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def check(folder, expected, name=NAME):
    """The loaded weight is `expected` in float64, rounded to bfloat16; the other weights are as before."""
    before = save_tiny("llama", folder.parent / "before", dtype=torch.bfloat16)
    loaded = load_model(folder)
    weights = loaded.model.state_dict()
    rounded = torch.from_numpy(np.ascontiguousarray(expected)).float().bfloat16()
    assert torch.equal(weights[f"{name}.weight"], rounded)
    assert len(rounded.unique()) > 4
    others = load_file(before / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in others.items() if key != f"{name}.weight")
    assert any("quantised weights" in note and "reference" in note for note in loaded.notes)
    loaded.model.save_pretrained(folder.parent / "saved")
    assert load_model(folder.parent / "saved").digest == loaded.digest


def message(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def float8(random, *shape):
    """Random values that float8_e4m3fn holds: (numpy float64, torch float8)."""
    tensor = torch.from_numpy(random.normal(size=shape).astype(np.float32) * 40).to(torch.float8_e4m3fn)
    return tensor.double().numpy(), tensor


def pack(codes, bits, axis):
    """Pack unsigned codes into int32 words along `axis`, the first code in the lowest bits."""
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    per = 32 // bits
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], -codes.shape[-1] % per), np.uint64)], axis=-1)
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), np.uint64)
    for place in range(per):
        words |= codes[..., place::per] << np.uint64(bits * place)
    words = words.astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def nibbles(values):
    """4-bit floats as codes: the index of the magnitude, and 8 for the sign."""
    return np.array([E2M1.index(abs(v)) + 8 * bool(np.signbit(v)) for v in values.ravel()]).reshape(values.shape)


def random_e2m1(random, *shape):
    return random.choice(E2M1, size=shape) * random.choice([1.0, -1.0], size=shape)


@pytest.mark.parametrize("block", [(32, 32), (128, 128), (1, 16), (48, 80)])
def test_fp8_by_block_with_smaller_blocks_at_the_edges(folder, random, block):
    values, codes = float8(random, ROWS, COLS)
    grid = (-(-ROWS // block[0]), -(-COLS // block[1]))
    scale = random.uniform(1e-4, 1e-3, size=grid).astype(np.float32)
    expected = np.array(
        [[values[i, j] * np.float64(scale[i // block[0], j // block[1]]) for j in range(COLS)] for i in range(ROWS)]
    )
    settings = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    replace_weight(folder, settings, {".weight": codes, ".weight_scale_inv": torch.from_numpy(scale)})
    check(folder, expected)


@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1)])
def test_fp8_by_tensor_or_row_with_a_scale_of_the_activations(folder, random, shape):
    values, codes = float8(random, ROWS, COLS)
    scale = random.uniform(1e-4, 1e-3, size=shape).astype(np.float32)
    stored = {
        ".weight": codes,
        ".weight_scale_inv": torch.from_numpy(np.asarray(scale)),
        ".activation_scale": torch.tensor(0.5),
    }
    replace_weight(folder, {"quant_method": "fp8", "weight_block_size": None}, stored)
    check(folder, values * np.asarray(scale, np.float64))
    assert f"1 scales of quantised activations, such as {NAME}.activation_scale" in load_model(folder).notes[0]


def test_fp8_with_scales_that_are_powers_of_two(folder, random):
    values, codes = float8(random, ROWS, COLS)
    exponents = random.integers(110, 130, size=(2, 3)).astype(np.uint8)
    scale = 2.0 ** (exponents.astype(np.float64) - 127)
    expected = values * np.repeat(np.repeat(scale, 32, 0)[:ROWS], 32, 1)[:, :COLS]
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    stored = torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
    replace_weight(folder, settings, {".weight": codes, ".weight_scale_inv": stored})
    check(folder, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_with_and_without_a_stored_order_of_the_groups(folder, random, bits, layout):
    size = 16
    codes, zeros = random.integers(0, 1 << bits, (COLS, ROWS)), random.integers(0, 1 << bits, (COLS // size, ROWS))
    scale = random.uniform(1e-3, 1e-2, (COLS // size, ROWS)).astype(np.float16)
    groups = random.permutation(np.repeat(np.arange(COLS // size), size))
    expected = np.array(
        [
            [(int(codes[j, i]) - int(zeros[groups[j], i])) * np.float64(scale[groups[j], i]) for j in range(COLS)]
            for i in range(ROWS)
        ]
    )
    stored = {
        ".qweight": pack(codes, bits, 0),
        ".qzeros": pack((zeros - (layout == "gptq")) % (1 << bits), bits, 1),
        ".scales": torch.from_numpy(scale),
        ".g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": layout}
    replace_weight(folder, settings, stored)
    check(folder, expected)


def test_awq(folder, random):
    size = 16
    codes, zeros = random.integers(0, 16, (COLS, ROWS)), random.integers(0, 16, (COLS // size, ROWS))
    scale = random.uniform(1e-3, 1e-2, (COLS // size, ROWS)).astype(np.float16)

    def shuffled(values):  # AutoAWQ packs the outputs 0, 2, 4, 6, 1, 3, 5, 7 of every eight into one word
        return values.reshape(values.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)

    expected = ((codes - np.repeat(zeros, size, 0)) * np.repeat(scale.astype(np.float64), size, 0)).T
    stored = {".qweight": pack(shuffled(codes), 4, 1), ".qzeros": pack(shuffled(zeros), 4, 1)}
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    replace_weight(folder, settings, stored | {".scales": torch.from_numpy(scale)})
    check(folder, expected)


def compressed(strategy, bits=8, kind="int", **weights):
    """A quantization_config of compressed-tensors with one group."""
    arguments = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | weights
    names = {("int", 4): "pack-quantized", ("int", 8): "int-quantized", ("float", 8): "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": names.get((kind, bits), "nvfp4-pack-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_compressed_tensors_of_packed_integers(folder, random, asymmetric, ordered):
    size = 20
    codes = random.integers(-8, 8, (ROWS, COLS))
    zeros = random.integers(-8, 8, (ROWS, COLS // size)) if asymmetric else np.zeros((ROWS, COLS // size), int)
    scale = torch.from_numpy(random.uniform(1e-3, 1e-2, (ROWS, COLS // size))).bfloat16()
    groups = np.repeat(np.arange(COLS // size), size)
    if ordered:
        groups = random.permutation(groups)
    expected = (codes - zeros[:, groups]) * scale.double().numpy()[:, groups]
    stored = {
        ".weight_packed": pack(codes + 8, 4, 1),
        ".weight_scale": scale,
        ".weight_shape": torch.tensor([ROWS, COLS]),
    }
    stored |= {".weight_zero_point": pack(zeros + 8, 4, 0)} if asymmetric else {}
    stored |= {".weight_g_idx": torch.from_numpy(groups.astype(np.int32))} if ordered else {}
    replace_weight(folder, compressed("group", 4, group_size=size, symmetric=not asymmetric), stored)
    check(folder, expected)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors_of_one_byte_a_weight(folder, random, strategy, kind):
    values, codes = float8(random, ROWS, COLS)
    if kind == "int":
        codes = torch.from_numpy(random.integers(-128, 128, (ROWS, COLS)).astype(np.int8))
        values = codes.double().numpy()
    shape = {"tensor": (1,), "channel": (ROWS, 1), "block": (2, 3)}[strategy]
    scale = random.uniform(1e-4, 1e-3, shape).astype(np.float32)
    each = np.repeat(np.repeat(scale, 32, 0)[:ROWS], 32, 1)[:, :COLS] if strategy == "block" else scale
    settings = compressed(strategy, 8, kind, block_structure=[32, 32] if strategy == "block" else None)
    stored = {".weight": codes, ".weight_scale": torch.from_numpy(scale), ".input_scale": torch.tensor([0.5])}
    replace_weight(folder, settings, stored)
    check(folder, values * each.astype(np.float64))


def test_compressed_tensors_of_4_bit_floats(folder, random):
    values = random_e2m1(random, ROWS, COLS)
    scales, stored_scales = float8(random, ROWS, COLS // 16)
    total = np.float32(700.0)
    codes = nibbles(values).astype(np.uint8)
    each = np.repeat((scales.astype(np.float32) / total), 16, 1)  # the division is one of float32 numbers
    stored = {
        ".weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4),
        ".weight_scale": stored_scales,
        ".weight_global_scale": torch.tensor([total]),
    }
    replace_weight(folder, compressed("tensor_group", 4, "float", group_size=16), stored)
    check(folder, values * each.astype(np.float64))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_4_bits(folder, random, nested):
    size, count = 64, ROWS * COLS
    table = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
    codes = random.integers(0, 16, count).astype(np.uint8)
    scale = random.uniform(1e-2, 1e-1, count // size).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [ROWS, COLS]}
    stored = {".weight": torch.from_numpy(codes[::2] << 4 | codes[1::2])[:, None]}
    if nested:
        inner = random.integers(0, 256, count // size).astype(np.uint8)
        inner_table, mean = np.sort(random.uniform(-1, 1, 256)).astype(np.float32), np.float32(0.05)
        inner_scale = np.float32(0.02)
        scale = (inner_table[inner] * inner_scale + mean).astype(np.float32)  # float32 at each step, as bitsandbytes
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(mean)}
        stored |= {
            ".weight.absmax": torch.from_numpy(inner),
            ".weight.nested_absmax": torch.tensor([inner_scale]),
            ".weight.nested_quant_map": torch.from_numpy(inner_table),
        }
    else:
        stored |= {".weight.absmax": torch.from_numpy(scale)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored |= {".weight.quant_map": torch.from_numpy(table), ".weight.quant_state.bitsandbytes__nf4": text}
    replace_weight(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True}, stored)
    expected = table.astype(np.float64)[codes] * np.repeat(scale.astype(np.float64), size)
    check(folder, expected.reshape(ROWS, COLS))


def test_bitsandbytes_of_8_bits(folder, random):
    codes = random.integers(-127, 128, (ROWS, COLS)).astype(np.int8)
    scale = random.uniform(0.1, 1, ROWS).astype(np.float32)
    stored = {
        ".weight": torch.from_numpy(codes),
        ".SCB": torch.from_numpy(scale),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    replace_weight(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True}, stored)
    check(folder, codes.astype(np.float64) * scale.astype(np.float64)[:, None] / 127)


def test_mxfp4_of_gpt_oss(tmp_path, random):
    folder = tmp_path / "model"
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = random_e2m1(random, 3, 64, 2, 32)  # expert, output, block, input of the block
    exponents = random.integers(115, 130, (3, 64, 2)).astype(np.uint8)
    codes = nibbles(values).astype(np.uint8)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    tensors[f"{name}_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4)
    tensors[f"{name}_scales"] = torch.from_numpy(exponents)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
    loaded, *_ = load_dense(locate(folder), None, Scratch(tmp_path))
    expected = (values * 2.0 ** (exponents.astype(np.float64) - 127)[..., None]).reshape(3, 64, 64).transpose(0, 2, 1)
    assert torch.equal(loaded.state_dict()[name].double(), torch.from_numpy(np.ascontiguousarray(expected)))


def test_powers_of_two_are_those_of_every_exponent():
    exponents = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(powers_of_two(exponents).double(), 2.0 ** (exponents.double() - 127))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_quantised_weights_beside_a_config_that_does_not_say_so(folder, dtype):
    codes = torch.ones(ROWS, COLS).to(dtype)
    replace_weight(folder, None, {".weight": codes})
    text = message(folder)
    assert f"{NAME}.weight is stored as" in text
    assert "give the original" in text


@pytest.mark.parametrize(
    "end", [".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".scales", ".qzeros", ".SCB", ".weight.absmax"]
)
def test_a_scale_beside_a_plain_weight(folder, end):
    tensors = load_file(folder / "model.safetensors") | {NAME + end: torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{NAME}{end} is part of a quantised weight" in message(folder)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_file_of_another_tool_says_that_the_weights_are_quantised(folder, name):
    (folder / name).write_text("{}")
    assert name in message(folder)


def test_the_older_key_of_compressed_tensors_is_read(folder, random):
    codes = torch.from_numpy(random.integers(-128, 128, (ROWS, COLS)).astype(np.int8))
    settings = compressed("tensor")
    del settings["quant_method"]
    replace_weight(folder, None, {".weight": codes, ".weight_scale": torch.tensor([0.01])})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compression_config": settings}))
    check(folder, codes.double().numpy() * np.float64(np.float32(0.01)))


BAD_SETTINGS = [
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "hqq"},
    "int8",
    7,
    {"bits": 4},
    {"quant_method": ["gptq"]},
    {"quant_method": "gptq", "bits": 3},
    {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    {"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}},
    {"quant_method": "awq", "bits": 4, "version": "gemv"},
    {"quant_method": "fp8", "weight_block_size": [0, 128]},
    {"quant_method": "fp8", "weight_block_size": "x"},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "compressed-tensors", "config_groups": 7},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "format": "marlin-24"},
    compressed("tensor") | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
    compressed("tensor") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    compressed("tensor", bits="x"),
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_schemes_that_are_not_known_are_refused_by_name(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    text = message(folder)
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    assert str(method) in text
    assert "give the original" in text


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_config_that_calls_plain_weights_quantised(folder, method):
    settings = {"bits": 4, "quant_method": method}
    if method == "compressed-tensors":
        settings = compressed("tensor")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert "remove quantization_config" in message(folder)


def test_a_quantised_weight_without_its_scale_or_with_one_of_another_shape(folder):
    codes = torch.ones(ROWS, COLS).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    replace_weight(folder, settings, {".weight": codes})
    assert f"{NAME}.weight is stored as F8_E4M3" in message(folder)
    tensors = load_file(folder / "model.safetensors") | {f"{NAME}.weight_scale_inv": torch.ones(3, 2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = message(folder)
    assert f"{NAME}.weight cannot be unpacked" in text
    assert "expected [2, 3]" in text


def test_a_scale_that_belongs_to_no_quantised_weight(folder):
    codes = torch.ones(ROWS, COLS).to(torch.float8_e4m3fn)
    stored = {".weight": codes, ".weight_scale_inv": torch.ones(2, 3), ".weight_scale_2": torch.ones(())}
    replace_weight(folder, {"quant_method": "fp8", "weight_block_size": [32, 32]}, stored)
    assert f"{NAME}.weight_scale_2 is part of a quantised weight" in message(folder)


def test_fp8_of_deepseek_with_an_expert_each_and_a_layer_for_further_tokens(tmp_path, random):
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=80,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=40,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored = {}
    for name, weight in plain.items():
        stored[name] = weight
        if weight.ndim == 2 and "proj" in name:
            values, stored[name] = float8(random, *weight.shape)
            grid = tuple(-(-size // 64) for size in weight.shape)
            scale = random.uniform(1e-4, 1e-3, grid).astype(np.float32)
            stored[f"{name}_scale_inv"] = torch.from_numpy(scale)
            each = np.repeat(np.repeat(scale, 64, 0)[: weight.shape[0]], 64, 1)[:, : weight.shape[1]]
            plain[name] = torch.from_numpy(values * each.astype(np.float64)).float().bfloat16()
    assert any(".experts.3.down_proj" in name for name in stored)
    further = {f"model.layers.2.{name}.weight": torch.ones(2, 2) for name in ("eh_proj", "enorm", "mlp.up_proj")}
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "plain", tmp_path / "quantised")
    save_file(stored | further, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(raw))
    loaded = load_model(tmp_path / "quantised")
    assert loaded.digest == load_model(tmp_path / "plain").digest
    assert "model.layers.2 (3)" in loaded.notes[0]
