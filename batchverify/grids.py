"""Small grids of vectors of channels, transformed or reduced in registers: what compiled convolutions are made of.

Written as LLVM's own code, as `tiles.py` is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batchverify.vectors import LANES, PLACE, Code


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
    bias: Any,
    slopes: Any,
    begin: Any,
) -> Any:
    """`_grid` of LANES channels, then a bias added and what is negative multiplied by its slope.

    bias, slopes: float32, from `begin` on.
    """
    place = types.int64
    kinds = (source, *[place] * 3, target, *[place] * 3, bias, slopes, place)
    return types.void(matrix, *kinds), partial(_finish, matrix)


def _transform(matrix: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    write = Code(context, builder)
    source, target = _corners(write, signature, arguments)
    _, *given = arguments

    def channels(c: Any) -> list[Any]:
        found = _product(write, matrix, write.beyond(source, c), given[2], given[3])
        vector = write.beyond(target, builder.mul(builder.udiv(c, PLACE(LANES)), given[8]))
        _store(write, found, vector, given[6], given[7])
        return []

    write.loop(given[9], LANES, [], channels)
    return context.get_dummy_value()


def _finish(matrix: Any, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    write = Code(context, builder)
    source, target = _corners(write, signature, arguments)
    _, *kinds = signature.args
    _, *given = arguments
    bias, slopes = (write.load(write.element(kinds[which], given[which], given[10])) for which in (8, 9))
    found = _product(write, matrix, source, given[2], given[3])
    ended = [[write.sloped(builder.fadd(value, bias), slopes) for value in line] for line in found]
    _store(write, ended, target, given[6], given[7])
    return context.get_dummy_value()


def _corners(write: Code, signature: Any, arguments: Any) -> list[Any]:
    """Where the grids begin, in the source and in the target."""
    return [write.element(signature.args[at], arguments[at], arguments[at + 1]) for at in (1, 5)]


def _store(write: Code, grid: list[list[Any]], first: Any, under: Any, beside: Any) -> None:
    for y, line in enumerate(grid):
        row = write.beyond(first, write.builder.mul(under, PLACE(y)))
        for x, value in enumerate(line):
            write.store(value, write.beyond(row, write.builder.mul(beside, PLACE(x))))


def _product(write: Code, matrix: Any, source: Any, down: Any, across: Any) -> list[list[Any]]:
    """M X M' of the grid of vectors that begins at an address."""
    side, *numbers = (each.literal_value for each in matrix)
    rows = [numbers[start : start + side] for start in range(0, len(numbers), side)]
    columns = []
    for x in range(side):
        column = write.beyond(source, write.builder.mul(across, PLACE(x)))
        places = (write.beyond(column, write.builder.mul(down, PLACE(y))) for y in range(side))
        values = [write.load(place) for place in places]
        columns.append([write.combined(row, values) for row in rows])
    return [[write.combined(row, line) for row in rows] for line in zip(*columns, strict=True)]


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
grid: Any = intrinsic(prefer_literal=True)(_grid)
finished_grid: Any = intrinsic(prefer_literal=True)(_finished_grid)
peak: Any = intrinsic(prefer_literal=True)(_peak)
move: Any = intrinsic(_move)
