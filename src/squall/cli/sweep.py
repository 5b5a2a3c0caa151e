"""`squall sweep`: one trace under every combination of settings, and whether the best of them is robust."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.progress import printable
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.simulate.sweep import Sweep

COMMON = Group("What all have in common", sort_key=10)


def sweep(
    trace: TraceArgument,
    *,
    sweep: Annotated[list[str], Parameter(negative="")],
    by: str = "ttft_p99",
    slo: str | None = None,
    stability: bool = True,
    jobs: int | None = None,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    calibration: Annotated[str | None, Parameter(group=COMMON)] = None,
    model: Annotated[str | None, Parameter(group=COMMON)] = None,
    gpu: Annotated[str | None, Parameter(group=COMMON)] = None,
    tp: Annotated[int | None, Parameter(group=COMMON)] = None,
    replicas: Annotated[int | None, Parameter(group=COMMON)] = None,
    engine: Annotated[str | None, Parameter(group=COMMON)] = None,
    kv_blocks: Annotated[int | None, Parameter(group=COMMON)] = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """Simulate a trace under every combination of settings, and test the best against errors of the step time.

    Parameters
    ----------
    trace
        A trace file, `-`, or a built-in profile such as burstgpt://all.
    sweep
        A setting of `squall simulate` (or rate, speed, head, sample) and its values: kv-blocks=1000,2000. Repeat it for
        more settings; one value fixes a setting for all.
    by
        What decides: ttft_p99, e2e_mean, tpot_p50, goodput_share, throughput, preemptions, …
    slo
        Like ttft=1s,tpot=100ms; adds goodput_share.
    stability
        Repeat all with each step-time coefficient 20 % lower and higher.
    jobs
        Processes. [default: one per core, or one for a small sweep]
    out
        Write the table: .parquet, .csv, .jsonl or .json.
    calibration
        What `squall calibrate` wrote.
    model
        As for simulate.
    gpu
        As for simulate.
    tp
        As for simulate.
    replicas
        As for simulate.
    engine
        As for simulate.
    kv_blocks
        As for simulate.
    """
    from squall.simulate.sweep import sweep as run_sweep

    options = as_options(select)
    result = run_sweep(
        trace,
        sweep=sweep,
        by=by,
        slo=slo,
        stability=stability,
        jobs=jobs,
        out=out,
        calibration=calibration,
        seed=options.pop("seed"),
        model=model,
        gpu=gpu,
        tp=tp,
        replicas=replicas,
        engine=engine,
        kv_blocks=kv_blocks,
        **options,
    )
    if output.json:
        print_json(
            {
                "combinations": result.table.to_dicts(),
                "settings": result.settings,
                "stability": result.stability,
                "step_time": result.step_time,
            }
        )
    else:
        _show(result, out)
    return 0


def _show(result: "Sweep", out: str | None) -> None:
    from squall.report.terminal import console, number, row, table

    screen = console()
    screen.print(printable(f"step time: {result.step_time}"), markup=False)
    columns = ["ttft_mean", "ttft_p99", "tpot_mean", "e2e_mean", "e2e_p99", "throughput", "goodput_share"]
    columns += ["preemptions", *([result.stability.by] if result.stability.by not in [*columns, "preemptions"] else [])]
    columns = [name for name in columns if result.table[name].null_count() < len(result.table)]
    shown = table("Seconds; requests/s", *result.settings, *columns)
    for cells in result.table.sort(result.stability.by, nulls_last=True).to_dicts():
        numbers = ("-" if cells[name] is None else number(cells[name]) for name in columns)
        row(shown, *(str(cells[name]) for name in result.settings), *numbers)
    screen.print(shown)
    it = result.stability
    best = " ".join(f"{name.replace('_', '-')}={value}" for name, value in it.best.items())
    text = f"best by {it.by}: {best}"
    if it.worlds > 1:
        text += f"; it stays the best in {it.stays_best} of {it.worlds} worlds (each step-time coefficient +-20 %)"
        if it.least_rank_correlation is not None:
            text += f", rank correlation at least {it.least_rank_correlation:.2f}"
    else:
        text += "; not tested against errors of the step time"
    screen.print(printable(text), markup=False)
    for line in it.lost_to:
        screen.print(f"  but with {printable(line)}", markup=False)
    if out is not None:
        screen.print(f"{'written':<12} {printable(out)}", markup=False)
