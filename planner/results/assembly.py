"""Make a plan from a solver's choice, and add up its exact bytes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, prod

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import natural_key
from reallm.planner.problem.problem import Candidate
from reallm.planner.problem.selection import Selection
from reallm.planner.tables.plan import Bound, Choice, LimitState, Plan, Uniform
from reallm.planner.tables.tensor_layout import matrices_nbytes
from reallm.planner.tables.work_folder import described

UNPACKED_SHARE = 0.01
"""From this share of the weights on, a plan says that tensors with several dimensions are not packed."""


def assemble(
    selection: Selection,
    *,
    chosen: Mapping[str, Candidate],
    runners_up: Mapping[str, str | None],
    bound: Bound,
    budget: tuple[str, int],
    uniform: Uniform | None,
    work: str,
    limits: Sequence[LimitState] = (),
) -> Plan:
    """The plan for a choice: `chosen` maps the name of every item to its candidate.

    `budget` is the text that the user wrote and its value in bytes. Raises ArithmeticError when the exact bytes exceed
    the budget, which would be a fault of the planner, not of the user.
    """
    table, options = selection.table, selection.plan_options
    choices = _choices(selection, chosen, runners_up)
    matrices_bytes, all_file_bytes = selection.sizes(chosen)
    counted = all_file_bytes if selection.scope == "file" else matrices_bytes
    if counted + selection.reserved.nbytes > budget[1]:
        raise ArithmeticError(f"the plan takes {counted} bytes, more than its budget of {budget[1]}")
    return Plan(
        model=table.model,
        model_sha256=table.model_sha256,
        work=work,
        table_sha256=table.digest(),
        calibration=described(table, folders=False) if "nsamples" in table.settings else None,
        budget=budget[0],
        budget_bytes=budget[1],
        scope=selection.scope,
        counted_bytes=counted,
        matrices_bytes=matrices_bytes,
        file_bytes=all_file_bytes,
        bits_per_weight=8 * matrices_bytes / selection.numel,
        predicted_loss=fsum(choice.cost for choice in choices),
        bound=bound,
        choices=choices,
        shared=selection.used_codebooks(chosen),
        dense=tuple(sorted((m.name for m in selection.fixed), key=natural_key)),
        kept=selection.kept,
        uniform=uniform,
        pins=options.pins,
        exclude=options.exclude,
        formats=options.formats,
        ties=options.ties,
        cost=options.cost,
        requirements=options.requirements,
        reserved=selection.reserved,
        limits=tuple(limits),
        corrections=options.corrections,
        notes=_notes(selection, choices, bound),
    )


def _choices(
    selection: Selection, chosen: Mapping[str, Candidate], runners_up: Mapping[str, str | None]
) -> tuple[Choice, ...]:
    stored = matrices_nbytes(selection.table.matrices, selection.formats(chosen))
    choices = []
    for item, group in selection.members.items():
        for matrix in group:
            option = selection.format_options[matrix.name][chosen[item].format]
            choices.append(
                Choice(
                    matrix=matrix.name,
                    format=option.format.name,
                    rows=matrix.rows,
                    cols=matrix.cols,
                    kind=matrix.kind,
                    family=matrix.family,
                    nbytes=stored[matrix.name],
                    cost=option.cost,
                    codes_sha256=option.codes_sha256,
                    runner_up=runners_up[item],
                )
            )
    return tuple(sorted(choices, key=lambda choice: natural_key(choice.matrix)))


def _notes(selection: Selection, choices: tuple[Choice, ...], bound: Bound) -> tuple[str, ...]:
    notes, options = [*selection.table.doubts, *_notes_on_the_rest(selection)], selection.plan_options
    if all(isinstance(Format.parse(c.format).codec, DenseCodec) for c in choices):
        notes.append("the budget holds every matrix uncompressed; a smaller one would give a smaller model")
    if only := [c.matrix for c in choices if len(selection.format_options[c.matrix]) == 1 and not c.codes_sha256]:
        notes.append(f"{len(only)} matrices have no measured candidate and stay dense, such as {only[0]}")
    if bounded := selection.table.bounded:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(bounded.items()))
        notes.append(f"bounded and not measured, with the number of matrices: {listed}")
    if options.exclude:
        kept = sum(map(len, selection.kept.values()))
        notes.append(f"--exclude leaves {len(selection.fixed) - kept} matrices dense and out of the bits per weight")
    if options.cost not in ("two_sided", "guided"):
        notes.append(f"costs are the {options.cost} error, not the guided loss")
    if bound.status != "optimal" and bound.solver != "none":
        notes.append("the search ended before the plan was proved optimal; more seconds may find a better one")
    return tuple(notes)


def _notes_on_the_rest(selection: Selection) -> list[str]:
    """Notes on weights that no format was chosen for: what share of the model they are, and why."""
    table = selection.table
    sizes = {matrix.name: matrix.numel for matrix in table.matrices}
    large = {name: prod(shape) for name, shape in table.other_tensors.items() if len(shape) > 1}
    total = sum(sizes.values()) + sum(prod(shape) for shape in table.other_tensors.values())
    notes = []
    for reason, names in selection.kept.items():
        share = sum(sizes[name] for name in names) / total
        notes.append(
            f"{len(names)} matrices ({share:.1%} of the weights) keep their dtype, such as {names[0]}: {reason}"
        )
    unmeasured = {name for names in table.kept.values() for name in names}
    if pinned := [name for name in sizes if name in unmeasured and name in selection.format_options]:
        what = f"{len(pinned)} pinned matrices, such as {pinned[0]}, were not run by the calibration"
        notes.append(f"{what}: the loss that their formats cause is unknown and not in the predicted loss")
    if sum(large.values()) >= UNPACKED_SHARE * total:
        largest = max(large, key=lambda name: large[name])
        share, shape = sum(large.values()) / total, list(table.other_tensors[largest])
        notes.append(
            f"{share:.1%} of the weights are in {len(large)} tensors that are not packed, such as {largest} {shape}"
        )
    return notes
