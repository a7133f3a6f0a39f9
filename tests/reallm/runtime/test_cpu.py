"""Native kernels on the CPU: products with matrices as they are stored equal those with the reference decode."""

from __future__ import annotations

import copy
import io
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compilers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import random_fields
from products import product_bound
from torch import Tensor, nn

from reallm.codegen.cpu import compiler as native
from reallm.codegen.cpu.linear import load_functions
from reallm.kernels.codes.packing import pack_codes
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.runtime.convert import pack_embedding, pack_linear
from reallm.runtime.cpu import NativeMatrix, native_matrix
from reallm.runtime.modules import CompressedLinear

NAMES = [
    *("tq2-l12+ldl2+rot", "tq2.625-l12+perm", "tq5.5-l16+o9"),
    *("int4-g64", "int4-g64+r3", "uint3-g32+cs", "nf4-g64", "lm4-g64+perm+cs+o20+r2i4", "int4-g24", "lm2-g0-dq8x64"),
    *("lm6-g32", "km3", "aq1x8-d8", "aq2x9-d4-shared+r2i8", "aq3x5-d2", "e8p2+rot", "e8p4+ldl+perm+cs+rot+o9+r2i8"),
    *("bf16", "fp16"),
]
WHOLE = [(48, 64), (17, 192)]
"""Columns in whole groups of 32, for which codes are read as stored."""


def forget_libraries() -> None:
    native.generated_library.cache_clear()
    load_functions.cache_clear()
    native._warn_once.cache_clear()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing built is remembered, before and after."""
    forget_libraries()
    yield
    forget_libraries()


def packed_matrix(name: str, rows: int, cols: int, seed: int) -> tuple[Format, dict[str, np.ndarray], NativeMatrix]:
    fmt = Format.parse(name)
    packed = random_fields(fmt, rows, cols, seed)
    tensors = {key: torch.from_numpy(raw) for key, raw in packed.items()}
    shared = tensors.pop("codebooks") if fmt.shared_field else None
    matrix = native_matrix(fmt, tensors, rows, cols, shared)
    assert matrix is not None
    return fmt, packed, matrix


def product(matrix: NativeMatrix, x: Tensor, threads: int = 1) -> Tensor:
    """x W_hat^T, written over NaNs."""
    y = torch.full((len(x), matrix.rows), float("nan"))
    assert matrix.built.linear(matrix.address, x.data_ptr(), y.data_ptr(), 0, len(x), threads) == 0
    return y


def check(name: str, rows: int, cols: int, batch: int, seed: int) -> None:
    fmt, packed, matrix = packed_matrix(name, rows, cols, seed)
    weight = decode_reference(fmt, packed, rows, cols)
    x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(seed))
    exact = x.double().numpy() @ weight.T
    bound = product_bound(fmt, packed, rows, cols) * np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    assert (np.abs(product(matrix, x).numpy() - exact) <= bound).all()
    if matrix.looks_up:
        out = matrix.lookup(torch.arange(rows), torch.float32).numpy()
        assert (np.abs(out - weight) <= product_bound(fmt, packed, rows, cols)).all()  # x a unit vector


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(
    shape=st.one_of(st.sampled_from(WHOLE), st.tuples(st.integers(1, 41), st.integers(1, 83))),
    batch=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_equal_those_with_the_reference(name: str, shape: tuple[int, int], batch: int, seed: int) -> None:
    check(name, *shape, batch, seed)


@needs_compiler
@pytest.mark.parametrize(("rows", "cols"), [(576, 576), (192, 576), (576, 1536), (1536, 576)])
@pytest.mark.parametrize("name", ["tq2.25-l12+ldl2+rot", "nf4-g64"])
def test_products_at_the_shapes_of_a_model(name: str, rows: int, cols: int) -> None:
    for batch in (1, 33):
        check(name, rows, cols, batch, batch)


@needs_compiler
def test_more_rows_of_x_than_are_taken_at_once() -> None:
    check("nf4-g64", 17, 64, 1100, 0)


@needs_compiler
@pytest.mark.parametrize("width", range(16))
def test_every_width_that_a_trellis_can_have(width: int) -> None:
    fmt, rows, cols = Format.parse("tq6-l16"), 35, 64
    packed = random_fields(fmt, rows, cols, width)
    packed["widths"] = pack_codes(np.array([width, 0, min(width, 8), 3]), 4)
    tensors = {key: torch.from_numpy(raw) for key, raw in packed.items()}
    matrix = native_matrix(fmt, tensors, rows, cols)
    assert matrix is not None
    bound = product_bound(fmt, packed, rows, cols)
    for batch in (1, 2):
        x = torch.eye(cols)[None].expand(batch, -1, -1).reshape(-1, cols).contiguous()
        found = torch.cat([product(matrix, row) for row in x.split(batch)])
        assert (
            np.abs(found.numpy() - decode_reference(fmt, packed, rows, cols).T[np.r_[: len(x)] % cols]).max() <= bound
        )


@needs_compiler
@pytest.mark.parametrize("name", ["tq2.5-l12+rot", "nf4-g64", "e8p4"])
def test_lower_tiers_give_the_same_products(name: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALLM_NATIVE", "portable")
    for rows, cols in ((33, 64), (20, 51)):
        check(name, rows, cols, 3, 1)
        check(name, rows, cols, 1, 2)


@pytest.fixture
def avx512(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AVX-512 tier, where need be with its instructions of 64 bytes written out for AVX2."""
    if native.machine_tier() not in ("avx2", "avx512"):
        pytest.skip("the tier's instructions of 16 and 32 bytes are the processor's own, and this one has no AVX2")
    if native.machine_tier() != "avx512":
        header = Path(__file__).parents[2] / "support" / "avx512.hpp"
        made_of = f"-DMADE_OF=0x{zlib.crc32(header.read_bytes()):x}"  # another name for the library, if it changes
        flags = ("-march=x86-64-v3", "-DLANES=32", made_of, "-include", str(header))
        monkeypatch.setitem(native.TIERS, "avx512", flags)
        monkeypatch.setattr(native, "machine_tier", lambda: "avx512")


@needs_compiler
@pytest.mark.parametrize("name", ["tq2.5-l12+rot", "uint3-g32", "nf4-g64", "lm6-g32", "km3"])
def test_the_avx512_tier_gives_the_same_products(name: str, avx512: None) -> None:
    for rows, cols in ((33, 64), (20, 51), (19, 96)):
        check(name, rows, cols, 3, 1)
        check(name, rows, cols, 1, 2)


@needs_compiler
@pytest.mark.parametrize("name", ["tq3-l10", "tq2.5-l12+rot", "int4-g64", "nf4-g64"])
def test_extreme_inputs(name: str) -> None:
    """A value that is not finite is in every output, and what is too small for whole numbers is nothing."""
    fmt, packed, matrix = packed_matrix(name, 33, 64, 0)
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 64)
        x[0, 37] = value
        assert not torch.isfinite(product(matrix, x)).any()
    largest = product_bound(fmt, packed, 33, 64) / 2.0**-24
    for size in (0.0, 1e-38, 1e-31):
        assert product(matrix, torch.full((1, 64), size)).abs().max() <= size * 64 * largest
    assert torch.isfinite(product(matrix, torch.full((1, 64), 1e30))).all()


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    for name in ("tq2-l12+ldl2+rot", "nf4-g64"):
        _, _, matrix = packed_matrix(name, 1600, 96, 0)
        for batch in (1, 7):
            x = torch.randn(batch, 96)
            alone = product(matrix, x)
            assert all(torch.equal(product(matrix, x, threads), alone) for threads in (2, 3, 8) for _ in range(20))


def module(name: str = "tq2.5-l12+rot+r3", bias: bool = True) -> CompressedLinear:
    made = pack_linear(nn.Linear(36, 20, bias=bias), Format.parse(name), "load", torch.float32, None)
    fields = random_fields(made.format, 20, 36, 0, size=0.1)
    made.write((field, torch.from_numpy(raw)) for field, raw in fields.items())
    return made


@needs_compiler
def test_a_module_multiplies_without_a_decoded_weight() -> None:
    linear = module()
    for dtype, unit in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        x = torch.randn(2, 3, 36).to(dtype)
        with torch.inference_mode():
            found = linear(x)
        assert linear.decoded.numel() == 0 and found.dtype == dtype
        weight = decode_reference(linear.format, {k: v.numpy() for k, v in linear.fields.items()}, 20, 36)
        exact = x.double().numpy() @ weight.T + linear.bias.detach().to(dtype).double().numpy()
        # y is rounded, then y + b is: 2 u each of what has been reached; and the product's own error, which is smaller
        bound = 2 * unit * (np.abs(exact) + 1) + product_bound(linear.format, fields_of(linear), 20, 36) * 20
        assert (np.abs(found.double().numpy() - exact) <= bound).all()


def fields_of(linear: CompressedLinear) -> dict[str, np.ndarray]:
    return {name: raw.numpy() for name, raw in linear.fields.items()}


@needs_compiler
def test_gradients_take_the_decoded_weight() -> None:
    linear = module(bias=False)
    x = torch.randn(4, 36, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(4, -1), rtol=0, atol=1e-5)  # 20 terms of size one


@needs_compiler
def test_written_fields_are_multiplied_from_then_on() -> None:
    linear, x = module(bias=False), torch.randn(2, 36)
    before = linear(x)
    fresh_fields = random_fields(linear.format, 20, 36, 1, size=0.1)
    linear.write((name, torch.from_numpy(raw)) for name, raw in fresh_fields.items())
    after = linear(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, product(native_matrix(linear.format, linear.fields, 20, 36) or pytest.fail(), x))


@needs_compiler
def test_a_module_that_has_multiplied_can_be_copied_and_pickled() -> None:
    linear, x = module(), torch.randn(2, 36)
    expected = linear(x)
    assert torch.equal(copy.deepcopy(linear)(x), expected)
    stream = io.BytesIO()
    torch.save(linear, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), expected)


@needs_compiler
def test_an_embedding_looks_rows_up_and_refuses_others() -> None:
    table = pack_embedding(nn.Embedding(20, 36), Format.parse("int4-g64+o30"), "load", torch.float32, None)
    fields = random_fields(table.format, 20, 36, 0, size=0.1)
    table.write((name, torch.from_numpy(raw)) for name, raw in fields.items())
    index = torch.tensor([[3, 19], [0, 3]])
    found = table(index)
    assert table.decoded.numel() == 0 and found.shape == (2, 2, 36)
    weight = decode_reference(table.format, fields, 20, 36)
    assert np.abs(found.numpy() - weight[index.numpy()]).max() <= product_bound(table.format, fields, 20, 36)
    for wrong in (20, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))


@needs_compiler
def test_fields_that_contradict_themselves_are_refused() -> None:
    linear = module("tq2-l12+perm+o30", bias=False)
    for name, values, bits in (
        ("widths", [15, 15, 15], 4),
        ("permutation", [0] * 36, 16),
        ("sparse_counts", [1] * 20, 16),
    ):
        fields = random_fields(linear.format, 20, 36, 0, size=0.1)
        fields[name] = pack_codes(np.array(values), bits)
        linear.write((field, torch.from_numpy(raw)) for field, raw in fields.items())
        with pytest.raises(ValueError, match=r"widths|permutation|sparse"):
            linear(torch.randn(1, 36))


def test_without_a_working_compiler_modules_decode_and_say_so_once(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REALLM_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "find_compiler", lambda: "/bin/false")
    with caplog.at_level(logging.WARNING):
        for name in ("tq2-l12", "int4-g64", "km3"):
            linear, x = module(name), torch.randn(2, 36)
            assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert len(caplog.records) == 1 and "decoded to dense weights" in caplog.text


_BUILD = """
import sys, torch
from reallm.runtime.cpu import native_matrix
from reallm.kernels.formats.formats import Format
fmt = Format.parse("km2")
fields = {field.name: torch.full((field.nbytes,), 60, dtype=torch.uint8) for field in fmt.fields(4, 32)}
print(float(native_matrix(fmt, fields, 4, 32).linear(torch.ones(1, 32)).sum()))
"""


@needs_compiler
def test_two_processes_can_build_the_same_kernel(tmp_path: Path) -> None:
    environment = os.environ | {"REALLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", _BUILD]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs) and said[0] == said[1]
    assert len(list((tmp_path / "native").iterdir())) == 1


@needs_compiler
def test_levels_that_an_earlier_product_left_behind_do_not_matter() -> None:
    """A table of 4 levels is read where one of 16, all of them about 9000, was."""
    fmt = Format.parse("km4")
    fields = {field.name: torch.full((field.nbytes,), 0x70, dtype=torch.uint8) for field in fmt.fields(4, 32)}
    assert native_matrix(fmt, fields, 4, 32).linear(torch.ones(1, 32)).abs().min() > 1e4
    check("km2", 4, 32, 1, 0)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("REALLM_CACHE", str(tmp_path / "file"))
    check("km2", 5, 40, 2, 0)


@needs_compiler
def test_matrices_share_the_tables_that_are_the_same_for_all() -> None:
    (_, _, one), (_, _, other) = (packed_matrix("e8p2+rot", 48, 64, seed) for seed in (1, 2))
    assert one.operand.table == other.operand.table
    for rotation in ("input", "output"):
        assert getattr(one.operand, rotation).signs == getattr(other.operand, rotation).signs
    assert one.operand.table % 64 == 0
