"""Downloads public data sets: resumable, checked by sha256, and in place whole or not at all.

A file is written as NAME.part, with the server's entity tag beside it, and renamed when its hash is right. After a cut
connection the next goes on from the last byte (RFC 9110: Range and If-Range); a server that cannot do that begins
again. The hash decides in the end: the published one where it is known, else the one recorded at the first fetch.
"""

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import IO, Any

from squall.errors import InputError, SquallError
from squall.progress import note, progress
from squall.trace.catalogue import DataSet, PublicFile, data_set

CHUNK = 1 << 18
ATTEMPTS = 6
"""Connections in a row that may fail without bringing a byte."""
TIMEOUT = 30.0
LONGEST_WAIT = 30.0
_PASSING = {408, 425, 429, 500, 502, 503, 504}


def fetch(name: str, *, to: str | Path = ".", base_url: str | None = None) -> Path:
    """Download the data set `name` (see `squall.trace.catalogue`) into the directory `to`; returns its path there.

    `base_url` is a mirror: the file's name is appended to it (`https://…`; plain `http` to this machine only). What is
    already there and right is not fetched again; an interrupted download goes on where it stopped. Raises InputError
    for an unknown name or a wrong destination, SquallError for what the network, the server or the disk does.
    """
    chosen = data_set(name)
    target = Path(to)
    if target.exists() and not target.is_dir():
        raise InputError(f"--to {to}: it is a file; name a directory.")
    base = _checked(base_url or chosen.url)
    record = target / f"{chosen.folder or chosen.files[0].path}.sha256"
    (target / (chosen.folder or "")).mkdir(parents=True, exist_ok=True)
    recorded = _recorded(record)
    with progress(f"Fetching {chosen.name}", chosen.size or len(chosen.files)) as bar:
        done = 0
        for count, file in enumerate(chosen.files, start=1):
            path, known = target / file.path, file.sha256 or recorded.get(file.path)
            within = _bar_of(bar, done) if chosen.size else _nothing
            digest = _fetch_file(f"{base}/{file.path}", path, file, known, within)
            done += path.stat().st_size
            bar(done if chosen.size else count)
            if known is None:
                _remember(record, file.path, digest)
    _tell(chosen, target, record)
    return target / (chosen.folder or chosen.files[0].path)


def _bar_of(bar: Callable[[float], None], before: int) -> Callable[[int], None]:
    return lambda size: bar(before + size)


def _nothing(size: int) -> None:
    """A bar that counts files has nothing to show within one."""


def _tell(chosen: DataSet, target: Path, record: Path) -> None:
    path = target / (chosen.folder or chosen.files[0].path)
    checked = f"sha256 recorded in {record.name}, checked from now on" if record.exists() else "sha256 as published"
    note(f"{path}: {chosen.title}; {checked}. Licence: {chosen.licence}.")


def _checked(url: str) -> str:
    """`url` without its last slash, if it is one that may be asked: https, or http on this machine."""
    parts = urllib.parse.urlsplit(url)
    if not (parts.scheme == "https" or (parts.scheme == "http" and _local(parts.hostname))) or not parts.hostname:
        raise InputError(f"--base-url {url}: an https:// address is needed (http:// only on this machine).")
    return url.rstrip("/")


def _local(host: str | None) -> bool:
    return host in ("localhost", "::1") or (host or "").startswith("127.")


# ------------------------------------------------------------------------------------------------- recorded hashes


def _recorded(record: Path) -> dict[str, str]:
    """File -> sha256 from the lines of a checksum file, as `sha256sum` writes and checks them."""
    if not record.exists():
        return {}
    entries = {}
    for number, line in enumerate(record.read_text("utf-8", "replace").splitlines(), start=1):
        digest, gap, path = line.partition("  ")
        if not gap or len(digest) != 64:
            raise InputError(f"{record}: line {number} is not `SHA256  NAME`; mend or remove that file.")
        entries[path] = digest
    return entries


def _remember(record: Path, path: str, digest: str) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.write(f"{digest}  {path}\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------- one file


def _fetch_file(url: str, path: Path, file: PublicFile, known: str | None, bar: Callable[[int], None]) -> str:
    """Bring `url` to `path`; returns its sha256. `known` is what that must be."""
    if path.exists():
        digest = _sha256(path)
        if known is not None and digest != known:
            raise InputError(
                f"{path}: it is there already but is not the file expected (sha256 {digest}, not {known}); "
                "move it away and fetch again."
            )
        return digest
    part = path.with_name(f"{path.name}.part")
    resumed = _download(url, part, known is not None, file.size, bar)
    digest = _sha256(part)
    if known is not None and digest != known and resumed:
        note(f"{path.name}: what was kept from an earlier try does not fit what the server has now; from the start.")
        _discard(part)
        _download(url, part, True, file.size, bar)
        digest = _sha256(part)
    if known is not None and digest != known:
        _discard(part)
        raise SquallError(
            f"{url}: what came has sha256 {digest}, not {known}, so it is another or a damaged file; it was removed. "
            "Try again later, or another --base-url."
        )
    _refuse_stand_in(url, part)
    os.replace(part, path)
    _tag_of(part).unlink(missing_ok=True)
    return digest


def _refuse_stand_in(url: str, part: Path) -> None:
    """A file whose hash nobody knows must at least not be a web page or a pointer to the data."""
    with part.open("rb") as file:
        begin = file.read(64).lstrip().lower()
    for mark, what in ((b"<", "a web page"), (b"version https://git-lfs", "a Git LFS pointer")):
        if begin.startswith(mark) or not begin:
            _discard(part)
            raise SquallError(f"{url}: the server sent {what if begin else 'nothing'} instead of data; it was removed.")


def _tag_of(part: Path) -> Path:
    """Where the entity tag of a partial file is kept: only with it may the rest be asked for."""
    return part.with_name(f"{part.name}.etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def _download(url: str, part: Path, hash_known: bool, size: int | None, bar: Callable[[int], None]) -> bool:
    """Bring all of `url` to `part`, over as many connections as it takes; True if part of it came from before."""
    before = part.stat().st_size if part.exists() else 0
    if before and not hash_known and not _tag_of(part).exists():
        _discard(part)  # nothing would tell whether the rest belongs to it
        before = 0
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            _connection(url, part, size, bar)
            return before > 0
        except _Cut as cut:
            brought = (part.stat().st_size if part.exists() else 0) > have
            failures = 1 if brought else failures + 1
            if failures >= ATTEMPTS:
                raise SquallError(
                    f"{url}: {cut.reason} ({ATTEMPTS} tries in a row); {_kept(part)}. Run the same command again "
                    "to go on, or give another --base-url."
                ) from cut
            wait = min(LONGEST_WAIT, cut.wait or BACKOFF * 2 ** (failures - 1))
            note(f"{part.name}: {cut.reason}; next try in {wait:g} s.")
            time.sleep(wait)


BACKOFF = 0.5
"""Seconds to the second try; doubled with each further one."""


class _Cut(Exception):
    """A connection ended before all was there; another may do better."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def _kept(part: Path) -> str:
    have = part.stat().st_size if part.exists() else 0
    return f"{have:,} bytes are kept in {part}" if have else "nothing was kept"


def _connection(url: str, part: Path, size: int | None, bar: Callable[[int], None]) -> None:
    """One request for what `part` lacks. Raises _Cut where another try makes sense."""
    have = part.stat().st_size if part.exists() else 0
    tag = _tag_of(part).read_text() if _tag_of(part).exists() else None
    headers = {"User-Agent": "squall", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag:
            headers["If-Range"] = tag
    try:
        with _opener(url).open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:  # noqa: S310
            start, total = _extent(answer.status, answer.headers, have)
            if start is None:
                _discard(part)
                raise _Cut("the server sent another stretch than was asked for")
            _keep_tag(part, answer.headers)
            _room(url, part, total, start)
            _receive(answer, url, part, start, total, bar)
    except urllib.error.HTTPError as error:
        _refused(error, url, part, have)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise SquallError(f"{url}: its certificate is not valid ({error.reason.verify_message}).") from error
        raise _Cut(f"no connection ({getattr(error.reason, 'strerror', None) or error.reason})") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Cut(f"the connection was cut ({_words(error)})") from error
    if size is not None and part.stat().st_size > size:
        note(f"{part.name}: {part.stat().st_size:,} bytes, more than the {size:,} published.")


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _extent(status: int, headers: Message, have: int) -> tuple[int | None, int | None]:
    """(first byte, size of the whole) of an answer; the first byte is None if the answer does not fit the question."""
    if status != 206:
        length = headers.get("Content-Length")
        return 0, int(length) if length and length.isdigit() else None
    stretch, _, whole = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
    first = stretch.partition("-")[0]
    total = int(whole) if whole.isdigit() else None
    return (have, total) if first == str(have) else (None, total)


def _keep_tag(part: Path, headers: Message) -> None:
    """Keep a strong entity tag, or else the date: the two things that If-Range may name."""
    tag = headers.get("ETag") or ""
    tag = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
    if tag:
        _tag_of(part).write_text(tag)
    else:
        _tag_of(part).unlink(missing_ok=True)


def _room(url: str, part: Path, total: int | None, start: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise SquallError(
            f"{part.parent}: {total - start:,} bytes of {url} are still to come, but only {free:,} are free; "
            f"{_kept(part)}. Make room, or give another --to."
        )


def _receive(
    answer: IO[bytes], url: str, part: Path, start: int, total: int | None, bar: Callable[[int], None]
) -> None:
    have = start
    try:
        with part.open("ab" if start else "wb") as file:
            while chunk := _next(answer):
                file.write(chunk)
                have += len(chunk)
                bar(have)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SquallError(
                f"{part.parent}: the disk is full; {_kept(part)}. Make room and run the same command again to go on."
            ) from error
        raise
    if total is not None and have < total:
        raise _Cut(f"the connection was cut at {have:,} of {total:,} bytes")
    if total is not None and have > total:
        _discard(part)
        raise _Cut("the server sent more than it announced")


def _next(answer: IO[bytes]) -> bytes:
    """The next bytes of an answer. Whatever fails here is the network; what fails in writing them is the disk."""
    try:
        return answer.read(CHUNK)
    except (http.client.HTTPException, OSError) as error:
        raise _Cut(f"the connection was cut ({_words(error)})") from error


def _refused(error: urllib.error.HTTPError, url: str, part: Path, have: int) -> None:
    """What an answer of 4xx or 5xx means: all is there, try again, or give up."""
    with contextlib.suppress(OSError):
        error.close()
    if error.code == 416 and have:
        if (error.headers.get("Content-Range") or "").strip() == f"bytes */{have}":
            return
        _discard(part)
        raise _Cut("the server has not as many bytes as were kept; from the start")
    if error.code in _PASSING:
        after = error.headers.get("Retry-After") or ""
        raise _Cut(f"the server says {error.code} {error.reason}", float(after) if after.isdigit() else None)
    raise SquallError(
        f"{url}: the server says {error.code} {error.reason}; the data set may have moved: give a mirror by "
        "--base-url, or fetch the file by hand."
    )


class _StaySecure(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to anything less."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme != "https" and urllib.parse.urlsplit(req.full_url).scheme == "https":
            raise SquallError(f"{req.full_url}: the server redirects to {newurl}, which is not https; refused.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str) -> urllib.request.OpenerDirector:
    local = _local(urllib.parse.urlsplit(url).hostname)
    return urllib.request.build_opener(_StaySecure, *([urllib.request.ProxyHandler({})] if local else []))
