"""Machine code: finding loops, counting instructions, naming faults."""

from __future__ import annotations

import pytest
from machine_code.sass import Code, Usage, lint, load_bits, parse_code

from reallm.codegen.ir.operations import CodegenError

GOOD = Usage(registers=40, stack_bytes=0, shared_bytes=0, local_bytes=0)
TEXT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_CTAID.X ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/              @!P0 FFMA R5, R4, R6, R5 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E [R2.64], R5 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def test_loops_are_counted_as_often_as_they_turn() -> None:
    code = parse_code(TEXT, GOOD)
    assert code.opcodes == ("MOV", "S2R", "LDG.E.128", "FFMA", "BRA", "STG.E", "EXIT")
    assert code.loops == ((2, 5),)
    assert code.count([1]) == 7 and code.count([10]) == 34
    assert code.histogram()["LDG"] == 1
    with pytest.raises(CodegenError, match="1 loops, not 2"):
        code.count([1, 1])


def test_loops_around_loops_are_listed_apart() -> None:
    inner = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
"""
    code = parse_code(inner, GOOD)
    assert code.loops == ((1, 3),) and code.outer == ((0, 4),)


@pytest.mark.parametrize(
    ("opcode", "bits"), [("LDG.E", 32), ("LDG.E.64.CONSTANT", 64), ("LDG.E.U16", 16), ("LDS.128", 0), ("FFMA", 0)]
)
def test_loads_are_as_wide_as_they_say(opcode: str, bits: int) -> None:
    assert load_bits(opcode) == bits


def test_clean_code_has_no_faults() -> None:
    assert lint(parse_code(TEXT, GOOD)) == ()


@pytest.mark.parametrize(
    ("opcodes", "usage", "fault"),
    [
        (("STL", "EXIT"), GOOD, "1 spills"),
        (("EXIT",), Usage(40, 16, 0, 8), "16 bytes of stack and 8 of local"),
        (("EXIT",), Usage(200, 0, 0, 0), "200 registers"),
        (("EXIT",), Usage(40, 0, 100_000, 0), "bytes of shared memory"),
        (("LDG.E.U8", "BRA"), GOOD, "narrow loads carry 8 of the 8 bits"),
        (("RED.E.ADD", "EXIT"), GOOD, "1 atomic"),
    ],
)
def test_faults_are_named(opcodes: tuple[str, ...], usage: Usage, fault: str) -> None:
    assert any(fault in message for message in lint(Code(opcodes, ((0, len(opcodes)),), usage)))
