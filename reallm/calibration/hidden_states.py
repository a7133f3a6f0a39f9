"""The hidden states between a model's blocks and the gradients with respect to them, stored in files to save memory.

Boundary b is the input of block b; the last boundary is the output of the last block. `<b>.hidden` holds the raw values
of all windows, appended one window at a time. `inputs.json` lists the shapes; it is written when all values are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.system.tensor_file import save_tensors
from reallm.system.torch_dtypes import torch_name

COMPLETE_FILE = "inputs.json"


class HiddenStates:
    """The hidden states and gradients at `count` boundaries, stored in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.shapes: list[tuple[int, ...]] = [()] * count
        """Shape of one window at each boundary, such as [seqlen, hidden]."""
        self.dtype = torch.float32
        self.windows = [0] * count
        """Number of windows stored at each boundary."""
        self._streams: list[IO[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    # -- hidden states ----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open all files for `append` within the context; files of an earlier pass are overwritten."""
        self.windows = [0] * self.count
        with ExitStack() as stack:
            self._streams = [stack.enter_context(self._path(b).open("wb")) for b in range(self.count)]
            yield
        self._streams = []

    def append(self, boundary: int, hidden: Tensor) -> None:
        """Add the hidden states of one window, [1, ...], at `boundary`."""
        raw = hidden.detach().cpu().contiguous()
        self.shapes[boundary], self.dtype = tuple(raw.shape[1:]), raw.dtype
        self.windows[boundary] += len(raw)
        self._streams[boundary].write(raw.reshape(-1).view(torch.uint8).numpy().data)

    def mark_complete(self) -> None:
        """Write `inputs.json`, which records that the hidden states of all windows are stored."""
        state = {"shapes": self.shapes, "windows": self.windows, "dtype": torch_name(self.dtype)}
        write_text_atomic(self.folder / COMPLETE_FILE, canonical_json(state))

    def is_complete(self) -> bool:
        """Whether an earlier pass stored all hidden states; reads their shapes from `inputs.json`."""
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
        """Read the hidden states of the first `count` windows (None: of all) at `boundary`: [count, seqlen, hidden]."""
        windows = self.windows[boundary] if count is None else count
        raw = np.fromfile(self._path(boundary), dtype=np.uint8, count=windows * self._window_bytes(boundary))
        return torch.from_numpy(raw).view(self.dtype).reshape(windows, *self.shapes[boundary])

    def _window_bytes(self, boundary: int) -> int:
        return int(np.prod(self.shapes[boundary])) * self.dtype.itemsize

    def _path(self, boundary: int) -> Path:
        return self.folder / f"{boundary:04d}.hidden"

    # -- gradients --------------------------------------------------------------------------------------------------

    def store_gradient(self, boundary: int, gradient: Tensor) -> None:
        """Store the gradient of all windows at `boundary`, and delete that at the next boundary, no longer needed."""
        save_tensors(self._gradient_path(boundary), {"gradient": gradient})
        self._gradient_path(boundary + 1).unlink(missing_ok=True)

    def read_gradient(self, boundary: int) -> Tensor:
        """Read the stored gradient at `boundary`: [windows, seqlen, hidden]."""
        gradient: Tensor = load_file(self._gradient_path(boundary))["gradient"]
        return gradient

    def first_gradient(self) -> int | None:
        """The first boundary with a stored gradient, which the backward pass has reached; None if it has not begun."""
        return next((b for b in range(self.count) if self._gradient_path(b).exists()), None)

    def _gradient_path(self, boundary: int) -> Path:
        return self.folder / f"gradient-{boundary:04d}.safetensors"
