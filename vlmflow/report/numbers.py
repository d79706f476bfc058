"""How numbers are written on the page."""

from __future__ import annotations

import math
from typing import Any


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def count(value: float) -> str:
    """1234567 -> 1 234 567 with thin no-break spaces."""
    return f"{int(value):,}".replace(",", "\u202f")


def seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def short(value: Any) -> str:
    """A number in few characters; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0 or 0.01 <= abs(value) < 10000:
            return f"{value:.4g}"
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value)


def number(value: Any) -> float | None:
    """`value` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    base = 10.0 ** math.floor(math.log10(rough))
    step = next((m * base for m in (1, 2, 2.5, 5) if m * base >= rough), 10 * base)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(total: float, most: int = 8) -> list[float]:
    """Times in seconds from 0 to `total` in steps that people use."""
    steps = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
    step = next((s for s in steps if total / s <= most), 86400 * 7)
    return [k * step for k in range(int(total / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high], low > 0, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wanted = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [m * 10.0**d for d in decades for m in wanted if low <= m * 10.0**d <= high]
