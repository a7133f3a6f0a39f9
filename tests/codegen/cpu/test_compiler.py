"""Native code: compiled once, cached, and skipped with one warning where it cannot be compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from compilers import needs_compiler

from reallm.codegen.cpu import compiler as native
from reallm.codegen.cpu.compiler import TIERS, library, machine_tier


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALLM_CACHE", str(tmp_path / "cache"))
    library.cache_clear()


@needs_compiler
def test_a_library_is_built_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library("trellis") is not None
    (built,) = (tmp_path / "cache" / "native").iterdir()
    library.cache_clear()
    monkeypatch.setattr(native, "BUILD_SECONDS", 0.0)  # building again would time out
    assert library("trellis") is not None and [built] == list((tmp_path / "cache" / "native").iterdir())


@needs_compiler
@pytest.mark.parametrize("tier", ["portable", "avx2", "avx512"])
def test_a_lower_tier_can_be_selected_and_never_a_higher_one(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = machine_tier()
    monkeypatch.setenv("REALLM_NATIVE", tier)
    order = list(TIERS)
    assert machine_tier() == min(tier, best, key=order.index)


@pytest.mark.parametrize("trouble", ["off", "no compiler", "failing compiler"])
def test_without_native_code_there_is_one_warning_and_none(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "off":
        monkeypatch.setenv("REALLM_NATIVE", "off")
    elif trouble == "no compiler":
        monkeypatch.setattr(native, "find_compiler", lambda: None)
    else:
        monkeypatch.setattr(native, "find_compiler", lambda: "/bin/false")
    with caplog.at_level(logging.WARNING):
        assert library("trellis") is None and library("trellis") is None
    assert len(caplog.records) == (0 if trouble == "off" else 1)


@needs_compiler
def test_a_library_is_built_if_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("REALLM_CACHE", str(tmp_path / "file"))
    assert library("trellis") is not None
