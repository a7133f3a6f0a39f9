"""Runs all passes over a program, in order; the verifier runs before the first pass and after every one.

Each pass takes a program and returns a better one with the same result.
"""

from __future__ import annotations

from collections.abc import Callable

from reallm.codegen.ir.program import Program
from reallm.codegen.ir.verify import verify_program

from .choose_tiles import choose_tiles
from .group_products import group_products
from .hoist_row_scales import hoist_row_scales
from .share_inputs import share_inputs
from .share_kernels import share_kernels

PASSES: tuple[tuple[str, Callable[[Program], Program]], ...] = (
    ("hoist_row_scales", hoist_row_scales),
    ("share_inputs", share_inputs),
    ("choose_tiles", choose_tiles),
    ("share_kernels", share_kernels),
    ("group_products", group_products),
)


def run_passes(program: Program) -> Program:
    """The program after all passes, verified before and after each. Raises CodegenError for an invalid program."""
    verify_program(program)
    for _name, transform in PASSES:
        program = transform(program)
        verify_program(program)
    return program
