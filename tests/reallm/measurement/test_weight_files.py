"""Weights reach workers as files: bit for bit, in a folder that belongs to the run and is removed with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from reallm.errors import UserError
from reallm.measurement.weight_files import PREFIX, read_weight, worker_weights_dir
from reallm.models.loaded import load_model
from reallm.system.lock import LOCK_FILE


@pytest.mark.parametrize(("architecture", "dtype"), [("gpt2", torch.float32), ("mixtral", torch.bfloat16)])
def test_a_weight_arrives_bit_for_bit(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2 stores its matrices transposed, Mixtral as slices of stacks."""
    loaded = load_model(save_tiny(architecture, tmp_path / "model", dtype=dtype))
    with worker_weights_dir(tmp_path) as weights:
        for matrix in loaded.matrices:
            weight = read_weight(weights.write_weight(loaded, matrix))
            assert weight.dtype == torch.float32 and torch.equal(weight, loaded.weight(matrix))
            weights.remove_weight(matrix.name)
        assert [path.name for path in weights.folder.iterdir()] == [LOCK_FILE]
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot access .*/elsewhere; .*shared file system"):
        read_weight(tmp_path / "elsewhere" / "q.safetensors")
    assert not (tmp_path / "elsewhere").exists()


def test_folders_of_killed_runs_are_removed_and_those_of_live_runs_stay(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{PREFIX}0123456789ab"
    abandoned.mkdir()
    (abandoned / "q.safetensors").write_bytes(b"half")
    with worker_weights_dir(tmp_path) as first, worker_weights_dir(tmp_path) as second:
        assert first.folder != second.folder
        assert {path.name for path in tmp_path.iterdir()} == {first.folder.name, second.folder.name}
    assert not list(tmp_path.iterdir())
