"""Trainable scales: the same outputs as the decoded weight, exact gradients, and a way back into the bytes."""

from __future__ import annotations

import pytest
import torch
from strategies import random_packed
from torch import nn

from reallm.kernels.formats.formats import Format
from reallm.runtime.convert import pack_linear
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.training.finish import revert, write_back_low_rank, write_back_scales
from reallm.runtime.training.start import has_scales, train_low_rank, train_scales

ROWS, COLS = 24, 40
FORMATS = (
    "tq2.5-l9+ldl2+rot",
    "tq2-l8",
    "e8p3+rot",
    "int4-g16",
    "uint3-g0+cs",
    "nf4-g8+perm+o5",
    "aq2x4-d4",
    "lm3-g16+r2i8",
    "tq2-l8+rot+perm+cs+r3",
)


def packed(fmt: Format, seed: int = 0) -> CompressedLinear:
    """A linear with random fields, computing in float32."""
    module = pack_linear(nn.Linear(COLS, ROWS, bias=True), fmt, "load", torch.float32, None)
    module.write((n, torch.from_numpy(raw)) for n, raw in random_packed(fmt, ROWS, COLS, seed).items())
    return module


def close(found: torch.Tensor, expected: torch.Tensor, module: CompressedLinear, x: torch.Tensor) -> bool:
    """Within the rounding of float32 sums: every product at most |x| |W|, rotations a few more of them."""
    bound = 64 * 2.0**-23 * float(x.norm(dim=-1).max()) * float(module.dense().norm())
    return bool((found - expected).abs().max() <= bound)


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_from_the_stored_weight_and_ends_in_it(name: str) -> None:
    fmt = Format.parse(name)
    module, x = packed(fmt), torch.randn(5, COLS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(x)
    gain = train_scales(module)
    assert close(module(x).detach(), before, module, x)
    with torch.no_grad():
        gain.mul_(torch.linspace(0.5, 1.5, len(gain)))
        during = module(x)
    write_back_scales(module)
    with torch.no_grad():
        after = module(x)
    assert not module.in_training and module.format == fmt
    # a stored scale is within 2^-11 of itself in fp16 (subnormal ones are not met here)
    assert (after - during).abs().max() <= 2.0**-10 * float(x.norm(dim=-1).max()) * float(module.dense().norm())


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """The output is linear in every gain, so that a difference over a whole step of one is exact but for rounding."""
    module, x = packed(Format.parse(name)), torch.randn(3, COLS, generator=torch.Generator().manual_seed(2))
    gain = train_scales(module)
    weights = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(3))
    (module(x) * weights).sum().backward()
    assert gain.grad is not None
    with torch.no_grad():
        for at in range(0, len(gain), max(1, len(gain) // 7)):
            base = module(x).double()
            gain[at] += 1
            step = float(((module(x).double() - base) * weights).sum())
            gain[at] -= 1
            size = float(weights.norm() * x.norm() * module.dense().norm())
            assert abs(step - float(gain.grad[at])) <= 256 * 2.0**-23 * size


def test_what_has_no_scales_says_so() -> None:
    module = packed(Format.parse("nf2-g16-dq4x16"))
    assert not has_scales(module)
    with pytest.raises(ValueError, match="no scales that can be trained"):
        train_scales(module)
    with pytest.raises(ValueError, match="no scales are being trained"):
        write_back_scales(module)


def test_a_scale_beyond_fp16_is_not_written() -> None:
    module = packed(Format.parse("int4-g16"))
    with torch.no_grad():
        train_scales(module).fill_(1e9)
    with pytest.raises(ValueError, match="not finite in fp16"):
        write_back_scales(module)


def test_reverting_gives_everything_back() -> None:
    module = packed(Format.parse("int4-g16"))
    fmt, fields, weight = module.format, {n: raw.clone() for n, raw in module.fields.items()}, module.dense().clone()
    with torch.no_grad():
        train_scales(module).mul_(2)
        train_low_rank(module, 2)[0].add_(1)
    write_back_low_rank(module, "i8")
    revert(module, fmt, fields)
    assert not module.in_training and module.format == fmt and torch.equal(module.dense(), weight)
    assert set(module.state_dict()) == {*fields, "bias"}
