"""`squall generate`."""

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json

if TYPE_CHECKING:
    from squall.trace import Trace
    from squall.workload import Workload


def generate(
    model: str,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    duration: str | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: str | None = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Draw a new trace from a workload model, and say what was asked for and what came out.

    Parameters
    ----------
    model
        A model file of `squall fit`, or a built-in profile such as burstgpt://chatgpt-api.
    out
        The trace file to write: .parquet, .csv or .jsonl.
    duration
        Length of the trace; the fitted span (for profiles one day) if not given.
    requests
        At most so many requests; without --duration, exactly so many.
    rate
        Rescale to this expected mean rate in requests/s; the CV of the gaps stays.
    start
        Where in the model's time to begin, such as 8h.
    """
    from squall.workload import generate as run
    from squall.workload.drawing import named

    workload, _ = named(model)
    trace = run(model, out=out, duration=duration, requests=requests, rate=rate, start=start, seed=seed.seed)
    result = achieved(workload, trace, out, duration, requests, rate)
    if output.json:
        print_json(result)
    else:
        _print(result)
    return 0


def achieved(
    workload: "Workload", trace: "Trace", out: str, duration: str | None, requests: int | None, rate: float | None
) -> dict[str, Any]:
    """What was asked for against what the drawn trace holds."""
    import numpy as np

    from squall.characterize.concurrency import dispersion
    from squall.units import seconds

    table = trace.table
    gaps = np.diff(table["arrival"].to_numpy())
    answered = table.filter(~table["failed"])
    return {
        "out": out,
        "source": trace.meta.source,
        "seed": trace.meta.seed,
        "requested": {
            "rate": rate if rate is not None else workload.mean_rate,
            "rate_from": "--rate" if rate is not None else "model",
            "duration": seconds(duration, "--duration")
            if duration is not None
            else (workload.span if requests is None else None),
            "requests": requests,
        },
        "requests": len(trace),
        "failed_share": float(table["failed"].mean() or 0.0),  # type: ignore[arg-type]
        "duration": trace.span,
        "rate": trace.rate,
        "gap_cv": float(gaps.std() / gaps.mean()) if gaps.size and gaps.mean() > 0 else None,
        "dispersion": [{"scale": scale, "index": index} for scale, index in dispersion(table["arrival"].to_numpy())],
        "request_tokens": _quantiles(answered["request_tokens"].to_numpy()),
        "response_tokens": _quantiles(answered["response_tokens"].to_numpy()),
        "notes": trace.meta.notes,
    }


def _quantiles(tokens: Any) -> dict[str, float]:
    import numpy as np

    if tokens.size == 0:
        return {}
    points = dict(zip(("p50", "p90", "p99", "max"), np.quantile(tokens, (0.5, 0.9, 0.99, 1.0)).tolist(), strict=True))
    return {"mean": float(tokens.mean()), **points}


def _print(result: dict[str, Any]) -> None:
    from squall.report.terminal import console, number, percent, row, table
    from squall.units import in_words

    screen = console()
    asked = result["requested"]
    screen.print(f"{result['out']}: drawn from {result['source']}, seed {result['seed']}", markup=False)
    totals = table("", "", "requested", "achieved")
    row(totals, "requests", number(asked["requests"]), number(result["requests"]))
    row(
        totals,
        "duration",
        "-" if asked["duration"] is None else in_words(asked["duration"]),
        in_words(result["duration"]),
    )
    row(totals, f"requests/s ({asked['rate_from']})", number(asked["rate"]), number(result["rate"]))
    row(totals, "CV of the gaps", "-", number(result["gap_cv"]))
    for point in result["dispersion"]:
        row(totals, f"dispersion of counts, {in_words(point['scale'])}", "-", number(point["index"]))
    row(totals, "failed", "-", percent(result["failed_share"]))
    screen.print(totals)
    tokens = table("Tokens of the answered requests", "", "mean", "p50", "p90", "p99", "max")
    for name in ("request_tokens", "response_tokens"):
        found = result[name]
        row(
            tokens,
            name.replace("_", " "),
            *(number(found.get(point)) for point in ("mean", "p50", "p90", "p99", "max")),
        )
    screen.print(tokens)
