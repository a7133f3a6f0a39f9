"""Tensors that kernels read but no matrix stores: levels, lattice vectors and rotations, made once per device."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from reallm.codegen.ir.operations import Lattice, Levels, Prepare, Unrotate
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.triton.rotation_factors import rotation_factors
from reallm.kernels.codes.hadamard import signs
from reallm.kernels.codes.lattice import absolute_vectors, odd_sign_parity, root_words
from reallm.kernels.codes.tables import table
from reallm.kernels.formats.codecs import TableName

if TYPE_CHECKING:
    import torch


def constant_tables(spec: KernelSpec, rows: int, cols: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The constant tensors that a kernel of `spec` for W[rows, cols] reads, by name."""
    result: dict[str, torch.Tensor] = {}
    for operation in spec.operations:
        if isinstance(operation, Levels) and operation.table != "int":
            result["levels"] = _levels(operation.table, operation.bits, device)
        elif isinstance(operation, Lattice):
            result["grid"], result["roots"] = _lattice(device)
        elif isinstance(operation, Prepare) and operation.rotated:
            result["base_in"], result["signs_in"] = _rotation(cols, device)
        elif isinstance(operation, Unrotate) and operation.rotated:
            result["base_out"], result["signs_out"] = _rotation(rows, device)
    return result


@cache
def _lattice(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(absolute vectors of E8P, vectors of its residual codebook), float32.

    The last entry of an E8P vector is stored as negative if the vector has an odd number of negative signs.
    """
    import torch

    grid = absolute_vectors().copy()
    grid[odd_sign_parity(), -1] *= -1
    roots = torch.from_numpy(root_words().copy())
    return torch.from_numpy(grid).to(device, torch.float32), roots.to(device, torch.float32)


@cache
def _rotation(order: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, signs) of the rotation of `order` entries, float32; see `rotation_factors`."""
    import torch

    base, _ = rotation_factors(order)
    return torch.from_numpy(base.copy()).to(device), torch.from_numpy(signs(order).copy()).to(device, torch.float32)


@cache
def _levels(name: TableName, bits: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(table(name, bits).copy()).to(device)
