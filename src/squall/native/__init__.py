"""Compiled functions without numba at run time: their machine code is kept in a file and loaded in milliseconds.

Importing numba takes a third of a second in every process, and LLVM 90 MB of memory. So what is compiled is compiled by
numba once per source (compiling.py), and its object code kept beside the bytecode (else in the user's cache). The
functions are plain C ones: they take bundles (bundle.py), numbers and addresses, know no exceptions, allocate nothing,
count indices from the begin alone, and the GIL is free while they run. They may call libc by
`numba.types.ExternalFunction`.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from squall.native.bundle import Bundle as Bundle
from squall.native.bundle import Form as Form
from squall.native.linking import link, link_by_llvm, processor

_OURS = "squall.native", "squall.native.compiling"
_LINKED_HERE = sys.platform == "linux" and os.uname().machine == "x86_64"


class Part:
    """A function that compiled ones call, compiled with them. To Python it is the function that is written there."""

    def __init__(self, function: Callable[..., Any], inlined: bool) -> None:
        self._function, self._inlined = function, inlined
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    @cached_property
    def _dispatcher(self) -> Any:
        from squall.native.compiling import Overloads

        return Overloads(self._function, self._inlined)

    @property
    def _numba_type_(self) -> Any:
        """What numba asks for when a function that it compiles names this one."""
        return self._dispatcher._numba_type_


def lean(function: Callable[..., Any]) -> Part:
    """A part."""
    return Part(function, inlined=False)


def inlined(function: Callable[..., Any]) -> Part:
    """A part that stands in the place of each of its calls: it is called at every step and short, or from one place."""
    return Part(function, inlined=True)


class _Prefetch:
    """Ask for what `array[index]` has before it is needed. It changes nothing."""

    def __call__(self, array: Any, index: Any) -> None:
        """Nothing, to Python."""

    @property
    def _numba_type_(self) -> Any:
        from squall.native.compiling import prefetch_type

        return prefetch_type()


prefetch = _Prefetch()


def load(
    module: str,
    name: str,
    arguments: int = 0,
    also: tuple[str, ...] = (),
    slow: Callable[[], object] = lambda: None,
    *,
    bundles: tuple[Form, ...] = (),
) -> Callable[..., int]:
    """The function `name` of `module`, which is compiled only if there is no code of it yet.

    It takes (the addresses of) `bundles` of these forms, then so many `arguments`, integers of 64 bits or addresses as
    such, and gives one such number. `also` are other modules whose change calls for compiling anew; `slow` is called
    before that is done, which takes seconds. Raises OSError where the system has no memory that may be run.
    """
    source = _source(module)
    texts = [_source(one).read_bytes() for one in (module, *also, *_OURS)]
    kind = f"{_digest(texts)}-{_digest((bundles, arguments, os.uname().machine, processor()))}"
    linked = link if _LINKED_HERE else link_by_llvm
    address = None
    for code in _kept(source, name, kind):
        with suppress(ValueError, IndexError, struct.error):  # a broken file is as good as none
            address = linked(code, name)
            break
    if address is None:
        from squall import jit  # noqa: F401  # numba's import takes half the time behind it
        from squall.native.compiling import compiled

        slow()
        code = compiled(getattr(importlib.import_module(module), name), bundles, arguments)
        _keep(source, name, kind, code)
        address = linked(code, name)
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (len(bundles) + arguments))(address)


def _source(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"{module} has no source")
    return Path(found.origin)


def _digest(of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


def _places(source: Path, name: str) -> Iterator[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squall"
    for folder in (source.parent / "__pycache__", cache):
        yield folder / f"{source.stem}.{name}"


def _kept(source: Path, name: str, kind: str) -> Iterator[bytes]:
    for place in _places(source, name):
        try:
            yield place.with_suffix(f".{name}-{kind}.o").read_bytes()
        except OSError:
            continue


def _keep(source: Path, name: str, kind: str, code: bytes) -> None:
    """Keep the code, in place of what was made from other sources."""
    for place in _places(source, name):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_suffix(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(code)
            for old in place.parent.glob(f"{place.name}-*.o"):
                if kind.split("-")[0] not in old.name:
                    old.unlink(missing_ok=True)
            temporary.replace(place.with_suffix(f".{name}-{kind}.o"))
        except OSError:
            continue  # it is compiled again the next time
        return
