"""How are numbers, sizes and names shown to people?"""

import math

from fedgen_edge.tasks.measure import Number


def number(value: Number) -> str:
    """A number to read: about three digits; a dash for nan."""
    if not math.isfinite(value):
        return "\N{EN DASH}" if math.isnan(value) else "\N{INFINITY}"
    high = abs(value)
    if 0 < high < 1:
        return f"{value:#.3g}"
    form = ".1e" if high >= 1e6 else ",.0f" if high >= 1000 else ".1f" if high >= 10 else ".2f"
    return f"{value:{form}}"


def size(count: Number) -> str:
    """Bytes in decimal units: 1 kB is 1000 bytes."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, math.floor(math.log10(max(1, count)) / 3)))
    return f"{number(count / 1000**power) if power else int(count)} {units[power]}"


def printable(text: str) -> str:
    """The text with a question mark for whatever a terminal or a font cannot show."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
