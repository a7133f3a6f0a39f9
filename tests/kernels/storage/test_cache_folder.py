"""The cache folder follows REALLM_CACHE, then XDG_CACHE_HOME, then the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from reallm.kernels.storage.cache_folder import cache_folder


def test_environment_variables_choose_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "reallm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/reallm")
    monkeypatch.setenv("REALLM_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")
