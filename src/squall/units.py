"""Durations and times as people write them: `90`, `90s`, `15m`, `2h`, `7d`; inside squall they are seconds."""

import re

from squall.errors import InputError

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|d)?\s*")

Duration = str | float | int


def seconds(value: Duration, flag: str = "duration", *, unit_required: bool = False) -> float:
    """Seconds in `value`: a number of seconds or a text such as `90`, `500ms`, `15m`, `2h`, `7d`.

    `flag` names the value in the error. With `unit_required` a bare number is refused (peers mean milliseconds).
    """
    if isinstance(value, int | float):
        if value < 0 or value != value:
            raise InputError(f"{flag}: {value} is not a duration; give seconds >= 0, or 90s, 15m, 2h, 7d.")
        return float(value)
    match = _DURATION.fullmatch(value)
    if not match:
        raise InputError(f"{flag}: {value!r} is not a duration; write it like 90, 500ms, 90s, 15m, 2h or 7d.")
    if unit_required and not match[2]:
        raise InputError(f"{flag}: {value!r} lacks a unit; write {value}s or {value}ms.")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def in_words(value: float) -> str:
    """A duration for people: `850 ms`, `12.3 s`, `4.2 min`, `1.5 h`, `61 d`."""
    magnitude = abs(value)
    if magnitude < 1:
        return f"{value * 1e3:.3g} ms"
    for limit, size, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if magnitude < limit:
            return f"{value / size:.3g} {name}"
    return f"{value / 86400:.4g} d"
