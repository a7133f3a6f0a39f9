"""GGUF files made from artifacts: every weight as the package gguf decodes it, and bad input refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from packing import Codes, PackedModel
from tiny import tiny_model, tiny_tokenizer

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.kernels.codes.packing import pad
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.models.loaded import load_model
from reallm.targets.gguf.file_header import read_gguf_header
from reallm.targets.gguf.types import gguf_type
from reallm.targets.gguf.verify import verify_gguf
from reallm.targets.gguf.write import write_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf is the independent reader")
SETTINGS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FORMATS = ("int4-g32+ldl", "int8-g32", "int5-g32")
HEADS = {"attn_q": 4, "attn_k": 2}


def pick_all(matrix):
    """The formats in turn for linears, one of eight bits for embedding and head."""
    return FORMATS[sum(map(ord, matrix.name)) % 3] if matrix.kind == "linear" else "int8-g32"


class Case:
    """A tiny llama artifact of random codes, and a GGUF file of the same model."""

    def __init__(self, folder: Path, choose=pick_all, architecture="llama", tiny_scale=False):
        self.folder = folder
        tiny_model(architecture, settings=SETTINGS).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        loaded = load_model(folder / "model")
        self.packed = PackedModel(loaded, choose)
        self.set_scales(loaded, tiny_scale)
        plan = self.packed.write_plan(folder / "plan.json")
        codes = Codes(self.packed)
        self.artifact = compile_plan(plan, folder / "out", model=loaded, codes=codes, kernels=False)
        self.state = {name: value.numpy().copy() for name, value in loaded.model.state_dict().items()}
        if architecture == "llama-tied":
            del self.state["lm_head.weight"]
        self.weights = {}
        for matrix in loaded.matrices:
            if fields := self.packed.fields.get(matrix.name):
                fmt = Format.parse(self.packed.names[matrix.name])
                weight = decode_reference(fmt, fields, matrix.rows, matrix.cols).astype(np.float32)
                self.weights[f"{matrix.name}.weight"] = self.state[f"{matrix.name}.weight"] = weight
        self.base = self.write_base("base.gguf")

    def set_scales(self, loaded, tiny_scale):
        """Random scales of either sign, far from the smallest numbers of fp16 unless `tiny_scale`."""
        rng = np.random.default_rng(0)
        for matrix in loaded.matrices:
            fields = self.packed.fields.get(matrix.name)
            if fields and "scales" in fields:
                count = matrix.rows * matrix.cols // 32
                scales = (rng.uniform(0.02, 0.2, count) * rng.choice([-1, 1], count)).astype("<f2")
                if tiny_scale:
                    scales[3] = np.float16(6e-8)
                self.packed.fields[matrix.name] = {**fields, "scales": pad(scales.tobytes())}

    def write_base(self, name, noise=0.05, skip=(), edit=None, blocks=2):
        """A GGUF file by the package gguf: matrices with noise in F16, the rest in F32, q and k with permuted rows."""
        path, rng = self.folder / name, np.random.default_rng(1)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(blocks)
        writer.add_head_count(HEADS["attn_q"])
        writer.add_head_count_kv(HEADS["attn_k"])
        writer.add_token_list(["a", "ü", "c"])
        writer.add_string("tokenizer.chat_template", "{{ messages }}")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        for key, value in self.state.items():
            target = names.get_name(key, try_suffixes=(".weight",))
            if target in skip:
                continue
            value = gguf_side(target, value)
            value = edit(target, value) if edit else value
            if value.ndim == 2 and key in self.weights:
                value = (value + noise * value.std() * rng.standard_normal(value.shape)).astype(np.float16)
            writer.add_tensor(target, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def write(self, name="model.gguf", **options):
        return write_gguf(self.artifact, self.folder / name, **{"base": self.base} | options)

    def error(self, name="refused.gguf", **options) -> str:
        """The message of the UserError of `write`, which must be one line; nothing may be left behind."""
        before = sorted(path.name for path in self.folder.iterdir())
        with pytest.raises(UserError) as caught:
            self.write(name, **options)
        assert sorted(path.name for path in self.folder.iterdir()) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)


def gguf_side(target: str, value: np.ndarray) -> np.ndarray:
    """Rows of q and k as llama.cpp's converter orders them (LlamaModel.permute)."""
    heads = HEADS.get(target.split(".")[-2])
    return value if heads is None else value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("gguf"))


def read_all(path):
    """Tensor name -> (type name, bytes, float32 values), by the package gguf."""
    return {
        t.name: (t.tensor_type.name, t.data.tobytes(), gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def test_every_packed_matrix_decodes_to_the_artifacts_weight_and_the_rest_is_the_bases(case):
    exported = case.write(force=True)
    written, base = read_all(exported.path), read_all(case.base)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert set(exported.types.values()) == {"Q4_0", "Q5_0", "Q8_0"}
    assert exported.types.keys() == case.packed.fields.keys()
    packed = set()
    for key, weight in case.weights.items():
        target = names.get_name(key, try_suffixes=(".weight",))
        packed.add(target)
        type_name, _, values = written[target]
        assert type_name == exported.types[key.removesuffix(".weight")]
        assert np.array_equal(values, gguf_side(target, weight)), key
    assert list(written) == list(base)
    kept = written.keys() - packed
    assert kept == {name for name in base if "norm" in name}
    assert all(written[name][:2] == base[name][:2] for name in kept)


def test_key_values_are_the_bases_byte_for_byte_and_tensors_are_aligned(case):
    exported = case.write(force=True)
    header, base = read_gguf_header(exported.path), read_gguf_header(case.base)
    assert header.pairs == base.pairs
    assert header.values["tokenizer.chat_template"] == "{{ messages }}"
    assert all(tensor.start % 32 == 0 for tensor in header.tensors)
    assert exported.nbytes == exported.path.stat().st_size
    for ours, theirs in zip(header.tensors, gguf.GGUFReader(exported.path).tensors, strict=True):
        assert (ours.name, ours.start, ours.nbytes) == (theirs.name, theirs.data_offset, theirs.n_bytes)


def test_rows_that_the_base_does_not_reorder_stay(tmp_path, monkeypatch):
    case = Case(tmp_path)
    monkeypatch.setitem(globals(), "gguf_side", lambda target, value: value)
    written = read_all(case.write(base=case.write_base("plain.gguf")).path)
    for part in ("q", "k"):
        weight = case.weights[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert np.array_equal(written[f"blk.1.attn_{part}.weight"][2], weight)


def test_dense_matrices_keep_the_bases_bytes(tmp_path):
    case = Case(tmp_path, choose=lambda matrix: "int4-g32" if "mlp" in matrix.name else None)
    exported = case.write()
    written, base = read_all(exported.path), read_all(case.base)
    assert exported.notes == ()
    assert len(exported.types) == 6
    for name in base:
        assert (written[name][1] == base[name][1]) == ("ffn_norm" in name or "ffn" not in name)


def test_a_dense_matrix_with_other_values_in_the_base_is_a_note(tmp_path):
    case = Case(tmp_path, choose=lambda matrix: "int4-g32" if "mlp" in matrix.name else None)
    base = case.write_base("rounded.gguf", edit=lambda name, v: v * np.float32(1.05) if name == "output.weight" else v)
    notes = case.write(base=base).notes
    assert len(notes) == 1
    assert notes[0].startswith("lm_head.weight keeps the base's values, which differ from the artifact's by 4.8%")


@pytest.mark.parametrize("own_head", [False, True])
def test_a_packed_tied_embedding_is_the_embedding_and_the_head_where_the_base_has_one(tmp_path, own_head):
    case = Case(tmp_path, architecture="llama-tied")
    if own_head:
        case.state["lm_head.weight"] = case.state["model.embed_tokens.weight"]
    written = read_all(case.write(base=case.write_base("tied.gguf")).path)
    assert ("output.weight" in written) == own_head
    for name in ("token_embd.weight", "output.weight")[: 1 + own_head]:
        assert written[name][0] == "Q8_0"
        assert np.array_equal(written[name][2], case.weights["model.embed_tokens.weight"])


def test_a_format_that_gguf_cannot_hold_is_refused_with_the_first_matrix_and_the_number(tmp_path):
    case = Case(tmp_path, choose=lambda matrix: "nf4-g32" if "k_proj" in matrix.name else "int4-g32")
    message = case.error()
    assert message.startswith("model.layers.0.self_attn.k_proj [32, 64] is in nf4-g32, which no GGUF type holds")
    assert "2 of 16" in message
    assert "int4-g32 (Q4_0), int5-g32 (Q5_0), int8-g32 (Q8_0)" in message


def test_a_scale_that_is_not_exact_after_the_division_is_refused(tmp_path):
    case = Case(tmp_path, choose=lambda matrix: "int8-g32" if "down_proj" in matrix.name else None, tiny_scale=True)
    assert case.error().startswith("model.layers.0.mlp.down_proj: 1 scales, the first 5.96046e-08, divided by 128")


def test_another_models_file_is_refused(case):
    def other(name, value):
        return np.roll(value, 1, axis=0) if name == "blk.1.ffn_up.weight" else value

    assert "blk.1.ffn_up.weight differs from model.layers.1.mlp.up_proj" in case.error(
        base=case.write_base("other.gguf", edit=other)
    )
    cut = case.write_base("cut.gguf", edit=lambda name, v: v[:-1] if name == "token_embd.weight" else v)
    assert "token_embd.weight is [260, 64], model.embed_tokens is [261, 64]" in case.error(base=cut)
    lacking = case.write_base("lacking.gguf", skip=("output.weight",))
    assert "no tensor of its own for lm_head" in case.error(base=lacking)


def test_other_norms_are_refused(case):
    tuned = case.write_base("norms.gguf", edit=lambda n, v: v * np.float32(1.02) if n == "output_norm.weight" else v)
    assert "output_norm.weight differs from model.norm.weight by 2% of its norm" in case.error(base=tuned)


def test_an_existing_output_needs_force_and_the_base_is_never_replaced(case):
    case.write(force=True)
    assert "exists; give another name, or --force" in case.error("model.gguf")
    with pytest.raises(UserError, match="is the base itself"):
        write_gguf(case.artifact, case.base, base=case.base, force=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated or damaged"),
        (lambda raw: b"GGML" + raw[4:], "is not a GGUF file"),
        (lambda raw: raw[:4] + b"\x09" + raw[5:], "is GGUF version 9"),
        (lambda raw: raw[:100], "truncated or damaged"),
        (lambda raw: b"", "truncated or damaged"),
    ],
)
def test_a_damaged_base_is_refused(case, damage, words):
    broken = case.folder / "broken.gguf"
    broken.write_bytes(damage(case.base.read_bytes()))
    assert words in case.error(base=broken)


def test_the_verifier_finds_one_changed_bit_anywhere_in_the_data(case):
    from reallm.targets.gguf.contents import read_contents

    path, base = case.write(force=True).path, read_gguf_header(case.base)
    contents = read_contents(case.artifact, base)
    verify_gguf(path, base, contents)
    raw = path.read_bytes()
    for tensor in read_gguf_header(path).tensors:
        changed = bytearray(raw)
        changed[tensor.start + tensor.nbytes - 1] ^= 16
        path.write_bytes(changed)
        with pytest.raises(UserError, match=f"{tensor.name} was written, but reads back differently"):
            verify_gguf(path, base, contents)


@pytest.mark.parametrize(
    ("name", "cols", "expected"),
    [
        ("int4-g32", 64, "Q4_0"),
        ("int5-g32+ldl2+lwc", 64, "Q5_0"),
        ("int8-g32", 32, "Q8_0"),
        ("int8-g32", 48, None),
        ("int4-g64", 64, None),
        ("uint4-g32", 64, None),
        ("nf4-g32", 64, None),
        ("int3-g32", 64, None),
        ("int4-g32-dq8x64", 64, None),
        ("int4-g32+rot", 64, None),
        ("int4-g32+o5", 64, None),
        ("int4-g32+r4", 64, None),
        ("bf16", 64, None),
    ],
)
def test_types_of_formats(name, cols, expected):
    assert gguf_type(Format.parse(name), 64, cols) == expected


def test_the_sizes_of_blocks_are_those_of_the_package():
    from reallm.targets.gguf.types import BLOCKS

    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    common = BLOCKS.keys() & theirs.keys()
    assert len(common) > 25
    assert {kind: BLOCKS[kind] for kind in common} == {kind: theirs[kind] for kind in common}


def test_extreme_codes_and_factors_decode_as_in_the_package():
    from reallm.targets.gguf.blocks import decode_blocks, encode_blocks

    rng = np.random.default_rng(2)
    d = np.array([[6e-8, -65504, 0, -0.0, 1e-3, -1, 6e-5, 2]], np.float16).T.repeat(3, 1)
    for bits, name in ((4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")):
        codes = rng.integers(0, 1 << bits, (8, 96))
        codes[:, :2] = 0, (1 << bits) - 1
        raw = encode_blocks(name, codes, d)
        expected = d.repeat(32, 1).astype(np.float32) * (codes - (1 << (bits - 1))).astype(np.float32)
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        assert np.array_equal(decode_blocks(name, raw.reshape(-1), 8, 96), expected)
        assert np.array_equal(theirs, expected)
