"""Functions that a user wrote, in a process of their own: compiled code that never ends can only be killed.

The process runs the user's file, compiles its functions for numbers by numba, and answers over a pipe; it ends with the
one that started it. What the file prints goes to standard error.
"""

import importlib.util
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import numpy as np

from squall.errors import InputError

START, CALL_PER_ROW = 60.0, 20e-6
"""Seconds that a file may take to be run or a function to be compiled, and that a call may take longer for each row."""

_GOOD, _BAD, _RAISED = b"=", b"!", b"?"
_guests: dict[str, "_Guest"] = {}  # by file


class NoReturnError(InputError):
    """A function did not return in time, or its process died."""


class RaisedError(InputError):
    """A function raised, or returned what is not a finite number."""


class Function:
    """A function of a Python file, which it is called with numbers only.

    Whatever is wrong with the file or the function is an InputError, the second half of a sentence without their names.
    """

    def __init__(self, file: str, name: str) -> None:
        self.name, self.took = name, 0.0
        """`took`: seconds of CPU that the last call needed."""
        self._guest = _guest_of(file)
        names = self._guest.ask(name, None, START, "was not run").decode()
        self.parameters = tuple(names.split(",")) if names else ()

    def compile(self) -> None:
        """Have it compiled, as the first call does otherwise."""
        if self.name not in self._guest.compiled:
            self._guest.ask(self.name, np.empty((len(self.parameters), 0)), START, "was not compiled")
            self._guest.compiled.add(self.name)

    def __call__(self, columns: np.ndarray, limit: float) -> np.ndarray:
        """The results (n,) for (parameters, n) arguments, one by one.

        Raises NoReturnError if that takes over `limit` seconds and CALL_PER_ROW for each, RaisedError, or InputError if
        it cannot be compiled.
        """
        self.compile()
        answer = self._guest.ask(self.name, columns, limit + CALL_PER_ROW * columns.shape[1], "did not return")
        self.took, *_ = np.frombuffer(answer[:8])
        return np.frombuffer(answer[8:])


def _guest_of(file: str) -> "_Guest":
    """The process for a file as it is now."""
    try:
        digest = sha256(Path(file).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise InputError("there is no such file") from None
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from None
    guest = _guests.get(file)
    if guest is None or guest.digest != digest or not guest.lives:
        if guest is not None:
            guest.end()
        guest = _guests[file] = _Guest(file, digest)
    return guest


class _Guest:
    """A process that runs the user's file."""

    def __init__(self, file: str, digest: str) -> None:
        self.digest, self.compiled = digest, set[str]()
        self._talk, theirs = Pipe()
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        self._process = Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()", file, str(theirs.fileno())],
            stdin=DEVNULL,
            stdout=sys.__stderr__ or DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._talk.close()
        self._process.kill()
        self._process.wait()

    def ask(self, function: str, columns: np.ndarray | None, limit: float, what: str) -> bytes:
        """Its answer: the names of the function's parameters without `columns`, otherwise the results."""
        try:
            self._talk.send((function, columns))
            if not self._talk.poll(limit):
                raise NoReturnError(f"it {what} within {limit:.0f} s; it must end, and soon")
            answer = self._talk.recv_bytes()
        except (EOFError, OSError):
            raise NoReturnError(f"its process died ({_cause(self._process.wait())})") from None
        except BaseException:
            self.end()  # Ctrl-C, too: what it may still answer is not to be taken for another answer
            raise
        kind, answer = answer[:1], answer[1:]
        if kind != _GOOD:
            raise (RaisedError if kind == _RAISED else InputError)(answer.decode(errors="replace"))
        return answer


def _cause(code: int) -> str:
    """Of a process's end, in words."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


# --- the process ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer until the other end closes."""
    file, talk = sys.argv[1], Connection(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everyone; the other end says when to stop
    compiled: dict[str, Callable[..., Any]] = {}

    module = None
    with suppress(EOFError, OSError):
        while True:
            name, columns = talk.recv()
            _stop_after(2 * START)  # should nobody be left to kill it
            try:
                module = module or _run(file)
                if columns is None:
                    answer = ",".join(inspect.signature(_function(module, name)).parameters).encode()
                else:
                    if name not in compiled:
                        compiled[name] = _compiled(_function(module, name))
                    answer = _results(compiled[name], columns) if columns.size else b""
            except _WrongError as error:
                talk.send_bytes(error.kind + str(error).encode(errors="replace"))
            else:
                talk.send_bytes(_GOOD + answer)


def _stop_after(seconds: float) -> None:
    """Let the system end this process when it has computed for so much longer."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds), most))


class _WrongError(Exception):
    """What the user's file or function does wrong, as the second half of a sentence."""

    kind = _BAD


class _ResultError(_WrongError):
    """The same of a call."""

    kind = _RAISED


def _run(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("squall_guest", file)
    if spec is None or spec.loader is None:
        raise _WrongError("it is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _WrongError(f"it cannot be run: {type(error).__name__}: {error}") from error
    return module


def _function(module: Any, name: str) -> Any:
    function = getattr(module, name, None)
    function = getattr(function, "py_func", function)  # of numba's own decorators
    if not inspect.isfunction(function):
        raise _WrongError(f"it has no function {name}")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise _WrongError(f"{name} must be a plain function that returns a number")
    kinds = {it.kind for it in inspect.signature(function).parameters.values()}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        raise _WrongError(f"write the parameters of {name} plainly, without * or /")
    return function


def _compiled(function: Any) -> Callable[..., Any]:
    from squall.jit import njit  # noqa: F401, I001  # makes the import of numba faster
    from numba import float64, vectorize

    own = vectorize(function)
    try:
        own.add((float64,) * len(inspect.signature(function).parameters))
    except Exception as error:  # noqa: BLE001 (not all that numba raises is its own)
        raise _WrongError(f"numba cannot compile it: {_in_short(error)}") from None
    return own


def _in_short(error: Exception) -> str:
    """What numba says, without where in numba it says so."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = next(line for line in [*lines, "?"] if line and not line.startswith(("Failed in", "During:", "raised from")))
    if said.endswith("cannot be represented as a NumPy dtype"):
        return f"it returns {said.split()[0].split('(')[0]}, not a number"
    return said.rstrip(".")


def _results(function: Callable[..., Any], columns: np.ndarray) -> bytes:
    before = time.thread_time()
    try:
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            results = function(*columns)
    except Exception as error:  # noqa: BLE001 (whatever the user's code raises)
        raise _ResultError(f"it raised {type(error).__name__}: {error}") from None
    if results.dtype.kind not in "biuf" or not np.isfinite(results := np.asarray(results, float)).all():
        raise _ResultError("it must return a finite number for every request, and did not for some")
    return np.float64(time.thread_time() - before).tobytes() + results.tobytes()
