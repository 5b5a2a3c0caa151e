"""Compiled functions without numba at run time: their machine code is kept in a file and loaded in a millisecond.

Importing numba takes a third of a second in every process, and LLVM 90 MB of memory. So a function that a short-lived
process calls is compiled by numba once per source, and its object code kept beside the bytecode (else in the user's
cache), for any processor of this architecture. The functions are plain C ones: numbers and addresses, no arrays, no
exceptions, and the GIL is free while they run. They may call libc by `numba.types.ExternalFunction`.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_kept_alive: list[Any] = []  # the code must outlive its callers
_X86_64 = os.name == "posix" and os.uname().machine == "x86_64"


def load(
    module: str, name: str, arguments: int, also: tuple[str, ...] = (), slow: Callable[[], object] = lambda: None
) -> Callable[..., int]:
    """The function `name` of `module`, which is not imported unless it must be compiled.

    It takes so many `arguments` and gives one number, all integers of 64 bits or addresses as such. `also` are other
    modules whose change calls for compiling anew; `slow` is called before that is done, which takes seconds. Raises
    OSError where the system has no memory that may be run.
    """
    source = _source(module)
    texts = [_source(one).read_bytes() for one in (module, *also, __name__)]
    key = hashlib.sha256(repr((texts, arguments, os.uname().machine)).encode()).hexdigest()[:16]
    linked = link if _X86_64 else _link_by_llvm
    address = None
    for code in _kept(source, name, key):
        with suppress(ValueError, IndexError, struct.error):  # a broken file is as good as none
            address = linked(code, name)
            break
    if address is None:
        slow()
        code = _compiled(module, name, arguments)
        _keep(source, name, key, code)
        address = linked(code, name)
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(address)


def link(code: bytes, name: str) -> int:
    """Put an ELF object file for x86-64 into memory that may be run; the address of the function `name`.

    It takes what LLVM makes for its large code model: sections of code and constants, and absolute addresses in them.
    Raises ValueError for anything else, OSError where the system has no memory to run.
    """
    (sections_at,), (count,) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<H", code, 0x3C)
    sections = list(_records(code, "<IIQQQQIIQQ", sections_at, count))
    placed, size = {}, 0
    for number, (_, kind, flags, _, at, length, *_, align, _) in enumerate(sections):
        if kind == 1 and flags & 2:  # PROGBITS, ALLOC
            size = -(-size // max(align, 1)) * max(align, 1)
            placed[number] = (size, at, length)
            size += length
    room = mmap.mmap(-1, max(size, 1))
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for begin, at, length in placed.values():
        room[begin : begin + length] = code[at : at + length]
    found = 0
    for _, kind, _, _, at, length, linked, target, _, entry in sections:
        if kind != 4 or target not in placed:  # RELA
            continue
        _, _, _, _, symbols_at, symbols_length, strings, *_ = sections[linked]
        symbols = list(_records(code, "<IBBHQQ", symbols_at, symbols_length // 24))
        where = [_resolve(code, symbol, sections[strings][4], placed, base) for symbol in symbols]
        for place, what, addend in _records(code, "<QQq", at, length // entry):
            if what & 0xFFFFFFFF != 1 or (address := where[what >> 32]()) is None:
                raise ValueError(f"relocation {what:#x} is not an absolute address")
            struct.pack_into("<Q", room, placed[target][0] + place, address + addend)
    for _, kind, _, _, at, length, strings, *_ in sections:
        if kind == 2:  # SYMTAB
            for symbol in _records(code, "<IBBHQQ", at, length // 24):
                if _text(code, sections[strings][4] + symbol[0]) == name and symbol[3] in placed:
                    found = base + placed[symbol[3]][0] + symbol[4]
    if not found:
        raise ValueError(f"there is no {name}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(room)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "no memory may be run here")
    _kept_alive.append(room)
    return found


def _records(data: bytes, form: str, at: int, count: int) -> Iterator[tuple[Any, ...]]:
    size = struct.calcsize(form)
    return (struct.unpack_from(form, data, at + size * number) for number in range(count))


def _resolve(
    code: bytes, symbol: tuple[Any, ...], strings: int, placed: dict[int, tuple[int, int, int]], base: int
) -> Callable[[], int | None]:
    """What gives the address of a symbol: asked for only where it is used."""
    named, _, _, section, value, _ = symbol
    if section in placed:
        return lambda: base + placed[section][0] + value
    if section == 0 and named:
        return lambda: ctypes.cast(ctypes.CDLL(None)[_text(code, strings + named)], ctypes.c_void_p).value
    return lambda: None


def _text(code: bytes, at: int) -> str:
    return code[at : code.index(b"\0", at)].decode()


def _machine() -> Any:
    """LLVM's idea of the simplest machine of this architecture."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(opt=3, jit=True)


def _link_by_llvm(code: bytes, name: str) -> int:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept_alive.append(engine)
    return int(engine.get_function_address(name))


def _source(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"{module} has no source")
    return Path(found.origin)


def _compiled(module: str, name: str, arguments: int) -> bytes:
    import llvmlite.binding as llvm
    from numba import cfunc, int64

    machine = _machine()
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
