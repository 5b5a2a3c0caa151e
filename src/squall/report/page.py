"""The page of a report, written as one HTML file that needs nothing else.

The scripts (Vega, Vega-Lite, Vega-Embed) stand inside it once. Its content security policy allows these scripts by
their hashes and no request to any host; all text goes through the template's escaping, and the data of the charts
through `script_safe`, so that no name or message in the input can become markup or code.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from squall import __version__
from squall.files import replace_file
from squall.report import charts
from squall.report.sections import (
    MeasuredRun,
    MeasuredTrace,
    Origin,
    Section,
    run_facts,
    run_sections,
    trace_facts,
    trace_sections,
    warnings,
)

BAD = ("CLIENT-LIMITED",)
"""Cells of a table that stand out."""


def write_page(
    path: Path,
    title: str,
    traces: Mapping[str, MeasuredTrace],
    runs: Mapping[str, MeasuredRun],
    lead: Sequence[str] = (),
) -> None:
    """Write the page on `traces` and `runs` (by name, in this order) to `path`, whole or not at all."""
    write_sections(
        path,
        title,
        [*run_sections(runs), *trace_sections(traces)],
        [
            *(Origin(name, run_facts(measured)) for name, measured in runs.items()),
            *(Origin(name, trace_facts(measured)) for name, measured in traces.items()),
        ],
        lead=lead,
        warnings=[warning for name, measured in runs.items() for warning in warnings(name, measured.metrics)],
    )


def write_sections(
    path: Path,
    title: str,
    sections: Sequence[Section],
    origins: Sequence[Origin],
    *,
    lead: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write a page of `sections` to `path`, whole or not at all; `lead` and `warnings` are sentences at its top."""
    import jinja2

    declared = {figure.id: charts.declaration(figure.chart) for section in sections for figure in section.figures}
    themes = {"light": charts.theme(), "dark": charts.theme(dark=True)}
    library, script = _library(), _asset("page.js")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    html = environment.from_string(_asset("page.html")).render(
        title=title,
        lead=lead,
        warnings=warnings,
        sections=sections,
        origins=origins,
        colours=len(charts.LIGHT),
        bad_cells=BAD,
        version=__version__,
        policy=_policy(library, script),
        style=_style(),
        declarations=script_safe({"charts": declared, "themes": themes}),
        library=library,
        script=script,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, html.encode())


def script_safe(value: Any) -> str:
    """`value` as JSON for the inside of a script element: no character in it can end the element or open a comment."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


_EXPORTS = "window.vegaEmbed = vegaEmbed;"


@cache
def _library() -> str:
    import vl_convert

    return vl_convert.javascript_bundle(_EXPORTS).replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return files("squall.report").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet, with the colours of the charts for the legends."""

    def root(colours: Sequence[str]) -> str:
        return ":root {" + " ".join(f"--c{k}: {colour};" for k, colour in enumerate(colours)) + "}"

    marks = "\n".join(f"i.c{k} {{ background: var(--c{k}); }}" for k in range(len(charts.LIGHT)))
    dark = f"@media (prefers-color-scheme: dark) {{ {root(charts.DARK)} }}"
    return "\n".join((_asset("page.css"), root(charts.LIGHT), dark, marks))
