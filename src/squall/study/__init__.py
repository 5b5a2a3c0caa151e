"""Studies: from traces to a finding, each in one call."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from squall.errors import InputError
from squall.verb import callable_room

__all__ = ["STUDIES", "study"]

# Name -> (what it is, its module and function), imported when it is called.
STUDIES = {
    "reference-statistics": (
        "Published statistics of public traces beside squall's, computed from your copy of the files.",
        "squall.study.reference_statistics:reference_statistics",
    ),
}


def study(name: str, *paths: str | Path, out: str | Path | None = None) -> Any:
    """Run the study `name` (a key of STUDIES) on the files at `paths`; `out` is a directory for what it writes.

    Returns the study's own result. Raises InputError for an unknown name or for files that it cannot use.
    """
    if name not in STUDIES:
        raise InputError(f"study {name}: there is no such study; there are {', '.join(STUDIES)}.")
    module, _, function = STUDIES[name][1].partition(":")
    run: Callable[..., Any] = getattr(import_module(module), function)
    return run(*paths, out=out)


callable_room(__name__)
