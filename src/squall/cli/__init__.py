"""The command line: one file per verb, each of which parses, calls the function of the same name, and prints."""

import gc

gc.set_threshold(20_000, 50, 50)  # importing makes a hundred thousand objects and no garbage: hundreds of collections

from squall.cli.app import main  # noqa: E402

__all__ = ["main"]
