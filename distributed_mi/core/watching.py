"""Numbers in memory by which threads tell each other something without the interpreter's lock."""

import platform

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}
"""How a processor is told that a loop only waits, so that it saves power and gives way to its other thread."""


@intrinsic
def _read(typing_context, address):
    """The int64 at an address as another thread left it, with all that it wrote before."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), build


@intrinsic
def _write(typing_context, address, value):
    """Leave an int64 at an address, after all that was written before."""

    def build(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _pause(typing_context):
    def build(context, builder, signature, args):
        if platform.machine() in _PAUSE:
            name, values = _PAUSE[platform.machine()]
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [number] * len(values))
            instruction = builder.module.declare_intrinsic(name, (), kind)
            builder.call(instruction, [number(v) for v in values])
        return context.get_dummy_value()

    return types.void(), build


@njit(nogil=True, cache=True)
def watch(words, place, value, looks):
    """Whether a number became a value while it was looked at."""
    address = words.ctypes.data + 8 * place
    for _ in range(looks):
        if _read(address) == value:
            return True
        _pause()
    return False


@njit(nogil=True, cache=True)
def tell(words, place, value):
    """Let the number at a place become a value."""
    _write(words.ctypes.data + 8 * place, value)
