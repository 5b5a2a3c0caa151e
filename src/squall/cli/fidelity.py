"""`squall fidelity`."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.errors import InputError
from squall.progress import note, printable
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from squall.fidelity import Compared, Fidelity

CLUSTER = Group("Cluster", sort_key=10)


def fidelity(
    real: TraceArgument,
    generated: str,
    *,
    model: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    gpu: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    replicas: Annotated[int, Parameter(group=CLUSTER)] = 1,
    calibration: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    loads: str = "0.5,0.8,1.1",
    seeds: int = 10,
    baselines: Annotated[bool, Parameter(negative="")] = False,
    html: Annotated[str | None, Parameter(name="--html")] = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """How alike two traces are: statistically, and in what a modelled server makes of them.

    Parameters
    ----------
    real
        The real trace.
    generated
        A trace file; or a model of `squall fit` (.json) or a built-in profile, which is then drawn several times.
    model
        A built-in model or a Hugging Face config.json. [default: the calibration's, or llama-3.1-8b]
    gpu
        A built-in GPU or a JSON file. [default: the calibration's, or h100]
    replicas
        How many engines.
    calibration
        What `squall calibrate` wrote, or a built-in calibration.
    loads
        Shares of the rate that the cluster sustains for the real trace's lengths.
    seeds
        How many traces are drawn from a model.
    baselines
        Also show what is left if parts of the real trace are thrown away: Poisson and Gamma arrivals, shuffled lengths,
        block bootstraps.
    html
        Also write the comparison as one offline page to this file.
    """
    from squall.fidelity import fidelity as run

    if html is not None and not html.lower().endswith((".html", ".htm")):
        raise InputError(f"--html {html}: a page is an HTML file; give a name that ends in .html.")
    result = run(
        real,
        generated,
        model=model,
        gpu=gpu,
        replicas=replicas,
        calibration=calibration,
        loads=_shares(loads),
        seeds=seeds,
        baselines=baselines,
        **as_options(select),
    )
    if html is not None:
        from squall.report.fidelity_sections import write_fidelity

        note(f"Wrote {write_fidelity(result, html)}.")
    if output.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--loads {text}: numbers with commas between them are needed, like 0.5,0.8,1.1.") from None


def _print(result: "Fidelity") -> None:
    from squall.report.terminal import console, duration, number, percent, row, table
    from squall.units import in_words

    screen = console()
    draws = f", {len(result.seeds)} draws" if result.seeds else ""
    screen.print(f"{printable(result.real)} (real) against {printable(result.generated)}{draws}", markup=False)
    screen.print(result.verdict.upper(), style="bold", markup=False)
    for sentence in result.summary:
        screen.print(printable(sentence), markup=False)
    screen.print()
    columns = ("real", "generated", "range", "ratio", "real inside")
    felt = table("Downstream, simulated", "load, metric", *columns)
    for one in result.downstream:
        shown: Callable[[float | None], str] = duration
        if one.metric in ("peak_kv", "preemptions"):
            shown = percent if one.metric == "peak_kv" else number
        row(felt, f"{one.load:g} {one.metric}", *_cells(one, shown))
    screen.print(felt)
    if result.baselines:
        screen.print(_beside(result))
    target = result.target
    screen.print(
        f"{target['replicas']} x {target['gpu']}, {target['model']} ({result.step_time}); load 1 is "
        f"{number(result.capacity)} requests/s.",
        markup=False,
    )
    distances = table("Distances", "of", "Kolmogorov-Smirnov", "Wasserstein")
    for key, distance in result.ks.items():
        row(distances, key.replace("_", " "), number(distance), number(result.wasserstein[key]))
    screen.print(distances)
    numbers = table("Statistics", "", *columns)
    for key, found in result.numbers.items():
        row(numbers, key.replace("_", " "), *_cells(found, number))
    for key, found in result.spearman.items():
        row(numbers, f"Spearman {key.replace('_', ', ')}", *_cells(found, number))
    for at in result.dispersion:
        row(numbers, f"dispersion of counts, {in_words(at.scale)}", *_cells(at, number))
    for name, curve in result.lengths_in_time.items():
        for at in curve[::2]:
            row(numbers, f"{name.replace('_', ' ')} in time, {in_words(at.scale)}", *_cells(at, number))
    for part, of in (("session", result.conversations), ("failed", result.failures)):
        for key, found in of.items():
            row(numbers, f"{part} {key.replace('_', ' ')}", *_cells(found, number))
    screen.print(numbers)
    for line in result.notes:
        screen.print(line, markup=False)


def _beside(result: "Fidelity") -> "Table":
    from squall.fidelity import BANDS, metric_name
    from squall.report.terminal import row, table

    heads = [f"{metric_name(metric)}, {load:g}" for load, metric in _places(result, tuple(BANDS))]
    shown = table("Ratio generated / real (* the real value lies outside of the draws)", "", *heads)
    shown.columns[0].overflow = "fold"
    for column in shown.columns[1:]:
        column.no_wrap = False
    for name, downstream in (
        ("this one", result.downstream),
        *((one.name, one.downstream) for one in result.baselines),
    ):
        found = {(one.load, one.metric): one for one in downstream}
        cells = []
        for place in _places(result, tuple(BANDS)):
            one = found[place]
            cells.append("-" if one.ratio is None else f"{one.ratio:.2f}{'' if one.inside in (None, True) else '*'}")
        row(shown, name, *cells)
    return shown


def _places(result: "Fidelity", metrics: tuple[str, ...]) -> list[tuple[float, str]]:
    return [(one.load, one.metric) for one in result.downstream if one.metric in metrics]


def _cells(one: "Compared", shown: "Callable[[float | None], str]") -> tuple[str, ...]:
    from squall.report.terminal import number

    spread = "-" if one.low is None or one.inside is None else f"{shown(one.low)} to {shown(one.high)}"
    inside = "-" if one.inside is None else ("yes" if one.inside else "no")
    return shown(one.real), shown(one.generated), spread, number(one.ratio), inside
