"""LLVM code in the making, with words for vectors of numbers: what `tiles.py` and `grids.py` are written in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

# Numbers side by side; a CPU with shorter registers takes several for them.
LANES = 16

FLOAT, INT, PLACE, SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16)
FLOATS, INTS, SHORTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, SHORT))


class Code:
    """Code in the making, with words for vectors of `LANES`."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def element(self, kind: Any, array: Any, at: Any) -> Any:
        """The address of an element of a contiguous array."""
        return self.beyond(self.context.make_array(kind)(self.context, self.builder, array).data, at)

    def beyond(self, address: Any, count: Any) -> Any:
        """The address some elements further on."""
        return self.builder.gep(address, [count if hasattr(count, "type") else PLACE(count)])

    def load(self, address: Any) -> Any:
        """The numbers from an address on: float32, pairs as int32, or the bits of bfloat16 widened to float32."""
        kind = ir.VectorType(address.type.pointee, LANES)
        found = self.builder.load(self.builder.bitcast(address, kind.as_pointer()))
        found.align = kind.element.width // 8 if kind.element != FLOAT else 4
        if kind != SHORTS:
            return found
        bits = self.builder.shl(self.builder.zext(found, INTS), ir.Constant(INTS, [16] * LANES))
        return self.builder.bitcast(bits, FLOATS)

    def store(self, values: Any, address: Any) -> None:
        """Put float32 there, rounded where there is bfloat16."""
        if address.type.pointee == SHORT:
            values = self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", SHORTS, [values])
        place = self.builder.bitcast(address, values.type.as_pointer())
        self.builder.store(values, place).align = 2 if values.type == SHORTS else 4

    def fetch(self, address: Any, cache: int) -> None:
        """Ask for what is there to come to the first cache (3) or the second (2)."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
        ask = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        to_read, near, data = INT(0), INT(cache), INT(1)
        self.builder.call(ask, [self.builder.bitcast(address, byte), to_read, near, data])

    def everywhere(self, value: Any) -> Any:
        """A number in all lanes."""
        kind = ir.VectorType(value.type, LANES)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, value, INT(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * LANES))

    def call(self, name: str, result: Any, values: Sequence[Any]) -> Any:
        """An instruction that LLVM has a name for."""
        kind = ir.FunctionType(result, [each.type for each in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)

    def added(self, total: Any, one: Any, other: Any) -> Any:
        """total + one * other; of pairs both products."""
        if one.type == INTS:
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [total, other, one])
        return self.call(f"llvm.fmuladd.v{LANES}f32", FLOATS, [one, other, total])

    def loop(self, count: Any, step: int, carried: Sequence[Any], body: Any) -> list[Any]:
        """Call `body(at, *carried)`, which gives what is carried on, for 0, step, … below count, once at least."""
        builder, entry = self.builder, self.builder.block
        inside, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(inside)
        builder.position_at_end(inside)
        at, *kept = [builder.phi(each.type) for each in (PLACE(0), *carried)]
        after = body(at, *kept)
        following = builder.add(at, PLACE(step))
        for phi, first, later in zip((at, *kept), (PLACE(0), *carried), (following, *after), strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(later, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, done)
        builder.position_at_end(done)
        return list(after)

    def combined(self, weights: Sequence[float], values: Sequence[Any]) -> Any:
        """The sum of vectors, each times a constant, not all of them 0."""
        total = None
        for weight, value in zip(weights, values, strict=True):
            if weight == 0:
                continue
            if total is None:
                total = value if weight == 1 else self.builder.fmul(value, _constant(weight))
            elif abs(weight) == 1:
                total = (self.builder.fadd if weight > 0 else self.builder.fsub)(total, value)
            else:
                total = self.added(total, _constant(weight), value)
        return total

    def sloped(self, value: Any, slopes: Any) -> Any:
        """PReLU."""
        above = self.builder.fcmp_ordered(">", value, _constant(0))
        return self.builder.select(above, value, self.builder.fmul(value, slopes))


def _constant(number: float) -> Any:
    return ir.Constant(FLOATS, [float(number)] * LANES)
