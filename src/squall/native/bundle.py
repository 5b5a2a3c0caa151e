"""A named tuple of arrays that compiled functions take as one pointer.

numba passes a tuple member by member, an array as seven words and more: two kilobytes for the arrays of a cluster, at
every call. Here they stay in a table of words (address and shape of each array, or the number itself) to which one
pointer leads; a member is read where it is used. Compiled code sees the attributes of the tuple and cannot set them.
"""

from typing import Any, NamedTuple

import numpy as np


class Items(NamedTuple):
    """The form of an array."""

    dtype: np.dtype
    ndim: int


class Form(NamedTuple):
    """What compiled code knows of a bundle: the names of its members, and of each `int`, `float`, None, or its form."""

    name: str
    members: tuple[tuple[str, Any], ...]


class Bundle:
    """The arrays (C-contiguous), integers, floats, Nones and inner tuples of a named tuple, for compiled functions."""

    def __init__(self, members: Any) -> None:
        """Keeps `members` alive; what is later written into its arrays is seen, other arrays in their stead are not."""
        words: list[int] = []
        forms: list[tuple[str, Any]] = []
        self._kept: list[Any] = []
        for name, value in members._asdict().items():
            kept: Any = Bundle(value) if isinstance(value, tuple) else value
            form: Any = int
            self._kept.append(kept)
            if kept is None:
                form = None
            elif isinstance(kept, Bundle):
                form = kept.form
                words.append(kept.address)
            elif isinstance(kept, np.ndarray):
                if not kept.flags.c_contiguous:
                    raise TypeError(f"{name}: a bundle holds C-contiguous arrays")
                form = Items(kept.dtype, kept.ndim)
                words += [kept.ctypes.data, *kept.shape]
            elif isinstance(kept, float):
                form = float
                words.append(int(np.float64(kept).view(np.int64)))
            else:
                words.append(int(kept))
            forms.append((name, form))
        self._table = np.array(words, np.int64)
        self.form: Form = Form(type(members).__name__, tuple(forms))
        self.address: int = self._table.ctypes.data
