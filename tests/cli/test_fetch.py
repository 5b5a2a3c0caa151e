"""`squall fetch` as a user calls it."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from squall.cli.app import main


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def mirror(tmp_path):
    """A mirror on this machine, and the folder that it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def _call(capfd, *args):
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    out, err = capfd.readouterr()
    return exit_.value.code, out, err


def test_without_a_name_the_data_sets_are_listed(capfd):
    code, out, _ = _call(capfd, "fetch")
    assert code == 0
    assert "burstgpt-3-without-fails" in out
    code, out, _ = _call(capfd, "fetch", "list", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert listed["burstgpt-1"]["files"][0]["bytes"] == 52_283_111
    assert len(listed["servegen-deepseek-r1"]["files"]) == 146


def test_a_file_from_a_mirror(mirror, tmp_path, capfd):
    url, folder = mirror
    text = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    (folder / "AzureLLMInferenceTrace_code.csv").write_bytes(text)
    to = tmp_path / "data"
    code, out, err = _call(capfd, "fetch", "azure-2023-code", "--to", to, "--base-url", url)
    assert (code, out) == (0, f"{to}/AzureLLMInferenceTrace_code.csv\n")
    assert "recorded" in err
    recorded = (to / "AzureLLMInferenceTrace_code.csv.sha256").read_text().split()[0]
    assert recorded == hashlib.sha256(text).hexdigest()
    code, out, err = _call(capfd, "fetch", "azure-2023-code", "--to", to, "--base-url", url, "--json", "--quiet")
    assert json.loads(out)["bytes"] == len(text)
    assert err == ""


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["burstgpt-7"], 2, "no such data set"),
        (["burstgpt-1", "--base-url", "http://example.org"], 2, "https"),
        (["burstgpt-1", "--base-url", "MIRROR"], 1, "404"),
    ],
)
def test_failures_are_one_sentence(mirror, tmp_path, capfd, args, code, sentence):
    args = [mirror[0] if arg == "MIRROR" else arg for arg in args]
    got, out, err = _call(capfd, "fetch", *args, "--to", tmp_path / "data", "--quiet")
    assert (got, out) == (code, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
