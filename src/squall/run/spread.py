"""How much do repeated runs of the same load differ? One run's interval knows nothing of the next run's luck.

Of each number: the mean over the runs, their standard deviation, the lowest and the highest, and a 95 % interval of the
mean by Student's t, which takes the runs as independent draws of the same thing.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from squall.run.metrics import Metrics

NUMBERS: dict[str, Callable[[Metrics], float | None]] = {
    "throughput": lambda found: found.throughput,
    "output_token_throughput": lambda found: found.output_token_throughput,
    "failed_share": lambda found: found.failed / found.requests if found.requests else None,
    **{
        f"{name}_{level}": lambda found, name=name, level=level: getattr(getattr(found, name), level)  # type: ignore[misc]
        for name in ("ttft", "tpot", "e2e")
        for level in ("mean", "p50", "p99")
    },
    "lateness_p99": lambda found: found.lateness.p99,
}
"""What is compared between the runs; times in seconds, rates per second."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One number over `n` runs that know it. Null: fewer than two of them."""

    n: int
    mean: float
    std: float | None
    """Between runs (n - 1)."""
    min: float
    max: float
    interval: tuple[float, float] | None
    """Of the mean, at 95 %."""


def spread(runs: Sequence[Metrics]) -> dict[str, Spread]:
    """The spread of each of NUMBERS over `runs`; those that no run knows are left out."""
    found = {}
    for name, number in NUMBERS.items():
        values = np.array([value for run in runs if (value := number(run)) is not None])
        if len(values):
            found[name] = _spread(values)
    return found


def _spread(values: np.ndarray) -> Spread:
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    std = float(values.std(ddof=1)) if n > 1 else None
    around = None if std is None else float(t.ppf(0.975, n - 1)) * std / n**0.5
    interval = None if around is None else (mean - around, mean + around)
    return Spread(n=n, mean=mean, std=std, min=float(values.min()), max=float(values.max()), interval=interval)
