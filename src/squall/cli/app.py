"""The table of verbs, and the frame around each call: errors become one sentence and an exit code."""

import gc
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

from squall import __version__
from squall.errors import SquallError

# Verb -> (one line of help, group). The function is squall.cli.<verb>:<verb>, imported when it is called.
VERBS = {
    "demo": ("The main job end to end, on embedded defaults or on a TRACE of yours.", "Start here"),
    "fetch": ("Download a public data set, resumable and checked; without NAME: which there are.", "Traces"),
    "validate": ("Everything that is wrong or odd with a trace file, with row numbers.", "Traces"),
    "convert": ("Convert a trace between formats; filter and scale it on the way.", "Traces"),
    "characterize": ("What is in a trace: concurrency, conversations, lengths, failures.", "Traces"),
    "fit": ("Fit a workload model to a trace.", "Workloads"),
    "generate": ("Draw a new trace from a workload model.", "Workloads"),
    "fidelity": ("How alike two traces are, statistically and downstream.", "Workloads"),
    "replay": ("Send a trace to a live endpoint, open loop.", "Experiments"),
    "simulate": ("Run a trace through a modelled cluster.", "Experiments"),
    "capacity": ("The highest load that still meets an SLO, on a server or a modelled cluster.", "Experiments"),
    "capture": ("Record live traffic through a proxy: times, tokens, outcomes, no content.", "Experiments"),
    "sweep": ("Simulate a trace under every combination of settings; is the best one robust?", "Experiments"),
    "calibrate": ("Fit the simulator's step time to a recorded run or a live server.", "Experiments"),
    "serve": ("The modelled cluster in real time behind an OpenAI-compatible port.", "Experiments"),
    "local": ("Start a real llama.cpp server with a small model on this machine.", "Experiments"),
    "metrics": ("Efficiency, stability and reliability of a run.", "Results"),
    "compare": ("Which differences between two runs are real.", "Results"),
    "report": ("One self-contained HTML page from traces and runs.", "Results"),
    "study": ("An experiment of the paper, from trace to figure.", "Results"),
}

EPILOGUE = (
    "Exit codes: 0 done, 1 the job failed, 2 the call or the input is wrong, 3 the result must not be trusted, "
    "4 not met, 130 interrupted."
)


def build() -> App:
    """The application, with every verb registered by name only: its module is imported when it is called."""
    app = App(
        name="squall",
        help="Test LLM serving under load as real users make it.",
        help_epilogue=EPILOGUE,
        version=__version__,
        version_flags=["--version"],
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=()),
    )
    groups = {name: Group.create_ordered(name) for _, name in VERBS.values()}
    for verb, (line, group) in VERBS.items():
        app.command(f"squall.cli.{verb}:{verb}", name=verb, help=line, group=groups[group])
    return app


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; no traceback for what the user can mend."""
    with suppress(ValueError):  # outside the main thread there are no signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what an interrupt ends well, this ends as well
    try:
        code = build()(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _complain(f"{' '.join(str(error).split())} See `squall {' '.join(error.command_chain or [])} --help`.")
        code = 2
    except SquallError as error:
        _complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted.")
        code = 130
    except BrokenPipeError:
        # Our reader went away (`squall … | head`): nothing is wrong, but the last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        _complain(f"{error.filename or 'system'}: {error.strerror or error}.")
        code = 1
    gc.freeze()  # the process ends: a last collection would only walk through every module
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str) -> None:
    from squall.progress import printable

    print(f"squall: {printable(text)}", file=sys.stderr)
