"""Generated C++: one source for each kind of codes, which compiles for every tier."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import get_args

import pytest

from reallm.codegen.cpu import compiler as native
from reallm.codegen.cpu.compiler import GENERATED_FLAGS, INCLUDE_FLAGS, TIERS
from reallm.codegen.cpu.linear import CPU_KERNELS, emit, kernel_for
from reallm.kernels.formats.codecs import AnyCodec, NeuralCodec
from reallm.kernels.formats.formats import Format

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = {"tq2.25-l12+ldl2+rot": "tq-l12", "uint4-g64-dq8x256+r16": "uint4-g64-dq8x256", "aq2x8-d8-shared": "aq2x8-d8"}


@pytest.mark.parametrize(("name", "stem"), KERNELS.items())
def test_sources_are_the_golden_ones(name: str, stem: str) -> None:
    kernel = kernel_for(Format.parse(name))
    assert kernel is not None and kernel.name == f"linear-{stem}"
    assert emit(kernel) == (GOLDEN / f"linear-{stem}.cpp.txt").read_text("utf-8")


def test_every_codec_is_in_the_table_and_only_a_neural_decoder_has_no_kernel() -> None:
    assert set(CPU_KERNELS) == set(get_args(AnyCodec))
    assert [codec for codec, kernel in CPU_KERNELS.items() if kernel is None] == [NeuralCodec]


def test_formats_that_differ_in_data_alone_share_a_kernel() -> None:
    for same in (
        ("tq2-l12", "tq3.5-l12+ldl2+rot+o5+r4i8"),
        ("nf4-g64", "lm4-g64+lwc"),
        ("aq2x8-d8", "aq2x8-d8-shared+cs"),
    ):
        first, second = (kernel_for(Format.parse(name)) for name in same)
        assert first is not None and first == second
    assert kernel_for(Format.parse("nd1x4-d2-c8x1-t3-w8")) is None


def test_a_build_is_known_by_the_headers_it_includes() -> None:
    kernel = kernel_for(Format.parse("tq2-l12"))
    assert kernel is not None
    headers = native.included_headers(emit(kernel))
    assert {"entry.hpp", "kernel.hpp", "linear.hpp", "simd.hpp", "threads.hpp", "trellis.hpp"} <= headers.keys()
    assert not any(name.startswith(("step", "scalar", "vectors")) for name in headers)


@pytest.mark.skipif(native.find_compiler() != "/usr/bin/g++", reason="the flags of the tier are g++'s on x86")
@pytest.mark.parametrize("name", ["tq2-l12", "nf4-g64", "uint3-g64", "e8p4"])
def test_the_avx512_tier_compiles(name: str, tmp_path: Path) -> None:
    kernel = kernel_for(Format.parse(name))
    assert kernel is not None
    source = tmp_path / "kernel.cpp"
    source.write_text(emit(kernel))
    flags = [*GENERATED_FLAGS, *TIERS["avx512"], *INCLUDE_FLAGS, "-O1", "-S", "-o", str(tmp_path / "kernel.s")]
    subprocess.run(["/usr/bin/g++", *flags, str(source)], check=True)
