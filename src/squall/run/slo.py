"""Service-level objectives: `ttft=1s,tpot=100ms,e2e=30s`. A request meets them if every limit named holds for it."""

import msgspec

from squall.errors import InputError
from squall.units import in_words, seconds

LATENCIES = ("ttft", "tpot", "e2e")


class SLO(msgspec.Struct, frozen=True, kw_only=True):
    """Upper limits in seconds (inclusive); None = not asked for."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The limits asked for, by latency."""
        return {name: limit for name in LATENCIES if (limit := getattr(self, name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} ≤ {in_words(limit)}" for name, limit in self.limits.items())


def parse_slo(text: str) -> SLO:
    """The SLO in `text`; InputError if it is none. Units are required: peers mean milliseconds by a bare number."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.lower()
        if not equals or name not in LATENCIES:
            raise InputError(
                f"--slo: {part.strip()!r} is not a limit; write it like ttft=1s,tpot=100ms,e2e=30s "
                f"(known are {', '.join(LATENCIES)})."
            )
        if name in limits:
            raise InputError(f"--slo: {name} is given twice; give it once.")
        limits[name] = seconds(value, f"--slo {name}", unit_required=True)
        if limits[name] == 0:
            raise InputError(f"--slo: {name}=0 cannot be met by any request; give a limit above 0.")
    return SLO(**limits)
