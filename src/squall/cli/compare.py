"""`squall compare`: which differences between two runs are real."""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json

if TYPE_CHECKING:
    from squall.compare import Comparison, Difference

UNTRUSTED, NOT_MET = 3, 4


def compare(
    a: str,
    b: str,
    *,
    metric: Annotated[list[str] | None, Parameter(negative="")] = None,
    alpha: float = 0.05,
    slo: str | None = None,
    tolerance: float = 0.0,
    fail_on: Annotated[Literal["regression", "never"], Parameter(name="--fail-on")] = "regression",
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Which differences between two runs are real: B against A.

    Exit code 3 if one of the runs is CLIENT-LIMITED, 4 if B is worse in a metric that was compared.

    Parameters
    ----------
    a
        The run to compare with: the reference.
    b
        The run that is judged.
    metric
        Such as ttft_p99, e2e_mean, tpot_p50, throughput, failed_share; several with commas. [default: all]
    alpha
        Intervals are at confidence 1 - ALPHA, and the chance of any wrong verdict is at most ALPHA.
    slo
        Limits like ttft=1s,tpot=100ms,e2e=30s: adds goodput and the share that met them.
    tolerance
        How much worse B may be (0.05: 5 %) before it is a regression; the whole interval must lie beyond.
    fail_on
        regression: exit with 4 on one. never: exit with 0 whatever comes out.
    """
    from squall.compare import compare as run

    result = run(a, b, metric=metric, alpha=alpha, slo=slo, tolerance=tolerance, seed=seed.seed)
    if output.json:
        print_json(result)
    else:
        _print(result)
    if fail_on == "never":
        return 0
    if not result.trusted:
        return UNTRUSTED
    return NOT_MET if result.regressions else 0


def _print(result: "Comparison") -> None:
    from squall.progress import printable
    from squall.report.terminal import console, percent, row, table

    out = console()

    def say(text: str, style: str | None = None) -> None:
        out.print(printable(text), markup=False, style=style)

    for name, side in (("A", result.a), ("B", result.b)):
        title = f"{side.source} ({side.title})" if side.title and side.title != side.source else side.source
        failed = percent(side.failed / side.requests if side.requests else None)
        say(f"{name}: {title}: {side.kind}, {side.requests:,} requests, {failed} failed, {side.verdict}")
    say(f"{result.pairing[:1].upper()}{result.pairing[1:]}.")
    for text in result.notes:
        say(text, "bold red" if "CLIENT-LIMITED" in text else None)
    out.print()
    for text in result.summary:
        say(text)
    out.print()
    confidence = f"{100 * (1 - result.alpha):g} % interval"
    shown = table("B against A", "", "A", "B", "change", confidence, "p, corrected", "verdict")
    for one in result.differences:
        row(shown, *_cells(one))
    out.print(shown)
    say(f"p-values are corrected for their number ({result.correction}); an interval stands for its metric alone.")
    if result.regressions:
        beyond = f" by more than {percent(result.tolerance)}" if result.tolerance else ""
        say(f"REGRESSION{beyond}: {', '.join(result.regressions)}.", "bold red")


def _cells(one: "Difference") -> tuple[str, ...]:
    from squall.compare import change_of, name_of, value_of

    unknown = one.verdict == "equal" or one.low is None or one.high is None
    interval = "-" if unknown else f"{change_of(one, one.low)} to {change_of(one, one.high)}"
    p = "-" if one.p_adjusted is None else ("< 0.0001" if one.p_adjusted < 1e-4 else f"{one.p_adjusted:.2g}")
    values = value_of(one.metric, one.a), value_of(one.metric, one.b)
    return name_of(one.metric), *values, change_of(one, one.change), interval, p, one.verdict
