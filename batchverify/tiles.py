"""Tiles of matrix products, kept in registers: what compiled convolutions are made of.

Written as LLVM's own code: numba's loops cannot say which numbers stay in registers.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from batchverify.vectors import LANES, PLACE, Code

# Of `pixel_tile`: pixels, and vectors of outputs, whose sums stay in registers (fewer loads than one long column
# has), and pairs of channels that are multiplied before the next round of its loop.
ROWS = 8
VECTORS = 2
PANEL = VECTORS * LANES
ROUND = 8
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
    depths: Any,
    pixel: Any,
    step: Any,
    jump: Any,
    segments: Any,
    right: Any,
    panel: Any,
    bias: Any,
    slopes: Any,
    begin: Any,
    target: Any,
    to: Any,
    down: Any,
) -> Any:
    """A tile of a product of matrices, the left one pixels of one or several arrays; sums go out in bfloat16.

    target[to + r * down + n] = what is negative sloped, of bias[begin + n] + the sum over all sources, s and k of
    source[(pixel + s * jump + r * step) * depth + k] * right[panel + ...], and of what is there already where it
    `adds`. shape: constants (rows r, vectors of LANES n, adds: 0 or 1). sources, depths: tuples, depths multiples of
    `ROUND`. sources, right: pairs of bfloat16 as int32. bias, slopes: float32. target: the bits of bfloat16 as int16.
    """
    place = types.int64
    kinds = (sources, depths, *[place] * 4, right, place, bias, slopes, place, target, place, place)
    return types.void(shape, *kinds), partial(_multiply_pixels, shape)


def _multiply_pixels(shape: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    rows, vectors, adds = (each.literal_value for each in shape)
    write = Code(context, builder)
    _, *kinds = signature.args
    _, sources, depths, pixel, step, jump, segments, *given = arguments
    right, bias, slopes, answers = (
        write.element(kinds[6 + which], given[which], given[at])
        for which, at in ((0, 1), (2, 4), (3, 4), (5, 6))
    )
    totals = [write.load(write.beyond(bias, v * LANES)) for v in range(vectors)] * rows
    for which in range(kinds[0].count):
        array, depth = builder.extract_value(sources, which), builder.extract_value(depths, which)
        along = [builder.mul(builder.mul(step, depth), PLACE(r)) for r in range(rows)]
        rounds, hop = builder.udiv(depth, PLACE(ROUND)), builder.mul(jump, depth)

        def numbers(_: Any, pixel: Any, row: Any, *totals: Any, along: Any = along) -> list[Any]:
            for k in range(ROUND):
                factors = [write.load(write.beyond(row, (k * vectors + v) * LANES)) for v in range(vectors)]
                places = (write.beyond(write.beyond(pixel, far), k) for far in along)
                ones = [write.everywhere(builder.load(place)) for place in places]
                pairs = ((one, factor) for one in ones for factor in factors)
                totals = tuple(write.added(total, *pair) for total, pair in zip(totals, pairs, strict=True))
            return [write.beyond(pixel, ROUND), write.beyond(row, ROUND * vectors * LANES), *totals]

        def segment(
            s: Any, first: Any, row: Any, *totals: Any, rounds: Any = rounds, hop: Any = hop
        ) -> list[Any]:
            _, *after = write.loop(rounds, 1, [first, row, *totals], numbers)
            return [write.beyond(first, hop), *after]

        first = write.element(kinds[0].dtype, array, builder.mul(pixel, depth))
        _, right, *totals = write.loop(segments, 1, [first, right, *totals], segment)
    for v in range(vectors):
        slope = write.load(write.beyond(slopes, v * LANES))
        for r, total in enumerate(totals[v::vectors]):
            place = write.beyond(answers, builder.add(builder.mul(given[7], PLACE(r)), PLACE(v * LANES)))
            total = builder.fadd(total, write.load(place)) if adds else total
            write.store(write.sloped(total, slope), place)
    return context.get_dummy_value()


def _fetch_range(context: Any, source: Any, at: Any, count: Any) -> Any:
    """Ask for some numbers of a flat array, which will be wanted soon, to come to the second cache."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        write = Code(context, builder)
        first = write.element(signature.args[0], given[0], given[1])

        def line(c: Any) -> list[Any]:
            write.fetch(write.beyond(first, c), 2)
            return []

        write.loop(given[2], CACHE_LINE // context.get_abi_sizeof(first.type.pointee), [], line)
        return context.get_dummy_value()

    place = types.int64
    return types.void(source, place, place), code


# Called in compiled loops without the first argument.
tile: Any = intrinsic(prefer_literal=True)(_tile)
sloped_tile: Any = intrinsic(prefer_literal=True)(_sloped_tile)
pixel_tile: Any = intrinsic(prefer_literal=True)(_pixel_tile)
fetch_range: Any = intrinsic(_fetch_range)
