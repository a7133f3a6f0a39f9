"""Running a model one block at a time, with gradients, while stored results stand in for the other blocks.

Forward, the model runs as it is, and what each call of a block returns is stored. Backward, from the last call to the
first, the model runs again with stored results in place of the blocks, up to the call in question, which runs with
gradients. What a model does between its blocks therefore needs no description: it is executed. Which stored results a
call needs is found once, on the first window (`dependencies`), and checked by comparing what every call then returns
with what it returned in the whole model. Where that fails, no call is replaced and the model is run as a whole.

A model that does not fit into memory is run as a whole on the first window only. After that every call is run on all
windows before the next one, so that each block is read from its file once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reallm.errors import UserError
from reallm.models.conversion import computing_in, tensors_of
from reallm.models.loaded import LoadedModel, Matrix
from reallm.system.device import is_gpu, placed
from reallm.system.memory import available_memory
from reallm.system.progress import progress_bar
from reallm.system.scratch import Scratch

from .block_calls import (
    Arguments,
    CallTemplate,
    StopForwardError,
    argument_leaves,
    intercepted,
    run_and_take_apart,
    with_replaced_tensors,
)
from .compute_dtype import compute_dtype
from .dependencies import Dependencies, Tracer
from .hooks import StatisticsHooks, sums_nbytes
from .objective import MAX_NATS, Objective
from .stored_tensors import TAIL, CallResults, Gradients, Stored, StoredGradients

SUMS_SHARE = 0.55
"""Largest share of the available memory that the sums of one pass may take; larger ones are in files."""
WAY_OUT = "check the weights, or convert a float16 model to bfloat16 or float32"


class NotReproducedError(Exception):
    """A model's blocks cannot be replaced by their stored results."""


_FAILURES = (
    NotReproducedError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
)
"""Exceptions of a model that gets zeros in place of the results of its blocks."""


class BlockStreamer:
    """Runs the parts of `loaded` on the windows of `objective`; what passes between blocks is stored in `folder`."""

    def __init__(self, loaded: LoadedModel, folder: Path, objective: Objective) -> None:
        self.loaded, self.objective = loaded, objective
        self.device = loaded.model.device
        self.blocks = {path: loaded.model.get_submodule(path) for path in loaded.blocks}
        self.dtype = compute_dtype(loaded, self.device)
        self.results = CallResults(folder)
        self.gradients = StoredGradients(folder)
        self.scratch = Scratch(folder)
        """Where sums go that do not fit into memory."""
        self.notes: list[str] = self.objective.notes
        """Notes for the user, one line each."""
        self.calls: list[CallTemplate] = []
        """The calls of blocks, in order; empty where the model is run as a whole."""
        self.dependencies: list[Dependencies] = []
        """What each call depends on."""
        self.tail = Dependencies(())

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.objective)

    def hooks(self, matrices: Sequence[Matrix], sums: Mapping[str, Tensor] | None = None) -> StatisticsHooks:
        """Hooks that gather the statistics of `matrices`, starting from the `sums` of earlier passes.

        Sums that would take too much memory are in files.
        """
        hooks = self.objective.hooks(matrices, sums)
        if not is_gpu(self.device) and sum(map(sums_nbytes, matrices)) > SUMS_SHARE * available_memory():
            hooks.scratch = self.scratch
        return hooks

    def _forward(self, window: int, inputs: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for a window; `inputs` replace the tensors of the same names that it is called with."""
        keywords: dict[str, Any] = {**self.objective.keywords(window), **(inputs or {})}
        if not self.loaded.is_encoder:
            keywords["use_cache"] = False
        return self.loaded.model(**keywords)

    def _followed_inputs(self, window: int) -> dict[str, Tensor]:
        """The floating-point inputs of a window (pixels, sound), made to require gradients."""
        inputs = self.objective.keywords(window)
        return {n: t.detach().requires_grad_() for n, t in inputs.items() if t.is_floating_point()}

    # -- forward ----------------------------------------------------------------------------------------------------

    def ready(self, number: int) -> AbstractContextManager[None]:
        """A context in which the block of call `number` is on the device and in the dtype to compute in."""
        return self._ready(self.calls[number].path)

    def all_ready(self) -> AbstractContextManager[None]:
        """A context in which the whole model is; of a large model the converted weights are in files."""
        return self._converted(self.loaded.model, None if is_gpu(self.device) else self.loaded.scratch)

    def _ready(self, path: str) -> AbstractContextManager[None]:
        return self._converted(self.blocks[path])

    @contextmanager
    def _converted(self, module: nn.Module, scratch: Scratch | None = None) -> Iterator[None]:
        tensors = tensors_of(module)
        with placed(tensors, self.device), computing_in(tensors, self.dtype, scratch):
            yield

    def store_results(self) -> None:
        """Run all windows and store what each call returns, unless an earlier pass did; then find the dependencies.

        Raises UserError for activations that are not finite.
        """
        stored = self.results.resume(self.windows)
        window_by_window = self.loaded.scratch is None
        if window_by_window and not stored.complete:
            stored = self.results.clear()
        with torch.no_grad():
            try:
                logits = self._record(0, stored)
                if window_by_window and not stored.complete:
                    for window in progress_bar(range(1, self.windows), desc="calibrate: forward", unit="window"):
                        self._record(window, stored)
                self._find_dependencies()
                self._check_reproduction(logits)
                if not window_by_window and not stored.complete:
                    self._store_by_calls(stored.calls)
            except NotReproducedError as error:
                self.calls, self.dependencies, self.tail = [], [], Dependencies(())
                if self.blocks:
                    self.notes.append(f"calibrated with the whole model at once, because {error}")
        if self.calls and not stored.complete:
            self.results.mark(len(self.calls), complete=True)

    def _store_by_calls(self, done: int) -> None:
        """Run each call on all windows but the first; the first `done` calls are stored already."""
        calls = range(done, len(self.calls))
        for number in progress_bar(calls, desc="calibrate: forward", unit="block", initial=done, total=len(self.calls)):
            with self.ready(number):
                for window in range(1, self.windows):
                    self._store_call(number, window)
            self.results.mark(number + 1)

    def _store_call(self, number: int, window: int) -> None:
        """Run one call on a window, with stored results in place of the calls before it, and store what it returns."""
        path = self.calls[number].path

        def compute(forward: Callable[..., Any], arguments: Arguments) -> None:
            _, template, tensors = run_and_take_apart(path, forward, arguments)
            if len(template.leaves) != len(self.calls[number].leaves) or template.writes != self.calls[number].writes:
                raise NotReproducedError("its blocks return different things for different texts")
            self._check_finite(tensors[0] if tensors else None, path, output=True)
            self.results.append(number, tensors)

        self._run_to(number, window, compute, {k: self._values(k, window) for k in self.dependencies[number].results})

    def _record(self, window: int, stored: Stored) -> Tensor:
        """Run one window and store the results of the calls that are not `stored`; returns the output's first tensor.

        The first window also makes the list of calls.
        """
        templates: list[CallTemplate] = []

        def handle(number: int, path: str, forward: Callable[..., Any], arguments: Arguments) -> Any:
            if number == 0:
                self._check_finite(next((t for t in argument_leaves(arguments) if isinstance(t, Tensor)), None), path)
            with self._ready(path):
                result, template, tensors = run_and_take_apart(path, forward, arguments)
            if window and number >= len(self.calls):
                raise NotReproducedError("its blocks are called differently for different texts")
            self._check_finite(tensors[0] if tensors else None, path, output=True)
            templates.append(template)
            if number >= stored.calls:
                self.results.append(number, tensors)
            return result

        with intercepted(self.blocks, handle):
            output = self._forward(window)
        paths = [template.path for template in templates]
        if window == 0:
            self.calls = templates
        elif paths != [call.path for call in self.calls]:
            raise NotReproducedError("its blocks are called differently for different texts")
        return self.objective.scores(output)

    def _check_finite(self, tensor: Tensor | None, path: str, output: bool = False) -> None:
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            where = f"the {'output' if output else 'input'} of {path}"
            what = f"activations at {where} are NaN or infinite in {tensor.dtype}; expected finite ones"
            raise UserError(f"{self.loaded.source}: {what}; {WAY_OUT}")

    # -- dependencies -----------------------------------------------------------------------------------------------

    def _find_dependencies(self) -> None:
        if not self.calls:
            raise NotReproducedError("none of its blocks is called as a module")
        tracer = Tracer()
        found: list[Dependencies] = []

        def handle(number: int, path: str, _forward: Callable[..., Any], arguments: Arguments) -> Any:
            self._expect(number, path)
            found.append(tracer.call(arguments))
            tensors = [tensor.to(self.device) for tensor in self.results.read(number, 0)]
            return self.calls[number].fill(tracer.results(tensors), arguments)

        try:
            with torch.enable_grad(), tracer.following_embeddings(), intercepted(self.blocks, handle):
                inputs = self._followed_inputs(0)
                tracer.outside += inputs.values()
                self.tail = tracer.tail(self._forward(0, inputs))
        except _FAILURES as error:
            reason = str(error).partition("\n")[0]
            raise NotReproducedError(f"its blocks cannot be replaced by their results ({reason})") from None
        self.dependencies = found

    def _check_reproduction(self, logits: Tensor) -> None:
        """Compare every call, and the output, with those of the whole model; where a call differs, give it all results.

        Raises NotReproducedError if even that changes something.
        """
        for number in range(len(self.calls)):
            if not self._reproduces(number):
                everything = tuple(range(number))
                known = self.dependencies[number]
                self.dependencies[number] = Dependencies(everything, known.outside, known.hidden)
                if not self._reproduces(number):
                    path = self.calls[number].path
                    raise NotReproducedError(f"{path} run alone differs from {path} in the model")
        if not self._reproduces_output(logits):
            self.tail = Dependencies(tuple(range(len(self.calls))))
            if not self._reproduces_output(logits):
                raise NotReproducedError("its output differs when its blocks are replaced by their results")

    def _reproduces(self, number: int) -> bool:
        actual: list[Tensor] = []

        def compute(forward: Callable[..., Any], arguments: Arguments) -> None:
            with self.ready(number):
                actual.extend(run_and_take_apart(self.calls[number].path, forward, arguments)[2])

        try:
            self._run_to(number, 0, compute, {k: self._values(k, 0) for k in self.dependencies[number].results})
        except _FAILURES:
            return False
        expected = self._values(number, 0)
        return len(actual) == len(expected) and all(map(_same, actual, expected))

    def _reproduces_output(self, logits: Tensor) -> bool:
        try:
            output = self._run_replaced(0, {k: self._values(k, 0) for k in self.tail.results})
        except _FAILURES:
            return False
        return _same(self.objective.scores(output), logits)

    def _expect(self, number: int, path: str) -> None:
        if number >= len(self.calls) or self.calls[number].path != path:
            raise NotReproducedError("its blocks are called in another order when they are replaced by their results")

    def _values(self, call: int, window: int) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in self.results.read(call, window)]

    # -- running parts ----------------------------------------------------------------------------------------------

    def _filled(self, number: int, window: int, given: dict[int, list[Tensor]], arguments: Arguments) -> Any:
        """The result of a call that is not run: `given` tensors, or zeros where nothing depends on it."""
        tensors = given.get(number) or self.results.empty(number, window, self.device)
        return self.calls[number].fill(tensors, arguments)

    def _run_to(
        self,
        number: int,
        window: int,
        compute: Callable[[Callable[..., Any], Arguments], None],
        given: dict[int, list[Tensor]],
    ) -> None:
        """Run the model on `window` up to call `number`; `compute` gets the block's forward and its arguments."""

        def handle(reached: int, path: str, forward: Callable[..., Any], arguments: Arguments) -> Any:
            self._expect(reached, path)
            if reached < number:
                return self._filled(reached, window, given, arguments)
            compute(forward, arguments)
            raise StopForwardError

        with intercepted(self.blocks, handle), suppress(StopForwardError):
            self._forward(window)
            raise NotReproducedError(f"{self.calls[number].path} is not called when its results are replaced")

    def _run_replaced(self, window: int, given: dict[int, list[Tensor]]) -> Any:
        """The model's output with every call replaced."""

        def handle(number: int, path: str, _forward: Callable[..., Any], arguments: Arguments) -> Any:
            self._expect(number, path)
            return self._filled(number, window, given, arguments)

        with intercepted(self.blocks if self.calls else {}, handle):
            return self._forward(window)

    @property
    def is_chain(self) -> bool:
        """Whether every call uses the result of the one before it and no other one, as its hidden state."""
        return bool(self.calls) and all(
            dependencies.results == ((number - 1,) if number else ())
            and (dependencies.hidden is not None or len(dependencies.outside) == 1)
            for number, dependencies in enumerate(self.dependencies)
        )

    @torch.no_grad()
    def arguments(self, number: int, window: int) -> Arguments:
        """The arguments of a call for one window. Its hidden state is among them."""
        found: list[Arguments] = []
        given = {k: self._values(k, window) for k in self.dependencies[number].results}
        self._run_to(number, window, lambda _forward, arguments: found.append(arguments), given)
        return found[0]

    def replay(self, number: int, window: int, hidden: Tensor, block: nn.Module) -> Tensor:
        """The hidden states [1, seqlen, hidden] that `block` makes of `hidden` in place of call `number` of a chain."""
        dependencies = self.dependencies[number]
        position = dependencies.outside[0] if dependencies.hidden is None else dependencies.hidden
        args, kwargs = with_replaced_tensors(self.arguments(number, window), {position: hidden})
        output = block(*args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    # -- backward ---------------------------------------------------------------------------------------------------

    def run_tail(self, hooks: StatisticsHooks, *, follow_inputs: bool = False) -> float:
        """Run the tail on all windows and store the gradients at the results that it uses.

        Gradients are those of the loss on sampled labels; the perplexity returned is that of the text. With
        `follow_inputs` the stored gradients at the inputs of the blocks flow back through everything outside them in
        the same pass. Raises UserError for logits or gradients that are not finite.
        """
        generator = torch.Generator().manual_seed(self.objective.seed)
        found: dict[int, Gradients] = defaultdict(dict)
        total, scored = 0.0, 0
        for window in progress_bar(range(self.windows), desc="calibrate: head", unit="window"):
            leaves = {call: _leaves(self._values(call, window)) for call in self.tail.results}
            ends: list[tuple[Tensor, Tensor]] = []
            with hooks.recording(every_lookup=follow_inputs), torch.enable_grad():
                with self._explained():
                    output = self._run_collecting(window, _copies(leaves), ends if follow_inputs else None)
                loss, text_loss, count = self.objective.losses(output, window, generator)
                tensors = [loss, *(tensor for tensor, _ in ends)]
                with self._explained():
                    torch.autograd.backward(tensors, [None, *(gradient for _, gradient in ends)])
            if not math.isfinite(text_loss):
                raise UserError(f"{self.loaded.source}: its logits are NaN or infinite; {WAY_OUT}")
            for call, tensors in leaves.items():
                self._collect(found[call], tensors, window, f"the output of {self.calls[call].path}")
            total, scored = total + text_loss, scored + count
        if not follow_inputs:
            self.gradients.store(TAIL, found, {})
        return math.exp(min(total / max(scored, 1), MAX_NATS))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise UserError in place of an error of the model's own code in a pass with gradients."""
        try:
            yield
        except _FAILURES as error:
            what = f"{type(self.loaded.model).__name__} cannot be run with gradients, which calibration needs"
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.loaded.source}: {what}: {reason}") from error

    def _run_collecting(
        self,
        window: int,
        given: dict[int, list[Tensor]],
        ends: list[tuple[Tensor, Tensor]] | None,
        last: int | None = None,
    ) -> Any:
        """Run the model with every call replaced, and add to `ends` every input from outside the blocks together with
        the gradient stored for it. `last` ends the pass at that call; None runs the tail too.
        """

        def handle(number: int, path: str, _forward: Callable[..., Any], arguments: Arguments) -> Any:
            self._expect(number, path)
            if ends is not None and self.dependencies[number].outside:
                flat = argument_leaves(arguments)
                gradients = self.gradients.of_inputs(number).read(window)
                ends.extend((flat[i], g.to(self.device)) for i, g in gradients.items() if flat[i].requires_grad)
            if number == last:
                raise StopForwardError
            return self._filled(number, window, given, arguments)

        output, inputs = None, None if ends is None else self._followed_inputs(window)
        with intercepted(self.blocks if self.calls else {}, handle), suppress(StopForwardError):
            output = self._forward(window, inputs)
        return output

    def run_call(self, number: int, hooks: StatisticsHooks) -> tuple[dict[int, Gradients], Gradients]:
        """Run one call on all windows with gradients: (gradients at the results of earlier calls, at its own inputs
        from outside the blocks). Neither is stored; `StoredGradients.store` does that.
        """
        dependencies, reader = self.dependencies[number], self.gradients.of_results(number)
        results: dict[int, Gradients] = defaultdict(dict)
        inputs: Gradients = {}
        for window in range(self.windows):
            leaves = {call: _leaves(self._values(call, window)) for call in dependencies.results}
            cut: dict[int, Tensor] = {}
            gradients = {slot: value.to(self.device) for slot, value in reader.read(window).items()}

            def compute(
                forward: Callable[..., Any],
                arguments: Arguments,
                cut: dict[int, Tensor] = cut,
                gradients: dict[int, Tensor] = gradients,
            ) -> None:
                flat = argument_leaves(arguments)
                for index in dependencies.outside:
                    cut[index] = flat[index].detach().requires_grad_()
                copies = {index: leaf.clone() for index, leaf in cut.items()}
                before = {index: flat[index] for index in cut if flat[index].requires_grad}
                with hooks.recording():
                    replaced = with_replaced_tensors(arguments, copies) if copies else arguments
                    _backward(run_and_take_apart(self.calls[number].path, forward, replaced)[2], gradients)
                connected = [(t, cut[i].grad) for i, t in before.items() if cut[i].grad is not None]
                if connected:
                    torch.autograd.backward([t for t, _ in connected], [g for _, g in connected])

            with torch.enable_grad():
                self._run_to(number, window, compute, _copies(leaves))
            where = f"the input of {self.calls[number].path}"
            for call, tensors in leaves.items():
                self._collect(results[call], tensors, window, where)
            for index, leaf in cut.items():
                self._collect(inputs, {index: leaf}, window, where)
        return results, inputs

    def run_front(self, hooks: StatisticsHooks) -> None:
        """Let the stored gradients at the inputs of the blocks flow back to the embeddings."""
        fed = [number for number, found in enumerate(self.dependencies) if found.outside]
        if not fed:
            return
        needed = {call for number in fed for call in self.dependencies[number].results}
        for window in range(self.windows):
            ends: list[tuple[Tensor, Tensor]] = []
            given = _copies({call: _leaves(self._values(call, window)) for call in sorted(needed)})
            with hooks.recording(every_lookup=True), torch.enable_grad():
                self._run_collecting(window, given, ends, last=fed[-1])
                if ends:
                    torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])

    def _collect(
        self, gradients: Gradients, leaves: Sequence[Tensor] | dict[int, Tensor], window: int, where: str
    ) -> None:
        """Move the gradients of `leaves` to `gradients`. Raises UserError for one that is not finite."""
        for slot, leaf in leaves.items() if isinstance(leaves, dict) else enumerate(leaves):
            if leaf.grad is None:
                continue
            if not bool(torch.isfinite(leaf.grad).all()):
                what = f"the gradient at {where} is NaN or infinite in {leaf.dtype}; expected a finite one"
                raise UserError(f"{self.loaded.source}: {what}; {WAY_OUT}")
            gradients[slot, window] = leaf.grad


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]


def _copies(leaves: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
    """Copies that a model may change in place, which leaves that require gradients do not allow."""
    with torch.enable_grad():
        return {call: [t.clone() if t.requires_grad else t for t in tensors] for call, tensors in leaves.items()}


def _backward(tensors: Sequence[Tensor], gradients: dict[int, Tensor]) -> None:
    """Propagate `gradients`, by slot, from the results `tensors` of a call."""
    pairs = [(tensors[slot], gradient) for slot, gradient in gradients.items() if tensors[slot].requires_grad]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if torch.equal(left, right):
        return True
    if left.shape != right.shape or not left.is_floating_point():
        return False
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())
