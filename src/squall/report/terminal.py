"""Terminal tables and small plots, shared by all verbs that print for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from squall.progress import printable
from squall.run.server import Agreement
from squall.units import in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LEVELS = " ▁▂▃▄▅▆▇█"


def console() -> "Console":
    """Standard output for people: coloured on a terminal, plain in a pipe, never wider than 120 columns."""
    from rich.console import Console

    class Page(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for the command line to judge; rich would exit with 1

    probe = Page(highlight=False)
    return Page(highlight=False, width=min(probe.width, 120) if probe.is_terminal else 120)


def table(title: str, *columns: str, text: int = 0) -> "Table":
    """An empty table; the column at `text` is left-aligned and wraps, the others are numbers. Add rows with `row`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for position, name in enumerate(columns):
        is_text = position == text
        result.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    return result


def row(into: "Table", *cells: object) -> None:
    """Add a row of plain text, `-` for None: control characters and markup in untrusted names are shown, not obeyed."""
    from rich.text import Text

    texts = (number(cell) if cell is None or isinstance(cell, float) else str(cell) for cell in cells)
    into.add_row(*(Text(printable(text)) for text in texts))


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `1,155`, `0.0272`, `-` for what is not known."""
    if value is None or value != value:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def duration(value: float | None) -> str:
    """A latency for people: `0.21 ms`, `850 ms`, `65.5 s`, `137 s`, in minutes from 1000 s on; `-` if unknown."""
    if value is None or value != value:
        return "-"
    return f"{value:.3g} s" if value == 0 or 1 <= abs(value) < 1000 else in_words(value)


def agreement(found: Agreement, server: str) -> str:
    """One sentence on a latency as the server's histogram and as the client's sample have it."""
    counts = f"{found.server_n:,} and {found.client_n:,} requests"
    means = f"mean {duration(found.server_mean)} by {server}, {duration(found.client_mean)} here from send"
    gap = f"shares at the histogram's edges differ by at most {percent(found.largest_gap)}"
    told = f"{found.metric.upper()} {means} ({counts}); {gap}"
    if found.agree is None:
        return f"{told}: not the same requests, so not comparable."
    off = [level for level in found.levels if not level.within]
    if not off:
        levels = ", ".join(f"P{level.level}" for level in found.levels)
        return f"{told}; {levels} lie in the server's buckets: they agree."
    worst = "; ".join(
        f"P{level.level} {duration(level.client)} here, {duration(level.low)} to "
        f"{'more' if level.high is None else duration(level.high)} there"
        for level in off
    )
    return f"{told}; they DISAGREE: {worst}."


def percent(share: float | None) -> str:
    """A share as `12.3 %`; `-` for what is not known."""
    return "-" if share is None or share != share else f"{100 * share:.3g} %"


def sparkline(values: Sequence[float] | np.ndarray, width: int = 60) -> str:
    """`values` as one line of blocks from 0 to their maximum, averaged down to `width` columns; nan is a blank."""
    series = np.asarray(values, dtype=float)
    if series.size == 0:
        return ""
    if series.size > width:
        edges = np.linspace(0, series.size, width + 1).astype(int)
        series = np.array(
            [np.nanmean(part) if np.isfinite(part).any() else np.nan for part in np.split(series, edges[1:-1])]
        )
    finite = series[np.isfinite(series)]
    top = finite.max() if finite.size else 0.0
    if top <= 0:
        return "".join(" " if v != v else _LEVELS[1] for v in series)
    # Anything above zero gets at least the lowest block, so that rare events stay visible.
    levels = np.where(series > 0, np.ceil(series / top * (len(_LEVELS) - 1)), 0)
    return "".join(
        " " if v != v else _LEVELS[int(level)] for v, level in zip(series, np.nan_to_num(levels), strict=True)
    )


def bar(share: float, width: int = 20) -> str:
    """A horizontal bar for a share of 1."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + "░" * (width - filled)
