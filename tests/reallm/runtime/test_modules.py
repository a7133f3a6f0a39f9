"""Packed modules: what casts, writes, training and copies do to them, and what they must not do."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from packing import random_fields
from torch import nn

from reallm.artifacts.quantization_config import DecodeMode
from reallm.decoding.decode import decode
from reallm.kernels.formats.formats import Format
from reallm.runtime.convert import pack_embedding, pack_linear, tie_head
from reallm.runtime.experts import ExpertStack, PackedExpert
from reallm.runtime.field_bytes import pack_factors
from reallm.runtime.frozen_weight import FrozenWeightError
from reallm.runtime.modules import CompressedEmbedding, CompressedLinear
from reallm.runtime.packed import Packed
from reallm.runtime.training.finish import write_back_low_rank
from reallm.runtime.training.start import train_low_rank

ROWS, COLS = 20, 36


def fill(packed: Packed, seed: int = 0) -> None:
    fields = random_fields(packed.format, packed.rows, packed.cols, seed, size=0.1)
    packed.write((name, torch.from_numpy(raw)) for name, raw in fields.items())


def linear(name: str = "int4-g16+r3", mode: DecodeMode = "load", bias: bool = True) -> CompressedLinear:
    module = pack_linear(nn.Linear(COLS, ROWS, bias=bias), Format.parse(name), mode, torch.float32, None)
    fill(module)
    return module


def fields_of(module: Packed) -> dict[str, bytes]:
    return {name: raw.numpy().tobytes() for name, raw in module.fields.items()}


@pytest.mark.parametrize("mode", ["load", "call"])
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_a_cast_changes_the_weight_and_not_the_fields(mode: DecodeMode, cast: object) -> None:
    module = linear(mode=mode)
    before, exact = fields_of(module), module.weight
    cast(module)
    assert fields_of(module) == before
    assert module.weight.dtype == module.bias.dtype
    assert torch.equal(module.weight, exact.to(module.bias.dtype))
    module.float()
    assert torch.equal(module.weight, exact)  # nothing was lost on the way there and back
    assert module.decoded.numel() == (ROWS * COLS if mode == "load" else 0)


def test_output_is_in_the_dtype_of_the_input() -> None:
    module = linear()
    inputs = torch.randn(2, 5, COLS)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = nn.functional.linear(inputs.to(dtype), module.weight.to(dtype), module.bias.to(dtype))
        found = module(inputs.to(dtype))
        unit = torch.finfo(dtype).eps / 2
        # Rounded to dtype: each weight (36 terms, against none of ours), the product, the sum with the bias.
        sizes = nn.functional.linear(inputs.abs(), module.weight.abs()) + expected.abs().float() + 1
        assert found.dtype == dtype and bool(((found - expected).abs() <= 4 * unit * sizes).all())


def test_writing_the_weight_raises() -> None:
    module = linear()
    exact = module.weight.clone()
    with pytest.raises(FrozenWeightError):
        module.weight = nn.Parameter(torch.zeros(ROWS, COLS))
    with pytest.raises(FrozenWeightError):
        module.weight.data = torch.zeros(ROWS, COLS)
    with pytest.raises(FrozenWeightError):
        module.weight.data += 1.0  # as PEFT's merge does
    with pytest.raises(FrozenWeightError):
        module.weight += 1.0
    with pytest.raises(FrozenWeightError):
        module.weight.zero_()
    with pytest.raises(FrozenWeightError):
        module.weight[0] = 0.0
    with pytest.raises(FrozenWeightError):
        nn.init.normal_(module.weight)
    with pytest.raises(FrozenWeightError):
        torch.add(exact, 1.0, out=module.weight)
    assert torch.equal(module.weight, exact) and type(module.weight + 0) is torch.Tensor


def test_only_the_bias_is_a_parameter_and_only_fields_are_saved() -> None:
    module = linear()
    module(torch.randn(1, COLS))
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert list(module.state_dict()) == ["bias", "codes", "scales", "left", "right"]


def test_new_fields_give_a_new_weight() -> None:
    module, other = linear(), linear()
    fill(other, seed=1)
    kept = module.weight.clone()
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.weight, other.weight) and not torch.equal(module.weight, kept)
    with pytest.raises(ValueError, match="'codes'"):
        module.write([("codes", torch.zeros(3, dtype=torch.uint8))])


def test_a_weight_kept_in_inference_mode_can_be_trained_through() -> None:
    module = linear()
    with torch.inference_mode():
        module(torch.randn(1, COLS))
    inputs = torch.randn(3, COLS, requires_grad=True)
    module(inputs).sum().backward()
    # the gradient of sum(x W^T) is the sum of the rows of W, here summed in the same way
    torch.testing.assert_close(inputs.grad, torch.ones(3, ROWS) @ module.weight, rtol=0, atol=ROWS * 2.0**-20)


def test_copies_are_independent() -> None:
    module = linear()
    twin = copy.deepcopy(module)
    fill(twin, seed=1)
    assert not torch.equal(twin.weight, module.weight) and type(twin) is CompressedLinear


@pytest.mark.parametrize("mode", ["load", "call"])
def test_embedding_gives_rows_of_the_weight(mode: DecodeMode) -> None:
    module = pack_embedding(
        nn.Embedding(ROWS, COLS, padding_idx=1), Format.parse("nf4-g8-dq8x8"), mode, torch.float32, None
    )
    fill(module)
    ids = torch.tensor([[3, 1, 3], [19, 0, 7]])
    assert torch.equal(module(ids), module.weight[ids])


def test_a_subclass_keeps_its_own_forward_and_buffers() -> None:
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(ROWS, COLS)
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * self.scale

    module = pack_embedding(Scaled(), Format.parse("int8-g0"), "load", torch.float32, None)
    assert isinstance(module, CompressedEmbedding) and isinstance(module, Scaled)
    fill(module)
    assert torch.equal(module(torch.tensor([2])), 3 * module.weight[2:3])
    assert not module._is_hf_initialized  # transformers must fill `scale`


def test_a_tied_head_uses_the_embedding_and_refuses_writes() -> None:
    table = pack_embedding(nn.Embedding(ROWS, COLS), Format.parse("int8-g0"), "load", torch.float32, None)
    fill(table)
    head = tie_head(nn.Linear(COLS, ROWS, bias=False), table)
    inputs = torch.randn(2, COLS)
    expected = nn.functional.linear(inputs, table.weight)
    sizes = nn.functional.linear(inputs.abs(), table.weight.abs())
    # Sums of 36 float32 products in another order (36 u each), and the zero 128 taken off codes up to 255 (3 u more).
    assert bool(((head(inputs) - expected).abs() <= 2 * 39 * 2.0**-24 * 3 * (sizes + 1)).all())
    assert not list(head.state_dict()) and not list(head.children())
    with pytest.raises(FrozenWeightError):
        head.weight = nn.Parameter(torch.zeros(ROWS, COLS))


@pytest.mark.parametrize("mode", ["load", "call"])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_stack_stands_in_for_its_tensor(mode: DecodeMode, transposed: bool) -> None:
    experts = []
    for seed, name in enumerate(("int4-g8", "nf3-g16+r1", "bf16")):
        expert = PackedExpert()
        expert.allocate_fields(Format.parse(name), ROWS, COLS, mode="call", dtype=torch.float32)
        fill(expert, seed)
        experts.append(expert)
    stack = ExpertStack(experts, transposed=transposed, mode=mode, dtype=torch.float32)
    whole = torch.stack([expert.weight.T if transposed else expert.weight for expert in experts])
    assert stack.shape == whole.shape and stack.dtype == torch.float32 and stack.ndim == 3
    assert torch.equal(stack[1], whole[1]) and torch.equal(stack[torch.tensor(2)], whole[2])
    assert torch.equal(stack[-1], whole[-1]) and torch.equal(stack[torch.tensor([2, 0])], whole[[2, 0]])
    assert torch.equal(stack.transpose(-2, -1), whole.transpose(-2, -1))
    inputs = torch.randn(3, 2, whole.shape[2])
    assert torch.equal(torch.bmm(inputs, stack.transpose(1, 2)), torch.bmm(inputs, whole.transpose(1, 2)))
    assert torch.equal(torch.matmul(stack, inputs.transpose(1, 2)), whole @ inputs.transpose(1, 2))
    assert sorted(stack.state_dict())[0] == "0.codes"
    with pytest.raises(IndexError):
        stack[3]


def test_training_starts_from_the_stored_weight() -> None:
    module = linear()
    inputs = torch.randn(4, COLS)
    before = module(inputs).detach()
    left, right = train_low_rank(module, rank=5)
    assert left.shape == (ROWS, 5) and right.shape == (5, COLS) and left.dtype == torch.float32
    # 36 products and 5 factors summed in another order, of terms below 10
    torch.testing.assert_close(module(inputs), before, rtol=0, atol=10 * (COLS + 5) * 2.0**-22)
    assert {name for name, _ in module.named_parameters()} == {
        "bias",
        "training_part.left_factor",
        "training_part.right_factor",
    }


@pytest.mark.parametrize("kind", ["f16", "i8", "i4"])
@pytest.mark.parametrize("name", ["int4-g16+r3", "aq1x4-d4", "nf3-g8+ldl+r3i8"])
def test_trained_factors_fold_back_into_the_bytes(name: str, kind: str) -> None:
    module = linear(name)
    codes = fields_of(module)["codes"]
    left, right = train_low_rank(module, rank=4)
    inputs, target = torch.randn(16, COLS), torch.randn(16, ROWS)
    before = nn.functional.mse_loss(module(inputs), target)
    optimiser = torch.optim.Adam([left, right], lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        nn.functional.mse_loss(module(inputs), target).backward()
        optimiser.step()
    trained = module(inputs).detach()
    assert nn.functional.mse_loss(trained, target) < before
    fmt = write_back_low_rank(module, kind)
    assert fmt.low_rank is not None and (fmt.low_rank.rank, fmt.low_rank.dtype) == (4, kind)
    assert fields_of(module)["codes"] == codes and not module.in_training
    assert list(module.fields) == [field.name for field in fmt.fields(ROWS, COLS)]
    assert all(
        raw.numel() == field.nbytes for raw, field in zip(module.fields.values(), fmt.fields(ROWS, COLS), strict=True)
    )
    # Rounding a factor changes an entry by at most `step` of its component's largest; fp16 2^-11, int8 1/254, int4
    # 1/14 (and the scale 2^-11). Output: sum over 4 components and 36 inputs of |x| times both changes.
    step = {"f16": 0.0, "i8": 1 / 254, "i4": 1 / 14}[kind] + 2.0**-11
    size = (inputs.abs().sum(1).max() * left.abs().amax(0) @ right.abs().amax(1)).item()
    assert (module(inputs) - trained).abs().max() <= 2.1 * step * size + 1e-4


def test_what_cannot_be_trained_says_so() -> None:
    with pytest.raises(ValueError, match="bf16"):
        train_low_rank(linear("bf16"), 4)
    with pytest.raises(ValueError, match="rank 2"):
        train_low_rank(linear("int4-g16+r3"), 2)
    with pytest.raises(ValueError, match="rank 0"):
        train_low_rank(linear("int4-g16"))
    with pytest.raises(ValueError, match="train_low_rank"):
        write_back_low_rank(linear())
    fmt = Format.parse("int4-g16+r3")
    assert fmt.low_rank is not None
    with pytest.raises(ValueError, match="not finite"):
        pack_factors(torch.full((ROWS, 3), 1e6), torch.zeros(3, COLS), fmt.low_rank)


@pytest.mark.parametrize("kind", ["i8", "i4"])
def test_integer_factors_of_zeros_stay_zeros(kind: str) -> None:
    fmt = Format.parse(f"int4-g16+r3{kind}")
    assert fmt.low_rank is not None
    fields = {name: torch.from_numpy(raw) for name, raw in random_fields(fmt, ROWS, COLS, 0).items()}
    fields |= pack_factors(torch.zeros(ROWS, 3), torch.zeros(3, COLS), fmt.low_rank)
    assert torch.equal(decode(fmt, fields, ROWS, COLS), decode(fmt, fields, ROWS, COLS, low_rank=False))


def test_importing_reallm_imports_neither_torch_nor_the_models() -> None:
    code = "import sys, reallm; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
    code = (
        "import reallm, transformers\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\nassert 'reallm' in m"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
