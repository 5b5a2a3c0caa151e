"""squall tests LLM serving under load as real users make it.

Two tables and the verbs between them: a Trace is what was asked, a Run is what was answered. Every verb of the
command line is a function here (`squall.fit` is `squall fit`). Rooms are imported when they are first used, so that
importing squall costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Verb -> the room that holds its function. A verb named like its room is that room, which is callable (see verb.py).
_VERBS = {
    "capture": "capture",
    "capacity": "capacity",
    "calibrate": "calibrate",
    "characterize": "characterize",
    "compare": "compare",
    "convert": "trace",
    "demo": "study.demo",
    "fetch": "trace",
    "fidelity": "fidelity",
    "fit": "workload",
    "generate": "workload",
    "local": "local",
    "metrics": "run",
    "read_run": "run",
    "read_trace": "trace",
    "replay": "replay",
    "report": "report",
    "serve": "serve",
    "simulate": "simulate",
    "study": "study",
    "sweep": "simulate.sweep",
    "validate": "trace",
}

__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'squall' has no attribute {name!r}")
    room = import_module(f"squall.{_VERBS[name]}")
    return room if room.__name__ == f"squall.{name}" else getattr(room, name)
