"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from squall.errors import InputError, SquallError


def check_place(path: str | Path, reads: object = None) -> Path:
    """`path`, or InputError if no file can be put there: for verbs that work long before they write.

    Folders may be missing. `reads` is what the verb reads, if that is a file: it must not be this one.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: this is a directory; give the name of a file.")
    with suppress(OSError):
        if isinstance(reads, str | Path) and path.samefile(reads):
            raise InputError(f"{path}: this is the file that is read; what is written needs another name.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{path}: nothing can be written in {folder} ({error.strerror}); give another place."
        ) from None
    return path


def replace_file(path: Path, write: bytes | Callable[[Path], object]) -> None:
    """Put at `path` the bytes given, or what the function given writes to the path that it is called with.

    A failure leaves what was there before and no temporary file; other readers see the old file or the new one. The
    file gets the rights that any new file of this process gets. Raises InputError if the directory does not exist,
    SquallError if the disk is full or the like.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the directory {path.parent} does not exist; create it first.")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            if callable(write):
                write(temporary)
            else:
                temporary.write_bytes(write)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        except Exception as error:
            told = re.search(r"([^:]*) \(os error \d+\)", str(error))  # how polars tells of the system's errors
            why = error.strerror if isinstance(error, OSError) and error.strerror else told and told[1].strip()
            if why is None:
                raise
            raise SquallError(f"{path}: it cannot be written ({why}); what was there is as before.") from error
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
