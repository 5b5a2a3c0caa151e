"""Everything that is wrong or odd with a trace file, with row numbers."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from squall.trace.catalogue import known_by_file_name, known_by_hash
from squall.trace.files import examine, memory_needed
from squall.trace.formats import Finding, Parsed, Severity, finding_at
from squall.units import in_words

LONG_REQUEST = 1_000_000
"""Prompts above this are beyond the context of any served model today (tokens)."""
LONG_CONTEXT = 32_768
"""Prompts above this do not fit into many served models (tokens)."""
LONG_SILENCE = 3600.0

BURSTGPT_PARTS = {1: 5.0, 2: 5_270_414.0, 3: 19_440_110.0}
"""The first second of each published part on BurstGPT's clock (of part 2: of its form without failures)."""


class Validation(msgspec.Struct, kw_only=True, frozen=True):
    """What `validate` found. `ok` means that every verb will take the file."""

    source: str
    format: str
    sha256: str
    rows: int
    ok: bool
    findings: list[Finding]


def validate(source: str | Path, *, format: str | None = None, columns: str | None = None) -> Validation:
    """All findings in a trace file, errors first. Raises InputError only if the file is not a trace at all.

    A file that would take more than 2 GB of memory is read block by block.
    """
    from squall.trace import blocks as reading

    checks = _Checks()
    if str(source) != "-" and memory_needed(Path(source)) > reading.WHOLE:
        blocks = reading.opened_blocks(source, format, columns)
        for parsed in blocks:
            checks.see(parsed)
        with reading.opened(source) as file:
            begin = file.read(4096)
        form, sha256, last = blocks.form, blocks.digest.hexdigest(), blocks.last_bytes
    else:
        parsed, form, data = examine(source, format, columns)
        checks.see(parsed, last=True)
        begin, sha256, last = data[:4096], hashlib.sha256(data).hexdigest(), data[-1:]
    findings = checks.findings() + _origin(source, form.name, sha256, checks) + _spelling(begin, last)
    if checks.rows == 0:
        findings.append(
            Finding(severity="error", code="no-rows", message="there is no request in it, only a header", count=0)
        )
    order = {"error": 0, "warning": 1, "info": 2}
    return Validation(
        source=str(source),
        format=form.name,
        sha256=sha256,
        rows=checks.rows,
        ok=not any(finding.severity == "error" for finding in findings),
        findings=sorted(findings, key=lambda finding: (order[finding.severity], finding.code, finding.message)),
    )


class _Checks:
    """What is legal and yet worth knowing before the numbers are believed, gathered block by block.

    The requests of one time are never parted: those of a block's last time wait for the next block. Copies of a row
    that stand apart from each other, in a file that is out of order, are found only where they lie in one block.
    """

    def __init__(self) -> None:
        self.rows = self.failed = self.copied = 0
        self.first: float | None = None
        self.last: float | None = None
        self._found: dict[tuple[str, str], Finding] = {}
        self._held: pl.DataFrame | None = None
        self._whole_seconds = True
        self._prefixes = False
        self._sessions = _Sessions()
        self._kinds: set[str] = set()

    def see(self, parsed: Parsed, *, last: bool = False) -> None:
        """Look at the next block; `last` says that no other follows."""
        for finding in parsed.findings:
            self._add(finding)
        self._kinds |= {parsed.session_kind} if parsed.session_kind else set()
        table = parsed.columns
        if parsed.total_tokens is not None:
            table = table.with_columns(parsed.total_tokens.alias("total"))
        if self._held is not None:
            table = pl.concat([self._held, table])
        if table.is_empty():
            return
        if last:
            self._held = None
            self._look(table)
            return
        final = table["arrival"][-1]
        waiting = (table["arrival"].reverse() != final).arg_true().head(1)
        size = int(waiting[0]) if len(waiting) else len(table)
        self._held = table.tail(size)
        if len(table) > size:
            self._look(table.head(len(table) - size))

    def findings(self) -> list[Finding]:
        """Everything that was found."""
        if self._held is not None:
            self._look(self._held)
            self._held = None
        if not self._whole_seconds:
            self._found = {key: finding for key, finding in self._found.items() if finding.code != "elapsed-zero"}
        found = []
        for finding in self._found.values():
            if finding.code == "duplicate":
                message = f"{finding.message} ({self.copied:,} different rows have copies)"
                finding = msgspec.structs.replace(finding, message=message)
            found.append(finding)
        if self.rows:
            found += self._sessions.findings(self._kinds, self.rows, self.last or 0.0)
            if not self._prefixes:
                message = "no block hashes of the prompts: prefix reuse can at most be bounded"
                found.append(_whole("info", "no-prefixes", message))
        return found

    def _look(self, table: pl.DataFrame) -> None:
        request, response, arrival = table["request_tokens"], table["response_tokens"], table["arrival"]
        before = pl.Series([self.last], dtype=pl.Float64)
        gap = arrival - pl.concat([before, arrival.head(len(arrival) - 1).cast(pl.Float64)])
        copies = _duplicates(table.drop("total", strict=False))
        checks: list[tuple[Severity, str, str, pl.Series]] = [
            (
                "warning",
                "out-of-order",
                "earlier than the row before; readers sort by time, ties in file order",
                gap < 0,
            ),
            (
                "warning",
                "no-prompt",
                "0 request tokens and yet a response; it cannot be sent",
                (request == 0) & (response > 0),
            ),
            (
                "warning",
                "very-long-request",
                f"more than {LONG_REQUEST:,} request tokens; no served model takes it",
                request > LONG_REQUEST,
            ),
            ("info", "failed", "failed in the recorded system (0 response tokens)", response == 0),
            (
                "info",
                "failed-without-length",
                "failed, and the prompt's length is unknown (0/0); it cannot be sent",
                (response == 0) & (request == 0),
            ),
            ("info", "duplicate", "copy of another row, word for word; duplicates are data and are kept", copies),
            ("info", "silence", f"begins after a silence of more than {LONG_SILENCE / 3600:g} h", gap > LONG_SILENCE),
            ("info", "tie", "same time as the row before; the file's order is kept (--ties decides)", gap == 0),
            (
                "info",
                "long-context",
                f"more than {LONG_CONTEXT:,} request tokens; nothing is clipped unless --max-request-tokens says so",
                (request > LONG_CONTEXT) & (request <= LONG_REQUEST),
            ),
        ]
        if "elapsed" in table.columns:
            self._whole_seconds &= not (table["elapsed"] % 1 != 0).any()
            checks.append(("info", "elapsed-zero", "0 s elapsed, which means less than 1 s", table["elapsed"] == 0))
            checks.append(("info", "elapsed-missing", "the elapsed time is not recorded", table["elapsed"].is_null()))
        if "total" in table.columns:
            message = "'Total tokens' is not the sum of request and response"
            checks.append(("warning", "wrong-total", message, table["total"] != request + response))
        if "session" in table.columns:
            message = "shorter than the request before it in its session (cut, edited or another model)"
            checks.append(("info", "shrinking-session", message, self._sessions.shorter(table)))
        for severity, code, message, mask in checks:
            if mask.any():
                finding = finding_at(severity, code, message, mask)
                self._add(msgspec.structs.replace(finding, rows=[row + self.rows for row in finding.rows]))
        if copies.any():
            self.copied += table.drop("total", "prefix", strict=False).filter(copies).n_unique()
        self._prefixes |= "prefix" in table.columns and table["prefix"].null_count() < len(table)
        self.failed += int((response == 0).sum())
        self.rows += len(table)
        low, high = arrival.min(), arrival[-1]
        if low is not None:
            self.first = float(low) if self.first is None else min(self.first, float(low))  # type: ignore[arg-type]
        self.last = float(high) if high is not None else self.last

    def _add(self, new: Finding) -> None:
        """Keep a finding, together with those of the same kind that were found before."""
        key = new.code, new.message
        old = self._found.get(key)
        if old is None:
            self._found[key] = new
            return
        rows = [*old.rows[:10], *new.rows[:10]][:10]
        if old.count + new.count > 10 and new.rows:
            rows.append(new.rows[-1])
        self._found[key] = msgspec.structs.replace(old, count=old.count + new.count, rows=rows)


class _Sessions:
    """The last request of each session so far, by the session's number."""

    def __init__(self) -> None:
        self._tokens = np.zeros(0, np.int64)
        self._first, self._last = np.zeros(0), np.zeros(0)
        self._pauses: list[np.ndarray] = []
        self._on_rows = 0

    def shorter(self, table: pl.DataFrame) -> pl.Series:
        """Which requests of the next rows are shorter than the one before in their session."""
        rows = table["session"].is_not_null().arg_true()
        mask = pl.repeat(False, len(table), dtype=pl.Boolean, eager=True)
        if len(rows) == 0:
            return mask
        self._on_rows += len(rows)
        session = table["session"].gather(rows).to_numpy()
        tokens = table["request_tokens"].gather(rows).fill_null(0).to_numpy().astype(np.int64)
        times = table["arrival"].gather(rows).cast(pl.Float64).to_numpy()
        grown = int(session.max()) + 1 - self._tokens.size
        if grown > 0:
            self._tokens = np.append(self._tokens, np.full(grown, -1))
            self._first = np.append(self._first, np.full(grown, np.nan))
            self._last = np.append(self._last, np.full(grown, np.nan))
        order = np.argsort(session, kind="stable")
        begins = np.diff(session[order], prepend=-1) != 0
        before, since = np.roll(tokens[order], 1), np.roll(times[order], 1)
        before[begins] = self._tokens[session[order][begins]]
        since[begins] = self._last[session[order][begins]]
        if sum(map(len, self._pauses)) < _MOST_PAUSES:
            self._pauses.append((times[order] - since)[before >= 0])
        fell = np.zeros(session.size, dtype=bool)
        fell[order] = tokens[order] < before
        fresh = session[order][begins]
        unseen = np.isnan(self._first[fresh])
        self._first[fresh[unseen]] = times[order][begins][unseen]
        ends = np.roll(begins, -1)
        ends[-1] = True
        self._tokens[session[order][ends]] = tokens[order][ends]
        self._last[session[order][ends]] = times[order][ends]
        return mask.scatter(rows.gather(pl.Series(fell).arg_true()), True)

    def findings(self, kinds_seen: set[str], rows: int, end: float) -> list[Finding]:
        """What kind of names the sessions have, and how many the file's edges may cut."""
        known = ~np.isnan(self._first)
        if not kinds_seen or not known.any():
            return []
        kind = next(iter(kinds_seen)) if len(kinds_seen) == 1 else "text"
        kinds = {"uuid": "UUIDs", "number": "numbers", "text": "text"}
        share = f"{self._on_rows / rows:.1%} of the rows"
        message = f"{int(known.sum()):,} sessions named by {kinds[kind]}, on {share}"
        found = [_whole("info", f"{kind}-sessions", message)]
        pauses = np.concatenate(self._pauses) if self._pauses else np.empty(0)
        if pauses.size:
            usual = float(np.quantile(pauses, 0.9))
            late = int((self._last[known] >= end - usual).sum())
            early = int((self._first[known] < np.nanmin(self._first) + usual).sum())
            message = (
                f"{late:,} sessions have a request in the last {in_words(usual)} and {early:,} their first one in the "
                f"first {in_words(usual)} (90 % of the pauses are shorter): the file's edge may cut them"
            )
            found.append(_whole("info", "cut-session", message))
        return found


_MOST_PAUSES = 2_000_000


def _origin(source: str | Path, form: str, sha256: str, checks: _Checks) -> list[Finding]:
    """Which published file this is, or that it only looks like one; with or without its failures."""
    findings = []
    known, named = known_by_hash(sha256), known_by_file_name(Path(str(source)).name)
    if known is not None:
        findings.append(_whole("info", "published-file", f"byte for byte the published {known.name}: {known.title}"))
    elif named is not None:
        message = (
            f"has the name of {named.name} but not its sha256: an excerpt, an edited or older file, or a synthetic "
            "look-alike (`squall fetch` brings the real one)"
        )
        findings.append(_whole("warning", "not-the-published-file", message))
    if form != "burstgpt" or checks.rows == 0:
        return findings
    if checks.failed:
        share = checks.failed / checks.rows
        message = f"the raw form: {share:.2%} of the requests failed; do not join it with the form without failures"
        findings.append(_whole("info", "raw", message))
    else:
        findings.append(_whole("info", "without-failures", "no request failed, or the failures were removed"))
    for part, begin in BURSTGPT_PARTS.items():
        if checks.first == begin and checks.last is not None and checks.last - begin < 86400:
            message = (
                f"the first rows of part {part}, less than a day, and no sample of the whole (part 1 begins with a "
                "night of conversations; its API floods begin on day 9)"
            )
            findings.append(_whole("info", "head-only", message))
    return findings


def _spelling(begin: bytes, last: bytes) -> list[Finding]:
    """How the text is written, where that trips other readers; squall takes it all the same."""
    if begin[:4] == b"PAR1":
        return []
    checks = (
        ("byte-order-mark", "begins with a UTF-8 byte-order mark", begin.startswith(b"\xef\xbb\xbf")),
        ("crlf", "lines end in CRLF", b"\r\n" in begin),
        ("no-last-newline", "the last line has no line end; is the file whole?", last != b"\n"),
    )
    return [_whole("info", code, message) for code, message, holds in checks if holds]


def _whole(severity: Severity, code: str, message: str) -> Finding:
    """A finding about the file as a whole."""
    return Finding(severity=severity, code=code, message=message, count=0)


def _duplicates(table: pl.DataFrame) -> pl.Series:
    return ~table.drop("prefix", strict=False).select(pl.struct(pl.all()).is_first_distinct()).to_series()
