"""What if: edits of a draw, each a text such as `longer-prompts=1.5`; what was edited is kept in the trace's metadata.

    api-share=0.9          the API's part of the requests; the whole rate stays
    longer-prompts=1.5     request tokens times 1.5 (longer-responses: response tokens); ranks and correlations stay
    burstier=2             the CV of the gaps times 2 (below 1: smoother), in models whose gaps have a shape
    growth=3%              every 30 days 3 % more requests, from the draw's start
    flood=2h:30m:5         from 2 h of the draw on, for 30 min, 5 times the requests
    outage=2h:10m          from 2 h on, for 10 min, every request fails
    clients=200            200 clients, in models made of clients; the load grows with their number

Growth and floods are drawn at the highest rate and thinned to the one of the moment, sessions as a whole, so that they
work on every kind of model. `--rate` is the rate without them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from squall.errors import InputError
from squall.seeds import stream
from squall.units import seconds
from squall.workload.clients import ClientPaths, Clients
from squall.workload.concurrency import DAY, Path
from squall.workload.model import Workload
from squall.workload.process import GAMMA, WEIBULL, variation

MONTH = 30 * DAY
_NAMES = ("api-share", "longer-prompts", "longer-responses", "burstier", "growth", "flood", "outage", "clients")


@dataclass(frozen=True)
class Edits:
    """What is changed in a draw; times are seconds from its start."""

    texts: tuple[str, ...] = ()
    api_share: float | None = None
    prompts: float = 1.0
    responses: float = 1.0
    burstiness: float = 1.0
    growth: float = 0.0
    floods: tuple[tuple[float, float, float], ...] = ()
    """(begin, end, factor)"""
    outages: tuple[tuple[float, float], ...] = ()
    clients: int | None = None

    def of_model(self, model: Workload, seed: int) -> Workload:
        """The model with other clients. Raises InputError for a model without any, or whose gaps have no shape."""
        for one in model.classes:
            kind = type(one.arrivals).__name__.lower()
            if self.clients is not None and not isinstance(one.arrivals, Clients):
                raise InputError(f"--edit clients={self.clients}: {model.source} is a model of {kind}, not of clients.")
            if self.burstiness != 1 and kind in ("episodes", "cascade", "bootstrap"):
                raise InputError(
                    f"--edit burstier={self.burstiness:g}: a model of {kind} holds the trace's own bursts; its gaps "
                    "have no shape to change; fit one with --kind renewal."
                )
        if self.clients is None:
            return model
        classes = [
            one.with_arrivals(one.arrivals.resampled(self.clients, seed))
            for one in model.classes
            if isinstance(one.arrivals, Clients)
        ]
        return model.only(classes=classes)

    def shares(self, model: Workload) -> list[float]:
        """By what the rate of each class is multiplied."""
        if self.api_share is None:
            return [1.0] * len(model.classes)
        api = [one.service == "api" for one in model.classes]
        now = sum(share for share, is_api in zip(model.shares, api, strict=True) if is_api)
        if not 0 < now < 1:
            raise InputError(
                f"--edit api-share={self.api_share:g}: {model.source} has {'only' if now else 'no'} API requests; a "
                "share needs classes of both services."
            )
        return [self.api_share / now if is_api else (1 - self.api_share) / (1 - now) for is_api in api]

    def path(self, path: Any) -> Any:
        """A path whose gaps have a CV that is higher by the factor `burstiness`."""
        if self.burstiness == 1:
            return path
        if isinstance(path, ClientPaths):
            pairs = zip(path.paths, path.weibull, strict=True)
            return replace(path, paths=[_burstier(one, law, self.burstiness) for one, law in pairs])
        law = WEIBULL if path.gaps == "weibull" else GAMMA
        return _burstier(path, np.full(path.alpha.size, law), self.burstiness)

    def load(self, time: np.ndarray) -> np.ndarray:
        """By what the load is multiplied at these times (s from the draw's start)."""
        factor = (1 + self.growth) ** (time / MONTH)
        for begin, end, times in self.floods:
            factor = np.where((time >= begin) & (time < end), factor * times, factor)
        return factor

    def most(self, span: float) -> float:
        """The highest `load` of a draw of `span` seconds."""
        return float(self.load(self._corners(span)).max())

    def mean(self, span: float) -> float:
        """The mean `load`, by its values at 10,000 even times."""
        return float(self.load((np.arange(10_000) + 0.5) / 10_000 * span).mean())

    def _corners(self, span: float) -> np.ndarray:
        borders = [
            border for begin, end, _ in self.floods for border in (begin, np.nextafter(end, 0)) if border <= span
        ]
        return np.array([0.0, span, *borders])

    def rows(self, pieces: Iterator[dict[str, np.ndarray]], span: float, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows, drawn at `most` times their rate, thinned to the load of the moment, with lengths and failures."""
        most, random = self.most(span), stream(seed, "edits")
        for piece in pieces:
            if self.growth or self.floods:
                chance = random.random(piece["arrival"].size)
                if "session" in piece:
                    chance = np.where(piece["session"] >= 0, _uniform_of(piece["session"], seed), chance)
                kept = chance < self.load(piece["arrival"]) / most
                piece = {name: column[kept] for name, column in piece.items()}
            for name, factor in (("request_tokens", self.prompts), ("response_tokens", self.responses)):
                if factor != 1:
                    longer = np.rint(piece[name] * factor).clip(1, 2**31 - 1)
                    piece[name] = np.where(piece[name] > 0, longer, 0).astype(np.int32)
            for begin, end in self.outages:
                out = (piece["arrival"] >= begin) & (piece["arrival"] < end)
                piece["failed"] = piece["failed"] | out
                piece["response_tokens"] = np.where(out, np.int32(0), piece["response_tokens"])
            yield piece


def parse_edits(texts: Sequence[str]) -> Edits:
    """The edits that these texts (`NAME=VALUE`) name. Raises InputError with the text, what is wrong, what to write."""
    edits = Edits(tuple(texts))
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in _NAMES or not equals:
            raise InputError(f"--edit {text}: write NAME=VALUE; the names are {', '.join(_NAMES)}.")
        if name == "api-share":
            edits = replace(edits, api_share=_number(text, value, most=1.0))
        elif name == "longer-prompts":
            edits = replace(edits, prompts=edits.prompts * _number(text, value))
        elif name == "longer-responses":
            edits = replace(edits, responses=edits.responses * _number(text, value))
        elif name == "burstier":
            edits = replace(edits, burstiness=edits.burstiness * _number(text, value))
        elif name == "growth":
            percent = value.endswith("%")
            grown = 1 + _number(text, value.removesuffix("%"), least=-math.inf) / (100 if percent else 1)
            if grown <= 0:
                raise InputError(f"--edit {text}: a load cannot shrink by all of it or more.")
            edits = replace(edits, growth=(1 + edits.growth) * grown - 1)
        elif name == "clients":
            number = _number(text, value)
            if number != int(number):
                raise InputError(f"--edit {text}: a whole number of clients is needed.")
            edits = replace(edits, clients=int(number))
        else:
            edits = _with_interval(edits, text, name, value)
    return edits


def _with_interval(edits: Edits, text: str, name: str, value: str) -> Edits:
    parts = value.split(":")
    if len(parts) != (3 if name == "flood" else 2):
        form = "flood=START:LENGTH:FACTOR, such as flood=2h:30m:5" if name == "flood" else "outage=START:LENGTH"
        raise InputError(f"--edit {text}: write {form}.")
    begin = seconds(parts[0], f"--edit {name}")
    end = begin + seconds(parts[1], f"--edit {name}")
    if end <= begin:
        raise InputError(f"--edit {text}: the length must be above 0.")
    if name == "outage":
        return replace(edits, outages=(*edits.outages, (begin, end)))
    return replace(edits, floods=(*edits.floods, (begin, end, _number(text, parts[2]))))


def _number(text: str, value: str, least: float = 0.0, most: float = math.inf) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (least < number < most):
        bounds = (
            "a number"
            + (f" above {least:g}" if least > -math.inf else "")
            + (f" and below {most:g}" if most < math.inf else "")
        )
        raise InputError(f"--edit {text}: {bounds} is needed.")
    return number


def _burstier(path: Path, law: np.ndarray, factor: float) -> Path:
    """The path with shapes that give `factor` times the CV; a Gamma law's CV is 1/sqrt(alpha)."""
    alpha = path.alpha / factor**2
    if (law == WEIBULL).any():
        shapes = np.geomspace(0.05, 100, 4_000)  # CV falls with the shape
        cv = np.array([variation(WEIBULL, float(shape)) for shape in shapes])
        now = np.interp(path.alpha, shapes, cv)
        alpha = np.where(law == WEIBULL, np.interp(-now * factor, -cv, shapes), alpha)
    return replace(path, alpha=np.clip(alpha, 1e-3, 1e6))


def _uniform_of(session: np.ndarray, seed: int) -> np.ndarray:
    """A uniform number for each session, the same wherever it occurs (the finaliser of splitmix64)."""
    x = session.astype(np.uint64) + np.uint64(stream(seed, "edited sessions").integers(2**63))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(float) * 2.0**-53
