"""The verb `calibrate`: how long do the steps of this engine take? Asked of a recorded run, or of a live server.

The step time is fitted in `squall.simulate.calibrate`; the questions to a live server are in `squall.microbenchmarks`.
"""

from pathlib import Path
from typing import Any

from squall.errors import InputError
from squall.run.table import RunSource
from squall.seeds import DEFAULT_SEED
from squall.simulate.calibrate import Calibration, calibrate_run
from squall.simulate.cluster import DEFAULT_ENGINE
from squall.simulate.hardware import GPU, Model
from squall.verb import callable_room

__all__ = ["Calibration", "calibrate"]
