"""The stand-in that numba finds at its import must not be what compiled functions multiply matrices with."""

import subprocess
import sys

PROGRAM = """
import sys
from squall.jit import njit
assert "scipy.linalg" not in sys.modules
import numpy as np
product = njit(lambda a, b: a @ b)
a = np.arange(6.0).reshape(2, 3)
assert (product(a, a.T.copy()) == [[5.0, 14.0], [14.0, 50.0]]).all()
import scipy.linalg.cython_blas as real
assert real.__file__
"""


def test_matrices_are_still_multiplied():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
