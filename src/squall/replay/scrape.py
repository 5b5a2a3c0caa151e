"""The server's own numbers: its `/metrics` page (Prometheus text format), read once a second while a replay runs.

Which page it is, is seen from the names on it. Gauges are taken as they stand at the moment of reading; counters become
what was added since the reading before, also over a restart of the server, which sets them back to 0. Nothing on the
page is trusted: it may be endless, slow, or lie. Names as of vLLM 0.11 to 0.32 (V1), SGLang 0.5, llama.cpp b6000 and
later, TGI 3 and Dynamo 1.
"""

import math
import re
import socket
import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools
import msgspec

from squall.errors import InputError
from squall.progress import printable
from squall.replay.target import Target, Trust
from squall.run.server import Histogram, ServerMetrics

DEADLINE = 2.0
"""Seconds that a page may take, whatever the server does."""
PAGE_LIMIT = 8 << 20
"""Bytes of a page after which it is not read on; vLLM's has some 200,000."""
MOST_VALUES = 50_000
LARGEST = 1e15
"""Greater values are lies: they would overflow sums."""
MOST_REPLICAS = 1024
MOST_EDGES = 200


class Names(NamedTuple):
    """What a server calls the things in the Run's time series; of several names the first that is there counts."""

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    kv_used: tuple[str, ...] = ()
    preemptions: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    """Counters of tokens computed; all of them are added."""
    ttft: str = ""
    e2e: str = ""


SERVERS = {
    "Dynamo": Names(
        running=("dynamo_frontend_inflight_requests",),  # all that are not answered yet: the waiting are taken off
        waiting=("dynamo_frontend_queued_requests",),
        kv_used=("dynamo_component_gpu_cache_usage_percent", "dynamo_component_kvstats_gpu_cache_usage_percent"),
        tokens=("dynamo_frontend_output_tokens_total", "dynamo_frontend_input_sequence_tokens_sum"),
        ttft="dynamo_frontend_time_to_first_token_seconds",
        e2e="dynamo_frontend_request_duration_seconds",
    ),
    "vLLM": Names(
        running=("vllm:num_requests_running",),
        waiting=("vllm:num_requests_waiting",),
        kv_used=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        preemptions=("vllm:num_preemptions_total",),
        tokens=("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        ttft="vllm:time_to_first_token_seconds",
        e2e="vllm:e2e_request_latency_seconds",
    ),
    "SGLang": Names(
        running=("sglang:num_running_reqs",),
        waiting=("sglang:num_queue_reqs",),
        kv_used=("sglang:token_usage",),
        preemptions=("sglang:num_retracted_requests_total", "sglang:num_retracted_reqs_total"),
        tokens=("sglang:prompt_tokens_total", "sglang:generation_tokens_total"),
        ttft="sglang:time_to_first_token_seconds",
        e2e="sglang:e2e_request_latency_seconds",
    ),
    "llama.cpp": Names(
        running=("llamacpp:requests_processing",),
        waiting=("llamacpp:requests_deferred",),
        kv_used=("llamacpp:kv_cache_usage_ratio",),
        tokens=("llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"),
    ),
    "TGI": Names(
        running=("tgi_batch_current_size",),
        waiting=("tgi_queue_size",),
        tokens=("tgi_request_input_length_sum", "tgi_request_generated_tokens_sum"),
        e2e="tgi_request_duration",
    ),
}
_GAUGES = ("running", "waiting", "kv_used")
_STARTED = "process_start_time_seconds"
_REPLICA_LABELS = ("engine", "dp_rank", "replica")  # vLLM's and SGLang's data-parallel engines; squall's own


def _values(names: "set[str]", histograms: "set[str]") -> re.Pattern[bytes]:
    """Finds the lines of the page that matter: name, labels and value."""
    whole = [re.escape(name) for name in sorted(names)]
    whole += [rf"{re.escape(name)}_(?:bucket|sum|count)" for name in sorted(histograms) if name]
    return re.compile(rf"(?m)^({'|'.join(whole)})(?:\{{([^\n]*)\}})?[ \t]+(\S+)".encode())


_LINES = _values(
    {name for names in SERVERS.values() for group in names[:5] for name in group} | {_STARTED},
    {name for names in SERVERS.values() for name in (names.ttft, names.e2e)},
)
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')


class Reading(msgspec.Struct):
    """One page, understood."""

    server: str
    values: dict[tuple[str, int], float]
    """By column of the time series (`tokens` for the computed ones) and replica."""
    buckets: dict[str, dict[float, float]]
    """Of `ttft` and `e2e`: edge -> requests at or below it."""
    sums: dict[str, float]
    started: float | None
    """When the process started, by its own clock."""


def read_page(page: bytes) -> Reading | None:
    """What `page` says of the server; None if no server that is known here wrote it."""
    found: dict[str, list[tuple[dict[bytes, bytes], float]]] = {}
    for match in islice(_LINES.finditer(page), MOST_VALUES):
        try:
            value = float(match[3])
        except ValueError:
            continue
        if 0 <= value <= LARGEST:
            found.setdefault(match[1].decode(), []).append((dict(_LABEL.findall(match[2] or b"")), value))
    server = next((name for name, names in SERVERS.items() if names.running[0] in found), None)
    if server is None:
        return None
    names = SERVERS[server]
    values: dict[tuple[str, int], float] = {}
    for column in ("running", "waiting", "kv_used", "preemptions"):
        name = next((name for name in getattr(names, column) if name in found), None)
        for labels, value in found.get(name or "", ()):
            key = (column, _replica(labels))
            values[key] = max(values.get(key, 0.0), value) if column == "kv_used" else values.get(key, 0.0) + value
    for name in names.tokens:
        for labels, value in found.get(name, ()):
            key = ("tokens", _replica(labels))
            values[key] = values.get(key, 0.0) + value
    for key in [key for key, value in values.items() if key[0] == "kv_used" and value > 1.0]:
        del values[key]  # no share
    if server == "Dynamo":
        for key in [key for key in values if key[0] == "running"]:
            values[key] = max(0.0, values[key] - values.get(("waiting", key[1]), 0.0))
    buckets: dict[str, dict[float, float]] = {}
    sums: dict[str, float] = {}
    for which in ("ttft", "e2e"):
        name = getattr(names, which)
        for labels, value in found.get(f"{name}_bucket", ()):
            edge = _edge(labels.get(b"le", b""))
            if edge is not None:
                into = buckets.setdefault(which, {})
                if edge in into or len(into) < MOST_EDGES:
                    into[edge] = into.get(edge, 0.0) + value
        sums[which] = sum(value for _, value in found.get(f"{name}_sum", ()))
    started = max((value for _, value in found.get(_STARTED, ())), default=None)
    return Reading(server, values, {k: b for k, b in buckets.items() if math.inf in b}, sums, started)


def _replica(labels: dict[bytes, bytes]) -> int:
    for name in _REPLICA_LABELS:
        text = labels.get(name.encode(), b"")
        if text.isdigit() and len(text) < 5:
            return min(int(text), MOST_REPLICAS)
    return 0


def _edge(text: bytes) -> float | None:
    try:
        edge = float(text)
    except ValueError:
        return None
    return None if math.isnan(edge) else edge


class Sample(msgspec.Struct):
    """A row of the Run's time series; a line of the journal's series file."""

    time: float
    replica: int
    running: float | None = None
    waiting: float | None = None
    kv_used: float | None = None
    preemptions: int | None = None
    batch_tokens: float | None = None


class Tally:
    """Reading after reading: the samples, and what the server's histograms gained since the first."""

    def __init__(self, summary: ServerMetrics) -> None:
        self.summary = summary
        self._last: Reading | None = None
        self._at = 0.0
        self._gained: dict[str, dict[float, float]] = {}
        self._sums: dict[str, float] = {}

    def add(self, at: float, reading: Reading) -> list[Sample]:
        """The samples that `reading`, made at `at` (seconds on the run's clock), adds to the series."""
        last, before = self._last, self._at
        self._last, self._at = reading, at
        self.summary.scrapes += 1
        restarted = last is not None and _restarted(last, reading)
        self.summary.restarts += restarted
        if last is not None:
            for which, edges in reading.buckets.items():
                old = {} if restarted else last.buckets.get(which, {})
                into = self._gained.setdefault(which, {})
                for edge, count in edges.items():
                    into[edge] = into.get(edge, 0.0) + max(0.0, count - old.get(edge, 0.0))
                base = 0.0 if restarted else last.sums.get(which, 0.0)
                self._sums[which] = self._sums.get(which, 0.0) + max(0.0, reading.sums[which] - base)
            self.summary.histograms = {
                which: _histogram(self._gained[which], self._sums[which]) for which in self._gained
            }
        span = at - before
        samples = []
        for replica in sorted({replica for _, replica in reading.values}):
            row = Sample(time=at, replica=replica)
            for column in _GAUGES:
                setattr(row, column, reading.values.get((column, replica)))
            if last is not None and span > 0:
                gained = {
                    name: max(0.0, reading.values[name, replica] - (0.0 if restarted else last.values[name, replica]))
                    for name in ("preemptions", "tokens")
                    if (name, replica) in reading.values and (name, replica) in last.values
                }
                if "preemptions" in gained:
                    row.preemptions = int(min(gained["preemptions"], 2**53))
                if "tokens" in gained:
                    row.batch_tokens = gained["tokens"] / span
            samples.append(row)
        return samples


def _restarted(before: Reading, now: Reading) -> bool:
    """Whether the server was started anew: it says so, or a counter is lower than it was."""
    if before.started is not None and now.started is not None and now.started > before.started + 1:
        return True
    counters = [key for key in now.values if key[0] in ("preemptions", "tokens") and key in before.values]
    fell = any(now.values[key] < before.values[key] for key in counters)
    counts = [which for which in now.buckets if which in before.buckets]
    return fell or any(now.buckets[which][math.inf] < before.buckets[which][math.inf] for which in counts)


def _histogram(cumulative: dict[float, float], total: float) -> Histogram:
    edges = sorted(edge for edge in cumulative if math.isfinite(edge))
    counts, below = [], 0.0
    for edge in [*edges, math.inf]:
        counts.append(max(0, round(cumulative[edge] - below)))
        below = max(below, cumulative[edge])
    return Histogram(edges=edges, counts=counts, sum=total)


class Endpoint(msgspec.Struct, frozen=True):
    """Where the page is, and how to ask for it."""

    url: str
    """As shown: without credentials and query."""
    host: str
    address: tuple[str, int]
    tls: bool
    request: bytes
    trust: Trust = Trust()


class PageError(Exception):
    """Why the page could not be read, in a few words."""


def find_metrics(target: Target, metrics_url: str | None) -> tuple[Endpoint | None, str | None]:
    """The metrics page of `target`, or the one at `metrics_url`, and the name of the server that wrote it.

    Without `metrics_url` it is looked for beside the API; (None, None) if there is none. Credentials and headers of
    the target go to its own page only. Raises InputError if the page at `metrics_url` cannot be read or understood.
    """
    if metrics_url is not None:
        endpoint = _endpoint(metrics_url, target)
        try:
            reading = read_page(fetch(endpoint))
        except PageError as error:
            raise InputError(f"--metrics-url {endpoint.url}: {error}; correct it, or leave it out.") from error
        if reading is None:
            raise InputError(
                f"--metrics-url {endpoint.url}: nothing there is of a server that squall knows ({', '.join(SERVERS)})."
            )
        return endpoint, reading.server
    above = target.base.removesuffix("/v1")
    for path in dict.fromkeys((f"{above}/metrics", "/metrics")):
        endpoint = _beside(target, path)
        try:
            reading = read_page(fetch(endpoint))
        except PageError:
            continue
        if reading is not None:
            return endpoint, reading.server
    return None, None


def _beside(target: Target, path: str) -> Endpoint:
    scheme, slashes, rest = target.url.partition("://")
    where = f"{scheme}{slashes}{rest.partition('/')[0]}{path}"
    head = f"GET {path} HTTP/1.1\r\nConnection: close\r\n".encode()
    return Endpoint(where, target.host, target.address, target.tls, head + target.headers + b"\r\n", target.trust)


def _endpoint(url: str, target: Target) -> Endpoint:
    parts = urlsplit(url)
    shown = printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise InputError(f"--metrics-url {shown}: the port is not a number from 0 to 65535.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--metrics-url {shown}: give the whole address, such as http://127.0.0.1:8000/metrics.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not (path.isascii() and path.isprintable() and " " not in path):
        raise InputError(f"--metrics-url {shown}: an address is printable ASCII without spaces.")
    where = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    same = (parts.hostname, port, parts.scheme == "https") == (target.host, target.address[1], target.tls)
    head = f"GET {path} HTTP/1.1\r\nConnection: close\r\n".encode()
    fields = target.headers if same else f"Host: {where}:{port}\r\nAccept-Encoding: identity\r\n".encode()
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--metrics-url {shown}: the name {parts.hostname} cannot be resolved ({error}).") from error
    address = target.address if same else (str(found[0][4][0]), port)
    trust = target.trust if same else Trust()
    return Endpoint(shown, parts.hostname, address, parts.scheme == "https", head + fields + b"\r\n", trust)


class _Page:
    """Takes one HTTP response."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


def fetch(endpoint: Endpoint, within: float = DEADLINE) -> bytes:
    """The page, read on a connection of its own in at most `within` seconds and PAGE_LIMIT bytes, or PageError."""
    until = time.monotonic() + within
    page, size = _Page(), 0
    parser = httptools.HttpResponseParser(page)
    try:
        with socket.create_connection(endpoint.address, timeout=within) as plain, _secured(plain, endpoint) as wire:
            wire.sendall(endpoint.request)
            for data in _received(wire, until):
                size += len(data)
                if size > PAGE_LIMIT:
                    raise PageError(f"the page is longer than {PAGE_LIMIT >> 20} MB")
                parser.feed_data(data)
                if page.complete:
                    break
    except TimeoutError as error:
        raise PageError(f"no whole page in {within:g} s") from error
    except OSError as error:
        raise PageError(error.strerror or type(error).__name__) from error
    except httptools.HttpParserError as error:
        raise PageError("the answer is not HTTP") from error
    try:
        status = parser.get_status_code()
    except AttributeError:
        status = 0
    if status != 200:
        raise PageError(f"HTTP {status}" if status else "no answer")
    return b"".join(page.body)


def _secured(plain: socket.socket, endpoint: Endpoint) -> socket.socket:
    if not endpoint.tls:
        return plain
    return endpoint.trust.context().wrap_socket(plain, server_hostname=endpoint.host)


def _received(wire: socket.socket, until: float) -> Iterator[bytes]:
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wire.settimeout(left)
        data = wire.recv(1 << 16)
        if not data:
            return
        yield data
