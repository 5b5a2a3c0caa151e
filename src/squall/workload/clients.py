"""Clients: the load as a superposition of clients, each with its own rate, burstiness and lengths over time.

The model of ServeGen (Xiang et al., arXiv 2505.09999): a client sends by a renewal process whose rate and shape (Gamma
or Weibull) change from window to window, and its requests have its own lengths, which change more slowly. Bursts of the
whole are bursts of single clients, and carry their lengths. Load grows either because each client sends more (`--rate`)
or because there are more clients (`--edit clients=N`), which smooths what single clients do.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from squall.errors import InputError
from squall.seeds import stream
from squall.trace.servegen import Pmf, ServeGenPool
from squall.workload.concurrency import ALPHA_RANGE, Path, Renewal, fit_renewal, whole_period
from squall.workload.lengths import GaussianCopula, Lengths, Quantiles, fit_lengths, tables_of, tokens_at
from squall.workload.process import GAMMA, WEIBULL, RenewalProcess

if TYPE_CHECKING:
    from squall.workload.compiled.lookup import Tables

FEWEST = 20
"""Clients of a trace with fewer requests than this are put together as one."""
_LEVELS = np.unique(np.concatenate([np.linspace(0, 1, 257), [1e-3, 1e-4, 1 - 1e-3, 1 - 1e-4]]))


class Client(msgspec.Struct, frozen=True):
    """One client, window by window."""

    rate: list[float]
    """Requests/s."""
    shape: list[float]
    """Of the gaps' law, with mean 1/rate."""
    weibull: list[bool]
    """Whether the gaps' law is Weibull; else it is Gamma."""
    lengths: list[int]
    """Which of the model's laws of lengths."""


@dataclass(frozen=True)
class ClientPaths:
    """What each client does between two times: its path and the laws of its gaps and lengths, piece by piece."""

    paths: list[Path]
    weibull: list[np.ndarray]
    lengths: list[np.ndarray]

    @property
    def expected(self) -> float:
        """Expected number of arrivals."""
        return sum(path.expected for path in self.paths)

    def scaled(self, factor: float) -> Self:
        """The same clients, each at `factor` times its rate."""
        return replace(self, paths=[path.scaled(factor) for path in self.paths])


class Clients(msgspec.Struct, frozen=True, dict=True, tag="clients", tag_field="kind"):
    """The clients of one class."""

    window: float
    """Length of a window, s; the last one ends with the span."""
    span: float
    """Fitted seconds."""
    period: float
    """Beyond the span, t takes the parameters of t mod `period`."""
    laws: list[Lengths]
    """Joint laws of request and response tokens, to which the clients refer."""
    clients: list[Client]

    def __post_init__(self) -> None:
        if not self.clients or not self.laws:
            raise ValueError("clients and laws must not be empty")
        for client in self.clients:
            if not len(client.rate) == len(client.shape) == len(client.weibull) == len(client.lengths):
                raise ValueError("rate, shape, weibull and lengths of a client must have the same length")
            if min(client.shape) <= 0 or not 0 <= min(client.lengths) <= max(client.lengths) < len(self.laws):
                raise ValueError("a client's shape must be above 0, and its lengths must name one of the laws")
            self._course(client)  # has checks of its own

    def _course(self, client: Client) -> Renewal:
        return Renewal(self.window, self.span, self.period, client.rate, client.shape)

    @property
    def mean_rate(self) -> float:
        """Requests/s over the fitted span, of all clients together."""
        return sum(self._course(client).mean_rate for client in self.clients)

    def path(self, begin: float, end: float, seed: int) -> ClientPaths:
        """What the clients do from `begin` to `end` (s from the model's time 0); nothing in it is random."""
        result = ClientPaths([], [], [])
        windows = len(self.clients[0].rate)
        # Where each piece of a path comes from: the path of a client whose rates are the windows' numbers.
        numbers = Renewal(self.window, self.span, self.period, [float(n) for n in range(windows)], [1.0] * windows)
        window = np.rint(numbers.path(begin, end, seed).rate).astype(np.int64)
        for client in self.clients:
            path = self._course(client).path(begin, end, seed)
            result.paths.append(path)
            result.weibull.append(np.where(np.array(client.weibull)[window], WEIBULL, GAMMA))
            result.lengths.append(np.array(client.lengths)[window])
        return result

    def arrive(self, paths: ClientPaths, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Arrival times (sorted seconds) of all clients, and which law of lengths each request has."""
        from squall.workload.compiled.order import in_order

        times, laws = [], []
        for path, weibull, lengths, own in zip(
            paths.paths, paths.weibull, paths.lengths, rng.spawn(len(paths.paths)), strict=True
        ):
            arrival = RenewalProcess(own).along(path, weibull)
            times.append(arrival)
            first = np.searchsorted(arrival, path.edges[1:-1])
            laws.append(np.repeat(lengths, np.diff(first, prepend=0, append=arrival.size)))
        together = np.concatenate(times)
        order = in_order(together)
        return together[order], np.concatenate(laws)[order]

    def tokens(self, law: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens (int32) of requests with these laws of lengths."""
        return tokens_at(self._tables, law, *rng.random((2, law.size)))

    @cached_property
    def _tables(self) -> "Tables":
        return tables_of(self.laws)

    def resampled(self, number: int, seed: int) -> Self:
        """As many whole sets of the clients as `number` holds, and the rest of it chosen at random, without repeats."""
        if number < 1:
            raise InputError(f"clients={number}: at least one client is needed.")
        sets, rest = divmod(number, len(self.clients))
        chosen = stream(seed, "clients").permutation(len(self.clients))[:rest]
        clients = [*self.clients * sets, *(self.clients[k] for k in sorted(chosen.tolist()))]
        return msgspec.structs.replace(self, clients=clients)


def fit_pool(pool: ServeGenPool) -> tuple[Clients, Lengths, list[str]]:
    """The clients of a ServeGen pool, the law of all their lengths, and what had to be decided.

    The load is the recorded rate, the burstiness the recorded family and shape. Lengths of a window are those of its
    block; a window whose block has none takes its client's first ones. Requests and responses are independent: the
    pool has marginals only.
    """
    laws: list[Lengths] = []
    clients = []
    windows = round(pool.span / pool.window)
    weights: list[float] = []
    for one in pool.clients:
        if not one.rate.any():
            continue
        own: dict[float, int] = {}
        for block in one.blocks:
            if block.input_tokens.values.size and block.output_tokens.values.size:
                own[block.start] = len(laws)
                laws.append(Lengths(_table(block.input_tokens), _table(block.output_tokens, 1), GaussianCopula(0.0)))
                weights.append(0.0)
        if not own:
            continue
        at = np.rint(one.start / pool.window).astype(np.int64)
        rate, shape, weibull = np.zeros(windows), np.ones(windows), np.zeros(windows, bool)
        lengths = np.full(windows, next(iter(own.values())))
        rate[at], weibull[at] = one.rate, [pattern == "weibull" for pattern in one.pattern]
        shape[at] = np.clip(np.where(np.isnan(one.shape), 1.0, one.shape), 0.02, ALPHA_RANGE[1])
        for place, time in zip(at.tolist(), one.start.tolist(), strict=True):
            found = one.block_at(time)
            lengths[place] = own.get(found.start, lengths[place]) if found else lengths[place]
        for place in range(windows):
            weights[lengths[place]] += rate[place]
        clients.append(Client(_short(rate), _short(shape), weibull.tolist(), lengths.tolist()))
    if not clients:
        raise InputError(f"{pool.source}: no client of the pool has both load and lengths.")
    model = Clients(pool.window, pool.span, whole_period(pool.span), laws, clients)
    share = np.array(weights) / sum(weights)
    sample = stream(0, "pool lengths").choice(len(laws), 50_000, p=share)
    together = fit_lengths(*model.tokens(sample, stream(0, "pool tokens")), stream(0, "pool ranks"))
    notes = [*pool.notes, "Requests and responses are independent inside a client: the pool has marginals only."]
    if len(clients) < len(pool.clients):
        notes.append(f"{len(pool.clients) - len(clients)} clients without load or lengths are left out.")
    return model, together, notes


def fit_clients(
    arrivals: np.ndarray,
    client: np.ndarray,
    answered: np.ndarray,
    request: np.ndarray,
    response: np.ndarray,
    span: float,
    window: float,
    *,
    tick: float | None,
    rng: np.random.Generator,
    seed: int,
) -> Clients:
    """The clients of one class, from sorted `arrivals` (s from 0), whose they are (numbers), and lengths in tokens.

    Those with fewer than FEWEST answered requests count as one client together.
    """
    _, owner = np.unique(client, return_inverse=True)
    often = np.bincount(owner, answered)
    owner = np.where(often[owner] < FEWEST, often.size, owner)
    laws, clients = [], []
    for number in np.unique(owner):
        rows = owner == number
        ok = rows & answered
        if not ok.any():
            continue
        course, _ = fit_renewal(arrivals[rows], span, window, tick=tick, method="moments", seed=seed)
        laws.append(fit_lengths(request[ok], response[ok], rng))
        size = len(course.rate)
        clients.append(Client(course.rate, course.alpha, [False] * size, [len(laws) - 1] * size))
    return Clients(window, span, whole_period(span), laws, clients)


def _table(pmf: Pmf, least: int = 0) -> Quantiles:
    """The quantile table of a distribution on whole numbers, at 261 levels."""
    upto = np.cumsum(pmf.probabilities)
    at = np.minimum(np.searchsorted(upto, _LEVELS - 1e-12), pmf.values.size - 1)
    values = np.maximum(pmf.values[at], least)
    kept = np.ones(_LEVELS.size, dtype=bool)
    kept[1:-1] = (values[1:-1] != values[:-2]) | (values[1:-1] != values[2:])
    return Quantiles(_LEVELS[kept].round(9).tolist(), values[kept].tolist())


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
