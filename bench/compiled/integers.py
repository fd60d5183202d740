"""The integer instructions of SASS that decide branches and addresses, on the 32-bit registers of a block's threads.

A register is a uint64 array with an element a thread (or one for all); its upper half is 0. `EVALUATE` maps an opcode's
first word to a function of (instruction, sources) that returns the destinations' values, or None if it is not known.
Instructions that are not listed yield unknown values: floating point never reaches a branch of these kernels.
Meanings: NVIDIA's "CUDA Binary Utilities", instruction set reference; the carry and extension rules were read off
compiled 64-bit arithmetic and are checked by tests/bench/compiled/test_emulate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .sass import Instruction

Value = Any  # uint64 array of a register, bool array of a predicate, or None: unknown
MASK = np.uint64(0xFFFFFFFF)
U32 = np.uint64(32)


def u64(value: Any) -> Any:
    return np.asarray(value).astype(np.uint64)


def low(value: Any) -> Any:
    return u64(value) & MASK


def high(value: Any) -> Any:
    return (u64(value) >> U32) & MASK


def signed(value: Any) -> Any:
    """A 32-bit register as int64."""
    return (np.asarray(value).astype(np.int64) ^ 0x80000000) - 0x80000000


def _wide(a: Any, b: Any, unsigned: bool) -> Any:
    return u64(a) * u64(b) if unsigned else (signed(a) * signed(b)).astype(np.uint64)


def _add3(x: Instruction, a: Value, b: Value, c: Value, *carries: Value) -> tuple[Value, ...]:
    """IADD3: the sum; whether it exceeds 32 bits once, twice. A negated operand is 2³² − b: carry = no borrow."""
    total = u64(a) + u64(b) + u64(c) + sum((u64(carry) for carry in carries), np.uint64(0))
    over = total >> U32
    return low(total), over >= 1, over >= 2


def _add_64(x: Instruction, a: Value, b: Value, c: Value = 0) -> tuple[Value, ...]:
    total = u64(a) + u64(b) + u64(c)
    return low(total), high(total)


def _add(x: Instruction, a: Value, b: Value) -> tuple[Value, ...]:
    return _add_64(x, a, b) if "64" in x.words else (low(u64(a) + u64(b)),)


def _multiply_add(x: Instruction, a: Value, b: Value, c: Value, *carry: Value) -> tuple[Value, ...]:
    unsigned = "U32" in x.words
    if "WIDE" in x.words:
        product = _wide(a, b, unsigned)
        total = product + u64(c)
        return low(total), high(total), total < product
    if "HI" in x.words:  # of the sum with a register pair
        return (high(_wide(a, b, unsigned) + u64(c)),)
    if "MOV" in x.words:
        return (low(c),)
    if "SHL" in x.words or "IADD" in x.words:
        return (low(u64(a) * u64(b) + u64(c)),)
    return (low(u64(a) * u64(b) + u64(c) + sum((u64(one) for one in carry), np.uint64(0))),)


def _lea(x: Instruction, a: Value, b: Value, *rest: Value) -> tuple[Value, ...]:
    if "HI" not in x.words:  # b + (a << s), with carry
        total = low(u64(a) << u64(rest[0])) + u64(b)
        carry = rest[1] if len(rest) > 1 else 0
        total = total + u64(carry)
        return low(total), total > MASK
    if "SX32" in x.words:  # b + the upper half of (a, sign-extended) << s
        shift, carry = rest[0], rest[1] if len(rest) > 1 else 0
        wide = signed(a).astype(np.uint64) << u64(shift)
    else:
        shift, carry = rest[1], rest[2] if len(rest) > 2 else 0
        wide = (low(a) | (low(rest[0]) << U32)) << u64(shift)
    total = high(wide) + u64(b) + u64(carry)
    return low(total), total > MASK


def _shift(x: Instruction, a: Value, s: Value, c: Value) -> tuple[Value, ...]:
    """SHF: shifts the pair {c, a}; HI returns the upper half."""
    s = u64(s)
    s = s & np.uint64(31) if "W" in x.words else np.minimum(s, np.uint64(63))
    pair = low(a) | (low(c) << U32)
    if "L" in x.words:
        if "HI" in x.words:
            return (high(pair << s),)
        return (low(low(a) << s),)
    if "HI" in x.words:
        return (low(signed(c) >> np.minimum(s, np.uint64(31)).astype(np.int64)),) if "S32" in x.words else (c >> s,)
    if "S64" in x.words:
        return (low(pair.astype(np.int64) >> s.astype(np.int64)),)
    return (low(pair >> s),)


def _lut(table: int, a: Any, b: Any, c: Any, every: Any) -> Any:
    """The bitwise function of three operands with this truth table; ``every``: all bits set."""
    result = np.zeros_like(a & b & c)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else a ^ every) & (b if i & 2 else b ^ every) & (c if i & 1 else c ^ every))
    return result


def _lop3(x: Instruction, a: Value, b: Value, c: Value, table: Value, *rest: Value) -> tuple[Value, ...]:
    result = _lut(int(table), u64(a), u64(b), u64(c), MASK)
    return result, result != 0


def _plop3(x: Instruction, a: Value, b: Value, c: Value, first: Value, second: Value) -> tuple[Value, ...]:
    a, b, c = (np.asarray(one).astype(bool) for one in (a, b, c))
    return tuple(_lut(int(table), a, b, c, np.bool_(True)) for table in (first, second))


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def _as_compared(x: Instruction, a: Value, b: Value) -> tuple[Any, Any]:
    """Operands as integers that numpy orders as the instruction does."""
    if "S64" in x.words:
        return u64(a).astype(np.int64), u64(b).astype(np.int64)
    return (u64(a), u64(b)) if "U32" in x.words or "U64" in x.words else (signed(a), signed(b))


def _compare(x: Instruction, a: Value, b: Value, also: Value, below: Value = None) -> tuple[Value, ...]:
    """ISETP. With EX ``below`` is the comparison of the lower halves, which decides where the upper ones are equal."""
    a, b = _as_compared(x, a, b)
    found = COMPARE[x.words[1]](a, b)
    if "EX" in x.words:
        if x.words[1] == "EQ":
            found = found & below
        elif x.words[1] == "NE":
            found = found | below
        else:
            found = np.where(a == b, below, found)
    joined = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[
        next(word for word in x.words[2:] if word in ("AND", "OR", "XOR"))
    ]
    return joined(found, also), joined(~found, also)


def _smaller_or_larger(x: Instruction, a: Value, b: Value, smaller: Value, *_: Value) -> tuple[Value, ...]:
    a, b = _as_compared(x, a, b)
    found = np.where(smaller, np.minimum(a, b), np.maximum(a, b))
    return (low(found), high(found)) if "S64" in x.words or "U64" in x.words else (low(found),)


def _add_smaller_or_larger(x: Instruction, a: Value, b: Value, c: Value, smaller: Value) -> tuple[Value, ...]:
    return _smaller_or_larger(x, low(u64(a) + u64(b)), c, smaller)


def _permute(x: Instruction, a: Value, selector: Value, b: Value) -> tuple[Value, ...]:
    """PRMT: each nibble of the selector takes a byte of {b, a}; its top bit repeats that byte's sign."""
    if len(x.words) > 1:
        return (None,)
    pair, selector = low(a) | (low(b) << U32), u64(selector)
    result: Any = np.uint64(0)
    for i in range(4):
        nibble = selector >> np.uint64(4 * i)
        byte = (pair >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i))
    return (result,)


def _extend(x: Instruction, a: Value, bits: Value) -> tuple[Value, ...]:
    kept = u64(a) & ((np.uint64(1) << u64(bits)) - np.uint64(1))
    if "U32" in x.words:
        return (kept,)
    sign = np.uint64(1) << (u64(bits) - np.uint64(1))
    return (low((kept ^ sign) + (np.uint64(1 << 32) - sign)),)


def _as_float(bits: Value) -> Any:
    return np.asarray(bits).astype(np.uint32).view(np.float32)


def _as_bits(number: Any) -> Any:
    return u64(np.asarray(number, np.float32).view(np.uint32))


def _to_float(x: Instruction, a: Value) -> tuple[Value, ...]:
    """I2F, which integer division begins with; RP rounds up."""
    if any(word in x.words for word in ("F64", "F16", "U64", "S64", "U16", "U8", "S8", "S16")):
        return (None,)
    exact = (u64(a) if "U32" in x.words else signed(a)).astype(np.float64)
    found = exact.astype(np.float32)
    if "RP" in x.words:
        found = np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found).astype(np.float32)
    return (_as_bits(found),)


def _reciprocal(x: Instruction, a: Value) -> tuple[Value, ...]:
    if x.words[1] != "RCP":
        return (None,)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return (_as_bits(np.float32(1) / _as_float(a)),)


def _to_integer(x: Instruction, a: Value) -> tuple[Value, ...]:
    if "TRUNC" not in x.words or "F64" in x.words:
        return (None,)
    with np.errstate(invalid="ignore"):
        number = np.nan_to_num(np.trunc(_as_float(a).astype(np.float64)), nan=0.0)
    least, most = (0, 0xFFFFFFFF) if "U32" in x.words else (-(2**31), 2**31 - 1)
    return (low(np.clip(number, least, most).astype(np.int64)),)


def _half_constant(x: Instruction, *sources: Value) -> tuple[Value, ...]:
    """HFMA2.MMA R, −RZ, RZ, upper, lower: how ptxas loads a constant through another pipe."""
    if not (x.operands[1] == "-RZ" and x.operands[2] == "RZ" and len(x.operands) == 5) or "BF16_V2" in x.words:
        return (None,)
    upper, lower = (int(np.float16(float(text)).view(np.uint16)) for text in x.operands[3:])
    return (u64(upper << 16 | lower),)


def _select(x: Instruction, a: Value, b: Value, chosen: Value) -> tuple[Value, ...]:
    return _copy(x, np.where(chosen, u64(a), u64(b)))


def _absolute(x: Instruction, a: Value) -> tuple[Value, ...]:
    return (low(np.abs(signed(a))),)


def _copy(x: Instruction, a: Value, *_: Value) -> tuple[Value, ...]:
    return (low(a), high(a)) if "64" in x.words else (u64(a),)


def _first_lane(x: Instruction, a: Value, *_: Value) -> tuple[Value, ...]:
    """R2UR: a uniform register has the value of the warp's first lane."""
    a = u64(a)
    return (np.repeat(a.reshape(-1, 32)[:, 0], 32) if a.size >= 32 else a,)


def _leading_one(x: Instruction, a: Value) -> tuple[Value, ...]:
    """FLO: the position of the highest bit; all ones if there is none."""
    if x.words[1:] != ("U32",):
        return (None,)
    a = u64(a)
    return (np.where(a == 0, MASK, np.floor(np.log2(np.maximum(a, 1).astype(np.float64))).astype(np.uint64)),)


def _shuffle(x: Instruction, a: Value, lane: Value, _: Value) -> tuple[Value, ...]:
    a = u64(a)
    if a.size < 32:
        return True, a
    lanes = np.arange(a.size) % 32
    step = np.broadcast_to(u64(lane).astype(np.int64), a.shape)
    other = {"BFLY": lanes ^ step, "IDX": step, "UP": lanes - step, "DOWN": lanes + step}[x.words[1]]
    inside = (other >= 0) & (other < 32)
    return inside, a[np.arange(a.size) - lanes + np.where(inside, other, lanes)]


EVALUATE: dict[str, Callable[..., Sequence[Value]]] = {
    "MOV": _copy,
    "IADD": _add,
    "VIADD": _add,
    "IADD3": lambda x, *sources: (_add_64 if "64" in x.words else _add3)(x, *sources),
    "IMAD": _multiply_add,
    "LEA": _lea,
    "SHF": _shift,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "SEL": _select,
    "FSEL": _select,
    "ISETP": _compare,
    "IMNMX": _smaller_or_larger,
    "VIMNMX": _smaller_or_larger,
    "VIADDMNMX": _add_smaller_or_larger,
    "IABS": _absolute,
    "PRMT": _permute,
    "SGXT": _extend,
    "I2F": _to_float,
    "I2FP": _to_float,
    "MUFU": _reciprocal,
    "F2I": _to_integer,
    "HFMA2": _half_constant,
    "FLO": _leading_one,
    "R2UR": _first_lane,
    "SHFL": _shuffle,
}
