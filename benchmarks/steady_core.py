"""Keeps the speed of one core constant, so that a server on it can be measured twice.

    python benchmarks/steady_core.py 0 &        # as root; then pin the server's engine to core 0

On a shared host a core is up to 1.6 times slower while a neighbour uses the other half of its physical core: seconds
at a time, and nothing in the guest shows it. This measures the core every 4 ms with a loop of known length and, at
real-time priority, takes from the fast moments what they have more than the slow ones. What runs on the core then has
always the speed of a slow moment.
"""

import argparse
import os
import time

PERIOD = 4e-3
LOOP = range(4000)
SMOOTHING = 0.3


def timed() -> float:
    """Seconds that the loop takes, the second time: the first warms the caches."""
    for _ in range(2):
        begin = time.perf_counter()
        for _ in LOOP:
            pass
        took = time.perf_counter() - begin
    return took


def main() -> None:
    """Run until killed."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("core", type=int)
    parse.add_argument("--slowest", type=float, default=90.0, help="microseconds of the loop in a slow moment")
    parse.add_argument("--gain", type=float, default=0.85, help="slowdown of the server per slowdown of the loop")
    asked = parse.parse_args()
    os.sched_setaffinity(0, {asked.core})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    took = timed()
    due = time.perf_counter()
    while True:
        due += PERIOD
        begin = time.perf_counter()
        took += SMOOTHING * (timed() - took)
        faster = 1 + asked.gain * (asked.slowest * 1e-6 / took - 1)
        until = begin + 3e-4 + (PERIOD - 3e-4) * max(0.0, 1 - 1 / faster)
        while time.perf_counter() < until:
            pass
        time.sleep(max(0.0, due - time.perf_counter()))
        due = max(due, time.perf_counter() - PERIOD)


if __name__ == "__main__":
    main()
