"""Single instructions that numba has no word for, to be used in compiled loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from batchverify.vectors import Code


def _wide(context: Any, value: Any) -> Any:
    """The float32 of a float16's bits, one instruction for many of them; a float32 as it is."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(value), code


def _fetch(context: Any, row: Any, at: Any) -> Any:
    """Have the cache line of `row[at]` brought while something else is computed."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write = Code(context, builder)
        write.fetch(write.element(row, *arguments), 3)
        return context.get_dummy_value()

    return types.void(row, at), code


def _copy(context: Any, source: Any, target: Any, start: Any) -> Any:
    """Write all bytes of one array into another from `start` on, where there must be room.

    Not `target[start:end] = source`: what numba compiles for its errors takes two seconds.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = zip((source, target), arguments, strict=False)
        given, taken = (context.make_array(kind)(context, builder, each) for kind, each in kinds)
        place = builder.gep(taken.data, [arguments[2]])
        cgutils.raw_memcpy(builder, place, given.data, given.nitems, 1)
        return context.get_dummy_value()

    return types.void(source, target, types.int64), code


# Called in loops without the first argument.
copy: Any = intrinsic(_copy)
wide: Any = intrinsic(_wide)
fetch: Any = intrinsic(_fetch)
