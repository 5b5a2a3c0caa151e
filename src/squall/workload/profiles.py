"""The built-in profiles `burstgpt://NAME`: BurstGPT's four classes as workload models made from published statistics.

The numbers lie in burstgpt.json, a workload file like those of `squall fit`. benchmarks/derive_profiles.py prints it,
and docs/profiles.md says of each part whether it is measured or assumed.
"""

from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED
from squall.trace import Trace
from squall.units import Duration
from squall.workload.drawing import generate
from squall.workload.model import Workload, read_workload

_CLASSES = {
    "chatgpt-api": ("api", "ChatGPT"),
    "gpt4-api": ("api", "GPT-4"),
    "chatgpt-conversation": ("conversation", "ChatGPT"),
    "gpt4-conversation": ("conversation", "GPT-4"),
}
PROFILES = (*_CLASSES, "all")
"""Names of the profiles: one for each class of BurstGPT, and `all` of them together."""

_QUERY = ("duration", "requests", "rate", "start")


def profile(
    name: str,
    *,
    seed: int = DEFAULT_SEED,
    duration: Duration | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: Duration | None = None,
) -> Trace:
    """A trace drawn from the profile `name` (one of PROFILES): one day from midnight of a Wednesday, unless asked else.

    The arguments are those of `generate`. Raises InputError for an unknown name.
    """
    return draw(name, seed, duration=duration, requests=requests, rate=rate, start=start)


def draw(name: str, seed: int = DEFAULT_SEED, **chosen: Duration | None) -> Trace:
    """The trace of `burstgpt://name`; a query may follow the name: `all?duration=7d&start=8h`.

    Query keys are duration, requests, rate and start, as in `generate`. Raises InputError for unknown names and keys.
    """
    import msgspec

    plain, _, query = name.partition("?")
    workload = named_workload(plain)
    asked = {key: value for key, value in chosen.items() if value is not None}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _QUERY:
            raise InputError(f"burstgpt://{name}: {key!r} is not known; a query may set {', '.join(_QUERY)}.")
        asked[key] = _number(name, key, value) if key in ("requests", "rate") else value
    trace = generate(workload, seed=seed, **asked)  # type: ignore[arg-type]
    meta = msgspec.structs.replace(trace.meta, source=f"burstgpt://{name}", format="profile")
    return Trace(trace.table, meta)


def named_workload(name: str) -> Workload:
    """The workload of the profile `name`, with or without `burstgpt://` before it. Raises InputError with the names."""
    plain = name.removeprefix("burstgpt://")
    if plain not in PROFILES:
        raise InputError(
            f"{name}: no such profile; there are {', '.join(f'burstgpt://{known}' for known in PROFILES)}."
        )
    whole = _burstgpt()
    if plain == "all":
        return whole.only(source="burstgpt://all")
    kept = [one for one in whole.classes if (one.service, one.model) == _CLASSES[plain]]
    return whole.only(source=f"burstgpt://{plain}", classes=kept)


@cache
def _burstgpt() -> Workload:
    return read_workload(Path(__file__).with_name("burstgpt.json"))


def _number(name: str, key: str, value: str) -> float | int:
    try:
        return int(value) if key == "requests" else float(value)
    except ValueError:
        raise InputError(f"burstgpt://{name}: {key}={value!r} is not a number.") from None
