"""`squall fetch`."""

from typing import Annotated

from cyclopts import Parameter

from squall.cli.common import Output, Seed, print_json


def fetch(
    name: str = "list",
    *,
    to: str = ".",
    base_url: Annotated[str | None, Parameter(name="--base-url")] = None,
    seed: Seed = Seed(),
    output: Output = Output(),
) -> int:
    """Download a public data set: resumable, checked by sha256. Without a NAME: what there is.

    Parameters
    ----------
    name
        The data set (burstgpt-1, azure-2023-conv, mooncake-conversation, ...), or `list` for all of them.
    to
        The directory to put it in; made if it is not there.
    base_url
        A mirror: the file's name is appended to it. https, or http on this machine.
    """
    if name == "list":
        return _list(output)
    from squall.trace import fetch as run
    from squall.trace.catalogue import data_set

    path = run(name, to=to, base_url=base_url)
    if output.json:
        chosen = data_set(name)
        files = [path] if chosen.folder is None else sorted(path.iterdir())
        size = sum(file.stat().st_size for file in files)
        print_json(
            {"name": chosen.name, "path": str(path), "files": len(files), "bytes": size, "licence": chosen.licence}
        )
        return 0
    print(path)
    return 0


def _list(output: Output) -> int:
    from squall.trace.catalogue import CATALOGUE

    if output.json:
        print_json(
            [
                {
                    "name": known.name,
                    "title": known.title,
                    "licence": known.licence,
                    "url": known.url,
                    "files": [{"path": f.path, "bytes": f.size, "sha256": f.sha256} for f in known.files],
                }
                for known in CATALOGUE.values()
            ]
        )
        return 0
    from squall.report.terminal import console, row, table

    listing = table("", "name", "what", "MB", "licence")
    for column, right in zip(listing.columns, (False, False, True, False), strict=True):
        column.justify = "right" if right else "left"
    for known in CATALOGUE.values():
        row(listing, known.name, known.title, f"{known.size / 1e6:,.0f}" if known.size else "", known.licence)
    console().print(listing)
    return 0
