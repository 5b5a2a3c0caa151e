"""Many sending processes: each has its share of the conversations, a loop and a journal file of its own.

They import what a sender needs (no tables, no files of traces), so each starts quickly and stays small.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace as changed
from typing import Any

import uvloop

from squall.replay.loopback import raise_file_limit
from squall.replay.schedule import Schedule
from squall.replay.sender import LEAD, Counts, Plan, Sender, prepare

_COUNTS = len(vars(Counts()))


def in_processes(
    plan: Plan,
    schedule: Schedule,
    workers: int,
    started: Callable[[int], None],
    watch: Callable[[Counts], int],
    stops: list[int],
    since: int,
) -> str:
    """Spawn the workers, start their clocks together, and wait. They share a few numbers and nothing else."""
    spawn = multiprocessing.get_context("spawn")
    shared = spawn.RawArray("q", 2 + workers * (_COUNTS + 1))  # start, stops, then per worker: ready, counts
    processes = []
    for worker in range(workers):
        limit = plan.max_concurrency
        share = None if limit is None else (limit + workers - 1 - worker) // workers
        arguments = (changed(plan, max_concurrency=share), schedule.part(worker, workers), worker, os.getpid(), shared)
        processes.append(spawn.Process(target=_work, args=arguments, name=f"squall replay {worker}"))
    for process in processes:
        process.start()
    try:
        while not all(shared[2 + worker * (_COUNTS + 1)] for worker in range(workers)):
            if any(process.exitcode is not None for process in processes):
                break  # its rows will be the client's fault; the others go on
            time.sleep(0.01)
        shared[0] = time.monotonic_ns() + LEAD - since
        started(shared[0])
        while any(process.is_alive() for process in processes):
            shared[1] = watch(sum(_snapshot(shared, workers), Counts()))
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        return "failed"
    return "interrupted" if stops[0] else "complete"


def _snapshot(shared: Any, workers: int) -> list[Counts]:
    """The counts of every worker, as it last wrote them (ten times a second); reading them disturbs nobody."""
    return [Counts(*shared[3 + worker * (_COUNTS + 1) :][:_COUNTS]) for worker in range(workers)]


def _work(plan: Plan, schedule: Schedule, worker: int, parent: int, shared: Any) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the parent says when to stop
    own = 2 + worker * (_COUNTS + 1)

    def watch(counts: Counts) -> int:
        shared[own + 1 : own + 1 + _COUNTS] = list(vars(counts).values())
        return shared[1] if os.getppid() == parent else 2

    async def send() -> None:
        prepare(plan)
        shared[own] = 1
        while not shared[0] and os.getppid() == parent:
            await asyncio.sleep(0.005)
        await Sender(plan, schedule, shared[0], worker=worker, watch=watch).run()

    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(send())
