"""numba, imported in half the time.

At its import numba looks whether SciPy has a BLAS for it, by importing all of scipy.linalg: more than 0.1 s for nothing
where no compiled function multiplies matrices. It finds a stand-in here; where one does, numba imports the real one.
"""

import sys
from types import ModuleType

_BLAS = "scipy.linalg.cython_blas"

if _BLAS not in sys.modules:
    sys.modules[_BLAS] = ModuleType(_BLAS)
    try:
        import numba.np.arraymath  # noqa: F401  # it is this one that looks
    finally:
        del sys.modules[_BLAS]

from numba import njit as njit  # noqa: E402
