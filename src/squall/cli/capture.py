"""`squall capture`: a recording proxy."""

from typing import Annotated, Literal

from cyclopts import Group, Parameter

from squall.cli.common import Output, print_json
from squall.errors import InputError

RELAY = Group("Relay", sort_key=10)
RECORD = Group("Record", sort_key=20)
LIMITS = Group("Limits", sort_key=30)
IMPORT = Group("Import", sort_key=40)


def capture(
    *,
    out: Annotated[str | None, Parameter(name=["--out", "-o"])] = None,
    upstream: Annotated[str | None, Parameter(group=RELAY)] = None,
    port: Annotated[int, Parameter(group=RELAY)] = 8080,
    host: Annotated[str, Parameter(group=RELAY)] = "127.0.0.1",
    insecure: Annotated[bool, Parameter(group=RELAY, negative="")] = False,
    rotate: Annotated[str, Parameter(group=RECORD)] = "1h",
    rotate_size: Annotated[int, Parameter(group=RECORD)] = 64 << 20,
    ask_usage: Annotated[bool, Parameter(group=RECORD, negative="--no-ask-usage")] = True,
    prefix: Annotated[bool, Parameter(group=RECORD, negative="--no-prefix")] = True,
    service: Annotated[Literal["conversation", "api"] | None, Parameter(group=RECORD)] = None,
    salt: Annotated[str | None, Parameter(group=RECORD)] = None,
    timeout: Annotated[str, Parameter(group=LIMITS)] = "10m",
    drain_timeout: Annotated[str, Parameter(group=LIMITS)] = "30s",
    max_body: Annotated[int, Parameter(group=LIMITS)] = 64 << 20,
    max_connections: Annotated[int, Parameter(group=LIMITS)] = 10_000,
    rate_limit: Annotated[float | None, Parameter(group=LIMITS)] = None,
    finish: Annotated[str | None, Parameter(name="--finish")] = None,
    log: Annotated[str | None, Parameter(name="--import", group=IMPORT)] = None,
    format: Annotated[str | None, Parameter(name="--format", group=IMPORT)] = None,
    columns: Annotated[str | None, Parameter(group=IMPORT)] = None,
    output: Output = Output(),
) -> int:
    """Record live traffic: a reverse proxy in front of an OpenAI-compatible server that keeps no content.

    It relays everything, and records of each request for generated text what a trace needs: times, token counts,
    model, outcome, and salted hashes of conversations and prompt blocks. Until it is interrupted it writes segments
    into the folder DIR; then trace.parquet and run.parquet there hold all of them. /squall/metrics (Prometheus) and
    /squall/health are its own pages.

    Parameters
    ----------
    out
        Folder for the segments. New, empty, or that of an earlier capture, which is then continued.
    upstream
        The server's base: http://127.0.0.1:8000. https:// too.
    port
        0 takes any free port.
    host
        Address to listen on. Anything but loopback lets others in, and says so.
    insecure
        Do not check the certificate of an https:// upstream.
    rotate
        Close a segment after this time.
    rotate_size
        Or after this many bytes of records.
    ask_usage
        Ask streams for their token usage; a client that did not ask does not see it.
    prefix
        Keep salted hashes of prompt blocks, to study how prompts share prefixes.
    service
        What all this traffic is, in BurstGPT's terms.
    salt
        File with the salt of the hashes, made if missing. [default: random, never written]
    timeout
        How long the upstream may be silent before its client gets a 504.
    drain_timeout
        After an interrupt: how long answers under way may take.
    max_body
        Bytes of the largest request body.
    max_connections
        Connections of clients at once; further ones get a 503.
    rate_limit
        Requests/s that are let through; further ones get a 429. [default: all]
    finish
        Instead of capturing: close what a killed capture left in this folder, and write trace.parquet and run.parquet.
    log
        Instead of capturing: write what this log tells of past requests as trace.parquet and run.parquet in DIR. vLLM's
        log, LiteLLM's, OpenTelemetry spans, or any access log with --columns.
    format
        The log's format, if it is not detected; for an access log nginx's log_format.
    columns
        What the fields of an access log or of JSON lines mean: ended=NAME,elapsed=NAME,request_tokens=NAME,...
    """
    from squall.capture import Ready, import_log
    from squall.capture import capture as run
    from squall.capture.record import finish as close
    from squall.capture.record import summary

    if finish is not None:
        if upstream is not None or out is not None:
            raise InputError("--finish DIR goes alone: it closes an earlier capture; leave --upstream and -o out.")
        result = close(finish)
    elif log is not None:
        if upstream is not None or out is None:
            raise InputError("--import LOG goes with -o DIR, and without --upstream.")
        result = import_log(log, out=out, format=format, columns=columns)
    else:
        if format is not None or columns is not None:
            raise InputError("--format and --columns say how to read the log of --import; give it or leave them out.")
        if upstream is None or out is None:
            raise InputError("a capture needs --upstream URL and -o DIR.")

        def ready(what: Ready) -> None:
            print_json(what)

        captured = run(
            upstream,
            out=out,
            port=port,
            host=host,
            rotate=rotate,
            rotate_size=rotate_size,
            timeout=timeout,
            drain_timeout=drain_timeout,
            ask_usage=ask_usage,
            prefix=prefix,
            service=service,
            salt=salt,
            max_body=max_body,
            max_connections=max_connections,
            rate_limit=rate_limit,
            insecure=insecure,
            ready=ready,
        )
        if captured is None:
            return 0
        result = captured
    said = summary(*result)
    if output.json:
        print_json(said)
    else:
        from squall.progress import note

        note(
            f"{said['requests']:,} requests in {said['span']:.0f} s, {said['failed']:,} failed, "
            f"{said['sessions']:,} conversations: {finish or out}/trace.parquet and run.parquet"
        )
    return 0
