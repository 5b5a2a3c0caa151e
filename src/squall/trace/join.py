"""Joining the parts of a trace on their common clock (BurstGPT's three parts count seconds from one midnight)."""

from collections.abc import Sequence
from typing import Any

import msgspec
import polars as pl

from squall.errors import InputError
from squall.progress import note
from squall.trace.catalogue import known_by_hash
from squall.trace.table import Trace
from squall.units import in_words


def joined(parts: Sequence[Trace]) -> Trace:
    """One trace of all `parts`, each at its own time of the clock that they share; sessions are kept apart.

    The clock is the wall clock where every part has one, else the sources' own. Raises InputError if the parts have no
    common clock or overlap in time, which is also what a part with and without its failures does.
    """
    starts = _starts(parts)
    order = sorted(range(len(parts)), key=lambda number: starts[number])
    parts, starts = [parts[number] for number in order], [starts[number] for number in order]
    notes = [note for part in parts for note in part.meta.notes]
    tables = []
    sessions = 0
    for part, start in zip(parts, starts, strict=True):
        shift = start - starts[0]
        tables.append(part.table.with_columns(arrival=pl.col("arrival") + shift, session=pl.col("session") + sessions))
        sessions += _session_numbers(part)
        sha256 = f", sha256 {part.meta.sha256}" if part.meta.sha256 else ""
        notes.append(f"joined: {part.meta.source}, {len(part):,} requests from {shift:,.0f} s on{sha256}")
    for before, after, begin, end in zip(parts, parts[1:], starts, starts[1:], strict=False):
        silence = end - begin - before.table["arrival"][-1]
        _refuse_overlap(before, after, silence)
        if silence > 86400:
            text = f"between {before.meta.source} and {after.meta.source} lie {in_words(silence)} without a request"
            notes.append(text)
            note(f"{text}.")
    failing = [bool(part.table["failed"].any()) for part in parts]
    if any(failing) and not all(failing):
        clean = parts[failing.index(False)].meta.source
        notes.append(f"{clean} has no failed request and another part has: do not read failures from the whole")
        note(f"{notes[-1]}.")
    first = parts[0].meta
    ticks = {part.meta.tick for part in parts}
    changed: dict[str, Any] = {
        "source": " + ".join(part.meta.source for part in parts),
        "sha256": None,
        "rows": sum(part.meta.rows for part in parts),
        "tick": max((tick for tick in ticks if tick is not None), default=None) if None not in ticks else None,
        "steps": _steps(parts),
        "notes": notes,
    }
    return Trace(pl.concat(tables), msgspec.structs.replace(first, **changed))


def _session_numbers(part: Trace) -> int:
    """One more than the highest session number of `part`; 0 if it has no sessions."""
    highest: Any = part.table["session"].max()
    return 0 if highest is None else int(highest) + 1


def _starts(parts: Sequence[Trace]) -> list[float]:
    """Where on the common clock each part has its arrival 0, in seconds."""
    names = ", ".join(part.meta.source for part in parts)
    if any(part.meta.speed != 1 for part in parts):
        raise InputError(
            f"--join: {names}: a part was rescaled in time and has left the clock; join first, then scale."
        )
    if len({part.meta.block_size for part in parts}) > 1:
        raise InputError(f"--join: {names}: the parts hash their prompts in blocks of different size.")
    epochs = [part.meta.epoch for part in parts]
    if None not in epochs:
        first = min(epoch for epoch in epochs if epoch is not None)
        return [(epoch - first) / 1e9 for epoch in epochs if epoch is not None]
    if any(epoch is not None for epoch in epochs) or len({part.meta.format for part in parts}) > 1:
        formats = ", ".join(sorted({part.meta.format for part in parts}))
        raise InputError(f"--join: {names}: the parts ({formats}) have no common clock.")
    return [part.meta.clock for part in parts]


def _refuse_overlap(before: Trace, after: Trace, silence: float) -> None:
    one, two = before.meta, after.meta
    if one.sha256 is not None and one.sha256 == two.sha256:
        raise InputError(f"--join: {one.source} and {two.source} are the same file; joining would count it twice.")
    if silence >= 0:
        return
    failing = [bool(part.table["failed"].any()) for part in (before, after)]
    names = [known.name if (known := known_by_hash(meta.sha256 or "")) else meta.source for meta in (one, two)]
    same_part = one.clock == two.clock or names[0].removesuffix("-without-fails") == names[1].removesuffix(
        "-without-fails"
    )
    if failing[0] != failing[1] and same_part:
        raise InputError(
            f"--join: {names[0]} and {names[1]} are one part with and without its failures; joining would count every "
            "successful request twice, so give one of them."
        )
    raise InputError(
        f"--join: {one.source} and {two.source} overlap by {in_words(-silence)} on their clock; parts must follow one "
        "another."
    )


def _steps(parts: Sequence[Trace]) -> list[str]:
    """Earlier steps, with the part that each belongs to unless all parts went the same way; then the join itself."""
    lists = [part.meta.steps for part in parts]
    same = all(steps == lists[0] for steps in lists)
    earlier = lists[0] if same else [f"{part.meta.source}: {step}" for part in parts for step in part.meta.steps]
    return [*earlier, *(f"--join {part.meta.source} ({len(part)} rows)" for part in parts[1:])]
