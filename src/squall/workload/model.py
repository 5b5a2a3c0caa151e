"""The workload model: one generative model per (service, model) class of a trace, and its JSON file."""

import pathlib
import re
from typing import Any, Self

import msgspec
import numpy as np

from squall.errors import InputError
from squall.files import replace_file
from squall.seeds import stream
from squall.workload.cascade import Cascade, Stretch
from squall.workload.clients import ClientPaths, Clients
from squall.workload.concurrency import Daily, Floods, Path, Renewal, renewal
from squall.workload.conversations import Conversations, Seating
from squall.workload.episodes import Course, Episodes
from squall.workload.failures import Failures
from squall.workload.lengths import Lengths
from squall.workload.resampling import Blocks, Bootstrap
from squall.workload.slots import Slots

VERSION = 1
Arrivals = Renewal | Daily | Floods | Slots | Episodes | Cascade | Bootstrap | Clients


class ClassFit(msgspec.Struct, frozen=True, kw_only=True):
    """Goodness of fit of one class: the trace against the model's law, or against one draw over the fitted span."""

    reason: str = ""
    """The kind of arrivals, and why it was taken."""
    requests: int
    windows: int
    """Windows with arrivals."""
    fitted: int
    """Windows whose shape is their own; the others took the pooled one."""
    alpha: list[float]
    """p10, p50, p90 of the fitted shapes."""
    ks_gaps: float | None
    """Median over the windows of the gaps' Kolmogorov-Smirnov distance to their Gamma law."""
    ks_request: float | None
    """Kolmogorov-Smirnov distance of the answered requests' lengths to the model's quantiles."""
    ks_response: float | None
    rate: tuple[float, float]
    """Requests/s: trace, draw."""
    spearman: tuple[float, float] | None
    """Rank correlation of request and response lengths: trace, draw."""
    dispersion: tuple[float, float] | None
    """Index of dispersion of counts at 60 s: trace, draw."""
    failed_share: tuple[float, float]
    """Trace, draw."""
    turns: tuple[float, float] | None
    """Mean turns of a session: trace, draw."""


class ClassModel(msgspec.Struct, frozen=True, kw_only=True):
    """One class of requests: when they arrive, how long they are, how they form conversations, which fail."""

    service: str | None
    model: str | None
    arrivals: Arrivals
    lengths: Lengths | None
    """None if no request of the class succeeded."""
    conversations: Conversations | None = None
    failures: Failures
    fit: ClassFit | None = None
    """None for a built-in profile, which is made from published statistics."""

    def __post_init__(self) -> None:
        if self.service not in (None, "conversation", "api"):
            raise ValueError("service must be conversation, api or null")
        if self.lengths is None and self.failures.share < 1:
            raise ValueError("lengths may be null only if all requests fail")

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.model, self.service) if part) or "all requests"

    def as_clients(self, arrivals: Clients) -> Self:
        """This class as a superposition of clients, which is what its conversations have become."""
        return msgspec.structs.replace(self, arrivals=arrivals, conversations=None)

    def with_arrivals(self, arrivals: Arrivals) -> Self:
        """This class with other arrivals."""
        return msgspec.structs.replace(self, arrivals=arrivals)

    def draw(
        self, path: Path | Course | Stretch | Blocks | ClientPaths, seed: int, *index: int
    ) -> dict[str, np.ndarray]:
        """The columns of requests along `path`: arrival (s), tokens, failed; session and turn where there are some.

        `index` is the class's place in its workload and keeps its random streams its own.
        """
        law, kind = self.lengths, self.arrivals
        clock, length_rng = stream(seed, "arrivals", *index), stream(seed, "responses", *index)
        failing_rng = stream(seed, "failures", *index)
        failed = None
        drawn: Any = None
        if isinstance(kind, Renewal | Daily | Floods | Slots):
            arrival = renewal(path, clock)  # type: ignore[arg-type]
        else:
            arrival, *drawn = kind.arrive(path, clock)  # type: ignore[arg-type]
        columns = {"arrival": arrival}
        order = None
        if self.conversations:
            seating = Seating(self.conversations, stream(seed, "conversations", *index))
            columns["session"], columns["turn"], order = seating.seat(arrival)
        request, response = np.zeros(arrival.size, np.int32), np.zeros(arrival.size, np.int32)
        if isinstance(kind, Bootstrap):
            request, response = (tokens[drawn[0]] for tokens in kind.tokens)
            failed = response == 0
        elif isinstance(kind, Episodes) and kind.lengths and law:
            request, response, failed = kind.lengths.draw(drawn[0], law, kind.freedom, length_rng, order)
        elif isinstance(kind, Clients):
            request, response = kind.tokens(drawn[0], length_rng)
        elif isinstance(kind, Cascade) and law:
            u, w = _uniform(drawn, order, length_rng)
            leads = kind.lead == "request"
            request, response = law.at(u, w) if leads else law.reversed.at(u, w)[::-1]
        elif isinstance(kind, Slots) and kind.theta and law:
            request, response = kind.lengths(arrival, path, law, length_rng)  # type: ignore[arg-type]
        elif law:
            request, response = law.draw(arrival.size, length_rng) if order is None else law.draw_at(order, length_rng)
        if failed is None:
            failed = self.failures.draw(arrival, failing_rng)
        if self.failures.request and not isinstance(kind, Bootstrap):
            request[failed] = np.rint(self.failures.request.at(failing_rng.random(int(failed.sum()))))
        response[failed] = 0
        return columns | {"request_tokens": request, "response_tokens": response, "failed": failed}


class Workload(msgspec.Struct, frozen=True, kw_only=True, tag="squall-workload", tag_field="type"):
    """What is needed to draw traces like one that was seen.

    Parameters; for `episodes` the times and length classes of its requests; for `bootstrap` its rows.
    """

    version: int = VERSION
    source: str
    """What it was fitted to."""
    sha256: str | None = None
    """Of the fitted file's bytes."""
    licence: str | None = None
    attribution: str | None = None
    steps: list[str] = []
    """Filters and scalings of the trace before the fit."""
    notes: list[str] = []
    """What the fit had to decide, one sentence each; for a profile, what is measured and what is assumed."""
    span: float
    """Fitted seconds; what `generate` draws if no duration is given."""
    midnight: float | None = None
    """Seconds from a local midnight to the model's time 0. None: unknown."""
    weekday: int | None = None
    """Weekday (Monday = 0) of that midnight's day."""
    method: str | None = None
    """Estimator of the shapes: moments or mle."""
    seed: int | None = None
    classes: list[ClassModel]

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version {self.version} is not {VERSION}, the one that this squall reads")
        if not self.classes:
            raise ValueError("classes must not be empty")
        if not self.span > 0:
            raise ValueError("span must be above 0")

    @property
    def mean_rate(self) -> float:
        """Requests/s over the long run, all classes together."""
        return sum(one.arrivals.mean_rate for one in self.classes)

    @property
    def shares(self) -> list[float]:
        """Each class's expected share of the requests."""
        return [one.arrivals.mean_rate / self.mean_rate for one in self.classes]

    def only(self, **fields: Any) -> Self:
        """This workload with other fields."""
        return msgspec.structs.replace(self, **fields)


def save_workload(workload: Workload, path: str | pathlib.Path) -> None:
    """Write `workload` as JSON."""
    replace_file(pathlib.Path(path), as_json(workload))


def as_json(workload: Workload) -> bytes:
    """`workload` as indented JSON, with each list of numbers on one line."""
    text = msgspec.json.format(msgspec.json.encode(workload), indent=1)
    return re.sub(rb"\[[\d\s.,eE+-]+\]", lambda match: b" ".join(match[0].split()), text) + b"\n"


def read_workload(path: str | pathlib.Path) -> Workload:
    """The workload in a JSON file. Raises InputError that names the field if it is not one."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise InputError(
            f"{path}: there is no such file; make a model with `squall fit TRACE -o MODEL.json`, or name a profile (burstgpt://all)."
        )
    try:
        return msgspec.json.decode(file.read_bytes(), type=Workload)
    except msgspec.ValidationError as error:
        raise InputError(
            f"{path}: not a workload model: {error}; make one with `squall fit TRACE -o MODEL.json`."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); a workload model is what `squall fit` writes.") from None


def _uniform(
    scores: list[np.ndarray], order: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks inside (0, 1) in the order of the normal scores, evenly spread, so that the lengths' marginal law is exact.

    In conversations (`order`) the request's rank follows both: what the burst is like, and where in its session it is.
    """
    from scipy.special import ndtri

    from squall.workload.compiled.order import cell_ranks

    request, response = scores
    if order is not None:
        request = request + ndtri(np.clip(order, 1e-6, 1 - 1e-6)) * (request.std() or 1.0)
    return cell_ranks(request, rng), cell_ranks(response, rng)
