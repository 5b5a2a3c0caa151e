"""The command line: one file per verb, each of which parses, calls the function of the same name, and prints."""

import gc
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy's import starts threads that spin for 0.1 s of CPU
gc.set_threshold(200_000, 50, 50)  # importing makes two hundred thousand objects and no garbage

from squall.cli.app import main  # noqa: E402

__all__ = ["main"]
