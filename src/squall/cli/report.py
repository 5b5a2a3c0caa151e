"""`squall report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json


def report(
    paths: Annotated[list[str], Parameter(negative="")],
    *,
    out: Annotated[str, Parameter(name=["--out", "-o"])],
    title: str | None = None,
    slo: str | None = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """One self-contained HTML page from traces and runs.

    The page works offline, on a phone, light and dark; it asks no host for anything.

    Parameters
    ----------
    paths
        Trace files, built-in profiles and runs, in any order; runs are laid side by side.
    out
        The page to write, FILE.html.
    title
        Title of the page.
    slo
        Limits that a request must meet all of, like ttft=1s,tpot=100ms,e2e=30s: adds goodput to the comparison.
    """
    from squall.progress import note
    from squall.report import report as write

    written: Path = write(*paths, out=out, title=title, slo=slo)
    if output.json:
        print_json({"out": str(written), "bytes": written.stat().st_size})
    else:
        note(f"Wrote {written} ({written.stat().st_size / 1e6:.1f} MB).")
    return 0
