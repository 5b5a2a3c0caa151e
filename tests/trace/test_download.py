"""fetch against a local server that cuts, lies, forgets and refuses."""

import errno
import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import squall
from squall.errors import InputError, SquallError
from squall.trace import catalogue
from squall.trace.catalogue import DataSet, PublicFile

DATA = bytes(range(256)) * 4000  # 1 MB: several chunks
RIGHT = hashlib.sha256(DATA).hexdigest()


class Server:
    """Serves `files`; `cuts` are the numbers of bytes after which the next answers break off."""

    def __init__(self):
        self.files = {"data.bin": DATA}
        self.cuts: list[int] = []
        self.ranges = True
        self.etag: str | None = '"one"'
        self.statuses: list[int] = []
        self.asked: list[tuple[str, str | None, str | None]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *args):
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that hangs up is no news here
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        self.asked.append((request.path, request.headers.get("Range"), request.headers.get("If-Range")))
        if self.statuses:
            request.send_response(self.statuses.pop(0))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = self.files.get(request.path[1:])
        if data is None:
            request.send_error(404)
            return
        wanted, start = request.headers.get("Range"), 0
        if wanted and self.ranges and request.headers.get("If-Range") in (None, self.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(data):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        body = data[start:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        request.close_connection = True


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """The module behind the function of the same name, with no waiting between tries."""
    found = sys.modules["squall.trace.fetch"]
    monkeypatch.setattr(found, "BACKOFF", 0.0)
    return found


@pytest.fixture
def known(monkeypatch):
    """A data set whose hash is known."""
    entry = DataSet("known", "a test", "none", "https://nowhere.invalid", (PublicFile("data.bin", len(DATA), RIGHT),))
    monkeypatch.setitem(catalogue.CATALOGUE, "known", entry)
    return entry


@pytest.fixture
def unknown(monkeypatch):
    """A data set whose hash nobody has published."""
    entry = DataSet("unknown", "a test", "none", "https://nowhere.invalid", (PublicFile("data.bin"),))
    monkeypatch.setitem(catalogue.CATALOGUE, "unknown", entry)
    return entry


def test_a_whole_download_lands_under_its_name(server, known, tmp_path):
    path = squall.fetch("known", to=tmp_path / "new", base_url=server.url + "/")
    assert path == tmp_path / "new" / "data.bin"
    assert path.read_bytes() == DATA
    assert os.listdir(path.parent) == ["data.bin"]  # no .part, no .etag, no record where the hash is published


def test_a_network_that_breaks_within_an_answer_is_tried_again(server, known, module, tmp_path, monkeypatch):
    really, left = module._next, [None, None, OSError(errno.ENETUNREACH, "Network is unreachable")]

    class Answer:
        def __init__(self, answer):
            self.answer = answer

        def read(self, size):
            error = left.pop(0) if left else None
            if error:
                raise error
            return self.answer.read(size)

    monkeypatch.setattr(module, "_next", lambda answer: really(Answer(answer)))
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert server.asked[1][1] == f"bytes={2 * module.CHUNK}-"


def test_an_interrupted_download_keeps_its_part(server, known, module, tmp_path, monkeypatch):
    def interrupt(answer):
        raise KeyboardInterrupt

    (tmp_path / "data.bin.part").write_bytes(DATA[:1000])
    with monkeypatch.context() as patched:
        patched.setattr(module, "_next", interrupt)
        with pytest.raises(KeyboardInterrupt):
            squall.fetch("known", to=tmp_path, base_url=server.url)
    assert (tmp_path / "data.bin.part").read_bytes() == DATA[:1000]
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA


def test_what_is_there_is_not_fetched_again(server, known, tmp_path):
    squall.fetch("known", to=tmp_path, base_url=server.url)
    squall.fetch("known", to=tmp_path, base_url=server.url)
    assert len(server.asked) == 1


def test_cut_connections_go_on_where_they_stopped(server, known, tmp_path):
    server.cuts = [300_000, 0, 0, 1, 500_000]
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert [asked[1] for asked in server.asked] == [
        None,
        "bytes=300000-",
        "bytes=300000-",
        "bytes=300000-",
        "bytes=300001-",
        "bytes=800001-",
    ]
    assert all(asked[2] == '"one"' for asked in server.asked[1:])


def test_a_server_that_always_cuts_is_given_up_with_what_came(server, known, module, tmp_path):
    server.cuts = [1000] + [0] * module.ATTEMPTS
    with pytest.raises(SquallError, match=r"1,000 bytes are kept in .*data\.bin\.part.*to go on") as caught:
        squall.fetch("known", to=tmp_path, base_url=server.url)
    assert caught.value.exit_code == 1
    server.cuts = []
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert server.asked[-1][1] == "bytes=1000-"


def test_a_server_without_ranges_begins_again(server, known, tmp_path):
    server.ranges, server.cuts = False, [700_000]
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA


def test_a_file_that_changed_in_between_begins_again(server, unknown, tmp_path):
    server.cuts = [700_000] + [0] * 6
    with pytest.raises(SquallError):
        squall.fetch("unknown", to=tmp_path, base_url=server.url)
    server.cuts, server.etag, server.files["data.bin"] = [], '"two"', DATA[::-1]
    assert squall.fetch("unknown", to=tmp_path, base_url=server.url).read_bytes() == DATA[::-1]


def test_without_tag_and_hash_nothing_is_resumed_between_runs(server, unknown, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"of something else")
    assert squall.fetch("unknown", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert server.asked[0][1] is None


def test_a_stale_partial_file_is_thrown_away_once_the_hash_says_so(server, known, tmp_path):
    server.etag = None
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert [asked[1] for asked in server.asked] == ["bytes=1000-", None]


@pytest.mark.parametrize("extra", [b"", b"and more"])
def test_a_complete_or_overlong_partial_file(server, known, tmp_path, extra):
    (tmp_path / "data.bin.part").write_bytes(DATA + extra)
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA


def test_a_wrong_hash_leaves_nothing(server, known, tmp_path):
    server.files["data.bin"] = DATA[:-1] + b"!"
    with pytest.raises(SquallError, match=f"not {RIGHT}.*it was removed"):
        squall.fetch("known", to=tmp_path, base_url=server.url)
    assert os.listdir(tmp_path) == []


def test_a_wrong_file_in_place_is_never_overwritten(server, known, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="move it away"):
        squall.fetch("known", to=tmp_path, base_url=server.url)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"


def test_an_unknown_hash_is_recorded_and_checked_afterwards(server, unknown, tmp_path):
    path = squall.fetch("unknown", to=tmp_path, base_url=server.url)
    assert (tmp_path / "data.bin.sha256").read_text() == f"{RIGHT}  data.bin\n"
    path.unlink()
    server.files["data.bin"] = DATA[::-1]
    with pytest.raises(SquallError, match=f"not {RIGHT}"):
        squall.fetch("unknown", to=tmp_path, base_url=server.url)
    (tmp_path / "data.bin.sha256").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1"):
        squall.fetch("unknown", to=tmp_path, base_url=server.url)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"", "nothing"),
    ],
)
def test_what_is_no_data_is_refused_even_without_a_hash(server, unknown, tmp_path, content, what):
    server.files["data.bin"] = content
    with pytest.raises(SquallError, match=what):
        squall.fetch("unknown", to=tmp_path, base_url=server.url)
    assert os.listdir(tmp_path) == []


def test_statuses_that_pass_are_tried_again(server, known, tmp_path):
    server.statuses = [503, 429, 500]
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_statuses_that_stay_are_said_at_once(server, known, tmp_path, status):
    server.statuses = [status]
    with pytest.raises(SquallError, match=f"the server says {status}.*--base-url"):
        squall.fetch("known", to=tmp_path, base_url=server.url)
    assert len(server.asked) == 1


def test_no_server_at_all(known, tmp_path):
    with pytest.raises(SquallError, match=r"no connection .*6 tries"):
        squall.fetch("known", to=tmp_path, base_url="http://127.0.0.1:9")


class _FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, chunk):
        if len(chunk) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= self.file.write(chunk)


def test_a_full_disk_is_said_and_the_part_kept(server, known, tmp_path, monkeypatch):
    really = Path.open

    def opened(path, mode="r", *args, **kwargs):
        file = really(path, mode, *args, **kwargs)
        return _FullDisk(file, 600_000) if path.name.endswith(".part") and mode != "rb" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(SquallError, match=r"the disk is full; 524,288 bytes are kept .* to go on"):
            squall.fetch("known", to=tmp_path, base_url=server.url)
    assert squall.fetch("known", to=tmp_path, base_url=server.url).read_bytes() == DATA
    assert server.asked[-1][1] == "bytes=524288-"


def test_too_little_room_is_said_before_anything_is_written(server, known, module, tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(SquallError, match="only 10 are free"):
        squall.fetch("known", to=tmp_path, base_url=server.url)


def test_a_pool_is_a_directory_with_a_record_for_all_its_files(server, tmp_path, monkeypatch):
    files = {f"pool/chunk-{n}.csv": f"{n},\n".encode() for n in range(3)}
    server.files |= files
    entry = DataSet("pool", "a test", "none", "https://nowhere.invalid", tuple(map(PublicFile, files)), "pool")
    monkeypatch.setitem(catalogue.CATALOGUE, "pool", entry)
    path = squall.fetch("pool", to=tmp_path, base_url=server.url)
    assert sorted(os.listdir(path)) == ["chunk-0.csv", "chunk-1.csv", "chunk-2.csv"]
    assert len((tmp_path / "pool.sha256").read_text().splitlines()) == 3
    (path / "chunk-1.csv").unlink()
    squall.fetch("pool", to=tmp_path, base_url=server.url)
    assert [asked[0] for asked in server.asked[3:]] == ["/pool/chunk-1.csv"]
    (path / "chunk-1.csv").write_text("changed")
    with pytest.raises(InputError, match=r"chunk-1\.csv: it is there already"):
        squall.fetch("pool", to=tmp_path, base_url=server.url)


@pytest.mark.parametrize("url", ["http://example.org/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "nowhere"])
def test_only_https_and_this_machine(known, tmp_path, url):
    with pytest.raises(InputError, match="https"):
        squall.fetch("known", to=tmp_path, base_url=url)


def test_a_redirect_away_from_https_is_refused(module):
    import urllib.request

    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(SquallError, match="not https"):
        module._StaySecure().redirect_request(request, None, 302, "Found", {}, "http://example.org/a")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"burstgpt-9: no such data set; known are burstgpt-1, .*mooncake"):
        squall.fetch("burstgpt-9")


def test_a_destination_that_is_a_file(known, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a directory"):
        squall.fetch("known", to=tmp_path / "file")


def test_the_catalogue_is_sound():
    for name, entry in catalogue.CATALOGUE.items():
        assert name == entry.name
        assert entry.url.startswith("https://")
        assert (len(entry.files) == 1) == (entry.folder is None)
        assert all(file.sha256 is None or len(file.sha256) == 64 for file in entry.files)
    assert catalogue.data_set("BurstGPT_3.csv").name == "burstgpt-3"
    assert catalogue.known_by_hash(catalogue.CATALOGUE["burstgpt-2"].files[0].sha256).name == "burstgpt-2"


def test_hashes_agree_with_the_real_files(traces):
    for name, folder in (("azure-2023-conv", "azure-2023"), ("mooncake-conversation", "mooncake")):
        file = catalogue.CATALOGUE[name].files[0]
        data = (traces / folder / file.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
