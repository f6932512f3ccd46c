"""Tiles of matrix products and of small grids, kept in registers: what compiled convolutions are made of.

Written as LLVM's own code: numba's loops cannot say which numbers stay in registers.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from batchverify.vectors import LANES, PLACE, Code

# Pairs of channels that are multiplied before the next round of a loop.
STEP = 8
CACHE_LINE = 64


@cache
def _has(feature: str) -> bool:
    """Whether this CPU, or the one that numba is told to compile for, has a kind of instruction."""
    told: str | None = vars(config)["CPU_FEATURES"]
    return f"+{feature}" in (get_host_cpu_features() if told is None else told).split(",")


def tile_rows(vectors: int = 1) -> int:
    """Rows of a product that are summed up at once, `vectors` of LANES columns each: what fits into registers."""
    return {1: 14, 2: 12, 3: 8, 4: 6}[vectors] if _has("avx512f") else max(1, 6 // vectors)


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in its vectors, and has nothing faster for them."""
    return _has("avx512bf16") and not _has("amx-bf16")


def _tile(
    context: Any,
    shape: Any,
    left: Any,
    at: Any,
    jump: Any,
    segments: Any,
    right: Any,
    panel: Any,
    start: Any,
    begin: Any,
    target: Any,
    to: Any,
    down: Any,
) -> Any:
    """A tile of a product of matrices, one of which may be pixels that overlap.

    target[to + r * down + n] = start[begin + n] + the sum over s and k of
    left[at + s * jump + r * step + k] * right[panel + (s * depth + k) * N + n].
    shape: constants (rows r, vectors of LANES n: N, step, depth). left, right: float32, or pairs of bfloat16 as
    int32, whose products are added to one another. start, target: float32. Arrays are addressed flat.
    """
    place = types.int64
    kinds = (left, place, place, place, right, place, start, place, target, place, place)
    return types.void(shape, *kinds), partial(_multiply, shape)


def _sloped_tile(
    context: Any,
    shape: Any,
    left: Any,
    at: Any,
    jump: Any,
    segments: Any,
    right: Any,
    panel: Any,
    start: Any,
    begin: Any,
    target: Any,
    to: Any,
    down: Any,
    slopes: Any,
) -> Any:
    """`_tile`, then what is negative multiplied by its slope: slopes[begin + n], float32."""
    place = types.int64
    kinds = (left, place, place, place, right, place, start, place, target, place, place, slopes)
    return types.void(shape, *kinds), partial(_multiply, shape)


def _multiply(shape: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    rows, vectors, step, depth = (each.literal_value for each in shape)
    write = Code(context, builder)
    _, *kinds = signature.args
    _, *given = arguments
    pixels, weights, sums, answers = (
        write.element(kinds[which], given[which], given[which + 1]) for which in (0, 4, 6, 8)
    )

    def numbers(k: Any, pixel: Any, row: Any, *totals: Any) -> list[Any]:
        factors = [write.load(write.beyond(row, v * LANES)) for v in range(vectors)]
        added = []
        for r in range(rows):
            one = write.everywhere(builder.load(write.beyond(pixel, r * step)))
            added += [
                write.added(total, one, factor)
                for total, factor in zip(totals[r * vectors :], factors, strict=False)
            ]
        return [write.beyond(pixel, 1), write.beyond(row, vectors * LANES), *added]

    def segment(s: Any, pixel: Any, row: Any, *sums: Any) -> list[Any]:
        here, totals = pixel, list(sums)
        if step < depth or depth > LANES:
            # Written out, what overlaps would be loaded once and kept, more than there are registers.
            _, row, *totals = write.loop(PLACE(depth), 1, [pixel, row, *totals], numbers)
        else:
            for k in range(depth):
                here, row, *totals = numbers(k, here, row, *totals)
        return [write.beyond(pixel, given[2]), row, *totals]

    first = [write.load(write.beyond(sums, v * LANES)) for v in range(vectors)] * rows
    _, _, *totals = write.loop(given[3], 1, [pixels, weights, *first], segment)
    last = [write.element(kind, array, given[7]) for kind, array in zip(kinds[11:], given[11:], strict=True)]
    for v in range(vectors):
        slopes = [write.load(write.beyond(each, v * LANES)) for each in last]
        for r, total in enumerate(totals[v::vectors]):
            row = write.beyond(answers, builder.mul(given[10], PLACE(r)))
            place = write.beyond(row, v * LANES)
            write.store(write.sloped(total, *slopes) if slopes else total, place)
    return context.get_dummy_value()


def _pixel_tile(
    context: Any,
    shape: Any,
    sources: Any,
    widths: Any,
    pixel: Any,
    right: Any,
    panel: Any,
    bias: Any,
    slopes: Any,
    begin: Any,
    target: Any,
    to: Any,
    down: Any,
) -> Any:
    """A tile of a product of matrices, the left one in several arrays, whose sums go to pixels in bfloat16.

    target[to + r * down + n] = what is negative sloped, of bias[begin + n] + the sum over all sources and k of
    source[(pixel + r) * width + k] * right[panel + ...], and of what is there already where it `adds`.
    shape: constants (rows r, vectors of LANES n, adds: 0 or 1). sources, widths: tuples. sources, right: pairs of
    bfloat16 as int32, widths multiples of `STEP`. bias, slopes: float32. target: the bits of bfloat16 as int16.
    """
    place = types.int64
    kinds = (sources, widths, place, right, place, bias, slopes, place, target, place, place)
    return types.void(shape, *kinds), partial(_multiply_pixels, shape)


def _multiply_pixels(shape: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    rows, vectors, adds = (each.literal_value for each in shape)
    write = Code(context, builder)
    _, *kinds = signature.args
    _, *given = arguments
    row, bias, slopes, answers = (
        write.element(kinds[which], given[which], given[at]) for which, at in ((3, 4), (5, 7), (6, 7), (8, 9))
    )
    totals = [write.load(write.beyond(bias, v * LANES)) for v in range(vectors)] * rows
    for which in range(kinds[0].count):
        width = builder.extract_value(given[1], which)
        array = builder.extract_value(given[0], which)
        first = write.element(kinds[0].dtype, array, builder.mul(given[2], width))
        steps = [builder.mul(width, PLACE(r)) for r in range(rows)]

        def segment(s: Any, pixel: Any, row: Any, *totals: Any, steps: Any = steps) -> list[Any]:
            for k in range(STEP):
                factors = [write.load(write.beyond(row, (k * vectors + v) * LANES)) for v in range(vectors)]
                ones = [
                    write.everywhere(builder.load(write.beyond(write.beyond(pixel, step), k)))
                    for step in steps
                ]
                pairs = ((one, factor) for one in ones for factor in factors)
                totals = [write.added(total, *pair) for total, pair in zip(totals, pairs, strict=True)]
            return [write.beyond(pixel, STEP), write.beyond(row, STEP * vectors * LANES), *totals]

        count = builder.udiv(width, PLACE(STEP))
        _, row, *totals = write.loop(count, 1, [first, row, *totals], segment)
    for v in range(vectors):
        slope = write.load(write.beyond(slopes, v * LANES))
        for r, total in enumerate(totals[v::vectors]):
            place = write.beyond(answers, builder.add(builder.mul(given[10], PLACE(r)), PLACE(v * LANES)))
            total = builder.fadd(total, write.load(place)) if adds else total
            write.store(write.sloped(total, slope), place)
    return context.get_dummy_value()


def _fetch(context: Any, source: Any, at: Any, count: Any) -> Any:
    """Ask for some numbers of a flat array, which will be wanted soon, to come to the cache."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        write = Code(context, builder)
        first = write.element(signature.args[0], given[0], given[1])

        def line(c: Any) -> list[Any]:
            write.fetch(write.beyond(first, c))
            return []

        write.loop(given[2], CACHE_LINE * 8 // first.type.pointee.width, [], line)
        return context.get_dummy_value()

    place = types.int64
    return types.void(source, place, place), code


def _grid(
    context: Any,
    matrix: Any,
    source: Any,
    at: Any,
    down: Any,
    across: Any,
    target: Any,
    to: Any,
    under: Any,
    beside: Any,
    hop: Any,
    channels: Any,
) -> Any:
    """M X M' of a square grid X of vectors, for every channel by itself.

    matrix: constants, how many columns M has and its numbers row by row. Rows of the grid are `down` apart in the
    source, its columns `across`, its channels (a multiple of LANES) are side by side; in the target `under`,
    `beside`, and vectors of channels `hop`. source, target: float32, or the bits of bfloat16 as int16; addressed
    flat.
    """
    place = types.int64
    kinds = (source, *[place] * 3, target, *[place] * 5)
    return types.void(matrix, *kinds), partial(_transform, matrix)


def _finished_grid(
    context: Any,
    matrix: Any,
    source: Any,
    at: Any,
    down: Any,
    across: Any,
    target: Any,
    to: Any,
    under: Any,
    beside: Any,
    hop: Any,
    channels: Any,
    bias: Any,
    slopes: Any,
) -> Any:
    """`_grid`, then a bias added and what is negative multiplied by its slope: both (channels,) float32."""
    place = types.int64
    kinds = (source, *[place] * 3, target, *[place] * 5, bias, slopes)
    return types.void(matrix, *kinds), partial(_transform, matrix)


def _transform(matrix: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    write = Code(context, builder)
    _, *kinds = signature.args
    _, *given = arguments
    side, *numbers = (each.literal_value for each in matrix)
    rows = [numbers[start : start + side] for start in range(0, len(numbers), side)]
    source, target = (write.element(kinds[which], given[which], given[which + 1]) for which in (0, 4))
    last = [write.element(kinds[which], given[which], PLACE(0)) for which in range(10, len(kinds))]

    def channels(c: Any) -> list[Any]:
        found = _product(write, rows, write.beyond(source, c), given[2], given[3])
        finish = [write.load(write.beyond(each, c)) for each in last]
        vector = write.beyond(target, builder.mul(builder.udiv(c, PLACE(LANES)), given[8]))
        for y, line in enumerate(found):
            row = write.beyond(vector, builder.mul(given[6], PLACE(y)))
            for x, value in enumerate(line):
                if finish:
                    value = write.sloped(builder.fadd(value, finish[0]), finish[1])
                write.store(value, write.beyond(row, builder.mul(given[7], PLACE(x))))
        return []

    write.loop(given[9], LANES, [], channels)
    return context.get_dummy_value()


def _product(write: Code, matrix: list[list[float]], source: Any, down: Any, across: Any) -> list[list[Any]]:
    """M X M' of the grid of vectors that begins at an address."""
    columns = []
    for x in range(len(matrix[0])):
        column = write.beyond(source, write.builder.mul(across, PLACE(x)))
        places = (write.beyond(column, write.builder.mul(down, PLACE(y))) for y in range(len(matrix[0])))
        values = [write.load(place) for place in places]
        columns.append([write.combined(row, values) for row in matrix])
    return [[write.combined(row, line) for row in matrix] for line in zip(*columns, strict=True)]


def _peak(
    context: Any,
    window: Any,
    source: Any,
    one: Any,
    two: Any,
    three: Any,
    left: Any,
    middle: Any,
    right: Any,
    target: Any,
    to: Any,
    channels: Any,
) -> Any:
    """The maxima of a window of vectors, for every channel by itself.

    window: a constant, 2 or 3: a window of 2 leaves out the second row and column. one, two, three: where the rows
    begin in the source; left, middle, right: columns, from there on. source, target: as `_grid` takes them.
    """
    place = types.int64
    kinds = (source, *[place] * 6, target, place, place)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write = Code(context, builder)
        _, *kinds = signature.args
        _, *given = arguments
        kept = slice(None, None, 2 if window.literal_value == 2 else 1)
        rows = [write.element(kinds[0], given[0], row) for row in given[1:4][kept]]
        places = [write.beyond(row, column) for row in rows for column in given[4:7][kept]]
        answer = write.element(kinds[7], given[7], given[8])

        def channels(c: Any) -> list[Any]:
            most, *others = (write.load(write.beyond(place, c)) for place in places)
            for other in others:
                most = builder.select(builder.fcmp_ordered(">", most, other), most, other)
            write.store(most, write.beyond(answer, c))
            return []

        write.loop(given[9], LANES, [], channels)
        return context.get_dummy_value()

    return types.void(window, *kinds), code


def _move(context: Any, source: Any, at: Any, target: Any, to: Any, count: Any) -> Any:
    """Copy numbers of a flat array, a multiple of LANES."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        write = Code(context, builder)
        here, there = (
            write.element(signature.args[which], given[which], given[which + 1]) for which in (0, 2)
        )
        kind = ir.VectorType(here.type.pointee, LANES).as_pointer()

        def vector(c: Any) -> list[Any]:
            value = builder.load(builder.bitcast(write.beyond(here, c), kind))
            place = builder.bitcast(write.beyond(there, c), kind)
            value.align = builder.store(value, place).align = 2
            return []

        write.loop(given[4], LANES, [], vector)
        return context.get_dummy_value()

    place = types.int64
    return types.void(source, place, target, place, place), code


# Called in compiled loops without the first argument.
tile: Any = intrinsic(prefer_literal=True)(_tile)
grid: Any = intrinsic(prefer_literal=True)(_grid)
sloped_tile: Any = intrinsic(prefer_literal=True)(_sloped_tile)
pixel_tile: Any = intrinsic(prefer_literal=True)(_pixel_tile)
move: Any = intrinsic(_move)
fetch: Any = intrinsic(_fetch)
peak: Any = intrinsic(prefer_literal=True)(_peak)
finished_grid: Any = intrinsic(prefer_literal=True)(_finished_grid)
