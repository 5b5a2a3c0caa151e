"""For what processor the code is, and object code into memory that may be run: by a small linker for ELF on x86-64."""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

_ABSOLUTE, _RELATIVE, _CALL = 1, 2, 4  # R_X86_64_64, _PC32, _PLT32
_JUMP = struct.Struct("<2sQ2s")  # movabs rax, address; jmp rax
_V3 = {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_kept_alive: list[Any] = []  # the code must outlive its callers


@cache
def processor() -> str:
    """LLVM's name for what the code may use: all that x86-64-v3 has (AVX2), or what any processor of this kind has."""
    try:
        with open("/proc/cpuinfo") as about:
            flags = next((line for line in about if line.startswith("flags")), "")
    except OSError:
        flags = ""
    return "x86-64-v3" if os.uname().machine == "x86_64" and set(flags.split()) >= _V3 else ""


def link(code: bytes, name: str) -> int:
    """Put an ELF object file for x86-64 into memory that may be run; the address of the function `name`.

    It takes what LLVM makes of functions without variables: sections of code and constants, absolute and relative
    addresses within them, and calls of what the process has (libc, libm), which go by jumps behind the sections. Raises
    ValueError for anything else, OSError where the system has no memory to run.
    """
    (sections_at,), (count,) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<H", code, 0x3C)
    sections = list(_records(code, "<IIQQQQIIQQ", sections_at, count))
    placed, size = {}, 0
    for number, (_, kind, flags, _, at, length, *_, align, _) in enumerate(sections):
        if kind == 1 and flags & 2:  # PROGBITS, ALLOC
            size = -(-size // max(align, 1)) * max(align, 1)
            placed[number] = (size, at, length)
            size += length
    # Of each symbol its name, and where it is in this memory; None: elsewhere.
    symbols: list[tuple[str, int | None]] = []
    for _, kind, _, _, at, length, strings, *_ in sections:
        if kind == 2:  # SYMTAB
            for named, _, _, section, value, _ in _records(code, "<IBBHQQ", at, length // 24):
                text = _text(code, sections[strings][4] + named) if section == 0 or section in placed else "a variable"
                symbols.append((text, placed[section][0] + value if section in placed else None))
    jumps: dict[str, int] = {}
    relocations = []
    for _, kind, _, _, at, length, _, target, _, entry in sections:
        if kind == 4 and target in placed:  # RELA
            for place, what, addend in _records(code, "<QQq", at, length // entry):
                text, inside = symbols[what >> 32]
                if inside is None and what & 0xFFFFFFFF == _CALL:
                    inside = jumps.setdefault(text, size + _JUMP.size * len(jumps))
                relocations.append((placed[target][0] + place, what & 0xFFFFFFFF, text, inside, addend))
    room = mmap.mmap(-1, max(size + _JUMP.size * len(jumps), 1))
    base = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for begin, at, length in placed.values():
        room[begin : begin + length] = code[at : at + length]
    for text, at in jumps.items():
        _JUMP.pack_into(room, at, b"\x48\xb8", _address(text), b"\xff\xe0")
    for place, how, text, inside, addend in relocations:
        if how == _ABSOLUTE:
            struct.pack_into("<Q", room, place, (_address(text) if inside is None else base + inside) + addend)
        elif how in (_RELATIVE, _CALL) and inside is not None:
            struct.pack_into("<i", room, place, inside + addend - place)
        else:
            raise ValueError(f"relocation {how} of {text}")
    found = [inside for text, inside in symbols if text == name and inside is not None]
    if not found:
        raise ValueError(f"there is no {name}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(room)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "no memory may be run here")
    _kept_alive.append(room)
    return base + found[0]


def link_by_llvm(code: bytes, name: str) -> int:
    """The same by LLVM, for whatever machine this is."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept_alive.append(engine)
    return int(engine.get_function_address(name))


def _address(name: str) -> int:
    """Of what the process has by this name."""
    try:
        return ctypes.cast(ctypes.CDLL(None)[name], ctypes.c_void_p).value or 0
    except AttributeError as error:
        raise ValueError(f"nobody has {name}") from error


def _records(data: bytes, form: str, at: int, count: int) -> Iterator[tuple[Any, ...]]:
    size = struct.calcsize(form)
    return (struct.unpack_from(form, data, at + size * number) for number in range(count))


def _text(code: bytes, at: int) -> str:
    return code[at : code.index(b"\0", at)].decode()
