"""`squall capacity`: the highest load that still meets an SLO."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from squall.cli.common import Output, Select, TraceArgument, as_options, print_json
from squall.trace.select import TraceOptions

if TYPE_CHECKING:
    from squall.capacity import Capacity

INTERRUPTED, CLIENT_LIMITED, NOT_MET = 130, 3, 4

SEARCH = Group("Search", sort_key=10)
SERVER = Group("On a server", sort_key=20)
CLUSTER = Group("On a modelled cluster", sort_key=30)


def capacity(
    trace: TraceArgument,
    *,
    slo: str,
    min_goodput: Annotated[float, Parameter(name="--min-goodput", group=SEARCH)] = 0.99,
    budget: Annotated[str, Parameter(group=SEARCH)] = "10m",
    start: Annotated[float | None, Parameter(group=SEARCH)] = None,
    precision: Annotated[float, Parameter(group=SEARCH)] = 0.02,
    out: Annotated[str | None, Parameter(name=["--out", "-o"], group=SEARCH)] = None,
    model: Annotated[str | None, Parameter(group=SEARCH)] = None,
    url: Annotated[str | None, Parameter(group=SERVER)] = None,
    step: Annotated[str | None, Parameter(group=SERVER)] = None,
    api: Annotated[Literal["chat", "completions"] | None, Parameter(group=SERVER)] = None,
    api_key_env: Annotated[str | None, Parameter(group=SERVER)] = None,
    workers: Annotated[int | None, Parameter(group=SERVER)] = None,
    warmup: Annotated[int | None, Parameter(group=SERVER)] = None,
    drain_timeout: Annotated[str | None, Parameter(group=SERVER)] = None,
    gpu: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    tp: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    replicas: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    router: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    engine: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    calibration: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    kv_blocks: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    max_num_seqs: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    max_num_batched_tokens: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    select: Select = TraceOptions(),
    output: Output = Output(),
) -> int:
    """The highest load at which a trace still meets an SLO, on a live server (--url) or a modelled cluster (--gpu).

    The load is the trace's mean rate, reached by --scale-method. Exit code 3 if the sender was the limit, 4 if even the
    lowest load tried misses the SLO, 130 after an interrupt (with what is known so far).

    Parameters
    ----------
    trace
        A trace file, `-`, or a built-in profile such as burstgpt://all.
    slo
        Limits that a request must meet all of, like ttft=1s,tpot=100ms,e2e=30s.
    min_goodput
        Share of the requests offered that must meet them.
    budget
        Time for the whole search; no step is begun that would not end in it.
    start
        First rate in requests/s. [default: the trace's own; half of the cluster's saturation]
    precision
        The search ends when pass and fail are this close (0.02: 2 %).
    out
        Write the result to this JSON file, anew after every step.
    model
        The served model; or the modelled one (a name or a config.json).
    url
        The server's base, with or without /v1.
    step
        How long a step lasts. [default: 60s]
    api
        chat or completions. [default: chat]
    api_key_env
        Environment variable with the API key. [default: OPENAI_API_KEY]
    workers
        Sending processes. [default: 1]
    warmup
        Requests sent before each step, not counted. [default: 0]
    drain_timeout
        How long to wait for answers at the end of a step. [default: 30s]
    gpu
        A built-in GPU or a JSON file.
    tp
        GPUs per replica.
    replicas
        How many engines.
    router
        round-robin, random or least-outstanding.
    engine
        vllm-0.11, vllm-0.14, vllm-0.19 or vllm-0.24.
    calibration
        What `squall calibrate` wrote, or a built-in calibration.
    kv_blocks
        KV-cache blocks per replica.
    max_num_seqs
        Most requests in a batch.
    max_num_batched_tokens
        Most tokens in a step.
    """
    from squall.capacity import capacity as run
    from squall.errors import InputError

    on_server: dict[str, Any] = {
        "step": step, "api": api, "api_key_env": api_key_env, "workers": workers, "warmup": warmup,
        "drain_timeout": drain_timeout,
    }  # fmt: skip
    on_cluster: dict[str, Any] = {
        "gpu": gpu, "tp": tp, "replicas": replicas, "router": router, "engine": engine, "calibration": calibration,
        "kv_blocks": kv_blocks, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens,
    }  # fmt: skip
    if url is None and gpu is None and calibration is None:
        raise InputError("capacity: give --url for a live server, or --gpu (or --calibration) for a modelled cluster.")
    foreign = on_cluster if url is not None else on_server
    for name, value in foreign.items():
        if value is not None:
            other = "--url: a live server" if url is not None else "a modelled cluster"
            raise InputError(f"--{name.replace('_', '-')} has no effect with {other}; leave it out.")
    words = {name: value for name, value in (on_server if url is not None else on_cluster).items() if value is not None}
    if model is not None:
        words["model"] = model
    length = words.pop("step", "60s")
    if url is not None:
        words.setdefault("drain_timeout", "30s")
    result = run(
        trace,
        slo=slo,
        min_goodput=min_goodput,
        url=url,
        gpu=words.pop("gpu", None),
        budget=budget,
        step=length,
        start=start,
        precision=precision,
        out=out,
        target=words,
        **as_options(select),
    )
    if output.json:
        print_json(result)
    else:
        _print(result)
    codes = {"interrupted": INTERRUPTED, "client-limited": CLIENT_LIMITED}
    return codes.get(result.state, NOT_MET if result.capacity is None else 0)


def _print(result: "Capacity") -> None:
    from squall.progress import printable
    from squall.report.terminal import console, duration, number, percent, row, table

    out = console()
    out.print(printable(result.summary), style="bold", markup=False)
    target = result.target
    if "url" in target:
        where = f"{target.get('model')} at {target['url']}"
    else:
        where = f"{target.get('replicas')} x {target.get('model')} on {target.get('gpu')} ({result.step_time})"
    out.print(
        printable(f"{result.source}, scaled by {result.scale_method}, on {where}; {duration(result.spent)} spent."),
        markup=False,
    )
    columns = ("requests", "met SLO", "95 % interval", "failed", "TTFT p99", "TPOT p99", "E2E p99", "took", "verdict")
    shown = table("Steps", "requests/s", *columns)
    for one in sorted(result.steps, key=lambda one: one.rate):
        interval = "-" if one.low is None else f"{percent(one.low)} to {percent(one.high)}"
        row(
            shown,
            number(one.rate),
            f"{one.requests:,}",
            f"{100 * one.met_share:.4g} %",
            interval,
            percent(one.failed_share),
            *(duration(value) for value in (one.ttft_p99, one.tpot_p99, one.e2e_p99, one.seconds)),
            f"{one.verdict}{', close' if one.close else ''}",
        )
    out.print(shown)
    for text in (*result.notes, *(reason for one in result.steps for reason in one.reasons)):
        out.print(printable(text), markup=False)
