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
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Fit a workload model to a trace and say how well it fits.

    Parameters
    ----------
    trace
        A trace file, - for standard input, or a built-in profile such as burstgpt://chatgpt-api.
    out
        The model's JSON file.
    kind
        What the arrivals are made of: renewal (rate and Gamma shape per window), episodes (the trace's own course,
        with lengths that move with it), or auto, which takes for each class what predicts held-out arrivals better.
    window
        Length of the windows in which rate and shape are fitted; a short trace takes a smaller one and says so.
    method
        Estimator of the Gamma shapes: moments or mle.
    """
    from squall.workload import fit as run

    workload = run(trace, out=out, kind=kind, window=window, method=method, **as_options(select))  # type: ignore[arg-type]
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
