"""Trainable scales: the same outputs as the decoded weight, exact gradients, and a way back into the bytes."""

from __future__ import annotations

import pytest
import torch
from strategies import random_packed
from torch import nn

from reallm.kernels.formats.formats import Format
from reallm.runtime.modules import CompressedLinear, pack_linear
from reallm.runtime.training.scales import ScaleTraining

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
    module = nn.Linear(COLS, ROWS, bias=True)
    pack_linear(module, fmt, "load", torch.float32, None)
    assert isinstance(module, CompressedLinear)
    module.write((n, torch.from_numpy(raw)) for n, raw in random_packed(fmt, ROWS, COLS, seed).items())
    return module


def close(found: torch.Tensor, expected: torch.Tensor, module: ScaleTraining, x: torch.Tensor) -> bool:
    """Within the rounding of float32 sums: every product at most |x| |W|, rotations a few more of them."""
    bound = 64 * 2.0**-23 * float(x.norm(dim=-1).max()) * float(module.dense().norm())
    return bool((found - expected).abs().max() <= bound)


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_from_the_stored_weight_and_ends_in_it(name: str) -> None:
    fmt = Format.parse(name)
    module, x = packed(fmt), torch.randn(5, COLS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(x)
    gain = module.train_scales()
    assert close(module(x).detach(), before, module, x)
    with torch.no_grad():
        gain.mul_(torch.linspace(0.5, 1.5, len(gain)))
        during = module(x)
    module.fold_scales()
    with torch.no_grad():
        after = module(x)
    assert module.scale_gain is None and module.format == fmt
    # a stored scale is within 2^-11 of itself in fp16 (subnormal ones are not met here)
    assert (after - during).abs().max() <= 2.0**-10 * float(x.norm(dim=-1).max()) * float(module.dense().norm())


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """The output is linear in every gain, so that a difference over a whole step of one is exact but for rounding."""
    module, x = packed(Format.parse(name)), torch.randn(3, COLS, generator=torch.Generator().manual_seed(2))
    gain = module.train_scales()
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
    assert not module.has_scales
    with pytest.raises(ValueError, match="no scales by themselves"):
        module.train_scales()
    with pytest.raises(ValueError, match="no scales are being trained"):
        module.fold_scales()


def test_a_scale_beyond_fp16_is_not_written() -> None:
    module = packed(Format.parse("int4-g16"))
    with torch.no_grad():
        module.train_scales().fill_(1e9)
    with pytest.raises(ValueError, match="not finite in fp16"):
        module.fold_scales()


def test_reverting_gives_everything_back() -> None:
    module = packed(Format.parse("int4-g16"))
    fmt, fields, weight = module.format, {n: raw.clone() for n, raw in module.fields.items()}, module.dense().clone()
    with torch.no_grad():
        module.train_scales().mul_(2)
        module.train_low_rank(2)[0].add_(1)
    module.fold("i8")
    module.revert(fmt, fields)
    assert not module.in_training and module.format == fmt and torch.equal(module.dense(), weight)
    assert set(module.state_dict()) == {*fields, "bias"}
