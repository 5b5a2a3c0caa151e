"""`squall calibrate`: fit the simulator's step time to a recorded run."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Seed, print_json
from squall.progress import printable

if TYPE_CHECKING:
    from rich.table import Table

    from squall.simulate import Calibration
    from squall.simulate.calibrate import Errors, Spread

MEASURED = Group("What was measured", sort_key=10)
LIVE = Group("A live server", sort_key=20)


def calibrate(
    *,
    run: str | None = None,
    url: str | None = None,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    first: int | None = None,
    model: Annotated[str | None, Parameter(group=MEASURED)] = None,
    gpu: Annotated[str | None, Parameter(group=MEASURED)] = None,
    tp: Annotated[int, Parameter(group=MEASURED)] = 1,
    kv_blocks: Annotated[int | None, Parameter(group=MEASURED)] = None,
    block_size: Annotated[int | None, Parameter(group=MEASURED)] = None,
    max_num_seqs: Annotated[int | None, Parameter(group=MEASURED)] = None,
    max_num_batched_tokens: Annotated[int | None, Parameter(group=MEASURED)] = None,
    max_model_len: Annotated[int | None, Parameter(group=MEASURED)] = None,
    engine: Annotated[str | None, Parameter(group=MEASURED)] = None,
    prefix_caching: Annotated[bool | None, Parameter(group=MEASURED)] = None,
    budget: Annotated[str | None, Parameter(group=LIVE)] = None,
    served_model: Annotated[str | None, Parameter(group=LIVE)] = None,
    api_key_env: Annotated[str | None, Parameter(group=LIVE)] = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Fit the simulator's step time to a recorded run or a live vLLM server, for `squall simulate --calibration`.

    Parameters
    ----------
    run
        A run, or a table of one: at least sent, first_token, last_token, request_tokens, response_tokens.
    url
        A live server that nobody else uses, instead: it is measured, and the fit is tested on it.
    out
        Where to write the calibration (JSON).
    first
        Fit on the first N requests of --run only; the others test the fit.
    model
        A built-in model or a Hugging Face config.json. [default with --url: as the server tells]
    gpu
        A built-in GPU or a JSON file. [default with --url: none, and a table of step times instead of a roofline]
    tp
        GPUs per replica.
    kv_blocks
        num_gpu_blocks, as the server logged it. [default: read from --url; fitted with --run]
    block_size
        Tokens per block. [default: read from --url, or 16]
    max_num_seqs
        Most requests in a batch. [default: seen at --url, or vLLM's for the GPU]
    max_num_batched_tokens
        Most tokens in a step. [default: vLLM's for the GPU]
    max_model_len
        Most tokens of a prompt and its response. [default: read from --url, or the model's context as far as it fits]
    engine
        vllm-0.11, vllm-0.14, vllm-0.19, vllm-0.24 or vllm-0.24-sync. [default: as --url tells, or vllm-0.24]
    prefix_caching
        Whether it caches prefixes: preempted requests then find their own blocks again. [default: as --url tells, or
        yes, as vLLM does unless told not to]
    budget
        About how long the measurements may take. [default: 3m]
    served_model
        Which model of the server. [default: its first]
    api_key_env
        The environment variable that holds the server's key. [default: OPENAI_API_KEY]
    """
    from squall.calibrate import calibrate as fit

    result = fit(
        run=run,
        url=url,
        out=out,
        first=first,
        model=model,
        gpu=gpu,
        tp=tp,
        kv_blocks=kv_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        engine=engine,
        prefix_caching=prefix_caching,
        budget=budget,
        served_model=served_model,
        api_key_env=api_key_env,
        seed=seed.seed,
    )
    if output.json:
        print_json(result)
    else:
        _show(result, out)
    return 0


def _show(result: "Calibration", out: str) -> None:
    from squall.report.terminal import console, row, table

    screen = console()
    on = f"{result.tp} x {result.gpu.name}, {result.engine}, {result.kv_blocks:,} KV blocks"
    screen.print(printable(f"{result.model.name} on {on}"), markup=False)
    shown = table("Step time", "coefficient", "95 % interval", "settled by the data")
    for name, (low, high) in result.fitted.items():
        row(shown, name, f"{low:.3g} to {high:.3g}", f"{result.informed.get(name, 1.0):.0%}")
    screen.print(shown)
    shown = table(
        "Against the recorded, %: mean/p50/p99", "", "n", "TTFT", "TPOT", "E2E", "|E2E|", "steps", "preempted"
    )
    for name, errors in result.errors.items():
        _row(shown, "  at its speed" if name.endswith("at its speed") else name.replace("_", " "), errors)
        if name in result.spread:
            _spread_row(shown, result.spread[name])
    screen.print(shown)
    screen.print(f"{'written':<12} {printable(out)}", markup=False)


def _row(shown: "Table", name: str, errors: "Errors") -> None:
    from squall.report.terminal import row

    parts = (errors.mean, errors.p50, errors.p99)
    cells = [
        "/".join(f"{100 * part[kind]:+.1f}" for part in parts) if kind in errors.mean else "-"
        for kind in ("ttft", "tpot", "e2e")
    ]
    counts = errors.preemptions or (None, None)
    preempted = "/".join("?" if count is None else str(count) for count in counts)
    steps = "-" if errors.steps is None else f"{100 * errors.steps:+.1f}"
    row(shown, name, errors.requests, *cells, f"{100 * errors.mean_absolute['e2e']:.1f}", steps, preempted)


def _spread_row(shown: "Table", spread: "Spread") -> None:
    """The 95 % interval of the median of the real runs."""
    from squall.report.terminal import row

    parts = (spread.mean, spread.p50, spread.p99)
    ttft, e2e = ("±" + "/".join(f"{100 * part[kind]:.1f}" for part in parts) for kind in ("ttft", "e2e"))
    known = sorted(count for count in spread.preemptions if count is not None)
    counts = f"{known[0]} to {known[-1]}" if known else "?"
    row(shown, f"  {spread.runs} real runs", "", ttft, "", e2e, "", "", counts)
