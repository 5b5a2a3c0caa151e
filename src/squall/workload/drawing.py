"""Draw: from a workload model to a trace, in memory or straight into a file, piece by piece.

Each class draws pieces of some 260,000 requests, one after another in time: arrivals, sessions, failures and lengths
each go on where the piece before ended. The pieces of all classes are merged by time. How they are cut follows from
the model and the seed alone, so the rows do not depend on the size of the portions in which they are handed on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as File

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED, stream
from squall.trace import SCHEMA, Trace, TraceMeta, write_trace
from squall.trace.files import PORTION, write_frames
from squall.units import Duration, in_words, seconds
from squall.workload.concurrency import DAY, Daily, Floods, Path, Renewal
from squall.workload.conversations import Seating
from squall.workload.edits import Edits, parse_edits
from squall.workload.episodes import Episodes
from squall.workload.failures import Striking
from squall.workload.model import ClassModel, Workload, read_workload
from squall.workload.process import RenewalProcess, parts
from squall.workload.tally import Tally

MOST_REQUESTS = 200_000_000
"""A draw into memory is refused above this; into a file there is no limit."""
MOST_WINDOWS = 20_000_000
"""A draw over more windows than this is refused: its path would not fit into memory."""
PIECE = 1 << 18
"""Requests that a class expects to draw at a time."""


@dataclass(frozen=True)
class Draw:
    """What is to be drawn: `model` (called `name`) over `span` seconds from `begin`, at `factor` times its rate."""

    model: Workload
    name: str
    begin: float
    span: float
    requests: int | None
    rate: float | None
    seed: int
    edits: Edits = field(default_factory=Edits)

    @property
    def factor(self) -> float:
        """By what the rates are multiplied."""
        if self.rate is None:
            return 1.0
        expected = self.expected
        if expected == 0:
            raise InputError(
                f"--rate {self.rate:g}: the model has no request in the {in_words(self.span)} from "
                f"{in_words(self.begin)}, so there is nothing to scale; draw a longer duration or another start."
            )
        return self.rate * self.span / expected

    @cached_property
    def expected(self) -> float:
        """Requests that the model expects in this time, at its own rate."""
        return sum(
            self._expected(index, one) * share
            for index, (one, share) in enumerate(zip(self.model.classes, self.edits.shares(self.model), strict=True))
        )

    def _expected(self, index: int, one: ClassModel) -> float:
        if index in self.paths:
            return self.paths[index].expected
        if isinstance(one.arrivals, Episodes):  # a path of it has every request in it
            return one.arrivals.expected(self.begin, self.begin + self.span, self.seed)
        parts = stretches(one, self.begin, self.span, 1.0)
        return sum(one.arrivals.path(begin, end, self.seed).expected for begin, end in parts)

    @cached_property
    def paths(self) -> dict[int, Path]:
        """The whole paths of those classes that have one, by their numbers, at the model's own rate."""
        return {
            index: one.arrivals.path(self.begin, self.begin + self.span, self.seed)
            for index, one in enumerate(self.model.classes)
            if isinstance(one.arrivals, Renewal | Daily | Floods)
        }


def generate(
    workload: Workload | str | File,
    *,
    out: str | File | None = None,
    duration: Duration | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: Duration | None = None,
    edit: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
) -> Trace:
    """A new trace drawn from `workload` (a model, its file, or a profile `burstgpt://…`), written to `out` if given.

    It holds what arrives in `duration` seconds (default: the fitted span; for profiles one day), but at most `requests`
    rows; with `requests` alone it runs until it has them. It begins at `start`, an offset into the model's time. `rate`
    rescales the expected mean rate over the drawn span: beta is multiplied, the CV of the gaps stays. `edit` are texts
    such as "longer-prompts=1.5" (see squall.workload.edits). The same seed
    gives the same bytes. The trace is held in memory; `generate_file` writes one of any size. Raises InputError if
    nothing arrives in that time.
    """
    draw = asked(workload, duration=duration, requests=requests, rate=rate, start=start, seed=seed, edit=edit)
    expected = draw.span * draw.rate if draw.rate else draw.expected
    if min(expected, draw.requests or expected) > MOST_REQUESTS:
        raise InputError(
            f"about {expected:,.0f} requests would be drawn, more than fit into memory; ask for a shorter duration or "
            "a lower rate, or write them to a file: `squall generate` holds none in memory."
        )
    table = pl.concat(rows(draw)).cast(SCHEMA)
    trace = Trace(table, _meta(draw, len(table)))
    if out is not None:
        write_trace(trace, out)
    return trace


def generate_file(
    workload: Workload | str | File,
    out: str | File,
    *,
    duration: Duration | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: Duration | None = None,
    edit: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
) -> Tally:
    """As `generate`, but written to `out` as it is drawn, in memory that does not grow; what was written, in numbers.

    The rows are those of `generate`.
    """
    draw = asked(workload, duration=duration, requests=requests, rate=rate, start=start, seed=seed, edit=edit)
    tally = Tally()
    sessions = any(one.conversations for one in draw.model.classes)
    write_frames(tally.seeing(rows(draw)), lambda: _meta(draw, tally.requests), out, wide=sessions)
    return tally.closed(_meta(draw, tally.requests))


def rescale(trace: Trace, rate: float, seed: int = DEFAULT_SEED) -> Trace:
    """`trace` modelled and drawn anew over the same span at the mean `rate` (requests/s): the scale method `model`."""
    from squall.workload.fitting import fit

    drawn = generate(fit(trace, seed=seed), rate=rate, seed=seed)
    return trace.replace(
        drawn.table,
        tick=drawn.meta.tick,
        midnight=drawn.meta.midnight,
        weekday=drawn.meta.weekday,
        clock=0.0,
        speed=1.0,
    )


def named(workload: Workload | str | File) -> tuple[Workload, str]:
    """The workload that is meant (a model, its file, or a profile) and its name."""
    if isinstance(workload, Workload):
        return workload, workload.source
    if "://" in str(workload):
        from squall.workload.profiles import named_workload

        return named_workload(str(workload)), str(workload)
    return read_workload(workload), str(workload)


def asked(
    workload: Workload | str | File,
    *,
    duration: Duration | None,
    requests: int | None,
    rate: float | None,
    start: Duration | None,
    seed: int,
    edit: Sequence[str] = (),
) -> Draw:
    """The draw that these arguments of `generate` mean, checked."""
    model, name = named(workload)
    edits = parse_edits(edit)
    model = edits.of_model(model, seed)
    begin = 0.0 if start is None else seconds(start, "--start")
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate}: a rate must be above 0 requests/s.")
    if requests is not None and requests < 1:
        raise InputError(f"--requests {requests}: a trace needs at least 1 request.")
    if duration is not None or requests is None:
        span = model.span if duration is None else seconds(duration, "--duration")
        if span <= 0:
            raise InputError("--duration 0: a trace needs some time, such as 10m.")
        draw = Draw(model, name, begin, span, requests, rate, seed, edits)
        _refuse_windows(draw)
        return draw
    # As long as it takes, with five per cent and six standard deviations to spare: gaps vary, and so do rates.
    wanted = 1.05 * requests + 6 * np.sqrt(requests)
    draw = Draw(model, name, begin, wanted / (rate or model.mean_rate) + 1.0, requests, rate, seed, edits)
    while True:
        if draw.span > 1e10:
            raise InputError(f"--requests {requests}: {name} does not bring so many in {in_words(draw.span)}.")
        _refuse_windows(draw)
        if (draw.span * rate if rate else draw.expected) * edits.mean(draw.span) >= wanted:
            return draw
        draw = Draw(model, name, begin, 2 * draw.span, requests, rate, seed, edits)


def _refuse_windows(draw: Draw) -> None:
    end = draw.begin + draw.span
    whole = [one.arrivals for one in draw.model.classes if isinstance(one.arrivals, Renewal | Daily | Floods)]
    if any(end / arrivals.window > MOST_WINDOWS for arrivals in whole) or end > 1e10:
        raise InputError(
            f"{in_words(end)} are more than {MOST_WINDOWS:,} windows of the model; ask for a shorter duration."
        )


# ---------------------------------------------------------------------------------------------------------------- rows


def rows(draw: Draw, portion: int = PORTION) -> Iterator[pl.DataFrame]:
    """The drawn requests of all classes, sorted by arrival, in frames of up to `portion` rows with SCHEMA's columns.

    What costs less says the same: names of models are an Enum, and a column that is null in all frames has the type
    Null. Raises InputError if there are none.
    """
    factor = draw.factor * draw.edits.most(draw.span)
    shares = draw.edits.shares(draw.model)
    classes = [_class(one, draw, factor * shares[index], index) for index, one in enumerate(draw.model.classes)]
    left = draw.requests
    seen = 0
    pieces = _merged(classes, any(one.conversations for one in draw.model.classes))
    if draw.edits.texts:
        pieces = draw.edits.rows(pieces, draw.span, draw.seed)
    for piece in _portions(pieces, portion):
        part = _complete(piece, draw.model)
        part = part if left is None else part.head(left - seen)
        seen += len(part)
        yield part
        if seen == left:
            return
    if seen == 0:
        raise InputError(
            f"{draw.name}: no request arrives in the {in_words(draw.span)} from {in_words(draw.begin)} with seed "
            f"{draw.seed}; draw a longer duration, or another start or seed."
        )


Columns = dict[str, np.ndarray]
"""Requests sorted by arrival. Beside the names of SCHEMA: `of`, the class's number, where there are several. `session`
is -1 where there is none, and may be left out."""
_Pieces = Iterator[tuple[Columns, float]]
"""Requests, and the time (s) until which there are no others."""


def _merged(classes: list[_Pieces], sessions: bool) -> Iterator[Columns]:
    """The requests of all classes by arrival; at one time, in the order of the classes. `sessions`: some have such."""
    if len(classes) == 1:
        yield from (piece for piece, _ in classes[0])
        return
    from squall.workload.compiled.order import places

    held: list[list[Columns]] = [[] for _ in classes]
    until = [-np.inf] * len(classes)
    reached = -np.inf
    while reached < np.inf:
        for index, pieces in enumerate(classes):
            if until[index] <= reached:
                piece, until[index] = next(pieces, (None, np.inf))
                held[index] += [piece] if piece is not None else []
        reached = min(until)
        ready: dict[int, Columns] = {}
        for index, some in enumerate(held):
            if not some:
                continue
            piece = _joined(some)
            first = np.searchsorted(piece["arrival"], reached) if reached < np.inf else piece["arrival"].size
            ready[index] = {name: column[:first] for name, column in piece.items()}
            held[index] = [{name: column[first:] for name, column in piece.items()}]
        begins = np.cumsum([0, *(piece["arrival"].size for piece in ready.values())])
        place = places(np.concatenate([piece["arrival"] for piece in ready.values()]), begins)
        together = {"of": np.empty(place.size, np.uint8 if len(classes) < 256 else np.uint32)}
        if sessions:
            together |= {"session": np.full(place.size, -1), "turn": np.zeros(place.size, np.int32)}
        for (index, piece), where in zip(ready.items(), np.split(place, begins[1:-1]), strict=True):
            together["of"][where] = index
            for name, column in piece.items():
                if name not in together:
                    together[name] = np.empty(place.size, column.dtype)
                together[name][where] = column
        yield together


def _joined(pieces: list[Columns]) -> Columns:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _portions(pieces: Iterator[Columns], portion: int) -> Iterator[Columns]:
    """The same rows in pieces of at most `portion` rows."""
    for piece in pieces:
        for first in range(0, piece["arrival"].size, portion):
            yield {name: column[first : first + portion] for name, column in piece.items()}


def _class(one: ClassModel, draw: Draw, factor: float, index: int) -> _Pieces:
    """The requests of one class, at `factor` times its rate."""
    if not isinstance(one.arrivals, Renewal | Daily | Floods):
        yield from _whole_stretches(one, draw, factor, index)
        return
    seed, classes = draw.seed, len(draw.model.classes)  # sessions have every `classes`th number, so that all differ
    process = RenewalProcess(stream(seed, "arrivals", index))
    seating = Seating(one.conversations, stream(seed, "conversations", index)) if one.conversations else None
    striking = Striking(one.failures, failing := stream(seed, "failures", index))
    responses = stream(seed, "responses", index)
    failing = failing.spawn(1)[0]
    path = draw.edits.path(draw.paths[index].scaled(factor))
    for piece in parts(path, PIECE):
        arrival = process.along(piece)
        columns, u = {"arrival": arrival}, None
        if seating is not None:
            columns["session"], columns["turn"], u = seating.seat(arrival)
            columns["session"] *= classes
            columns["session"] += index
        failed = striking.strike(arrival)
        request, response = np.zeros(arrival.size, np.int32), np.zeros(arrival.size, np.int32)
        if one.lengths:
            law = one.lengths
            request, response = law.draw(arrival.size, responses) if u is None else law.draw_at(u, responses)
        if one.failures.request:
            request[failed] = np.rint(one.failures.request.at(failing.random(int(failed.sum()))))
            response[failed] = 0
        columns |= {"request_tokens": request, "response_tokens": response, "failed": failed}
        yield columns, float(piece.edges[-1])


def stretches(one: ClassModel, begin: float, span: float, factor: float) -> Iterator[tuple[float, float]]:
    """Begin and end (s) of the stretches in which a class's path is made: one, or more where it would be long."""
    if isinstance(one.arrivals, Renewal | Daily | Floods):
        yield begin, begin + span
        return
    step = 4 * PIECE / (one.arrivals.mean_rate * factor)
    for number in range(max(1, int(np.ceil(span / step)))):
        yield begin + number * step, min(begin + (number + 1) * step, begin + span)


def _whole_stretches(one: ClassModel, draw: Draw, factor: float, index: int) -> _Pieces:
    """The requests of a class whose kind of arrivals draws a stretch of time as a whole; no session outlives one."""
    before = 0
    for number, (first, last) in enumerate(stretches(one, draw.begin, draw.span, factor)):
        path = draw.edits.path(one.arrivals.path(first, last, draw.seed).scaled(factor))
        columns = one.draw(path, draw.seed, index, *([number] if number else []))
        columns["arrival"] += first - draw.begin
        if "session" in columns:
            sessions = int(columns["session"].max(initial=-1)) + 1
            columns["session"] = (columns["session"] + before) * len(draw.model.classes) + index
            before += sessions
        yield columns, last - draw.begin


def _complete(known: Columns, model: Workload) -> pl.DataFrame:
    """The columns of SCHEMA."""
    size = known["arrival"].size
    columns = {name: pl.Series(name, known[name]) for name in SCHEMA if name in known}
    if "session" in known and (outside := known["session"] < 0).any():
        for name in ("session", "turn"):
            columns[name] = columns[name].set(pl.Series(outside), None)
    for name in ("service", "model"):
        values = [getattr(one, name) for one in model.classes]
        if any(values):
            kind = SCHEMA[name] if name == "service" else pl.Enum(sorted({value for value in values if value}))
            each = pl.Series(name, values, dtype=kind)
            columns[name] = each.gather(known["of"]) if len(values) > 1 else each.new_from_index(0, size)
    return pl.DataFrame(
        [columns[name] if name in columns else pl.repeat(None, size, dtype=pl.Null, eager=True).alias(name)
         for name in SCHEMA]
    )  # fmt: skip


def _meta(draw: Draw, count: int) -> TraceMeta:
    model = draw.model
    since = None if model.midnight is None else model.midnight + draw.begin
    weekday = None
    if since is not None and model.weekday is not None:
        weekday = (model.weekday + int(since // DAY)) % 7
    ticks = [getattr(one.arrivals, "tick", None) or 0.0 for one in model.classes]
    return TraceMeta(
        source=draw.name,
        format="generated",
        licence=model.licence,
        attribution=model.attribution,
        midnight=None if since is None else since % DAY,
        weekday=weekday,
        tick=max(ticks, default=0.0) or None,
        rows=count,
        seed=draw.seed,
        steps=[
            *([f"--rate {draw.rate:g} (model scaling)"] if draw.rate else []),
            *(f"--edit {text}" for text in draw.edits.texts),
        ],
        notes=model.notes,
    )
