"""Reads a ServeGen pool: a folder of fits to production traffic, one pair of files per client.

A pool is a workload, not a list of requests (Xiang et al., ServeGen, arXiv 2505.09999). `chunk-N-trace.csv` gives, for
each window of 600 s, a client's rate, the CV of its gaps, and a renewal family (Gamma or Weibull) with a shape and a
scale; `chunk-N-dataset.json` gives, for each block of 6 h, the distributions of input tokens, output tokens and the
share of reasoning in the output. Three things there are not what they seem:

* 1 / (shape * scale) is not the rate in one window of six, in the worst by factors of thousands: the load is `rate`,
  and the scale is not read at all;
* the CV that a Weibull's shape implies differs from the recorded one: both are kept;
* the distributions are text that holds Python dict literals, and they are marginals: nothing says how inputs and
  outputs go together.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from squall.errors import InputError

Pattern = Literal["gamma", "weibull", "idle"]

_TRACE = re.compile(r"chunk-(\d+)-trace\.csv")
_PATTERNS: dict[str, Pattern] = {"Gamma": "gamma", "Weibull": "weibull", "": "idle"}
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pmf:
    """A distribution on `values` (ascending) with `probabilities` that sum to 1; both empty in an idle block."""

    values: np.ndarray
    probabilities: np.ndarray

    @property
    def mean(self) -> float:
        """Mean of the distribution; nan if it is empty."""
        return float(self.values @ self.probabilities) if self.values.size else math.nan


@dataclass(frozen=True)
class Block:
    """The lengths of a client's requests from `start` (s) until its next block."""

    start: float
    input_tokens: Pmf
    output_tokens: Pmf
    reason_ratio: Pmf | None


@dataclass(frozen=True)
class Client:
    """One client: arrays over its windows, and its blocks in order of time."""

    number: int
    start: np.ndarray
    """Begin of each window, s; ascending, evenly spaced."""
    rate: np.ndarray
    """Requests/s; 0 in an idle window."""
    cv: np.ndarray
    """CV of the gaps as recorded; 0 in an idle window."""
    pattern: tuple[Pattern, ...]
    shape: np.ndarray
    """Shape of the Gamma or Weibull gaps; nan in an idle window."""
    blocks: tuple[Block, ...]

    def block_at(self, time: float) -> Block | None:
        """The block that `time` (s) falls in; None before the first."""
        at = [block for block in self.blocks if block.start <= time]
        return at[-1] if at else None


@dataclass(frozen=True)
class ServeGenPool:
    """All clients of a pool, by number. `window` is the length of each window in s."""

    source: str
    window: float
    clients: tuple[Client, ...]
    notes: tuple[str, ...]

    @property
    def span(self) -> float:
        """Seconds from 0 to the end of the last window."""
        return max(float(client.start[-1]) for client in self.clients) + self.window

    @property
    def rate(self) -> np.ndarray:
        """Requests/s of all clients together, window by window from 0."""
        total = np.zeros(round(self.span / self.window))
        for client in self.clients:
            total[np.rint(client.start / self.window).astype(int)] += client.rate
        return total


def read_servegen(folder: str | Path) -> ServeGenPool:
    """The pool in `folder` (files `chunk-N-trace.csv` and `chunk-N-dataset.json`), every field checked.

    Times are seconds, rates requests/s, lengths tokens. Reads files and nothing else. Raises InputError with the file
    and the row or key for what is missing, malformed, negative or not finite, for distributions that do not sum to 1,
    and for windows that are not evenly spaced.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: a ServeGen pool is a directory of chunk-N-trace.csv and chunk-N-dataset.json.")
    numbers = sorted(int(match[1]) for file in path.iterdir() if (match := _TRACE.fullmatch(file.name)))
    if not numbers:
        raise InputError(f"{folder}: there is no chunk-N-trace.csv in it.")
    clients = tuple(_client(path, number) for number in numbers)
    steps = {float(step) for client in clients for step in np.diff(client.start)}
    if len(steps) > 1:
        raise InputError(
            f"{folder}: its windows have different lengths ({', '.join(f'{s:g}' for s in sorted(steps))} s)."
        )
    window = steps.pop() if steps else 600.0
    off = [client.number for client in clients if (client.start % window).any()]
    if off:
        raise InputError(
            f"{path / f'chunk-{off[0]}-trace.csv'}: its windows do not begin at multiples of {window:g} s."
        )
    return ServeGenPool(str(folder), window, clients, _notes(clients))


def _notes(clients: tuple[Client, ...]) -> tuple[str, ...]:
    """What a model of the pool has to decide: load without lengths, clients without load."""
    notes = []
    bare = sum(
        int(rate > 0 and ((block := client.block_at(time)) is None or not block.input_tokens.values.size))
        for client in clients
        for time, rate in zip(client.start, client.rate, strict=True)
    )
    if bare:
        notes.append(f"{bare} active windows lie in blocks without lengths")
    silent = sum(not client.rate.any() for client in clients)
    if silent:
        notes.append(f"{silent} of {len(clients)} clients never send a request")
    return tuple(notes)


def _client(folder: Path, number: int) -> Client:
    trace, dataset = folder / f"chunk-{number}-trace.csv", folder / f"chunk-{number}-dataset.json"
    rows = [_window(trace, row, line) for row, line in enumerate(_text(trace).split("\n"), start=1) if line.strip()]
    if not rows:
        raise InputError(f"{trace}: the file is empty.")
    start, rate, cv, pattern, shape = zip(*rows, strict=True)
    times = np.array(start)
    if (np.diff(times) <= 0).any():
        row = int(np.flatnonzero(np.diff(times) <= 0)[0]) + 2
        raise InputError(f"{trace}: row {row}: its window does not come after the one before it.")
    return Client(number, times, np.array(rate), np.array(cv), pattern, np.array(shape), _blocks(dataset))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").replace("\r", "")
    except FileNotFoundError:
        raise InputError(
            f"{path}: the file is missing; each client has a chunk-N-trace.csv and a -dataset.json."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: it is not a text file.") from None


def _window(path: Path, row: int, line: str) -> tuple[float, float, float, Pattern, float]:
    """(start, rate, cv, pattern, shape) of one line: t, rate, cv, pattern, arg1 = shape, arg2 (not used)."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 6:
        raise InputError(f"{path}: row {row}: {len(fields)} fields instead of t, rate, cv, pattern, shape, scale.")
    values = [_number(path, row, name, fields[at]) for at, name in ((0, "t"), (1, "rate"), (2, "cv"), (4, "shape"))]
    start, rate, cv, shape = values
    if fields[3] not in _PATTERNS:
        raise InputError(f"{path}: row {row}: the pattern is {fields[3][:40]!r}, neither Gamma nor Weibull nor empty.")
    pattern = _PATTERNS[fields[3]]
    if (pattern == "idle") != (rate == 0):
        raise InputError(f"{path}: row {row}: a rate of {rate:g} with the pattern {fields[3]!r}.")
    if pattern != "idle" and shape == 0:
        raise InputError(f"{path}: row {row}: the shape is 0.")
    return start, rate, cv, pattern, math.nan if pattern == "idle" else shape


def _number(path: Path, row: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{path}: row {row}: {name} is {text[:40]!r}, not a finite number from 0.")
    return value


def _blocks(path: Path) -> tuple[Block, ...]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path}: it is not JSON ({error}).") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: it is not an object of blocks keyed by their start in seconds.")
    blocks = []
    for key, block in content.items():
        if not isinstance(block, dict) or not key.isdigit():
            raise InputError(f"{path}: the key {key[:40]!r} is not the start of a block in seconds.")
        reason = _pmf(path, key, "reason_ratio", block) if "reason_ratio" in block else None
        lengths = [_pmf(path, key, name, block) for name in ("input_tokens", "output_tokens")]
        blocks.append(Block(float(key), lengths[0], lengths[1], reason))
    return tuple(sorted(blocks, key=lambda block: block.start))


def _pmf(path: Path, key: str, name: str, block: dict[str, Any]) -> Pmf:
    where = f"{path}: block {key}: {name}"
    if name not in block:
        raise InputError(f"{where} is missing.")
    content = block[name]
    try:
        pairs = sorted(_dict_literal(content) if isinstance(content, str) else _numbers(content.items()))
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{where} is not a mapping of numbers to probabilities.") from None
    values, chances = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if not (np.isfinite(values).all() and np.isfinite(chances).all() and (values >= 0).all() and (chances >= 0).all()):
        raise InputError(f"{where} has a negative or infinite value or probability.")
    total = float(chances.sum())
    if pairs and abs(total - 1) > _SUM_TOLERANCE:
        raise InputError(f"{where}: its probabilities sum to {total:.4g}, not 1.")
    return Pmf(values, chances / total if pairs else chances)


def _dict_literal(text: str) -> list[tuple[float, float]]:
    """The items of `{45: 0.5, 46: 0.5}`, ten times faster than a Python parser. Raises ValueError for anything else."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(text)
    body = text[1:-1].strip().removesuffix(",")
    return _numbers(item.split(":") for item in body.split(",")) if body else []


def _numbers(pairs: Iterable[Any]) -> list[tuple[float, float]]:
    return [(float(value), float(chance)) for value, chance in pairs]
