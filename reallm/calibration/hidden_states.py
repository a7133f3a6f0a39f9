"""The hidden states between a model's blocks, and the gradients there: files, so that memory holds one block's at most.

Boundary b is the input of block b; the last one is the output of the last block. `<b>.hidden` holds the raw values of
all windows, appended one window at a time; `inputs.json` is written when they are complete, and names their shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reallm.kernels.storage.atomic import canonical_json, partial_path, write_text_atomic

COMPLETE_FILE = "inputs.json"


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that appears whole or not at all."""
    partial = partial_path(path)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class HiddenStates:
    """`count` boundaries in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.shapes: list[tuple[int, ...]] = [()] * count
        self.dtype = torch.float32
        self.windows = [0] * count
        self._streams: list[IO[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    # -- hidden states ----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it, `append` adds windows; what was there is overwritten."""
        self.windows = [0] * self.count
        with ExitStack() as stack:
            self._streams = [stack.enter_context(self._path(b).open("wb")) for b in range(self.count)]
            yield
        self._streams = []

    def append(self, boundary: int, hidden: Tensor) -> None:
        """Add one window, [1, ...]."""
        raw = hidden.detach().cpu().contiguous()
        self.shapes[boundary], self.dtype = tuple(raw.shape[1:]), raw.dtype
        self.windows[boundary] += len(raw)
        self._streams[boundary].write(raw.reshape(-1).view(torch.uint8).numpy().data)

    def complete(self) -> None:
        """Declare the hidden states whole."""
        state = {"shapes": self.shapes, "windows": self.windows, "dtype": str(self.dtype).removeprefix("torch.")}
        write_text_atomic(self.folder / COMPLETE_FILE, canonical_json(state))

    def is_complete(self) -> bool:
        """Whether an earlier pass left them whole; reads their shapes."""
        path = self.folder / COMPLETE_FILE
        if not path.exists():
            return False
        state = json.loads(path.read_text(encoding="utf-8"))
        self.shapes = [tuple(shape) for shape in state["shapes"]]
        self.windows, self.dtype = list(state["windows"]), getattr(torch, state["dtype"])
        return all(
            self._path(b).exists() and self._path(b).stat().st_size == self.windows[b] * self._window_bytes(b)
            for b in range(self.count)
        )

    def read(self, boundary: int, count: int | None = None) -> Tensor:
        """Hidden states of the first `count` windows, or of all: [count, seqlen, hidden]."""
        windows = self.windows[boundary] if count is None else count
        raw = np.fromfile(self._path(boundary), dtype=np.uint8, count=windows * self._window_bytes(boundary))
        return torch.from_numpy(raw).view(self.dtype).reshape(windows, *self.shapes[boundary])

    def _window_bytes(self, boundary: int) -> int:
        return int(np.prod(self.shapes[boundary])) * self.dtype.itemsize

    def _path(self, boundary: int) -> Path:
        return self.folder / f"{boundary:04d}.hidden"

    # -- gradients --------------------------------------------------------------------------------------------------

    def keep_gradient(self, boundary: int, gradient: Tensor) -> None:
        """Store the gradient of all windows at `boundary`; the one behind it has served."""
        save_tensors(self._gradient_path(boundary), {"gradient": gradient})
        self._gradient_path(boundary + 1).unlink(missing_ok=True)

    def gradient(self, boundary: int) -> Tensor:
        """The stored gradient [windows, seqlen, hidden]."""
        gradient: Tensor = load_file(self._gradient_path(boundary))["gradient"]
        return gradient

    def first_gradient(self) -> int | None:
        """The first boundary whose gradient is stored: how far the way back has come."""
        return next((b for b in range(self.count) if self._gradient_path(b).exists()), None)

    def _gradient_path(self, boundary: int) -> Path:
        return self.folder / f"gradient-{boundary:04d}.safetensors"
