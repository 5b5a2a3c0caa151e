"""`squall calibrate`: fit the simulator's step time to a recorded run."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Seed, print_json
from squall.progress import printable

if TYPE_CHECKING:
    from squall.simulate import Calibration

MEASURED = Group("What was measured", sort_key=10)


def calibrate(
    *,
    run: str,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    first: int | None = None,
    model: Annotated[str, Parameter(group=MEASURED)],
    gpu: Annotated[str, Parameter(group=MEASURED)],
    kv_blocks: Annotated[int, Parameter(group=MEASURED)],
    tp: Annotated[int, Parameter(group=MEASURED)] = 1,
    block_size: Annotated[int, Parameter(group=MEASURED)] = 16,
    max_num_seqs: Annotated[int | None, Parameter(group=MEASURED)] = None,
    max_num_batched_tokens: Annotated[int | None, Parameter(group=MEASURED)] = None,
    max_model_len: Annotated[int | None, Parameter(group=MEASURED)] = None,
    engine: Annotated[str, Parameter(group=MEASURED)] = "vllm-0.24",
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Fit the simulator's step time to a recorded run, for `squall simulate --calibration`.

    Parameters
    ----------
    run
        A run, or a table of one: at least sent, first_token, last_token, request_tokens, response_tokens.
    out
        Where to write the calibration (JSON).
    first
        Fit on the first N requests only; the others test the fit.
    model
        A built-in model or a Hugging Face config.json.
    gpu
        A built-in GPU or a JSON file.
    kv_blocks
        num_gpu_blocks, as the server logged it.
    tp
        GPUs per replica.
    block_size
        Tokens per block.
    max_num_seqs
        Most requests in a batch. [default: vLLM's for the GPU]
    max_num_batched_tokens
        Most tokens in a step. [default: vLLM's for the GPU]
    max_model_len
        Most tokens of a prompt and its response. [default: the model's context, as far as it fits]
    engine
        vllm-0.11, vllm-0.14, vllm-0.19 or vllm-0.24.
    """
    from squall.simulate.calibrate import calibrate as fit

    result = fit(
        run=run,
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
    screen.print(
        f"{result.model.name} on {result.tp} x {result.gpu.name}, {result.engine}, {result.kv_blocks:,} KV blocks",
        markup=False,
    )
    shown = table("Step time", "coefficient", "fitted", "95 % interval")
    for name, (low, high) in result.fitted.items():
        row(shown, name, getattr(result.step_time, name), f"{low:.3g} to {high:.3g}")
    screen.print(shown)
    shown = table(
        "Simulated against recorded",
        "",
        "requests",
        "TTFT mean",
        "TTFT p50",
        "TTFT p99",
        "TPOT mean",
        "E2E mean",
        "E2E p50",
        "E2E p99",
        "E2E |error|",
    )
    for name, errors in result.errors.items():
        cells = [errors.mean.get("ttft"), errors.p50.get("ttft"), errors.p99.get("ttft"), errors.mean.get("tpot")]
        cells += [errors.mean.get("e2e"), errors.p50.get("e2e"), errors.p99.get("e2e")]
        row(
            shown,
            name.replace("_", " "),
            errors.requests,
            *("-" if cell is None else f"{cell:+.1%}" for cell in cells),
            f"{errors.mean_absolute['e2e']:.1%}",
        )
    screen.print(shown)
    screen.print(f"{'written':<12} {printable(out)}", markup=False)
