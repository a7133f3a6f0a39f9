"""Launching kernels: which arguments are refused, and which source runs. `test_gemv` tests the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_fields import random_fields

from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.launch.launch import kernels_for, multiply
from reallm.codegen.launch.source_cache import load_kernel
from reallm.kernels.formats.formats import Format

pytest.importorskip("triton", reason="Triton is an extra")

FORMAT = Format.parse("int4-g32")


def fields(rows: int = 4, cols: int = 64) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(raw) for name, raw in random_fields(FORMAT, rows, cols, 0).items()}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 63), "expected fp16, bf16 or fp32"),
        (torch.zeros(1, 64, dtype=torch.float64), "expected fp16, bf16 or fp32"),
        (torch.tensor(1.0), "expected fp16, bf16 or fp32"),
    ],
)
def test_wrong_activations_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(CodegenError, match=message):
        multiply(FORMAT, fields(), x, 4, 64)


def test_wrong_fields_are_refused_before_any_kernel_reads_them() -> None:
    x = torch.zeros(1, 64)
    with pytest.raises(CodegenError, match="'codes': found nothing"):
        multiply(FORMAT, {"scales": fields()["scales"]}, x, 4, 64)
    with pytest.raises(CodegenError, match=r"'codes': found torch\.uint8"):
        multiply(FORMAT, fields() | {"codes": torch.zeros(64, dtype=torch.uint8)}, x, 4, 64)
    with pytest.raises(CodegenError, match=r"'scales': found torch\.float16"):
        multiply(FORMAT, fields() | {"scales": torch.zeros(32, dtype=torch.float16)}, x, 4, 64)


def test_wrong_bias_and_output_are_refused() -> None:
    x = torch.zeros(1, 64)
    with pytest.raises(CodegenError, match=r"bias: found \(3,\)"):
        multiply(FORMAT, fields(), x, 4, 64, torch.zeros(3))
    with pytest.raises(CodegenError, match="out: found"):
        multiply(FORMAT, fields(), x, 4, 64, out=torch.zeros(1, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_misaligned_activations_are_copied() -> None:
    on_device = {name: raw.cuda() for name, raw in fields().items()}
    x = torch.randn(65, device="cuda", dtype=torch.float16)[1:][None]
    assert torch.equal(multiply(FORMAT, on_device, x, 4, 64), multiply(FORMAT, on_device, x.clone(), 4, 64))


def test_no_rows_of_x_give_no_rows_of_y() -> None:
    assert multiply(FORMAT, fields(), torch.zeros(2, 0, 64), 4, 64).shape == (2, 0, 4)


def test_a_dense_format_is_refused() -> None:
    with pytest.raises(CodegenError, match="dense"):
        kernels_for(Format.parse("fp16"), 4, 64)


def test_a_source_that_was_changed_in_the_cache_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALLM_CACHE", str(tmp_path))
    (spec,) = kernels_for(FORMAT, 4, 64)
    load_kernel.cache_clear()
    load_kernel(spec)
    (path,) = (tmp_path / "kernels").glob("*.py")
    good = path.read_bytes()
    path.write_bytes(b"raise SystemExit('not ours')\n")
    load_kernel.cache_clear()
    load_kernel(spec)
    assert path.read_bytes() == good
