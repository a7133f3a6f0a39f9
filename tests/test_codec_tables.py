"""Every codec has its row in every table that is looked up by codec: adding one is a folder and these rows."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import pytest

from reallm.kernels.formats.codecs import AnyCodec

TABLES = (
    "kernels.reference:REFERENCE_DECODERS",
    "codecs.encode:ENCODERS",
    "decoding.decode:DECODERS",
    "codegen.ir.lower:LOWERINGS",
    "codegen.cpu.linear:CPU_KERNELS",
    "runtime.operand:OPERAND_FILLERS",
    "measurement.screening:NORMAL_ERRORS",
)


@pytest.mark.parametrize("place", TABLES)
def test_every_codec_is_in_every_table(place: str) -> None:
    module, name = place.split(":")
    table = getattr(import_module(f"reallm.{module}"), name)
    assert set(table) == set(get_args(AnyCodec))
