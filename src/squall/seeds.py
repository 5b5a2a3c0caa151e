"""One seed for everything: each random stream is derived from (seed, purpose, index), independent of all others."""

import zlib

import numpy as np

DEFAULT_SEED = 0


def stream(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The generator for `purpose` (a fixed text, e.g. "arrivals") and `index` under the run's `seed` (>= 0)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *index])))
