"""Where the real data lie: tests that need them skip where they are absent."""

import os
from pathlib import Path

import pytest


def _folder(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        pytest.skip(f"{variable} does not name a folder of real data")
    return Path(path)


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of real traces (SQUALL_TRACES)."""
    return _folder("SQUALL_TRACES")


@pytest.fixture(scope="session")
def runs() -> Path:
    """The folder of recorded runs (SQUALL_RUNS)."""
    return _folder("SQUALL_RUNS")
