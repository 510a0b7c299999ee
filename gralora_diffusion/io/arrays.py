"""Tensors of safetensors files as numpy arrays, without torch, which takes seconds to import.

numpy has neither bfloat16 nor 8-bit floats. Their values are exact in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensor_files import StoredTensor

Array = NDArray[Any]
#: The format's name of a dtype -> torch's name, and numpy's dtype of the same number of bits.
_DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "i1"),
    "U64": ("uint64", "<u8"),
    "U32": ("uint32", "<u4"),
    "U16": ("uint16", "<u2"),
    "U8": ("uint8", "u1"),
    "BOOL": ("bool", "?"),
    "C64": ("complex64", "<c8"),
    "F8_E4M3": ("float8_e4m3fn", "u1"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "u1"),
    "F8_E5M2": ("float8_e5m2", "u1"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "u1"),
    "F8_E8M0": ("float8_e8m0fnu", "u1"),
}
#: 8-bit floats: bits of the mantissa, bias of the exponent, and the bytes of NaN and infinity.
#: E4M3 and E5M2 are OCP's 8-bit Floating Point Specification 1.0, the others arXiv 2206.02915.
_FP8 = {
    "F8_E4M3": (3, 7, {0x7F: math.nan, 0xFF: math.nan}),
    "F8_E4M3FNUZ": (3, 8, {0x80: math.nan}),
    "F8_E5M2": (
        *(2, 15),
        {sign | byte: math.nan for sign in (0, 0x80) for byte in (0x7D, 0x7E, 0x7F)}
        | {0x7C: math.inf, 0xFC: -math.inf},
    ),
    "F8_E5M2FNUZ": (2, 16, {0x80: math.nan}),
}
#: Bits that are all set in NaN and infinity of 16-bit floats, and in nothing else: the exponent.
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80}
#: Elements that are looked at in one go, so that temporary arrays stay in the processor's cache.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class StoredArray:
    """The bytes of a stored tensor, of which values are made on demand.

    Attributes:
        dtype: torch's name, such as "bfloat16".
        bits: the values in numpy's dtype of the same size, which need not have the same meaning.
    """

    header: StoredTensor
    bits: Array

    @property
    def dtype(self) -> str:
        return _DTYPES[self.header.dtype_name][0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    def values(self) -> Array:
        """Return the exact values, in float32 if numpy does not have the dtype."""
        name = self.header.dtype_name
        if name == "BF16":
            return (self.bits.astype("<u4") << 16).view("<f4")
        return _table(name)[self.bits] if name.startswith("F8") else self.bits

    def is_finite(self) -> bool:
        """Whether there is neither NaN nor infinity. A part is looked at after the other."""
        flat, name = self.bits.reshape(-1), self.header.dtype_name
        if not name.startswith(("F", "BF", "C")):
            return True
        if name in _EXPONENTS:
            flat = flat.view("<u2")
        finite = np.isfinite(_table(name)) if name.startswith("F8") else None
        for start in range(0, len(flat), _AT_ONCE):
            part = flat[start : start + _AT_ONCE]
            if finite is not None:
                found = finite[part]
            elif bits := _EXPONENTS.get(name):
                found = (part & bits) != bits
            else:
                found = np.isfinite(part)
            if not found.all():
                return False
        return True


def stored_array(header: StoredTensor, data: Any) -> StoredArray:
    """Return a tensor of a file.

    Args:
        data: the whole file, as a buffer.

    Raises:
        KeyError: the dtype has no values of whole bytes.
    """
    dtype = np.dtype(_DTYPES[header.dtype_name][1])
    if not header.nbytes:
        return StoredArray(header, np.zeros(header.shape, dtype))
    count = header.nbytes // dtype.itemsize
    bits = np.frombuffer(data, dtype, count, header.offset).reshape(header.shape)
    return StoredArray(header, bits)


def _table(name: str) -> Array:
    """Return the values of all 256 bytes of an 8-bit float, in float32."""
    if name == "F8_E8M0":  # a power of two without sign: OCP's Microscaling Formats 1.0
        values = [2.0 ** (byte - 127) for byte in range(255)] + [math.nan]
        return np.array(values, "<f4")
    mantissa, bias, special = _FP8[name]
    return np.array([special.get(b, _fp8(b, mantissa, bias)) for b in range(256)], "<f4")


def _fp8(byte: int, mantissa: int, bias: int) -> float:
    """Return the value of one byte as sign, exponent and mantissa."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = (byte & 0x7F) >> mantissa, byte & ((1 << mantissa) - 1)
    if not exponent:  # subnormal
        return sign * math.ldexp(fraction, 1 - bias - mantissa)
    return sign * math.ldexp((1 << mantissa) + fraction, exponent - bias - mantissa)
