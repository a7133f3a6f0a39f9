"""What passes between a model's blocks, stored in files to save memory: the blocks' results and their gradients.

`<call>-<slot>.values` holds the raw values of one tensor that a call returned, all windows one after another;
`results.json` lists the shapes and dtypes of the calls that are stored for all windows. A slot's shape may differ from
window to window. Gradients are in one safetensors file per pair of calls, because several later calls may use one
result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.system.tensor_file import save_tensors
from reallm.system.torch_dtypes import torch_name

COMPLETE_FILE = "results.json"
TAIL = "tail"
"""Takes the place of a call's number for gradients that come from the tail."""


@dataclass(frozen=True)
class Stored:
    """How much of the results is stored."""

    calls: int
    """The first calls, of which the results of all windows are stored."""
    complete: bool
    """Whether these are all calls."""


class CallResults:
    """The tensors that every call returned for every window, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: list[list[list[tuple[int, ...]]]] = []
        """[call][slot][window] -> shape."""
        self.dtypes: list[list[torch.dtype]] = []
        """[call][slot] -> dtype."""
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> Stored:
        """Forget and overwrite what an earlier pass stored."""
        (self.folder / COMPLETE_FILE).unlink(missing_ok=True)
        self.shapes, self.dtypes = [], []
        return Stored(0, complete=False)

    def append(self, call: int, tensors: Sequence[Tensor]) -> None:
        """Add the tensors that a call returned for the next window; calls are numbered from 0 without gaps."""
        first = call == len(self.shapes)
        if first:
            self.shapes.append([[] for _ in tensors])
            self.dtypes.append([tensor.dtype for tensor in tensors])
        for slot, tensor in enumerate(tensors):
            raw = tensor.detach().cpu().contiguous()
            self.shapes[call][slot].append(tuple(raw.shape))
            with self._path(call, slot).open("wb" if first else "ab") as stream:
                stream.write(raw.reshape(-1).view(torch.uint8).numpy().data)

    def mark(self, calls: int, *, complete: bool = False) -> None:
        """Record in `results.json` that the results of the first `calls` calls are stored for all windows.

        `complete` says that these are all calls.
        """
        dtypes = [[torch_name(dtype) for dtype in slots] for slots in self.dtypes[:calls]]
        state = {"shapes": self.shapes[:calls], "dtypes": dtypes, "complete": complete}
        write_text_atomic(self.folder / COMPLETE_FILE, canonical_json(state))

    def resume(self, windows: int) -> Stored:
        """What an earlier pass stored of `windows` windows; reads the shapes of that and forgets the rest."""
        path = self.folder / COMPLETE_FILE
        if not path.exists():
            return self.clear()
        state = json.loads(path.read_text(encoding="utf-8"))
        self.shapes = [[[tuple(shape) for shape in slot] for slot in call] for call in state["shapes"]]
        self.dtypes = [[getattr(torch, name) for name in call] for call in state["dtypes"]]
        whole = all(
            len(shapes) == windows and self._is_whole(call, slot)
            for call, slots in enumerate(self.shapes)
            for slot, shapes in enumerate(slots)
        )
        return Stored(len(self.shapes), bool(state.get("complete", True))) if whole else self.clear()

    def _is_whole(self, call: int, slot: int) -> bool:
        """Whether the file of a slot has the size that the shapes give."""
        path = self._path(call, slot)
        return path.exists() and path.stat().st_size == self._offset(call, slot, None)

    def read(self, call: int, window: int) -> list[Tensor]:
        """The tensors that `call` returned for `window`, in the order of their slots."""
        return [self._read(call, slot, window) for slot in range(len(self.shapes[call]))]

    def empty(self, call: int, window: int, device: torch.device) -> list[Tensor]:
        """Zeros of the same shapes and dtypes as `read` returns."""
        pairs = zip(self.shapes[call], self.dtypes[call], strict=True)
        return [torch.zeros(shapes[window], dtype=dtype, device=device) for shapes, dtype in pairs]

    def _read(self, call: int, slot: int, window: int) -> Tensor:
        shape, dtype = self.shapes[call][slot][window], self.dtypes[call][slot]
        offset, nbytes = self._offset(call, slot, window), prod(shape) * dtype.itemsize
        raw = np.fromfile(self._path(call, slot), dtype=np.uint8, count=nbytes, offset=offset)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def _offset(self, call: int, slot: int, window: int | None) -> int:
        """Bytes before `window` in the file of a slot; None: of the whole file."""
        return self.dtypes[call][slot].itemsize * sum(prod(shape) for shape in self.shapes[call][slot][:window])

    def _path(self, call: int, slot: int) -> Path:
        return self.folder / f"{call:04d}-{slot}.values"


Gradients = dict[tuple[int, int], Tensor]
"""(slot, window) -> gradient of the loss with respect to that tensor."""


class StoredGradients:
    """The gradients with respect to the calls' results and to their inputs from outside all blocks, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, source: int | str, results: Mapping[int, Gradients], inputs: Gradients) -> None:
        """Store what the backward pass of `source`, a call or TAIL, found: the gradients with respect to the results of
        earlier calls and with respect to its own `inputs` from outside the blocks. Then those of its results are
        deleted, which are no longer needed.
        """
        for call, gradients in results.items():
            self._save(f"result-{call:04d}-from-{_label(source)}", gradients)
        if inputs:
            self._save(f"input-{_label(source)}", inputs)
        write_text_atomic(self.folder / "reached.json", canonical_json({"source": source}))
        if isinstance(source, int):
            for path in self.folder.glob(f"result-{source:04d}-from-*.safetensors"):
                path.unlink()

    def reached(self) -> int | str | None:
        """The call whose gradients were stored last, or TAIL; None if the backward pass has not begun."""
        path = self.folder / "reached.json"
        if not path.exists():
            return None
        source: int | str = json.loads(path.read_text(encoding="utf-8"))["source"]
        return source

    def of_results(self, call: int) -> ResultGradients:
        """A reader of the gradients with respect to the results of `call`."""
        return ResultGradients(sorted(self.folder.glob(f"result-{call:04d}-from-*.safetensors")))

    def of_inputs(self, call: int) -> ResultGradients:
        """A reader of the gradients with respect to the inputs of `call` from outside the blocks."""
        return ResultGradients([path] if (path := self._path(f"input-{_label(call)}")).exists() else [])

    def _save(self, name: str, gradients: Gradients) -> None:
        save_tensors(self._path(name), {f"{slot}.{window}": value for (slot, window), value in gradients.items()})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _label(source: int | str) -> str:
    return f"{source:04d}" if isinstance(source, int) else source


class ResultGradients:
    """Reads the gradients with respect to the tensors of one call; contributions of several files are added up."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def read(self, window: int) -> dict[int, Tensor]:
        """Slot -> gradient for one window; slots without a gradient are missing."""
        total: dict[int, Tensor] = {}
        for slot, gradient in self._contributions(window):
            total[slot] = total[slot] + gradient if slot in total else gradient
        return total

    def _contributions(self, window: int) -> Iterator[tuple[int, Tensor]]:
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    slot, number = map(int, key.split("."))
                    if number == window:
                        yield slot, file.get_tensor(key)
