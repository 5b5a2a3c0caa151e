"""`squall serve`."""

from typing import Annotated

from cyclopts import Group, Parameter

from squall.cli.common import Output, Seed
from squall.cli.simulate import PolicyOptions

SERVER = Group("Server", sort_key=10)
CLUSTER = Group("Cluster", sort_key=20)
LIMITS = Group("Engine limits", sort_key=30)
FAILURES = Group("Failures", sort_key=40)


def serve(
    *,
    port: Annotated[int, Parameter(group=SERVER)] = 8000,
    host: Annotated[str, Parameter(group=SERVER)] = "127.0.0.1",
    speed: Annotated[float, Parameter(group=SERVER)] = 1.0,
    ports_per_replica: Annotated[bool, Parameter(group=SERVER, negative="")] = False,
    served_model_name: Annotated[str | None, Parameter(group=SERVER)] = None,
    default_tokens: Annotated[int, Parameter(group=SERVER)] = 128,
    model: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    gpu: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    tp: Annotated[int | None, Parameter(group=CLUSTER)] = None,
    replicas: Annotated[int, Parameter(group=CLUSTER)] = 1,
    fleet: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    engine: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    calibration: Annotated[str | None, Parameter(group=CLUSTER)] = None,
    kv_blocks: Annotated[int | None, Parameter(group=LIMITS)] = None,
    block_size: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_num_seqs: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_num_batched_tokens: Annotated[int | None, Parameter(group=LIMITS)] = None,
    max_model_len: Annotated[int | None, Parameter(group=LIMITS)] = None,
    queue_limit: Annotated[int | None, Parameter(group=LIMITS)] = None,
    timeout: Annotated[str | None, Parameter(group=LIMITS)] = None,
    fail_rate: Annotated[float, Parameter(group=FAILURES)] = 0.0,
    failures: Annotated[str | None, Parameter(group=FAILURES)] = None,
    policies: PolicyOptions = PolicyOptions(),
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Serve the modelled cluster in (scaled) real time behind an OpenAI-compatible port, without a GPU.

    Real queueing, batching, KV pressure and preemption, chat and completions with streaming and usage, and /metrics
    with vLLM's names. It serves on 127.0.0.1 until it is interrupted, and prints one JSON line with its URL when it is
    ready. Step times are those of `squall simulate`: estimates, unless there is a --calibration. So are its policies,
    but for those that need to know the future or have no result here, which are refused: priorities come with the
    requests (`priority`), clients for vtc are their `user`, and what prompts share is seen in their texts.

    Parameters
    ----------
    port
        0 takes any free port.
    host
        The address to listen at. There is no key: anything but loopback is for closed networks.
    speed
        The modelled clock runs so many times faster than the real one.
    ports_per_replica
        Every replica behind a port of its own, from --port on, instead of all behind one and its router.
    served_model_name
        The model's name in the API. [default: the model]
    default_tokens
        Length of the answer to a request without max_tokens.
    model
        A built-in model or a Hugging Face config.json. [default: the calibration's, or llama-3.1-8b]
    gpu
        A built-in GPU or a JSON file. [default: the calibration's, or h100]
    tp
        GPUs per replica.
    replicas
        How many engines there are.
    fleet
        Engines on several GPUs in place of --gpu and --replicas: h100=2,a100=4.
    engine
        vllm-0.11, vllm-0.14, vllm-0.19 or vllm-0.24.
    calibration
        What `squall calibrate` made.
    kv_blocks
        num_gpu_blocks of one replica. [default: estimated]
    block_size
        Tokens of a block.
    max_num_seqs
        Requests in a batch.
    max_num_batched_tokens
        Tokens in a step.
    max_model_len
        Tokens of the longest prompt and answer together.
    queue_limit
        Waiting requests of a replica beyond which a request gets 429.
    timeout
        Time of the modelled clock after which a request ends with an error 504.
    fail_rate
        Share of the requests that get an error 500.
    failures
        A trace whose recorded failures say that share instead, in bins of 10 s, again and again.
    """
    from squall.serve import serve as run

    run(
        port=port,
        host=host,
        speed=speed,
        ports_per_replica=ports_per_replica,
        served_model_name=served_model_name,
        default_tokens=default_tokens,
        fail_rate=fail_rate,
        failures=failures,
        model=model,
        gpu=gpu,
        tp=tp,
        replicas=replicas,
        fleet=fleet,
        kv_blocks=kv_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        queue_limit=queue_limit,
        timeout=timeout,
        engine=engine,
        calibration=calibration,
        seed=seed.seed,
        **vars(policies),
    )
    return 0
