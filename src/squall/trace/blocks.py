"""Trace files larger than memory: read, filtered and written block by block.

A first pass surveys the file (errors, order, clocks, sessions, sha256), a second one counts what the filters leave
where a rate is asked for, the last one writes. What is written is what the way through memory writes, row for row and
with the same metadata. Some things need all rows at once and are refused here with one sentence: sorting a file that
is out of order, joining, breaking ties, and the scale methods `superpose` and `model`.
"""

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.progress import progress
from squall.seeds import stream
from squall.trace.files import (
    PORTION,
    TICK_ROWS,
    convert,
    form_of,
    memory_needed,
    tick_of,
    where,
    write_frames,
)
from squall.trace.formats import Finding, Format, Parsed
from squall.trace.formats.parquet import checked, kept_meta
from squall.trace.select import TraceOptions, _rebase, check_use, window_of
from squall.trace.table import SCHEMA, Trace, TraceMeta, TraceSource

WHOLE = 2 << 30
"""A file that would take more memory than this (bytes) is read block by block."""
BLOCK = 16 << 20
"""Bytes of text in a block."""


@dataclass(frozen=True)
class Converted:
    """What was written: requests, seconds from the first to the last, and the metadata."""

    requests: int
    span: float
    meta: TraceMeta

    @property
    def rate(self) -> float:
        """Mean requests/s: (n - 1) gaps over the span; nan if all requests arrive at once."""
        return (self.requests - 1) / self.span if self.span > 0 else float("nan")


def convert_file(source: TraceSource, out: str | Path, *, to: str | None = None, **options: Any) -> Converted:
    """As `convert`, but block by block where the file is large, so that memory does not grow with it."""
    if isinstance(source, Trace) or "://" in str(source) or memory_needed(Path(source)) <= WHOLE:
        trace = convert(source, out, to=to, **options)
        return Converted(len(trace), trace.span, trace.meta)
    return in_blocks(source, out, TraceOptions(**options), to)


def in_blocks(source: str | Path, out: str | Path, options: TraceOptions, to: str | None = None) -> Converted:
    """`source` with `options` applied, written to `out` without ever holding more than a block."""
    _refuse_what_needs_all(source, options)
    with progress(f"Surveying {Path(source).name}"):
        survey = Survey(source, options.format, options.columns)
    factor = None
    if options.rate is not None:
        passing = Passing(survey, options, None)
        for _ in passing.frames():
            pass
        if not passing.span > 0:
            raise InputError(f"--rate {options.rate:g}: {source} has no span to rescale.")
        factor = options.rate / ((passing.seen - 1) / passing.span)
        if options.scale_method == "thin" and factor > 1:
            raise InputError(
                f"--rate {options.rate:g} --scale-method thin: thinning only lowers a rate, and the trace has "
                f"{options.rate / factor:.4g}/s; use compress."
            )
    passing = Passing(survey, options, factor)
    if to is None and Path(out).suffix == ".csv" and survey.form.name == "azure":
        to = "azure"
    with progress(f"Writing {Path(out).name}"):
        write_frames(passing.frames(), lambda: passing.meta, out, to, wide=survey.wide)
    return Converted(passing.seen, passing.span, passing.meta)


def _refuse_what_needs_all(source: str | Path, options: TraceOptions) -> None:
    wants = [
        ("--join", bool(options.join)),
        (f"--ties {options.ties}", options.ties != "keep"),
        (f"--arrivals {options.arrivals}", options.arrivals is not None),
        (f"--scale-method {options.scale_method}", options.rate is not None and options.scale_method in _NEEDS_ALL),
    ]
    for flag, given in wants:
        if given:
            raise InputError(
                f"{flag}: it needs all rows at once, and {source} is read block by block because it would take "
                f"{memory_needed(Path(source)) / 1e9:.0f} GB of memory; take a part of it first, with --between or "
                "--service."
            )
    check_use(options)
    if options.sample is not None and not 0 < options.sample <= 1:
        raise InputError(f"--sample {options.sample}: a probability above 0 and at most 1 is needed.")
    for name in ("rate", "speed"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise InputError(f"--{name} {value}: a number above 0 is needed.")
    for name in ("head", "max_request_tokens", "max_response_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: a seed is a whole number from 0.")


_NEEDS_ALL = ("superpose", "model")


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Blocks:
    """The rows of a file, block by block, on one clock and with sessions numbered through the whole of it."""

    source: str | Path
    form: Format
    rows: int = 0
    """Read so far."""
    digest: Any = field(default_factory=hashlib.sha256)
    names: dict[str, int] = field(default_factory=dict)
    """The sessions' numbers by their names."""
    last_bytes: bytes = b""
    _utc: int | None = None

    def __iter__(self) -> Iterator[Parsed]:
        """Each block's columns, with the rows of its findings counted through the whole file."""
        for parsed in self._parsed():
            parsed.findings = [_later(finding, self.rows) for finding in parsed.findings]
            self.rows += len(parsed.columns)
            if len(parsed.columns) or parsed.findings:
                yield self._numbered(self._on_one_clock(parsed))

    def _parsed(self) -> Iterator[Parsed]:
        if self.form.kind == "parquet":
            kept = kept_meta(cast(IO[bytes], str(self.source)))
            with open(self.source, "rb") as file:
                while data := file.read(1 << 22):
                    self.digest.update(data)
            for frame in pl.scan_parquet(self.source).collect_batches(chunk_size=PORTION // 4, maintain_order=True):
                yield checked(frame, kept)
            return
        for data in self._texts():
            try:
                yield self.form.parse(data)
            except InputError as error:
                raise InputError(f"{self.source}: {error}".rstrip(".") + ".") from error

    def _texts(self) -> Iterator[bytes]:
        """The file's text in whole lines, each block of a CSV file with the header before it."""
        header, left = b"", b""
        with opened(self.source) as file:
            while True:
                data = file.read(BLOCK)
                self.digest.update(data)
                self.last_bytes = data[-1:] or self.last_bytes
                end = data.rfind(b"\n") + 1
                if data and not end:
                    left += data
                    continue
                whole, left = left + data[:end] if data else left, data[end:]
                if whole.strip():
                    yield header + whole
                    if not header and self.form.kind == "csv":
                        header = whole[: whole.index(b"\n") + 1].removeprefix(b"\xef\xbb\xbf")
                if not data:
                    return

    def _on_one_clock(self, parsed: Parsed) -> Parsed:
        utc = parsed.meta.pop("utc", None)
        if utc is None:
            return parsed
        if self._utc is None:
            self._utc = utc
        ns = (pl.col("arrival") * 1e9).round().cast(pl.Int64) + (utc - self._utc)
        parsed.columns = parsed.columns.with_columns(arrival=ns.cast(pl.Float64) / 1e9)
        return parsed

    def _numbered(self, parsed: Parsed) -> Parsed:
        if parsed.session_names is None or "session" not in parsed.columns.columns:
            return parsed
        known = parsed.session_names.cast(pl.String).to_list()
        numbers = pl.Series([self.names.setdefault(name, len(self.names)) for name in known], dtype=pl.Int64)
        parsed.columns = parsed.columns.with_columns(numbers.gather(parsed.columns["session"]).alias("session"))
        return parsed


def opened(source: str | Path) -> IO[bytes]:
    """A file's bytes, unpacked if it is gzipped."""
    with open(source, "rb") as file:
        magic = file.read(2)
    return cast(IO[bytes], gzip.open(source, "rb")) if magic == b"\x1f\x8b" else open(source, "rb")


def _later(finding: Finding, rows: int) -> Finding:
    return msgspec.structs.replace(finding, rows=[row + rows for row in finding.rows])


def opened_blocks(source: str | Path, format: str | None = None, columns: str | None = None) -> Blocks:
    """The blocks of a file, its format detected by its first ones."""
    with opened(source) as file:
        head = file.read(1 << 20)
    if not head.strip():
        raise InputError(f"{source}: the file is empty.")
    form = form_of(source, head, format, columns)
    if form.whole or (form.kind == "json" and head.lstrip()[:1] == b"["):
        raise InputError(f"{source}: a {form.title} file is read whole, and this one is larger than memory.")
    return Blocks(source, form)


class Survey:
    """What must be known of a whole file before its first row can be written."""

    def __init__(self, source: str | Path, format: str | None, columns: str | None) -> None:
        self.source, self.format, self.columns = source, format, columns
        blocks = opened_blocks(source, format, columns)
        self.form = blocks.form
        self.wide = self.services = False
        self.models: set[str] = set()
        first: Parsed | None = None
        last, ticked = -np.inf, True
        sample: list[pl.Series] = []
        for parsed in blocks:
            before = blocks.rows - len(parsed.columns)
            _refuse_errors(source, parsed)
            arrival = parsed.columns["arrival"]
            drop = int(((arrival.diff() < 0).arg_true().head(1)).sum()) if (arrival.diff() < 0).any() else None
            if drop is not None or (len(arrival) and arrival[0] < last):
                raise InputError(
                    f"{source}: row {before + (drop or 0) + 1} is earlier than the row before it; sorting needs all "
                    "rows at once, and the file is read block by block: sort it by time first."
                )
            last = float(arrival[-1]) if len(arrival) else last
            for name in ("session", "elapsed"):
                self.wide |= name in parsed.columns.columns and parsed.columns[name].null_count() < len(arrival)
            if "service" in parsed.columns.columns:
                self.services |= parsed.columns["service"].null_count() < len(arrival)
            if "model" in parsed.columns.columns:
                self.models |= set(parsed.columns["model"].drop_nulls().unique())
            ticked &= "tick" in parsed.meta
            if sum(map(len, sample)) < TICK_ROWS:
                sample.append(arrival)
            first = first or parsed
        if first is None or blocks.rows == 0:
            raise InputError(f"{source}: there is no request in it, only a header.")
        self.start = 0.0 if first.meta.get("kept") else float(first.columns["arrival"][0])
        self.meta = self._meta(first, blocks, ticked, pl.concat(sample))

    def _meta(self, first: Parsed, blocks: Blocks, ticked: bool, sample: pl.Series) -> TraceMeta:
        known = dict(first.meta)
        kept: TraceMeta | None = known.pop("kept", None)
        if kept is not None:
            return kept
        if known.pop("tick", None) and ticked:
            known["tick"] = first.meta["tick"]
        else:
            known["tick"] = tick_of(sample)
        notes = list(known.pop("notes", []))
        return TraceMeta(
            source=str(self.source),
            format=self.form.name,
            sha256=blocks.digest.hexdigest(),
            rows=blocks.rows,
            notes=notes,
            **known,
        )

    def frames(self) -> Iterator[pl.DataFrame]:
        """The whole trace, in frames with the columns of SCHEMA."""
        turns = np.zeros(0, np.int32)
        for parsed in opened_blocks(self.source, self.format, self.columns):
            frame = Trace.of(parsed.columns, self.meta).table.with_columns(pl.col("arrival") - self.start)
            known = frame["session"].drop_nulls()
            if len(known) and "turn" not in parsed.columns.columns:
                highest = int(cast(int, known.max()))
                turns = np.append(turns, np.zeros(max(0, highest + 1 - turns.size), np.int32))
                before = pl.Series(turns).gather(frame["session"])
                frame = frame.with_columns(turn=pl.col("turn") + before)
                turns += np.bincount(known.to_numpy(), minlength=turns.size).astype(np.int32)
            yield frame.select(SCHEMA.names())


def _refuse_errors(source: str | Path, parsed: Parsed) -> None:
    for finding in parsed.findings:
        if finding.severity == "error":
            raise InputError(f"{source}: {where(finding)}: {finding.message}. `squall validate` lists all findings.")


# ------------------------------------------------------------------------------------------------------------ filtering


class Passing:
    """A surveyed file's rows on their way through the trace options, in the order of select.select."""

    def __init__(self, survey: Survey, options: TraceOptions, factor: float | None) -> None:
        self._survey, self._options, self._factor = survey, options, factor
        self._counts: dict[str, list[int]] = {}
        self._start: float | None = None
        self._first = self._last = 0.0
        self.seen = 0

    @property
    def span(self) -> float:
        """Seconds from the first to the last arrival so far."""
        return self._last - self._first

    @property
    def meta(self) -> TraceMeta:
        """The metadata; the counts in its steps are right when all frames have passed."""
        trace = _rebase(Trace(pl.DataFrame({"arrival": [0.0]}), self._survey.meta), self._start or 0.0)
        steps = [*trace.meta.steps]
        for step, (kept, before) in self._counts.items():
            steps.append(step.format(kept=kept, before=before, other=before - kept))
        speed = self._speed
        changed: dict[str, Any] = {"steps": steps}
        if speed is not None:
            changed |= {"speed": trace.meta.speed * speed, "tick": trace.meta.tick and trace.meta.tick / speed}
        return msgspec.structs.replace(trace.meta, **changed)

    @property
    def _speed(self) -> float | None:
        """What the gaps are divided by."""
        if self._options.speed is not None:
            return self._options.speed
        return self._factor if self._options.scale_method == "compress" else None

    def frames(self) -> Iterator[pl.DataFrame]:
        """What is left of each block. Raises InputError if nothing is left in the end."""
        options, source = self._options, self._survey.source
        if options.service is not None and not self._survey.services:
            raise InputError(f"--service {options.service}: {source} does not record services; leave the flag out.")
        if options.model_name is not None and options.model_name not in self._survey.models:
            names = sorted(self._survey.models)
            have = f"it records {', '.join(names[:8])}" if names else "it records no models"
            raise InputError(f"--model-name {options.model_name}: no such model in {source}; {have}.")
        window = window_of(options.between) if options.between is not None else None
        sample, thin = stream(options.seed, "sample"), stream(options.seed, "thin")
        for whole in self._survey.frames():
            frame = self._filtered(whole, window)
            frame = self._limited(frame)
            if options.sample is not None:
                kept = sample.random(len(frame)) < options.sample
                frame = self._kept(frame, pl.Series(kept), f"--sample {options.sample:g} --seed {options.seed}")
            if self._start is None and len(frame):
                self._start = window[0] if window else float(frame["arrival"][0])
            frame = frame.with_columns(pl.col("arrival") - (self._start or 0.0))
            if self._speed is not None:
                frame = frame.with_columns(pl.col("arrival") / self._speed)
                flag = f"--speed {options.speed:g}" if options.speed else f"--rate {options.rate:g}"
                self._counts.setdefault(flag if options.speed else f"{flag} --scale-method compress", [0, 0])
            elif self._factor is not None:
                step = f"--rate {options.rate:g} --scale-method thin --seed {options.seed}"
                frame = self._kept(frame, pl.Series(thin.random(len(frame)) < self._factor), step)
            if len(frame):
                self._first = self._first if self.seen else float(frame["arrival"][0])
                self._last = float(frame["arrival"][-1])
                self.seen += len(frame)
                yield frame
        if self.seen == 0:
            flags = ", ".join(step.removesuffix(_OF_ROWS) for step in self._counts)
            raise InputError(f"{flags}: no request of {source} is left ({self._survey.meta.rows:,} were read).")

    @property
    def _head_step(self) -> str:
        return f"--head {self._options.head}" + _OF_ROWS

    def _filtered(self, frame: pl.DataFrame, window: tuple[float, float] | None) -> pl.DataFrame:
        options = self._options
        if options.service is not None:
            frame = self._kept(frame, frame["service"] == options.service, f"--service {options.service}")
        if options.model_name is not None:
            frame = self._kept(frame, frame["model"] == options.model_name, f"--model-name {options.model_name}")
        if window is not None:
            inside = (frame["arrival"] >= window[0]) & (frame["arrival"] < window[1])
            frame = self._kept(frame, inside, f"--between {options.between}")
        if options.head is not None:
            left = options.head - self._counts.get(self._head_step, [0])[0]
            frame = self._kept(frame, pl.int_range(len(frame), eager=True) < left, f"--head {options.head}")
        if options.drop_failed:
            frame = self._kept(frame, ~frame["failed"], "--drop-failed")
        return frame

    def _limited(self, frame: pl.DataFrame) -> pl.DataFrame:
        options = self._options
        for column in ("request_tokens", "response_tokens"):
            limit = getattr(options, f"max_{column}")
            if limit is None:
                continue
            step = f"--max-{column.replace('_', '-')} {limit} --over-limit {options.over_limit}"
            over = frame[column] > limit
            if options.over_limit == "drop":
                frame = self._kept(frame, ~over, step)
                continue
            said = "{other} rows clipped" if options.over_limit == "clip" else "{other} rows are longer"
            self._count(f"{step} ({said})", len(frame) - int(over.sum()), len(frame))
            if options.over_limit == "clip":
                frame = frame.with_columns(pl.col(column).clip(upper_bound=limit))
        return frame

    def _kept(self, frame: pl.DataFrame, keep: pl.Series, step: str) -> pl.DataFrame:
        left = frame.filter(keep.fill_null(False))
        self._count(step + _OF_ROWS, len(left), len(frame))
        return left

    def _count(self, step: str, kept: int, before: int) -> None:
        counts = self._counts.setdefault(step, [0, 0])
        counts[0] += kept
        counts[1] += before


_OF_ROWS = " ({kept} of {before} rows)"
