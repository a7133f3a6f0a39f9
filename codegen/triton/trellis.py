"""Writes the kernels that multiply trellis-coded matrices: a GEMV for few rows of x and a GEMM for many.

The bits of a tile of 16 x 16 weights form a ring (`kernels.codes.trellis`). If a weight takes width / 2 bits, a row
of the tile takes 8 * width bits, which begin at bit 8 * width * (15 - row) of the ring. The states of the row also use
the next few bits; all these bits are the window of the row. Each thread handles whole rows. It loads the words of the
window, shifts them once so that the window starts at bit 0 (`a_0`, `a_1`, ...), and then finds every state at a fixed
position. The tensor `index` (see `launch.derived_tensors`) sorts the blocks of columns by width. Each width has its own
loop, so the compiler knows all shifts in it.

A value is decoded from the product of a state and a constant: s is the sum of the four bytes of the product, computed
by one instruction (dp4a, v_sad_u8). The GEMV reads the bits of s as those of a float: s 2^-149, a denormal number that
FMA multiplies exactly. For this, x is multiplied by 2^LIFT beforehand, and the mean of s is subtracted from the
finished sums (`Centre`). The GEMM computes s - 510 exactly in half precision: it puts s into the last bits of 0x6400,
the pattern of 1024, whose lowest bit has the value 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reallm.codegen.ir.operations import LIFT, Centre, CodegenError, Operation, Trellis
from reallm.codegen.ir.program import KernelSpec
from reallm.kernels.codes.trellis import CODE_MEAN, CODE_UNIT, MULTIPLIERS, WORDS_PER_WIDTH, step_shape
from reallm.kernels.formats.codecs import TILE, TrellisCodec

from .group_select import tile_index
from .snippets import indent

WIDTHS = (2, 3, 4, 5, 6, 8, 10, 12)
"""The widths that the encoder chooses among; a matrix with other widths gets a separate kernel."""
WINDOWS = (3, 5, len(WIDTHS))
"""How many widths one kernel may decode. Triton compiles kernels with these numbers in about 3, 9 and 30 s."""
RUNS_AT, ORDER_AT = 1, 18
"""Positions in `index` of the first block of each width, and of the blocks sorted by width."""
DENORMAL = 2.0**-149
HALF_1024, HALF_BITS = 1024, 0x6400
WARP = 32
TILE_BITS = TILE.bit_length() - 1
ROW_BITS = TILE // 2
"""Number of bits that a row of a tile takes if the width is 1, that is, half a bit per weight."""


def kernel_widths(needed: Collection[int], state_bits: int) -> tuple[int, ...]:
    """The widths that a kernel is compiled for if it must decode the `needed` widths.

    The matrices of a model should share few kernels, but a kernel with many widths takes long to compile. So the result
    is the smallest range of consecutive entries of WIDTHS that contains all needed widths. Its length is one of
    WINDOWS, its middle is close to the mean of the needed widths, and it contains only widths that a trellis of
    2^state_bits states can have. If no such range contains all needed widths, the result is exactly those needed.
    """
    middle = sum(needed) / max(1, len(needed))
    possible = tuple(width for width in WIDTHS if step_shape(width)[1] <= state_bits)
    for size in WINDOWS:
        windows = [possible[start : start + size] for start in range(max(1, len(possible) - size + 1))]
        fitting = [window for window in windows if set(needed) <= set(window)]
        if fitting:
            return min(fitting, key=lambda window: abs(window[len(window) // 2] - middle))
    return tuple(sorted(needed))


def nominal_width(codec: TrellisCodec) -> int:
    """The width, from WIDTHS, that is closest to the rate of a codec; most blocks have about this width."""
    return min(WIDTHS, key=lambda width: abs(width - codec.eighths / 4))


def window_words(width: int, state_bits: int) -> tuple[int, int]:
    """The numbers of 32-bit words that the window of a row occupies: (at most as stored, after the shift to bit 0).

    `_window_lines` does this shift.
    """
    needed = ROW_BITS * width + state_bits - step_shape(width)[1]
    furthest = max(ROW_BITS * width * row % 32 for row in range(TILE))
    return -(-(furthest + needed) // 32), -(-needed // 32)


def position(width: int, column: int) -> tuple[int, int]:
    """Where the value of a tile's column is found: the first bit of its state, and its index among the state's values.

    The bit is counted from the start of the row's window. A state has one or more values, for adjacent columns.
    """
    values, bits, _ = step_shape(width)
    return bits * (TILE // values - 1 - column // values), column % values


def _row_lines(spec: KernelSpec, index: str) -> list[str]:
    """Lines at the start of a kernel that compute which rows of W the instance handles, and where their tiles are.

    `index` is an expression for the indices of these rows within the instance.
    """
    return [
        f"n = {tile_index(spec)} * {spec.tile.block_n} + {index}",
        "row = tl.minimum(n, rows - 1)",
        f"tile = row >> {TILE_BITS}",
        f"up = {TILE - 1} - (row & {TILE - 1})  # bits of a tile run from its last row to its first",
    ]


def _width_lines(width: int, state_bits: int) -> list[str]:
    """Lines that come before the loop over all blocks of one width.

    They read from `index` which blocks have this width. They also set the pointers `at_0`, ... to the words of a row's
    window, without the position of the block, which the loop adds.
    """
    values, bits, _ = step_shape(width)
    size = WORDS_PER_WIDTH * width
    lines = [
        f"# blocks of {width / 2:g} bits a weight: steps of {bits} bits for {values} weight{'s' * (values > 1)}",
        f"begin = tl.load(index + {RUNS_AT + width})",
        f"end = tl.load(index + {RUNS_AT + width + 1})",
    ]
    if ROW_BITS * width % 32:
        lines.append(f"word = (up * {width}) >> 2")
        lines.append(f"skip = (((up * {width}) & 3) * 8).to(tl.uint64)")
    else:
        lines.append(f"word = up * {ROW_BITS * width // 32}")
    for index in range(window_words(width, state_bits)[0]):
        there = f"(word + {index})" if index else "word"
        wrapped = f"tl.where({there} < {size}, {there}, {there} - {size})" if index else there
        lines.append(f"at_{index} = words + (tile * {size} + {wrapped})")
    return lines


def _window_lines(width: int, state_bits: int) -> list[str]:
    """Lines that shift the words `w_0`, ... to the uint32 words `a_0`, ..., in which a row's window starts at bit 0."""
    touched, needed = window_words(width, state_bits)
    word = "w_{}.to(tl.uint32, bitcast=True)"
    if ROW_BITS * width % 32 == 0:
        return [f"a_{index} = {word.format(index)}" for index in range(touched)]
    lines = []
    for index in range(needed):
        low = word.format(index)
        if index + 1 < touched:
            pair = f"({word.format(index + 1)}.to(tl.uint64) << 32) | {low}.to(tl.uint64)"
            lines.append(f"a_{index} = (({pair}) >> skip).to(tl.uint32)")
        else:
            lines.append(f"a_{index} = {low} >> skip.to(tl.uint32)")
    return lines


def product(width: int, state_bits: int, column: int) -> str:
    """An expression for the state of one column times a constant; the bytes of this product add up to s."""
    bit, which = position(width, column)
    word, shift = divmod(bit, 32)
    low = f"a_{word} >> {shift}" if shift else f"a_{word}"
    if shift + state_bits > 32:
        low = f"({low}) | (a_{word + 1} << {32 - shift})"
    mask = "" if shift + state_bits == 32 else f" & {(1 << state_bits) - 1}"
    return f"(({low}){mask}) * {MULTIPLIERS[which]:#x}"


def _find_lines(prefix: str) -> list[str]:
    """Lines that look up the block at position `own` of the sorted blocks: its number, and where its words begin.

    The names of the variables start with `prefix`; `live` is false if there is no such block.
    """
    return [
        f"{prefix}live = own < end",
        f"{prefix}block = tl.load(index + {ORDER_AT} + own, mask={prefix}live, other=0)",
        f"{prefix}start = tl.load(index + {ORDER_AT} + across + own, mask={prefix}live, other=0)",
    ]


def gemv_lines(spec: KernelSpec, operations: tuple[Operation, ...]) -> list[str]:
    """The body of a GEMV: part[split, m, n] = sum over the split's blocks of (s - mean) scale x'.

    All warps of an instance handle the same rows of W but different blocks of columns; their sums are added at the end.
    An instance has T threads, and each thread handles R rows: every 32nd row of the instance. Tensors that depend on
    the block but not on the row have the shape [T], those that also depend on the row [R T]. While a warp multiplies
    one block, it already loads the words of the next block and the position of the block after that.
    """
    decode, centre = operations[0], next(op for op in operations if isinstance(op, Centre))
    assert isinstance(decode, Trellis)
    state_bits, warps, batch = decode.state_bits, spec.tile.num_warps, range(spec.batch)
    threads, each = WARP * warps, spec.tile.block_n // WARP

    def wide(name: str) -> str:
        """An expression that expands the tensor `name` [T] to [R T]: each row gets the value of its thread."""
        return (
            name
            if each == 1
            else f"tl.reshape(tl.broadcast_to({name}[None, :], ({each}, {threads})), ({each * threads},))"
        )

    lines = [
        f"entry = tl.arange(0, {each * threads})",
        f"thread = tl.arange(0, {threads})",
        f"warp = thread >> {WARP.bit_length() - 1}",
        f"across = (cols + {TILE - 1}) // {TILE}",
        *_row_lines(spec, f"entry // {threads} * {WARP} + (entry & {WARP - 1})"),
        f"first = tl.program_id(1) * {spec.batch}",
        f"split = tl.program_id(2) * {warps}",
        f"step = tl.num_programs(2) * {warps}",
    ]
    for m in batch:
        lines += [
            f"m_{m} = {f'tl.minimum(first + {m}, batch - 1)' if spec.batch > 1 else 'first'}",
            f"plain_{m} = ready + m_{m} * (across * {TILE}) + (thread & {TILE - 1})",
            f"x_{m} = (ready + m_{m} * (across * {TILE})).to(tl.pointer_type(tl.int64))  # pairs of float32",
            f"mean_{m} = tl.zeros(({threads},), tl.float32)  # twice the sum of scale x'",
            f"total_{m} = tl.zeros(({each * threads},), tl.float32)",
        ]
    for width in spec.widths:
        words = range(window_words(width, state_bits)[0])

        def fetch(target: str, source: str, words: Sequence[int] = words) -> list[str]:
            """Lines that load the scale and the words of one block.

            `target` is the prefix of the variables that are set, `source` that of the variables that name the block.
            """
            return [
                f"{target}scale = tl.load(scales + {source}block, mask={source}live, other=0).to(tl.float32)",
                f"from_here, seen = {wide(f'{source}start')}, {wide(f'{source}live')}",
                *(f"{target}w_{i} = tl.load(at_{i} + from_here, mask=seen, other=0)" for i in words),
            ]

        inside = [*fetch("next_", "next_"), "own += step", *_find_lines("last_"), *_window_lines(width, state_bits)]
        for column in range(0, TILE, 2):
            for m in batch:
                inside.append(f"pair = tl.load(x_{m} + (block * {TILE // 2} + {column // 2}))")
                inside.append(f"x_0_{m} = {wide('(pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)')}")
                inside.append(f"x_1_{m} = {wide('(pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)')}")
            for half in range(2):
                term = product(width, state_bits, column + half)
                inside.append(f"value = byte_sum({term}, 0, DEVICE).to(tl.float32, bitcast=True)")
                new = column + half == 0
                inside += [f"sum_{m} {'=' if new else '+='} value * x_{half}_{m}" for m in batch]
        inside.append(f"scale_wide = {wide('scale')}")
        for m in batch:
            inside.append(f"total_{m} += sum_{m} * scale_wide")
            inside.append(f"mean_{m} += tl.load(plain_{m} + block * {TILE}) * scale")
        inside += [f"{name} = next_{name}" for name in ("block", "scale", *(f"w_{i}" for i in words))]
        inside += [f"next_{name} = last_{name}" for name in ("block", "start", "live")]
        lines += [
            *_width_lines(width, state_bits),
            "own = begin + split + warp",
            *_find_lines(""),
            *fetch("", ""),
            "own += step",
            *_find_lines("next_"),
            "for turn in tl.range(begin + split, end, step, num_stages=1):",
            *(f"    {line}" for line in inside),
        ]
    unit = CODE_UNIT / DENORMAL / 2.0**LIFT
    at = f"tl.arange(0, {each})[:, None] * {WARP} + tl.arange(0, {WARP})[None, :]"
    lines.append(f"n = {tile_index(spec)} * {spec.tile.block_n} + {at}  # [{each}, {WARP}]")
    for m in batch:
        limit = "rows" if spec.batch == 1 else f"tl.where(first + {m} < batch, rows, 0)"
        lines += [
            f"place = part + (tl.program_id(2) * batch + m_{m}).to(tl.int64) * rows",
            f"whole = tl.sum(tl.reshape(total_{m}, ({each}, {warps}, {WARP})), 1) * {unit!r}",
            f"whole -= tl.sum(mean_{m}, 0) * {centre.mean / 2!r}",
            f"tl.store(place + n, whole, mask=n < {limit})",
        ]
    return lines


def _joined(names: list[str]) -> str:
    """An expression that joins the tensors `names`, each [BLOCK_N], into one tensor [BLOCK_N, 2, ..., 2].

    The last axes are the bits of a tensor's index in `names`, the lowest bit last.
    """
    return names[0] if len(names) == 1 else f"tl.join({_joined(names[::2])}, {_joined(names[1::2])})"


def _values_lines(width: int, state_bits: int, block_n: int) -> list[str]:
    """Lines that set `weights` [BLOCK_N, 16] to s - 510, exactly and in half precision, for the block at `turn`."""
    lines = [
        f"block = tl.load(index + {ORDER_AT} + turn)",
        f"start = tl.load(index + {ORDER_AT} + across + turn)",
        *(f"w_{i} = tl.load(at_{i} + start)" for i in range(window_words(width, state_bits)[0])),
        *_window_lines(width, state_bits),
    ]
    names = [f"c_{column}" for column in range(TILE)]
    for column, name in enumerate(names):
        term = product(width, state_bits, column)
        half = f"byte_sum({term}, {HALF_BITS:#x}, DEVICE).to(tl.uint16)"
        lines.append(f"{name} = {half}.to(tl.float16, bitcast=True) - {HALF_1024 + CODE_MEAN}.0")
    return [*lines, f"weights = tl.reshape({_joined(names)}, ({block_n}, {TILE}))"]


def gemm_lines(spec: KernelSpec, operations: tuple[Operation, ...]) -> list[str]:
    """The body of a GEMM, which computes part[split, m, n] for `spec.batch` rows of x with half-precision tensor cores.

    Before x' * scale is rounded to half precision, it is divided by the first entry of `index`. This entry is a power
    of two that no scale exceeds; the sums are multiplied by it at the end.
    """
    decode, block_n, block_m = operations[0], spec.tile.block_n, spec.batch
    assert isinstance(decode, Trellis)
    if block_m < TILE:
        raise CodegenError(f"a GEMM takes {TILE} rows of x or more, not {block_m}")
    lines = [
        f"across = (cols + {TILE - 1}) // {TILE}",
        *_row_lines(spec, f"tl.arange(0, {block_n})  # [{block_n}]"),
        f"m = tl.program_id(1) * {block_m} + tl.arange(0, {block_m})  # [{block_m}]",
        "split = tl.program_id(2)",
        "splits = tl.num_programs(2)",
        "unit = tl.load(index).to(tl.float32, bitcast=True)  # a power of two, no less than any scale",
        f"column = tl.arange(0, {TILE})",
        f"x_at = ready + tl.minimum(m, batch - 1)[:, None].to(tl.int64) * (across * {TILE}) + column[None, :]",
        f"total = tl.zeros(({block_n}, {block_m}), tl.float32)",
    ]
    for width in spec.widths:
        inside = [
            *_values_lines(width, decode.state_bits, block_n),
            f"scale = tl.load(scales + block).to(tl.float32) / unit * {2.0**-LIFT!r}",
            f"left = (tl.load(x_at + block * {TILE}) * scale).to(tl.float16)  # [{block_m}, {TILE}]",
        ]
        inside.append("total = tl.dot(weights, tl.trans(left), total)")
        lines += _width_lines(width, decode.state_bits)
        lines.append("for turn in tl.range(begin + split, end, splits, num_stages=1):")
        lines += [f"    {line}" for line in inside]
    lines += [
        "place = (split * batch + m).to(tl.int64)[None, :] * rows + n[:, None]",
        "inside = (m < batch)[None, :] & (n < rows)[:, None]",
        f"tl.store(part + place, total * (unit * {CODE_UNIT!r}), mask=inside)",
    ]
    return lines


def dense_lines(spec: KernelSpec, operations: tuple[Operation, ...]) -> list[str]:
    """The body of a kernel that writes dense[n, k] = (s - 510) * CODE_UNIT * scale / unit in half precision.

    Here unit is the first entry of `index`. Blocks of width 0 are not written, so the caller must fill `dense` with
    zeros before.
    """
    decode, block_n = operations[0], spec.tile.block_n
    assert isinstance(decode, Trellis)
    seen = "" if spec.aligned else f" & (block * {TILE} + column < cols)"
    lines = [
        *([f"cols = cols // {TILE} * {TILE}  # as it is: says that rows are whole blocks"] if spec.aligned else []),
        f"across = (cols + {TILE - 1}) // {TILE}",
        *_row_lines(spec, f"tl.arange(0, {block_n})  # [{block_n}]"),
        "split = tl.program_id(2)",
        "splits = tl.num_programs(2)",
        "unit = tl.load(index).to(tl.float32, bitcast=True)  # a power of two, no less than any scale",
        f"column = tl.arange(0, {TILE})[None, :]",
        "goal = dense + n.to(tl.int64)[:, None] * cols + column",
    ]
    for width in spec.widths:
        lines += _width_lines(width, decode.state_bits)
        lines.append("for turn in tl.range(begin + split, end, splits, num_stages=1):")
        inside = [*_values_lines(width, decode.state_bits, block_n)]
        inside += [
            f"scale = tl.load(scales + block).to(tl.float32) / unit * {CODE_UNIT!r}",
            "value = (weights.to(tl.float32) * scale).to(dense.dtype.element_ty)",
            f"tl.store(goal + block * {TILE}, value, mask=(n < rows)[:, None]{seen})",
        ]
        lines += [f"    {line}" for line in inside]
    return lines


def emit_trellis(spec: KernelSpec, select: list[str]) -> str:
    """The body of a trellis kernel; `select` holds the lines that find the instance's matrix in a group."""
    body = {"gemm": gemm_lines, "gemv": gemv_lines, "dense": dense_lines}[spec.function](spec, spec.operations)
    shape = f"{spec.tile.block_n} rows of W, {spec.batch} of x, every `splits`-th block of each width"
    return (
        "    # ready float32 [batch, cols in whole blocks], part float32 [splits, batch, rows]; one instance:\n"
        f"    # {shape}\n"
        f"{indent([*select, *body], 4)}\n"
    )


BYTE_SUM = """\
@triton.jit
def byte_sum(product, START: tl.constexpr, DEVICE: tl.constexpr):
    # START and the four bytes of each product, uint32
    if DEVICE == "cuda":
        if START == 0:
            text: tl.constexpr = "dp4a.u32.u32 $0, $1, 0x01010101, 0;"
        else:
            text: tl.constexpr = "dp4a.u32.u32 $0, $1, 0x01010101, 0x6400;"
        return tl.inline_asm_elementwise(text, "=r,r", [product], dtype=tl.uint32, is_pure=True, pack=1)
    elif DEVICE == "hip":
        start = tl.full(product.shape, START, tl.uint32)
        return tl.inline_asm_elementwise(
            "v_sad_u8 $0, $1, 0, $2", "=v,v,v", [product, start], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        pairs = (product & 0xFF00FF) + ((product >> 8) & 0xFF00FF)
        return (pairs & 0xFFFF) + (pairs >> 16) + START
"""
