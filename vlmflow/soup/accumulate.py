"""The arithmetic of a soup: a float64 sum of stored values, rounded once to the stored type.

Buffers are made once and reused: fresh ones cost several times the arithmetic in page faults.
"""

from __future__ import annotations

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Accumulator:
    """Weighted sum of blocks of one tensor, at most `values` values a block: `start`, `add` once a parent, `stored`."""

    def __init__(self, values: int) -> None:
        self._total = np.empty(values, np.float64)
        self._other = np.empty(values, np.float64)
        self._bits = np.empty(values, np.uint32)
        self._work = np.empty(values, np.uint32)
        self._half = np.empty(values, "<u2")
        self._cut = np.empty(values, bool)
        self._past = np.empty(values, bool)
        self.n, self._first = 0, True

    def start(self, n: int) -> None:
        """Begin a sum of blocks of `n` values."""
        self.n, self._first = n, True

    def add(self, data: bytes, dtype: str, weight: float = 1.0) -> None:
        """Add weight * values; `data` are the stored bytes of `n` values."""
        values = self._values(data, dtype)
        total = self._total[: self.n]
        if weight != 1.0:
            values = np.multiply(values, weight, out=self._other[: self.n], dtype=np.float64)
        if self._first:
            np.copyto(total, values)  # not added to 0, which would turn -0 into 0
        else:
            np.add(total, values, out=total)
        self._first = False

    def finite(self) -> bool:
        """Whether the sum is; a NaN or infinity of any parent shows here."""
        return bool(np.isfinite(self._total[: self.n]).all())

    def stored(self, dtype: str, divisor: float) -> bytes:
        """sum / divisor as stored bytes, each value rounded once to the nearest (ties to even); ends the sum.

        bfloat16 by way of float32 would round twice; the float32 step therefore rounds to odd, which keeps the last bit
        as a witness of what was cut (Boldo and Melquiond 2008)."""
        n = self.n
        total = self._total[:n]
        np.divide(total, divisor, out=total)
        if dtype != "BF16":
            return total.astype(NUMPY[dtype]).tobytes()
        bits, work, half, back = self._bits[:n], self._work[:n], self._half[:n], self._other[:n]
        np.copyto(bits.view(np.float32), total, casting="same_kind")
        np.copyto(back, bits.view(np.float32))
        cut = np.not_equal(back, total, out=self._cut[:n])
        past = np.greater(np.abs(back, out=back), np.abs(total, out=total), out=self._past[:n])
        np.subtract(bits, past, out=bits)  # towards zero ...
        np.bitwise_or(bits, cut, out=bits)  # ... and odd when something was cut
        np.right_shift(bits, 16, out=work)
        np.bitwise_and(work, 1, out=work)
        np.add(work, 0x7FFF, out=work)
        np.add(bits, work, out=bits)
        np.right_shift(bits, 16, out=work)
        np.copyto(half, work, casting="unsafe")
        return half.tobytes()

    def _values(self, data: bytes, dtype: str) -> np.ndarray:
        raw = np.frombuffer(data, NUMPY[dtype])
        if dtype != "BF16":
            return raw
        bits = self._bits[: self.n]
        np.left_shift(raw, 16, out=bits, dtype=np.uint32, casting="unsafe")
        return bits.view(np.float32)


def to_float64(data: bytes, dtype: str) -> np.ndarray:
    """Stored values -> float64 [n], exactly."""
    raw = np.frombuffer(data, NUMPY[dtype])
    return ((raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw).astype(np.float64)


def from_float64(values: np.ndarray, dtype: str) -> bytes:
    """float64 [n] -> stored bytes, rounded once."""
    accumulator = Accumulator(len(values))
    accumulator.start(len(values))
    accumulator.add(values.tobytes(), "F64")
    return accumulator.stored(dtype, 1.0)
