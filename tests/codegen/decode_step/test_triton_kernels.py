"""The kernels of the decode step on GPUs compile; `runtime/test_cuda_graph` tests what they compute."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton is an extra")

NORMS = [{"ADDS": adds, "POST": post, "PLUS_ONE": post == 2} for adds, post in ((False, 0), (True, 0), (True, 2))]
ATTENDS = [
    {"WINDOW": window, "CAP": cap, "Q_NORM": norm, "K_NORM": norm, "SPLITS": splits}
    for window, cap, norm, splits in ((0, 0.0, 0, 1), (7, 2.0, 1, 4), (0, 50.0, 2, 16))
]
CASES = [
    *(
        ("norm_rows", "h y post weight total normed", "eps post_eps", {"WIDTH": 48, "BLOCK": 64} | case)
        for case in NORMS
    ),
    *(("gate", "a b y", "", {"BLOCK": 1024, "ACTIVATION": name}) for name in ("silu", "gelu_tanh")),
    *(
        (
            "attend",
            "q k v q_weight k_weight cosines sines keys values position part ends y",
            "q_eps k_eps",
            {"GROUP": 2, "HALF": 40, "LANES": 64, "BLOCK": 32, "SCALE": 0.25} | case,
        )
        for case in ATTENDS
    ),
    ("join_shares", "part ends y", "", {"WIDTH": 80, "BLOCK": 128, "SPLITS": 4}),
]
FLOAT32 = {"h", "total", "cosines", "sines", "part", "ends"}


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_kernel_compiles(
    case: tuple[str, str, str, dict[str, object]], target: tuple[str, int | str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reallm.codegen.decode_step import triton_kernels as step_kernels

    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    name, pointers, floats, constants = case
    function = getattr(step_kernels, name)
    types = {pointer: "*fp32" if pointer in FLOAT32 else "*bf16" for pointer in pointers.split()}
    types |= dict.fromkeys(floats.split(), "fp32") | {"position": "*i64", "capacity": "i32", "count": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in function.arg_names}
    compiled = triton.compile(ASTSource(function, signature, constants, {}), target=GPUTarget(*target))
    code = compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]
    assert code[:4] == b"\x7fELF"
