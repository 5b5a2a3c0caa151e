"""Flags that every verb has, and the one way in which verbs print."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from cyclopts import Group, Parameter

from squall.progress import notes
from squall.seeds import DEFAULT_SEED
from squall.trace.select import TraceOptions

TRACE_OPTIONS = Group("Trace options", sort_key=90)
OUTPUT_OPTIONS = Group("Output", sort_key=95)

Select = Annotated[TraceOptions, Parameter(name="*", group=TRACE_OPTIONS)]
TraceArgument = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A TRACE on the command line; `-` is standard input."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """How a verb speaks."""

    json: Annotated[bool, Parameter(negative="", group=OUTPUT_OPTIONS)] = False
    """Print the result as JSON on standard output, and nothing else there."""
    quiet: Annotated[bool, Parameter(negative="", group=OUTPUT_OPTIONS)] = False
    """No progress and no notes."""

    def __post_init__(self) -> None:
        notes.shown = not self.quiet


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Seed:
    """For verbs without trace options (those have --seed among them)."""

    seed: Annotated[int, Parameter(group=OUTPUT_OPTIONS)] = DEFAULT_SEED
    """Seed of every random choice."""


def as_options(select: TraceOptions) -> dict[str, Any]:
    """The trace options as keyword arguments of a verb's function."""
    return dict(vars(select))


def print_json(value: Any) -> None:
    """`value` (builtins, msgspec structs, numpy numbers) as one JSON document; nan and infinity become null."""
    sys.stdout.buffer.write(msgspec.json.encode(value, enc_hook=_plain))
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")
