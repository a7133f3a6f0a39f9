"""Gathering the statistics of all matrices, one call of a block at a time, or with the whole model at once.

A matrix may take part in several calls: one block called repeatedly (ALBERT), or one matrix tied between blocks
(Zamba). Its sums are then carried from call to call, and stored with the pass's progress, until its first call is done.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.models.loaded import LoadedModel, Matrix
from reallm.system.memory import available_memory
from reallm.system.progress import progress_bar
from reallm.system.tensor_file import save_tensors

from .block_streaming import BlockStreamer
from .hooks import sums_nbytes
from .statistics import statistics_path
from .stored_tensors import TAIL, Gradients

MEMORY_SHARE = 0.5
"""Largest share of the available memory that the sums of one pass may take."""

KEPT_SHARE = 0.4
"""Largest share of the memory still available that the statistics of a part may take; larger ones are in files."""


def gather_by_calls(streamer: BlockStreamer, folder: Path) -> float:
    """Gather the statistics of every matrix into `folder`, call by call; returns the perplexity of the model.

    Continues where an interrupted pass stopped.
    """
    loaded = streamer.loaded
    taking_part = _matrices_of_calls(streamer)
    first_call: dict[str, int] = {}
    for number in reversed(range(len(taking_part))):
        first_call |= {m.name: number for m in taking_part[number]}
    outside = [m for m in loaded.matrices if m.name not in first_call]
    perplexity = _gather_tail(streamer, outside)
    carried_path = streamer.results.folder / "carried.safetensors"
    reached = streamer.gradients.reached()
    start = len(streamer.calls) if reached == TAIL else int(reached or 0)
    for number in progress_bar(range(start - 1, -1, -1), desc="calibrate: blocks", unit="block"):
        carried = load_file(carried_path) if carried_path.exists() else {}
        names = {m.name for m in taking_part[number]}
        own_sums = {key: value for key, value in carried.items() if key.split("/", 1)[1] in names}
        done = {name for name in names if first_call[name] == number}
        with streamer.ready(number):
            results, inputs, sums, statistics = _run_call(streamer, number, taking_part[number], own_sums, done)
        _store(loaded, folder, statistics)
        left = {key: value for key, value in (carried | sums).items() if key.split("/", 1)[1] not in done}
        if left or carried:
            # Saved before the progress is: a pass interrupted between the two would add this call's part twice.
            save_tensors(carried_path.with_suffix(".next"), left)
        # The gradients come after the statistics: a pass interrupted between the two repeats the call.
        streamer.gradients.store(number, results, inputs)
        if left or carried:
            carried_path.with_suffix(".next").replace(carried_path)
    _gather_front(streamer, folder, outside)
    return perplexity


def _run_call(
    streamer: BlockStreamer, number: int, matrices: Sequence[Matrix], carried: Mapping[str, Tensor], done: set[str]
) -> tuple[dict[int, Gradients], Gradients, dict[str, Tensor], dict[str, Tensor]]:
    """Run one call: its gradients as in `run_call`, the sums of all its matrices, the statistics of those in `done`.

    Where the sums of all matrices do not fit into memory together, the call is run once for every part of them; what a
    part gives is put into files if it is large.
    """
    parts = list(_parts_in_memory(matrices))
    sums: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    for part in parts:
        names = {matrix.name for matrix in part}
        hooks = streamer.hooks(part, {key: value for key, value in carried.items() if key.split("/", 1)[1] in names})
        results, inputs = streamer.run_call(number, hooks)
        found, left = hooks.statistics(done), {k: v for k, v in hooks.sums.items() if k.split("/", 1)[1] not in done}
        del hooks
        if (
            len(parts) > 1
            and sum(v.nbytes for v in (*found.values(), *left.values())) > KEPT_SHARE * available_memory()
        ):
            found, left = ({k: streamer.scratch.copy(v) for k, v in tensors.items()} for tensors in (found, left))
        statistics |= found
        sums |= left
    return results, inputs, sums, statistics


def _gather_tail(streamer: BlockStreamer, outside: Sequence[Matrix]) -> float:
    """Gather the tail's statistics into the pass's own folder, unless an earlier pass did; returns the perplexity."""
    tail_path, perplexity_path = _tail_files(streamer)
    if not perplexity_path.exists():
        hooks = streamer.hooks(outside)
        perplexity = streamer.run_tail(hooks)
        save_tensors(tail_path, hooks.sums)
        write_text_atomic(perplexity_path, canonical_json(perplexity))
    return float(json.loads(perplexity_path.read_text(encoding="utf-8")))


def _gather_front(streamer: BlockStreamer, folder: Path, outside: Sequence[Matrix]) -> None:
    """Gather the statistics of the matrices outside all calls: those of the front, beside those of the tail.

    The square of a gradient needs all of the gradient. So where one matrix feeds both the blocks and the tail, front
    and tail are run once more, in one pass.
    """
    tail_sums = load_file(_tail_files(streamer)[0])
    hooks = streamer.hooks(outside)
    streamer.run_front(hooks)
    if tail_sums.keys() & hooks.sums.keys():
        hooks = streamer.hooks(outside)
        streamer.run_tail(hooks, follow_inputs=True)
    else:
        hooks.sums = {**tail_sums, **hooks.sums}
    _store(streamer.loaded, folder, hooks.statistics())


def _tail_files(streamer: BlockStreamer) -> tuple[Path, Path]:
    return streamer.results.folder / "tail.safetensors", streamer.results.folder / "tail.json"


def gather_at_once(streamer: BlockStreamer, folder: Path) -> float:
    """Gather the statistics of every matrix into `folder` with the whole model in memory; returns the perplexity.

    Where the statistics of all matrices do not fit into memory together, the model is run once for every part of them.
    """
    perplexity = 0.0
    with streamer.all_ready():
        for part in _parts_in_memory(streamer.loaded.matrices):
            hooks = streamer.hooks(part)
            perplexity = streamer.run_tail(hooks, follow_inputs=True)
            _store(streamer.loaded, folder, hooks.statistics())
    return perplexity


def _matrices_of_calls(streamer: BlockStreamer) -> list[list[Matrix]]:
    """The matrices that take part in each call: those with a user inside the block that is called."""
    return [
        [
            matrix
            for matrix in streamer.loaded.matrices
            if any(name.startswith(call.path + ".") for name in (matrix.parameter, *matrix.tied))
        ]
        for call in streamer.calls
    ]


def _parts_in_memory(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """The `matrices`, in parts whose sums fit into MEMORY_SHARE of the available memory."""
    limit = MEMORY_SHARE * available_memory()
    part, total = list[Matrix](), 0.0
    for matrix in matrices:
        nbytes = sums_nbytes(matrix)
        if part and total + nbytes > limit:
            yield part
            part, total = [], 0.0
        part.append(matrix)
        total += nbytes
    yield part


def _store(loaded: LoadedModel, folder: Path, statistics: dict[str, Tensor]) -> None:
    """Add `statistics` to the files of the blocks that their matrices belong to.

    Those of a matrix whose inputs or gradients were all zero are left out: it counts as not measured.
    """
    empty = {k.split("/", 1)[1] for k, v in statistics.items() if k.startswith("guided/") and not bool(v.any())}
    blocks = {matrix.name: matrix.block for matrix in loaded.matrices}
    by_block: dict[int | None, dict[str, Tensor]] = defaultdict(dict)
    for key, value in statistics.items():
        name = key.split("/", 1)[1]
        if name not in empty:
            by_block[blocks[name]][key] = value
    for block, tensors in by_block.items():
        path = statistics_path(folder, block)
        earlier = load_file(path) if path.exists() else {}
        save_tensors(path, {**earlier, **tensors})
