"""The capture's own `/squall/metrics` in Prometheus text: rates, latencies, and how bursty the traffic is now."""

from bisect import bisect_left
from collections import Counter, deque
from itertools import pairwise
from math import sqrt
from time import monotonic_ns

from squall.capture.record import Captured, Recorder

WINDOW = 300.0
"""Seconds over which burstiness is told."""
MOST_ARRIVALS = 100_000
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class _Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value

    def lines(self, name: str, text: str) -> list[str]:
        lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        sum_so_far = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.counts, strict=True):
            sum_so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {sum_so_far}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {sum_so_far}"]


class Gauges:
    """Counters that the relay keeps."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._arrivals: deque[int] = deque(maxlen=MOST_ARRIVALS)
        self._by_status: Counter[str] = Counter()
        self._ttft, self._elapsed = _Histogram(), _Histogram()
        self._request_tokens = self._response_tokens = 0
        self.in_flight = 0
        self.passed = 0
        """Requests that are relayed and not recorded: lists of models, embeddings."""

    def arrived(self, at: int | None) -> None:
        """A request goes upstream; `at` (ns) if it is one that is recorded."""
        self.in_flight += 1
        if at is not None:
            self._arrivals.append(at)

    def count(self, record: Captured) -> None:
        """Its outcome."""
        self._by_status[record.status] += 1
        self._elapsed.add(record.ended - record.arrival)
        if record.first_token is not None:
            self._ttft.add(record.first_token - record.arrival)
        self._request_tokens += record.request_tokens or 0
        self._response_tokens += record.response_tokens or 0

    def burstiness(self) -> tuple[int, float | None, float | None]:
        """Requests of the last five minutes, the CV of their gaps, and their index of dispersion in bins of 1 s.

        None where fewer than three requests came.
        """
        now = monotonic_ns()
        start = now - int(WINDOW * 1e9)
        while self._arrivals and self._arrivals[0] < start:
            self._arrivals.popleft()
        times = sorted(self._arrivals)
        if len(times) < 3:
            return len(times), None, None
        gaps = [(b - a) / 1e9 for a, b in pairwise(times)]
        mean = sum(gaps) / len(gaps)
        spread = sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
        bins = Counter((time - start) // 1_000_000_000 for time in times)
        seconds = max(1, int((now - times[0]) / 1e9))
        rate = len(times) / seconds
        variance = (sum(count * count for count in bins.values()) / seconds) - rate * rate
        return len(times), spread / mean if mean > 0 else None, variance / rate

    def text(self) -> str:
        """The page."""
        requests, cv, dispersion = self.burstiness()
        recorder = self._recorder
        lines = ["# HELP squall_requests_total Recorded requests by outcome", "# TYPE squall_requests_total counter"]
        lines += [
            f'squall_requests_total{{status="{name}"}} {count}' for name, count in sorted(self._by_status.items())
        ]
        simple: list[tuple[str, str, str, float | int | None]] = [
            ("squall_passed_total", "counter", "Requests relayed and not recorded", self.passed),
            ("squall_in_flight", "gauge", "Requests under way", self.in_flight),
            ("squall_request_tokens_total", "counter", "Prompt tokens that servers reported", self._request_tokens),
            ("squall_response_tokens_total", "counter", "Generated tokens", self._response_tokens),
            ("squall_records_written_total", "counter", "Records on disk", recorder.written),
            ("squall_records_dropped_total", "counter", "Records lost to a full or slow disk", recorder.dropped),
            ("squall_window_requests", "gauge", "Requests of the last 5 minutes", requests),
            ("squall_window_gap_cv", "gauge", "CV of the gaps between them (Poisson: 1)", cv),
            ("squall_window_dispersion", "gauge", "Their index of dispersion in bins of 1 s (Poisson: 1)", dispersion),
        ]
        for name, kind, text, value in simple:
            if value is not None:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += self._ttft.lines("squall_time_to_first_token_seconds", "From the request's first byte")
        lines += self._elapsed.lines("squall_request_duration_seconds", "From the request's first byte to its end")
        return "\n".join(lines) + "\n"
