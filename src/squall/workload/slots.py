"""The paper's experiments with the renewal model: Weibull gaps, the working day, slot playback, warm-up, burst ramps.

A *slot* is a stretch of time with one rate, one shape of the gaps and, if asked, one Zipf exponent theta of the request
lengths: alpha(t), beta(t), theta(t) of the BurstGPT paper, with P(L = k) proportional to k^-theta, 1 <= k <= L_max.
Slots may have any length, so that one kind holds all of these:

* gaps that follow Weibull(k) instead of Gamma(alpha), where they fit better;
* the representative working day: 20-minute slots of the day, the working days together, in a range of hours;
* playback: each slot is played for a time of its own (the authors play 20 minutes in 60 s) at its rate and shape;
* warm-up: requests at a fixed rate and shape before the slots, to fill the cache (the authors: 1,000 at alpha 0.5);
* the burst ramp: episodes in which the CV of the gaps rises to 64, 32, 16, 8, 4 and falls again.
"""

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from squall.errors import InputError
from squall.units import Duration, seconds
from squall.workload.concurrency import ALPHA_RANGE, DAY, Path, Renewal, cut, join
from squall.workload.failures import Failures
from squall.workload.lengths import GaussianCopula, Lengths, Quantiles

if TYPE_CHECKING:
    from squall.workload.model import Workload

WARM_UP = {"requests": 1000, "rate": 1.0, "shape": 0.5, "theta": 1.1}
"""The authors' first requests: Gamma gaps of shape 0.5 with the mean 1 s (numpy scale 2.0), and theta 1.1."""
PEAKS = (64.0, 32.0, 16.0, 8.0, 4.0)
"""CVs of the authors' burst ramp, one every 1,000 requests."""
_LONGEST = 1023  # tokens, of the authors' lengths
_BASE_CV = 2.0
_RISE = 200  # requests in which the CV rises, and as many in which it falls
_FEWEST_GAPS = 10


class Slots(msgspec.Struct, frozen=True, tag="slots", tag_field="kind"):
    """Rate, shape and, if not empty, theta in slots of any length; repeated beyond the last one."""

    gaps: str
    """Law of the gaps: gamma or weibull."""
    edges: list[float]
    """Slot k is from edges[k] to edges[k + 1] (s)."""
    rate: list[float]
    """Requests/s."""
    shape: list[float]
    """alpha of Gamma or k of Weibull gaps."""
    theta: list[float] = []
    """Zipf exponents of the request lengths; empty: they follow the class's law at all times."""
    longest: int = 0
    """L_max of the Zipf lengths, in tokens."""

    def __post_init__(self) -> None:
        if self.gaps not in ("gamma", "weibull"):
            raise ValueError("gaps must be gamma or weibull")
        if not self.rate or not len(self.rate) == len(self.shape) == len(self.edges) - 1:
            raise ValueError("rate and shape must have an entry for each slot, at least 1")
        if self.edges[0] != 0 or np.any(np.diff(self.edges) <= 0) or min(self.rate) < 0 or min(self.shape) <= 0:
            raise ValueError("edges must rise from 0, rate must not be negative and shape must be above 0")
        if self.theta and (len(self.theta) != len(self.rate) or self.longest < 1):
            raise ValueError("theta must have an entry for each slot, and longest be at least 1")

    @property
    def window(self) -> float:
        return self.edges[-1] / len(self.rate)

    @property
    def mean_rate(self) -> float:
        """Requests/s over all slots."""
        return float(np.array(self.rate) @ np.diff(self.edges)) / self.edges[-1]

    def path(self, begin: float, end: float, seed: int) -> Path:
        """Rate and shape from `begin` to `end` (s); nothing in it is random."""
        whole = Path(
            np.array(self.edges), np.array(self.rate), np.array(self.shape), np.arange(len(self.rate)), self.gaps
        )
        span = self.edges[-1]
        turns = range(int(begin // span), max(int(np.ceil(end / span)), int(begin // span) + 1))
        return cut(join([whole] * len(turns)), begin - turns[0] * span, end - turns[0] * span)

    def lengths(self, arrival: np.ndarray, path: Path, law: Lengths, rng: np.random.Generator) -> Any:
        """Request and response tokens of arrivals along `path`: Zipf requests, and responses by their rank."""
        place = np.searchsorted(path.edges, arrival, side="right").clip(1, path.rate.size) - 1
        slot = path.episode[place]  # type: ignore[index]
        u = rng.random(arrival.size)
        request = np.ones(arrival.size)
        for one in np.unique(slot):
            some = slot == one
            below = np.cumsum(np.arange(1.0, self.longest + 1) ** -self.theta[one])
            request[some] = 1 + np.searchsorted(below / below[-1], u[some])
        _, response = law.at(u, rng.random(arrival.size))
        return np.minimum(request, self.longest).astype(np.int32), response


def weibull_windows(renewal: Renewal, arrivals: np.ndarray, method: str) -> tuple[Slots, float]:
    """The windows of `renewal` with Weibull gaps; and how much likelier these make the gaps (nats a gap) than Gamma."""
    from scipy.special import gammaln

    edges = np.append(np.arange(len(renewal.rate)) * renewal.window, renewal.span)
    gaps = np.diff(arrivals)
    owner = np.minimum((arrivals[1:] // renewal.window).astype(np.int64), len(renewal.rate) - 1)
    gaps = np.maximum(gaps, 1e-6 * gaps.mean())
    size = np.bincount(owner, minlength=len(renewal.rate))
    held = np.maximum(size, 1)
    mean = np.bincount(owner, gaps, size.size) / held
    log_mean = np.bincount(owner, np.log(gaps), size.size) / held
    some = size >= _FEWEST_GAPS
    if method == "mle":
        k = _likeliest_weibull(gaps, owner, held, log_mean)
    else:
        variance = np.bincount(owner, gaps**2, size.size) / held - mean**2
        k = _weibull_of_cv(np.sqrt(np.maximum(variance, 1e-18)) / np.maximum(mean, 1e-12))
    pooled = float(np.median(k[some])) if some.any() else 1.0
    k = np.where(some, k, pooled)
    scale = np.maximum(mean, 1e-12) / np.exp(gammaln(1 + 1 / k))
    power = np.bincount(owner, (gaps / scale[owner]) ** k[owner], size.size) / held
    alpha = np.array(renewal.alpha)
    beta = alpha / np.maximum(mean, 1e-12)
    weibull = np.log(k) - k * np.log(scale) + (k - 1) * log_mean - power
    gamma = alpha * np.log(beta) - gammaln(alpha) + (alpha - 1) * log_mean - beta * mean
    gain = float(((weibull - gamma) * size)[some].sum() / max(size[some].sum(), 1))
    return Slots("weibull", edges.tolist(), renewal.rate, [float(f"{x:.6g}") for x in k]), gain


def _weibull_of_cv(cv: np.ndarray) -> np.ndarray:
    """The shape k of Weibull gaps with the given CV: (CV^2 + 1) Gamma(1 + 1/k)^2 = Gamma(1 + 2/k)."""
    from scipy.special import gammaln

    k = np.geomspace(0.08, 50, 2000)
    known = np.sqrt(np.expm1(gammaln(1 + 2 / k) - 2 * gammaln(1 + 1 / k)))
    return np.interp(-cv, -known, k)


def _likeliest_weibull(gaps: np.ndarray, owner: np.ndarray, size: np.ndarray, log_mean: np.ndarray) -> np.ndarray:
    """The likeliest shapes, window by window: 1/k = sum(x^k log x) / sum(x^k) - mean(log x), by bisection."""
    low, high = np.full(size.size, np.log(0.02)), np.full(size.size, np.log(50.0))
    log = np.log(gaps) - log_mean[owner]
    for _ in range(40):
        k = np.exp((low + high) / 2)
        weight = np.exp(np.minimum(k[owner] * log, 700.0))
        slope = np.bincount(owner, weight * log, size.size) / np.maximum(np.bincount(owner, weight, size.size), 1e-300)
        low, high = np.where(slope < 1 / k, np.log(k), low), np.where(slope < 1 / k, high, np.log(k))
    return np.exp((low + high) / 2)


def as_slots(renewal: Renewal) -> Slots:
    """The windows of `renewal` as slots."""
    edges = np.append(np.arange(len(renewal.rate)) * renewal.window, renewal.span)
    return Slots("gamma", edges.tolist(), renewal.rate, renewal.alpha)


def with_theta(slots: Slots, arrivals: np.ndarray, request: np.ndarray) -> Slots:
    """`slots` with the Zipf exponent of largest likelihood of the request lengths in each; few lengths: that of all."""
    from squall.characterize.lengths import zipf_exponent

    known = request > 0
    arrivals, request = arrivals[known], request[known]
    if not request.size:
        raise InputError("--zipf: no answered request with a prompt, so there are no lengths to fit a Zipf law to.")
    longest = int(request.max())
    whole = zipf_exponent(request, longest)
    borders = np.searchsorted(arrivals, slots.edges)
    theta = [
        zipf_exponent(request[first:last], longest) if last - first >= _FEWEST_GAPS else whole
        for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    ]
    return msgspec.structs.replace(slots, theta=[float(f"{x:.5g}") for x in theta], longest=longest)


def working_day(
    slots: Slots, arrivals: np.ndarray, midnight: float, weekday: int, hours: tuple[float, float], average: str
) -> Slots:
    """The representative working day of windows that divide the day: the slots of `hours` (s from midnight).

    "parameters" averages shape and beta of a slot over the working days, as published, which does not keep the mean
    rate; "pooled" fits the gaps of all of them together. Raises InputError if no working day is covered.
    """
    width = slots.edges[1]
    first, last = hours
    places = np.arange(first, last - 1e-6, width)
    rates, shapes = np.zeros(places.size), np.ones(places.size)
    days = int((midnight + slots.edges[-1]) // DAY) + 1
    for number, place in enumerate(places):
        pooled, counts, beta, alpha = [], [], [], []
        for day in range(days):
            begin = day * DAY + place - midnight
            # Hours beyond 24 belong to the night of the working day before.
            if (weekday + day) % 7 > 4 or begin < -1e-6 or begin + width > slots.edges[-1] + 1e-6:
                continue
            low, high = np.searchsorted(arrivals, (begin, begin + width))
            counts.append(high - low)
            gaps = np.diff(arrivals[max(low - 1, 0) : high])
            pooled.append(gaps)
            slot = int(np.searchsorted(slots.edges, begin + width / 2) - 1)
            if slots.rate[slot] > 0 and gaps.size >= _FEWEST_GAPS:
                alpha.append(slots.shape[slot])
                beta.append(slots.shape[slot] * slots.rate[slot])
        if not counts:
            continue
        rates[number] = np.mean(counts) / width
        together = np.concatenate(pooled)
        if average == "parameters" and alpha:
            shapes[number] = np.mean(alpha)
            rates[number] = np.mean(beta) / np.mean(alpha)
        elif together.size >= _FEWEST_GAPS and together.std() > 0:
            cv = float(together.std() / together.mean())
            shapes[number] = float(_weibull_of_cv(np.array([cv]))[0]) if slots.gaps == "weibull" else cv**-2
    if not rates.any():
        raise InputError("--day: the trace holds no request of a working day in these hours; choose others.")
    shapes = np.clip(shapes, *ALPHA_RANGE)
    edges = np.append(places, last) - first
    return Slots(slots.gaps, edges.tolist(), _short(rates), _short(shapes))


def played(slots: Slots, each: float) -> Slots:
    """Every slot played for `each` seconds, at its rate and shape."""
    return msgspec.structs.replace(slots, edges=(np.arange(len(slots.rate) + 1) * each).tolist())


def warmed(slots: Slots, requests: int, rate: float) -> Slots:
    """`requests` (expected) at `rate` and the authors' shape and theta before the slots."""
    length = requests / rate
    shape = WARM_UP["shape"]
    if slots.gaps == "weibull":
        shape = float(_weibull_of_cv(np.array([shape**-0.5]))[0])
    return msgspec.structs.replace(
        slots,
        edges=[0.0, *(length + edge for edge in slots.edges)],
        rate=[rate, *slots.rate],
        shape=[shape, *slots.shape],
        theta=[WARM_UP["theta"], *slots.theta] if slots.theta else [],
    )


def burst_ramp(*, peaks: tuple[float, ...] = PEAKS, keep_rate: bool = False) -> "Workload":
    """The authors' short-term bursts: every 1,000 requests the CV of the gaps rises to a peak in 200 and falls in 200.

    Between and before them CV 1.41 at 1 request/s. As published the scale of the Gamma law stays, so that the rate is
    CV^2/2: 2,048 requests/s at CV 64. `keep_rate` keeps 1 request/s instead: bursts without more load.
    Lengths: request and response independently Zipf(1.1) below 1,024.
    """
    from squall.workload.model import ClassModel, Workload

    if not peaks or min(peaks) < _BASE_CV:
        raise InputError(f"burst_ramp: peaks of the CV must be at least {_BASE_CV:g}.")
    rate, shape = [WARM_UP["rate"]], [WARM_UP["shape"]]
    edges = [0.0, float(WARM_UP["requests"])]
    for peak in peaks:
        rise = np.linspace(_BASE_CV, peak, _RISE + 1)
        cv = np.concatenate([rise[:-1], rise[::-1][:-1]])
        speed = np.full(cv.size, WARM_UP["rate"]) if keep_rate else cv**2 / 2
        rate += [*speed.tolist(), WARM_UP["rate"]]
        shape += [*(cv**-2.0).tolist(), WARM_UP["shape"]]
        edges += (edges[-1] + np.cumsum(1 / speed)).tolist()
        edges.append(edges[-1] + WARM_UP["requests"] - 2 * _RISE)
    below = np.cumsum(np.arange(1.0, _LONGEST + 1) ** -WARM_UP["theta"])
    levels = np.concatenate([[0.0], below / below[-1]])
    # Steps of the law, rounded back to whole tokens when drawn.
    zipf = Quantiles([0.0, *levels[1:].tolist()], [0.5, *(np.arange(1.0, _LONGEST + 1) + 0.499).tolist()])
    one = ClassModel(
        service=None,
        model=None,
        arrivals=Slots("gamma", edges, _short(np.array(rate)), _short(np.array(shape))),
        lengths=Lengths(zipf, zipf, GaussianCopula(0.0)),
        failures=Failures(0.0, 0.0, 0.0),
    )
    kept = ", at a kept rate" if keep_rate else ""
    return Workload(
        source=f"burst ramp to CV {', '.join(f'{p:g}' for p in peaks)}{kept}", span=edges[-1], classes=[one]
    )


def hours_of(text: str) -> tuple[float, float]:
    """Begin and end (s from midnight) of hours such as 8h:25h; 25h is one in the next night."""
    begin, found, end = text.partition(":")
    if not found:
        raise InputError(f"--day {text}: a range of hours from midnight is needed, such as 8h:25h.")
    first, last = (seconds(part, "--day") for part in (begin, end))
    if not 0 <= first < last <= first + DAY:
        raise InputError(f"--day {text}: the hours must rise, and cover a day at most.")
    return first, last


def duration(value: Duration | None, flag: str) -> float | None:
    """Seconds above 0, or None."""
    if value is None:
        return None
    found = seconds(value, flag)
    if found <= 0:
        raise InputError(f"{flag} 0: a length above 0 is needed, such as 60s.")
    return found


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
