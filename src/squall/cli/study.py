"""`squall study`."""

from itertools import groupby
from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, print_json
from squall.errors import InputError
from squall.progress import printable


def study(
    name: str | None = None,
    paths: Annotated[list[str] | None, Parameter(negative="")] = None,
    *,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    out: str | None = None,
    output: Output = Output(),
) -> int:
    """An experiment of the paper, from trace to figure. Exits with 4 if a figure is not met.

    Parameters
    ----------
    name
        Which study; --list names them.
    paths
        Files that the study works on.
    list_
        Name the studies and stop.
    out
        Directory for what the study writes.
    """
    if list_:
        return _list(output)
    from squall.study import STUDIES
    from squall.study import study as run

    if name is None:
        raise InputError(f"study: name one; there are {', '.join(STUDIES)}.")
    result = run(name, *(paths or ()), out=out)
    if output.json:
        print_json(result)
        return 4 if result.failed else 0
    from squall.report.terminal import console, number, row, table

    page = console()
    for name, checks in groupby(result.checks, key=lambda check: check.trace):
        shown = table(f"{printable(name)}: published statistics beside squall's", "quantity", "published", "squall's",
                      "difference", "")  # fmt: skip
        for check in checks:
            percent = 100.0 if check.published.endswith("%") else 1.0
            ours = "-" if check.ours is None else number(check.ours * percent, 5) + (" %" if percent > 1 else "")
            verdict = "-" if check.passed is None else "pass" if check.passed else "FAIL"
            row(shown, f"{check.section}: {check.quantity}", check.published, ours, number(check.difference), verdict)
        page.print(shown)
    unjudged = f"; {result.not_judged:,} are not judged (-): how they were computed is not known" * bool(
        result.not_judged
    )
    page.print(f"{result.passed:,} of {result.passed + result.failed:,} figures agree{unjudged}.")
    return 4 if result.failed else 0


def _list(output: Output) -> int:
    from squall.report.terminal import console
    from squall.study import STUDIES

    if output.json:
        print_json({name: about for name, (about, _) in STUDIES.items()})
        return 0
    for name, (about, _) in STUDIES.items():
        console().print(f"{name}: {about}", markup=False)
    return 0
