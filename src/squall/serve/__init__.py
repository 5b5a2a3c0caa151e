"""The modelled cluster of `squall simulate` behind a real port: an OpenAI server that needs no GPU.

Gateways, load balancers, autoscalers, dashboards and load generators can be tried on it: its queues, batches, KV cache
and preemptions are those of the simulator, in real time or faster.
"""

import asyncio
import ipaddress
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns
from typing import Any

import msgspec
import numpy as np
import uvloop

from squall.errors import InputError, SquallError
from squall.progress import note
from squall.replay.pacer import rare_collections
from squall.seeds import DEFAULT_SEED
from squall.serve import exposition
from squall.serve.api import Limits
from squall.serve.http import listen
from squall.serve.service import Service
from squall.serve.tokens import Outlets
from squall.simulate.calibrate import Calibration, calibrated, read_calibration
from squall.simulate.cluster import Cluster, resolve
from squall.simulate.hardware import GPU, Model
from squall.simulate.live import LiveCluster, check_live
from squall.simulate.policies import Choices
from squall.simulate.records import TICKS
from squall.trace import TraceSource, open_trace
from squall.units import Duration, seconds
from squall.verb import callable_room

__all__ = ["serve"]

BODY_LIMIT = 32 << 20
CONNECTION_LIMIT = 20_000
MOST_OBJECTS = 2_000_000
"""More than all connections can have: without circles among them nothing is left to collect before."""
FAILURE_BIN = 10.0
"""Seconds of a recorded trace that share one share of failures."""


def serve(
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    speed: float = 1.0,
    ports_per_replica: bool = False,
    served_model_name: str | None = None,
    default_tokens: int = 128,
    fail_rate: float = 0.0,
    failures: TraceSource | None = None,
    model: str | Model | None = None,
    gpu: str | GPU | None = None,
    tp: int | None = None,
    replicas: int = 1,
    fleet: str | None = None,
    kv_blocks: int | None = None,
    block_size: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    queue_limit: int | None = None,
    timeout: Duration | None = None,
    engine: str | None = None,
    calibration: "str | Path | Calibration | None" = None,
    seed: int = DEFAULT_SEED,
    **choices: Any,
) -> None:
    """Serve until interrupted, at `host`:`port` (0: any free port); prints one JSON line with the URLs when ready.

    `speed` runs the modelled clock so many times faster than the real one. The cluster is described as for `simulate`;
    its replicas stand behind one port and its router, or with `ports_per_replica` each behind a port of its own, from
    `port` on. `timeout` (of the modelled clock) ends a request with an error 504. A request without `max_tokens` gets
    `default_tokens`. `fail_rate` is the share of requests that get an error 500; `failures` is a trace whose recorded
    failures, in bins of 10 s and again and again, say the share instead. `choices` are the fields of
    `squall.simulate.Choices` that can be had live: the queue's order (`priority` goes by the requests' own, `vtc` by
    their `user`), prefix caching, swapping, routers, prefill and decode replicas, ….

    Raises InputError for values that cannot be used, and when an order of the queue of one's own does not return;
    SquallError if a port is taken.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: a port is 0 to 65535.")
    if not 0.01 <= speed <= 1000:
        raise InputError(f"--speed {speed:g}: give 0.01 to 1000.")
    if not 0 <= fail_rate <= 1:
        raise InputError(f"--fail-rate {fail_rate:g}: give a share from 0 to 1.")
    if fail_rate and failures is not None:
        raise InputError("--fail-rate and --failures both say how many requests fail; give one of them.")
    if default_tokens < 1:
        raise InputError(f"--default-tokens {default_tokens}: an answer has at least 1 token.")
    _check_choices(choices, ports_per_replica, fleet)
    limit = None if timeout is None else seconds(timeout, "--timeout")
    if limit is not None and limit <= 0:
        raise InputError(f"--timeout {timeout}: no request can be answered in no time; leave it out for none.")
    words: dict[str, Any] = {
        "model": model,
        "gpu": gpu,
        "tp": tp,
        "replicas": replicas,
        "fleet": fleet,
        "kv_blocks": kv_blocks,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "queue_limit": queue_limit,
        "engine": engine,
        **choices,
    }
    cluster = cluster_of(words, calibration)
    if default_tokens >= cluster.max_model_len:
        raise InputError(
            f"--default-tokens {default_tokens}: with any prompt that is beyond the context of"
            f" {cluster.max_model_len:,} tokens (--max-model-len)."
        )
    if ports_per_replica and cluster.replicas == 1:
        raise InputError("--ports-per-replica changes nothing with one replica; give more --replicas.")
    if ports_per_replica and port and port + cluster.replicas - 1 > 65535:
        raise InputError(f"--port {port}: there are no {cluster.replicas} ports from there on (they end at 65535).")
    failing = (lambda at: fail_rate) if fail_rate else None if failures is None else _recorded(failures)
    if not _is_loopback(host):
        note(f"serve: WARNING: {host} can be reached from other machines, without any key; use it in closed networks.")
    _compile(cluster)
    clusters = [cluster]
    if ports_per_replica:
        clusters = [msgspec.structs.replace(cluster, replicas=1) for _ in range(cluster.replicas)]
    limits = Limits(served_model_name or cluster.model.name, cluster.max_model_len, default_tokens)

    async def run() -> None:
        services = []
        for k, one in enumerate(clusters):
            name = f" (replica {k})" if ports_per_replica else ""
            services.append(Service(one, limits, speed=speed, seed=seed + k, timeout=limit, failing=failing, name=name))
        await _until_stopped(services, host, port, limits)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def cluster_of(words: dict[str, Any], calibration: "str | Path | Calibration | None" = None) -> Cluster:
    """The cluster that these words describe, for one that lives: a request's priority needs no --priorities."""
    by_priority = words.get("scheduler") == "priority"
    words = words | ({"scheduler": "fcfs"} if by_priority else {})
    words["own_blocks"] = words.get("own_blocks") or False  # as calibrated is for simulations: check_live tells why
    cluster = resolve(**words) if calibration is None else calibrated(read_calibration(calibration), words)
    if not by_priority:
        return cluster
    return msgspec.structs.replace(cluster, choices=msgspec.structs.replace(cluster.choices, scheduler="priority"))


def _check_choices(choices: dict[str, Any], ports_per_replica: bool, fleet: str | None) -> None:
    """Raise InputError for what cannot be had live, before the cluster is resolved."""
    known = Choices.__struct_fields__
    for name in choices:
        if name not in known:
            raise InputError(f"{name}: there is no such option; serve takes {', '.join(known)}.")
    chosen = Choices(**{name: value for name, value in choices.items() if value is not None})
    check_live(chosen)
    if ports_per_replica:
        if chosen.router != "round-robin":
            raise InputError(
                f"--router {chosen.router} changes nothing with --ports-per-replica: the clients choose the replica."
            )
        if chosen.disaggregated or fleet is not None:
            what = "--fleet" if fleet is not None else "--prefill-replicas"
            raise InputError(f"{what} cannot be combined with --ports-per-replica: its replicas are not alike.")


async def _until_stopped(services: list[Service], host: str, port: int, limits: Limits) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    open_ports, urls = [], []
    where = f"[{host}]" if ":" in host else host
    for k, service in enumerate(services):
        try:
            listening = await listen(
                service.handle,
                host,
                port + k if port else 0,
                body_limit=BODY_LIMIT,
                connection_limit=CONNECTION_LIMIT,
            )
        except OSError as error:
            raise SquallError(
                f"serve: cannot listen at {host}:{port + k} ({error.strerror or error}); give another --port or --host."
            ) from error
        open_ports.append(listening)
        urls.append(f"http://{where}:{listening[2]}")
    with rare_collections(MOST_OBJECTS):
        print(msgspec.json.encode({"url": urls[0], "urls": urls, "model": limits.model}).decode(), flush=True)
        while not stopped.is_set() and not any(service.failure for service in services):
            for _, connections, _ in open_ports:
                now = monotonic_ns()
                for connection in list(connections):
                    connection.close_if_slow(now)
            try:
                await asyncio.wait_for(stopped.wait(), 2.0)
            except TimeoutError:
                continue
    for server, connections, _ in open_ports:
        server.close()
        for connection in list(connections):
            connection.abort()
    for service in services:
        service.close()
    sys.stdout.flush()
    for service in services:
        if service.failure is not None:
            raise service.failure


def _recorded(source: TraceSource) -> Callable[[float], float]:
    """The share of failed requests by time, from a trace's recorded failures, repeated for ever."""
    table = open_trace(source).table
    if table.is_empty() or not table["failed"].any():
        raise InputError("--failures: no request in this trace failed, so there is nothing to repeat.")
    arrival = table["arrival"].to_numpy()
    bins = ((arrival - arrival.min()) // FAILURE_BIN).astype(np.int64)
    failed = np.bincount(bins, table["failed"].to_numpy().astype(float))
    shares = failed / np.maximum(np.bincount(bins), 1)

    def share(at: float) -> float:
        return float(shares[int(at / FAILURE_BIN) % len(shares)])

    return share


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _compile(cluster: Cluster) -> None:
    """Have everything compiled before the first client comes."""
    live = LiveCluster(cluster, capacity=4)
    live.submit(0, 1, 2, hashes=[1])
    gone = live.submit(0, 1, 1)
    live.advance(live.limits.ingest * 2 + 2)
    live.cancel(gone)
    outlets = Outlets(4, 0, 1.0, exposition.ITL)
    while live.next() < 1000 * TICKS:
        outlets.plan(live.ahead(live.next()))
        outlets.write(live.advance(live.next())[:0], 0, due=True)
    outlets.told(0, 1, 0)


callable_room(__name__)
