"""Progress bars and notes on standard error, so that standard output stays clean for results.

`notes` is the one switch: the command line turns it off for `--quiet`; in scripts it is off from the start.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Notes:
    shown: bool = False
    bars: int = 0  # open ones: a verb inside another verb draws none of its own
    sink: Callable[[str], None] | None = None  # who prints notes while a live view has the terminal


notes = _Notes()


def note(text: str) -> None:
    """Print one line to standard error, unless notes are off. Control characters in `text` are made visible."""
    if not notes.shown:
        return
    if notes.sink is not None:
        notes.sink(text)
    else:
        print(printable(text), file=sys.stderr, flush=True)


def line(text: str) -> None:
    """Show `text` as the last line of a terminal in place of what this function showed before; "" removes it.

    Unlike `progress` it needs no thread, so that it may be called where milliseconds count.
    """
    if notes.shown and sys.stderr.isatty():
        sys.stderr.write(f"\r{printable(text)}\x1b[K")
        sys.stderr.flush()


def printable(text: str) -> str:
    """`text` with control characters (escape sequences in untrusted input) replaced, so that a terminal shows them."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A bar on standard error while the block runs; call the yielded function with the amount done so far.

    Shown only on a terminal and while notes are on; elsewhere it costs nothing.
    """
    if not (notes.shown and sys.stderr.isatty()) or notes.bars:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    notes.bars += 1
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
    finally:
        notes.bars -= 1
