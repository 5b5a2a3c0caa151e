"""`squall fit`."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.workload import Workload


def fit(
    trace: TraceArgument,
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    kind: str = "auto",
    window: str = "20m",
    method: str = "moments",
    gaps: str = "gamma",
    zipf: Annotated[bool, Parameter(negative="")] = False,
    day: str | None = None,
    average: str | None = None,
    playback: str | None = None,
    warm_up: int | None = None,
    warm_up_rate: float | None = None,
    block: str | None = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Fit a workload model to a trace and say how well it fits.

    Parameters
    ----------
    trace
        A trace file, - for standard input, a built-in profile such as burstgpt://chatgpt-api, or a folder with a
        ServeGen pool.
    out
        The model's JSON file.
    kind
        What the arrivals are made of: episodes (the trace's own course, loosened), cascade (some numbers per time
        scale, to go beyond the trace), renewal (rate and shape of the gaps per window, as in the BurstGPT paper),
        bootstrap (the trace's rows in blocks), clients (each session a client of its own), or auto: episodes, unless
        windows predict held-out arrivals better and a simulated queue does not tell their draws from the trace.
    window
        Length of the windows in which rate and shape are fitted; a short trace takes a smaller one and says so.
    method
        Estimator of the shapes in windows: moments or mle.
    gaps
        Law of the gaps in windows: gamma, weibull, or auto, the likelier one. This and the following, down to
        warm-up-rate, need --kind renewal.
    zipf
        Request lengths follow Zipf(theta(t)), theta fitted in each window, as in the paper.
    day
        One representative working day of the windows in these hours from midnight, such as 8h:25h.
    average
        How days become one: pooled (their gaps together) or parameters (mean shape and rate parameter, as published).
    playback
        Play each window for so long, such as 60s for the authors' 20 minutes.
    warm_up
        So many requests first, with Gamma gaps of shape 0.5 (the authors take 1000).
    warm_up_rate
        Their rate in requests/s; 1 if not given.
    block
        Length of the bootstrap's blocks, such as 30s, or auto: the one whose draws a queue tells apart least.
    """
    from squall.workload import fit as run

    workload = run(
        trace,
        out=out,
        kind=kind,
        window=window,
        method=method,  # type: ignore[arg-type]
        gaps=gaps,  # type: ignore[arg-type]
        zipf=zipf,
        day=day,
        average=average,  # type: ignore[arg-type]
        playback=playback,
        warm_up=warm_up,
        warm_up_rate=warm_up_rate,
        block=block,
        **as_options(select),
    )
    if output.json:
        print_json(summary(workload, out))
    else:
        _print(workload, out)
    return 0


def summary(workload: "Workload", out: str) -> dict[str, object]:
    """The model in short: where it lies, what it was fitted to, and each class's goodness of fit."""
    classes = [
        {"service": one.service, "model": one.model, "share": share, "rate": one.arrivals.mean_rate, "fit": one.fit}
        for one, share in zip(workload.classes, workload.shares, strict=True)
    ]
    return {
        "out": out,
        "source": workload.source,
        "kind": kind_of(workload),
        "method": workload.method,
        "span": workload.span,
        "rate": workload.mean_rate,
        "notes": workload.notes,
        "classes": classes,
    }


def kind_of(workload: "Workload") -> str:
    """What the arrivals are made of: one kind, or those of the classes."""
    import msgspec

    kinds = {str(msgspec.to_builtins(one.arrivals)["kind"]) for one in workload.classes}
    return " and ".join(sorted(kinds))


def _print(workload: "Workload", out: str) -> None:
    from squall.report.terminal import console, number, percent, row, table
    from squall.units import in_words

    screen = console()
    screen.print(f"{out}: {kind_of(workload)} model of {workload.source}", markup=False)
    screen.print(f"{number(workload.mean_rate)} requests/s over {in_words(workload.span)}", markup=False)
    arrivals = table(
        "Arrivals, trace → draw",
        "class",
        "requests",
        "share",
        "rate/s",
        "windows",
        "alpha p10/50/90",
        "KS gaps",
        "IDC 60 s",
    )
    lengths = table(
        "Lengths, conversations, failures, trace → draw",
        "class",
        "KS request",
        "KS response",
        "Spearman",
        "turns",
        "failed",
    )
    for one, share in zip(workload.classes, workload.shares, strict=True):
        found = one.fit
        if found is None:
            continue
        windows = f"{found.fitted}/{found.windows}"
        alpha = " / ".join(number(a) for a in found.alpha)
        row(
            arrivals,
            one.name,
            found.requests,
            percent(share),
            _both(found.rate),
            windows,
            alpha,
            number(found.ks_gaps),
            _both(found.dispersion),
        )
        failed = " → ".join(percent(share) for share in found.failed_share)
        row(
            lengths,
            one.name,
            number(found.ks_request),
            number(found.ks_response),
            _both(found.spearman),
            _both(found.turns),
            failed,
        )
    screen.print(arrivals)
    screen.print(lengths)
    screen.print(
        "windows: with a shape of their own / with requests. KS: Kolmogorov-Smirnov distance, 0 is perfect.",
        markup=False,
    )
    for one in workload.classes:
        if one.fit:
            screen.print(f"{one.name}: {one.fit.reason}.", markup=False)
    for line in workload.notes:
        screen.print(line, markup=False)


def _both(pair: tuple[float, float] | None) -> str:
    from squall.report.terminal import number

    return "-" if pair is None else " → ".join(number(value) for value in pair)
