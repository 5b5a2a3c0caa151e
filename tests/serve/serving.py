"""A served cluster in a thread of this process, for tests."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from squall.serve import _compile, cluster_of
from squall.serve.api import Limits
from squall.serve.http import listen
from squall.serve.service import Service


@contextmanager
def serving(
    *,
    speed: float = 20.0,
    timeout: float | None = None,
    failing: Callable[[float], float] | None = None,
    body_limit: int = 1 << 20,
    **cluster: Any,
) -> Iterator[tuple[str, int, Service]]:
    """Host, port and the service; `cluster` as for `squall simulate`."""
    words = {"gpu": "a100", "model": "llama-3.1-8b", "kv_blocks": 2000, "max_num_seqs": 64, "max_model_len": 8192}
    _compile(cluster_of(words | cluster))  # as `squall serve` does before it listens
    ready, made = threading.Event(), {}

    async def run() -> None:
        service = Service(
            cluster_of(words | cluster),
            Limits("modelled", 8192, 16),
            speed=speed,
            seed=1,
            timeout=timeout,
            failing=failing,
        )
        server, connections, port = await listen(
            service.handle, "127.0.0.1", 0, body_limit=body_limit, connection_limit=5000
        )
        made.update(
            service=service, port=port, connections=connections, over=asyncio.Event(), loop=asyncio.get_running_loop()
        )
        ready.set()
        await made["over"].wait()
        server.close()
        for connection in list(connections):
            connection.abort()
        service.close()

    def thread() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())

    running = threading.Thread(target=thread, daemon=True)
    running.start()
    assert ready.wait(300)
    made["service"].connections = made["connections"]
    try:
        yield "127.0.0.1", made["port"], made["service"]
    finally:
        made["loop"].call_soon_threadsafe(made["over"].set)
        running.join(10)
