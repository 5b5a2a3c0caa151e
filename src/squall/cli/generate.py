"""`squall generate`."""

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json

if TYPE_CHECKING:
    from squall.workload import Workload
    from squall.workload.tally import Tally


def generate(
    model: str,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    duration: str | None = None,
    requests: int | None = None,
    rate: float | None = None,
    start: str | None = None,
    edit: tuple[str, ...] = (),
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
    edit
        What if, NAME=VALUE, may be repeated: api-share=0.9, longer-prompts=1.5, longer-responses=0.5, burstier=2,
        growth=3% (in 30 days), flood=2h:30m:5 (start, length, factor), outage=2h:10m, clients=200.
    """
    from squall.workload import generate_file
    from squall.workload.drawing import named

    workload, _ = named(model)
    tally = generate_file(
        model, out, duration=duration, requests=requests, rate=rate, start=start, edit=edit, seed=seed.seed
    )
    result = achieved(workload, tally, out, duration, requests, rate)
    if output.json:
        print_json(result)
    else:
        _print(result)
    return 0


def achieved(
    workload: "Workload", tally: "Tally", out: str, duration: str | None, requests: int | None, rate: float | None
) -> dict[str, Any]:
    """What was asked for against what the drawn trace holds."""
    from squall.units import seconds
    from squall.workload.tally import as_json

    return {
        "out": out,
        "source": tally.meta.source,
        "seed": tally.meta.seed,
        "requested": {
            "rate": rate if rate is not None else workload.mean_rate,
            "rate_from": "--rate" if rate is not None else "model",
            "duration": seconds(duration, "--duration")
            if duration is not None
            else (workload.span if requests is None else None),
            "requests": requests,
        },
        **as_json(tally),
        "steps": tally.meta.steps,
        "notes": tally.meta.notes,
    }


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
