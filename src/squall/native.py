"""Compiled functions without numba at run time: their machine code is kept in a file and loaded in milliseconds.

Importing numba takes a third of a second in every process, loading machine code by llvmlite a tenth of that. So a
function that a short-lived process calls is compiled by numba once per source, machine and version, and its object
code kept beside the bytecode (else in the user's cache). The functions are plain C ones: numbers and pointers, no
arrays, no exceptions, and the GIL is free while they run. They may call libc by `numba.types.ExternalFunction`.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

_engines: list[Any] = []  # the code lives as long as its engine


def load(
    module: str, name: str, arguments: int, also: tuple[str, ...] = (), slow: Callable[[], object] = lambda: None
) -> Callable[..., int]:
    """The function `name` of `module`, which is not imported unless it must be compiled.

    It takes so many `arguments` and gives one number, all integers of 64 bits or addresses as such. `also` are other
    modules whose change calls for compiling anew; `slow` is called before that is done, which takes seconds.
    """
    source = _source(module)
    texts = [_source(one).read_bytes() for one in (module, *also)]
    said = (texts, version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), platform.machine())
    key = hashlib.sha256(repr((said, arguments)).encode()).hexdigest()[:16]
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    code = next(_kept(source, name, key), None)
    if code is None:
        slow()
        code = _compiled(module, name, arguments, machine)
        _keep(source, name, key, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(engine.get_function_address(name))


def _source(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"{module} has no source")
    return Path(found.origin)


def _compiled(module: str, name: str, arguments: int, machine: Any) -> bytes:
    from numba import cfunc, int64

    # No reference counts, no ZeroDivisionErrors, all in one piece: then nothing of numba's own run-time is called.
    make = cfunc(int64(*[int64] * arguments), _nrt=False, error_model="numpy", forceinline=True)
    made = make(getattr(importlib.import_module(module), name))
    unit = llvm.parse_assembly(made.inspect_llvm())
    unit.get_function(made.native_name).name = name
    wanted = [one.name for one in unit.functions if one.is_declaration and one.name.startswith(("numba_", "NRT_"))]
    if wanted:
        raise TypeError(f"{module}.{name} may raise or allocate: it calls {', '.join(wanted)}")
    return machine.emit_object(unit)


def _places(source: Path, name: str) -> Iterator[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squall"
    for folder in (source.parent / "__pycache__", cache):
        yield folder / f"{source.stem}.{name}"


def _kept(source: Path, name: str, key: str) -> Iterator[bytes]:
    for place in _places(source, name):
        try:
            yield place.with_suffix(f".{name}-{key}.o").read_bytes()
        except OSError:
            continue


def _keep(source: Path, name: str, key: str, code: bytes) -> None:
    for place in _places(source, name):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_suffix(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(code)
            for old in place.parent.glob(f"{place.name}-*.o"):
                old.unlink(missing_ok=True)
            temporary.replace(place.with_suffix(f".{name}-{key}.o"))
        except OSError:
            continue  # it is compiled again the next time
        return
