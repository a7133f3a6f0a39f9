"""The writer of trellis products: a GEMV for few rows of x and a GEMM for many, both of the tiles of `kernels.trellis`.

A row of a tile of `width` half bits a weight owns 8 width bits of the tile's ring, from bit 8 width (15 - row) on, and
its states reach into the next few. Each thread holds whole rows: it loads the words of its window, moves them to the
window's start once (`a_0`, `a_1`, ...), and finds every state at a fixed place in them. Blocks of columns of one width
follow each other (`index`, see `launch.trellis_index`), so that all shifts of a loop are known when it is compiled.

The sum s of the four bytes of a product is one instruction (dp4a, v_sad_u8). The GEMV takes its bits for those of a
float: s 2^-149, a denormal number that FMA multiplies exactly; x comes 2^LIFT times as large, and the mean of s is
subtracted from the finished sums (`Centre`). The GEMM writes s - 510 in half precision, exactly: 0x6400 are the bits
of 1024, whose last place is one.
"""

from __future__ import annotations

from reallm.kernels.codecs import TILE
from reallm.kernels.trellis import CODE_MEAN, CODE_UNIT, MULTIPLIERS, WORDS_PER_WIDTH, step_shape

from .groups import place
from .operations import LIFT, CodegenError, Trellis
from .program import KernelSpec
from .snippets import indent

WIDTHS = (2, 3, 4, 5, 6, 8, 10, 12)
"""Those that the encoder chooses among; a matrix with others gets a kernel of its own."""
RUNS_AT, ORDER_AT = 1, 18
"""Where `index` holds the first block of each width, and the blocks in their order."""
DENORMAL = 2.0**-149
HALF_1024, HALF_BITS = 1024, 0x6400
TILE_BITS = TILE.bit_length() - 1
ROW_BITS = TILE // 2
"""Bits of a row of a tile for each half bit a weight."""


def standard_widths(state_bits: int) -> tuple[int, ...]:
    """The widths of WIDTHS that a trellis of 2^state_bits states can have."""
    return tuple(width for width in WIDTHS if step_shape(width)[1] <= state_bits)


def window_words(width: int, state_bits: int) -> tuple[int, int]:
    """(32-bit words that the window of a row can touch, words of the window once it is moved to its start)."""
    needed = ROW_BITS * width + state_bits - step_shape(width)[1]
    furthest = max(ROW_BITS * width * row % 32 for row in range(TILE))
    return -(-(furthest + needed) // 32), -(-needed // 32)


def position(width: int, column: int) -> tuple[int, int]:
    """(bit of the window where the state of a column of the tile begins, which of its values the column takes)."""
    values, bits, _ = step_shape(width)
    return bits * (TILE // values - 1 - column // values), column % values


def address_lines(width: int, state_bits: int) -> list[str]:
    """Lines before the loop of a width: the pointers `at_0`, ... [BLOCK_N] of a row's words in the first block."""
    size = WORDS_PER_WIDTH * width
    lines = [f"word = (up * {width}) >> 2"] if ROW_BITS * width % 32 else [f"word = up * {ROW_BITS * width // 32}"]
    if ROW_BITS * width % 32:
        lines.append(f"skip = (((up * {width}) & 3) * 8).to(tl.uint64)")
    for index in range(window_words(width, state_bits)[0]):
        there = f"(word + {index})" if index else "word"
        wrapped = f"tl.where({there} < {size}, {there}, {there} - {size})" if index else there
        lines.append(f"at_{index} = words + (tile * {size} + {wrapped})")
    return lines


def load_lines(width: int, state_bits: int) -> list[str]:
    """Lines that load a row's window of the block at `start` and move it to its start: `a_0`, ... [BLOCK_N]."""
    touched, needed = window_words(width, state_bits)
    lines = [f"w_{index} = tl.load(at_{index} + start).to(tl.uint32, bitcast=True)" for index in range(touched)]
    if ROW_BITS * width % 32 == 0:
        return [line.replace("w_", "a_", 1) for line in lines]
    for index in range(needed):
        if index + 1 < touched:
            pair = f"(w_{index + 1}.to(tl.uint64) << 32) | w_{index}.to(tl.uint64)"
            lines.append(f"a_{index} = (({pair}) >> skip).to(tl.uint32)")
        else:
            lines.append(f"a_{index} = w_{index} >> skip.to(tl.uint32)")
    return lines


def product(width: int, state_bits: int, column: int) -> str:
    """The product whose bytes make the value of one column, an expression [BLOCK_N]."""
    bit, which = position(width, column)
    word, shift = divmod(bit, 32)
    low = f"a_{word} >> {shift}" if shift else f"a_{word}"
    if shift + state_bits > 32:
        low = f"({low}) | (a_{word + 1} << {32 - shift})"
    mask = "" if shift + state_bits == 32 else f" & {(1 << state_bits) - 1}"
    return f"(({low}){mask}) * {MULTIPLIERS[which]:#x}"


def shared_setup(spec: KernelSpec) -> list[str]:
    """Lines at the start of both kernels."""
    block_n = spec.tile.block_n
    return [
        f"n = {place(spec)} * {block_n} + tl.arange(0, {block_n})  # [{block_n}]",
        "row = tl.minimum(n, rows - 1)",
        f"tile = row >> {TILE_BITS}",
        f"up = {TILE - 1} - (row & {TILE - 1})  # bits of a tile run from its last row to its first",
        f"across = (cols + {TILE - 1}) // {TILE}",
    ]


def _block_lines() -> list[str]:
    return [
        f"block = tl.load(index + {ORDER_AT} + turn)",
        f"start = tl.load(index + {ORDER_AT} + across + turn)",
    ]


def _loop(width: int, step: str, inside: list[str], state_bits: int) -> list[str]:
    values, bits, _ = step_shape(width)
    return [
        f"# blocks of {width / 2:g} bits a weight: steps of {bits} bits for {values} weight{'s' * (values > 1)}",
        *address_lines(width, state_bits),
        f"begin = tl.load(index + {RUNS_AT + width})",
        f"end = tl.load(index + {RUNS_AT + width + 1})",
        f"for turn in tl.range(begin + split, end, {step}, num_stages=1):",
        *(f"    {line}" for line in inside),
    ]


def gemv_lines(spec: KernelSpec, decode: Trellis) -> list[str]:
    """The body of y_part[split, m, n] = sum over the split's blocks of s scale x'."""
    block_n, batch = spec.tile.block_n, spec.batch
    lines = [
        *shared_setup(spec),
        f"first = tl.program_id(1) * {batch}",
        "split = tl.program_id(2)",
        "splits = tl.num_programs(2)",
    ]
    for m in range(batch):
        chosen = f"tl.minimum(first + {m}, batch - 1)" if batch > 1 else "first"
        lines += [
            f"row_{m} = {chosen}",
            f"x_{m} = (ready + row_{m} * (across * {TILE})).to(tl.pointer_type(tl.int64))  # pairs of float32",
            f"total_{m} = tl.zeros(({block_n},), tl.float32)",
        ]
    for width in spec.widths:
        inside = [
            *_block_lines(),
            "scale = tl.load(scales + block).to(tl.float32)",
            *load_lines(width, decode.state_bits),
        ]
        for column in range(0, TILE, 2):
            for half in range(2):
                which = product(width, decode.state_bits, column + half)
                inside.append(f"v_{half} = byte_sum({which}, 0, DEVICE).to(tl.float32, bitcast=True)")
            for m in range(batch):
                inside.append(f"pair = tl.load(x_{m} + block * {TILE // 2} + {column // 2})")
                low, high = "(pair & 0xFFFFFFFF)", "(pair >> 32)"
                first = f"v_0 * {low}.to(tl.int32).to(tl.float32, bitcast=True)"
                inside.append(f"sum_{m} = {first if column == 0 else f'sum_{m} + {first}'}")
                inside.append(f"sum_{m} += v_1 * {high}.to(tl.int32).to(tl.float32, bitcast=True)")
        inside += [f"total_{m} += sum_{m} * scale" for m in range(batch)]
        lines += _loop(width, "splits", inside, decode.state_bits)
    unit = CODE_UNIT / DENORMAL / 2.0**LIFT
    for m in range(batch):
        limit = "rows" if batch == 1 else f"tl.where(first + {m} < batch, rows, 0)"
        lines.append(f"place = (split * batch + row_{m}).to(tl.int64) * rows")
        lines.append(f"tl.store(part + place + n, total_{m} * {unit!r}, mask=n < {limit})")
    return lines


def _joined(names: list[str]) -> str:
    """[BLOCK_N] tensors as one [BLOCK_N, 2, ..., 2], the last axis the lowest bit of the index."""
    return names[0] if len(names) == 1 else f"tl.join({_joined(names[::2])}, {_joined(names[1::2])})"


def gemm_lines(spec: KernelSpec, decode: Trellis) -> list[str]:
    """The body of y_part[split, m, n] for blocks of `spec.batch` rows of x, by tensor cores in half precision.

    x' scale is brought into half precision's range by the power of two of the largest scale, the first of `index`.
    """
    block_n, block_m = spec.tile.block_n, spec.batch
    if block_m < TILE:
        raise CodegenError(f"a GEMM takes {TILE} rows of x or more, not {block_m}")
    lines = [
        *shared_setup(spec),
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
            *_block_lines(),
            f"scale = tl.load(scales + block).to(tl.float32) / unit * {2.0**-LIFT!r}",
            f"left = (tl.load(x_at + block * {TILE}) * scale).to(tl.float16)  # [{block_m}, {TILE}]",
            *load_lines(width, decode.state_bits),
        ]
        names = [f"c_{column}" for column in range(TILE)]
        for column, name in enumerate(names):
            half = f"byte_sum({product(width, decode.state_bits, column)}, {HALF_BITS:#x}, DEVICE).to(tl.uint16)"
            inside.append(f"{name} = {half}.to(tl.float16, bitcast=True) - {HALF_1024 + CODE_MEAN}.0")
        inside.append(f"weights = tl.reshape({_joined(names)}, ({block_n}, {TILE}))")
        inside.append("total = tl.dot(weights, tl.trans(left), total)")
        lines += _loop(width, "splits", inside, decode.state_bits)
    lines += [
        "place = (split * batch + m).to(tl.int64)[None, :] * rows + n[:, None]",
        "inside = (m < batch)[None, :] & (n < rows)[:, None]",
        f"tl.store(part + place, total * (unit * {CODE_UNIT!r}), mask=inside)",
    ]
    return lines


def emit_trellis(spec: KernelSpec, decode: Trellis, select: list[str]) -> str:
    """The function behind its signature; `select` are the lines that choose its matrix."""
    body = gemm_lines(spec, decode) if spec.function == "gemm" else gemv_lines(spec, decode)
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
