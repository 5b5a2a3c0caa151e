"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from squall.errors import InputError


def replace_file(path: Path, write: bytes | Callable[[Path], object]) -> None:
    """Put at `path` the bytes given, or what the function given writes to the path that it is called with.

    A failure leaves what was there before and no temporary file; other readers see the old file or the new one. The
    file gets the rights that any new file of this process gets. Raises InputError if the directory does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the directory {path.parent} does not exist; create it first.")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
