"""The server as it is found before the run: reachable, its model, the fields it takes, and what its tokens cost.

All of this is asked with a few one-token requests, before the run's clock starts; nothing of it is in the Run's rows.
"""

import asyncio
import base64
import os
import socket
import ssl
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from squall import __version__
from squall.errors import InputError
from squall.progress import printable
from squall.replay.connection import Exchange, Pool
from squall.replay.prompt import Dialect, Fit, Prompts, Tokens
from squall.replay.stream import Outcome

PROBE_TIMEOUT = 120.0
"""Seconds that a server has for a one-token answer: it may be loading."""
PROBE_WORDS = (16, 144)
WARM_AT_ONCE = 4
OURS = ("model", "messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "min_tokens")
"""Fields of the request that `--extra-body` may not set, since the Run's numbers speak of them."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go. Nothing secret shows in its text form."""

    url: str
    """As given, without credentials and query."""
    host: str
    address: tuple[str, int]
    """Resolved once."""
    tls: bool
    base: str
    query: str = field(repr=False)
    headers: bytes = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    def request(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST to `path` under the base."""
        line = f"POST {self.base}{path}{self.query} HTTP/1.1\r\n".encode()
        return b"".join(
            (line, self.headers, b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body)
        )

    def question(self, path: str) -> bytes:
        """The bytes of a GET of `path` under the base."""
        return f"GET {self.base}{path}{self.query} HTTP/1.1\r\n".encode() + self.headers + b"\r\n"

    def context(self) -> ssl.SSLContext | None:
        """How to speak TLS; None for plain HTTP."""
        return ssl.create_default_context() if self.tls else None

    def hide(self, text: str) -> str:
        """`text` without the secrets that a server may have echoed."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def find_target(url: str, *, api_key: str | None, headers: dict[str, str], connect_timeout: float) -> Target:
    """The target at `url`, resolved and reached once. Raises InputError if that is not possible."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        raise InputError(f"--url {url}: the port is not a number from 0 to 65535.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"--url {_plain(url)}: give the server's base, such as http://127.0.0.1:8000 or https://host/v1."
        )
    tls = parts.scheme == "https"
    port = port or (443 if tls else 80)
    where = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = f"{parts.scheme}://{where}:{port}{parts.path.rstrip('/')}"
    base = parts.path.rstrip("/")
    for known in ("/chat/completions", "/completions", "/models"):
        base = base.removesuffix(known)
    base = base if base.endswith("/v1") else base + "/v1"
    fields = {
        "Host": f"{where}:{port}",
        "User-Agent": f"squall/{__version__}",
        "Accept": "text/event-stream, application/json",
        "Accept-Encoding": "identity",
    }
    secrets = [value for value in headers.values() if len(value) > 7]
    if parts.password is not None or parts.username:
        credentials = f"{parts.username or ''}:{parts.password or ''}"
        fields["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
        secrets += [credentials, parts.password or ""]
    if api_key:
        fields["Authorization"] = f"Bearer {api_key}"
        secrets.append(api_key)
    fields |= headers
    for name, value in fields.items():
        if not (
            name.isascii()
            and name.replace("-", "").replace("_", "").isalnum()
            and value.isprintable()
            and value.isascii()
        ):
            raise InputError(
                f"--header {name}: a header's name is letters, digits and hyphens, its value printable ASCII."
            )
    return Target(
        url=shown,
        host=parts.hostname,
        address=_reach(parts.hostname, port, shown, connect_timeout),
        tls=tls,
        base=base,
        query=f"?{parts.query}" if parts.query else "",
        headers="".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode(),
        secrets=tuple(secret for secret in secrets if secret),
    )


def _plain(url: str) -> str:
    """`url` for a message: without what stands before an @."""
    scheme, slashes, rest = url.rpartition("://")
    return printable(scheme + slashes + rest.rpartition("@")[2])


def _reach(host: str, port: int, shown: str, timeout: float) -> tuple[str, int]:
    """The first address of `host` that takes a connection."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--url {shown}: the name {host} cannot be resolved ({error}); check the host.") from error
    failure: OSError | None = None
    for *_, address in found:
        literal = (str(address[0]), port)
        try:
            socket.create_connection(literal, timeout=timeout).close()
        except OSError as error:
            failure = error
        else:
            return literal
    reason = failure.strerror or type(failure).__name__ if failure else "no address"
    raise InputError(f"--url {shown}: cannot be reached ({reason}); start the server, or correct the host and port.")


@dataclass(frozen=True)
class Found:
    """What the questions before the run brought to light."""

    dialect: Dialect
    context: int | None
    """Tokens of the longest prompt and answer together, if the server says so."""
    calibration: dict[str, Any]
    """How prompt lengths are made, for the Run's metadata."""
    notes: list[str]


class Preflight:
    """Questions to a target, one at a time."""

    def __init__(self, target: Target, connect_timeout: float, timeout: float | None) -> None:
        self._target = target
        self._timeout = max(PROBE_TIMEOUT, timeout or 0)
        self._loop = asyncio.get_running_loop()
        self._pool = Pool(
            self._loop, target.address, tls=target.context(), hostname=target.host, connect_timeout=connect_timeout
        )
        self._number = 0

    async def find(
        self,
        *,
        model: str | None,
        api: Literal["chat", "completions"],
        extra: dict[str, Any] | None,
        ignore_eos: bool,
        typical: int,
        warmup: list[tuple[int, int]],
    ) -> Found:
        """Model, context, fields, token mode and calibration; then the warm-up.

        `typical` is a prompt length that the run will ask for; `warmup` are (prompt, response) lengths to be sent.

        Raises InputError if the server cannot be asked, or refuses even the plainest request.
        """
        notes: list[str] = []
        try:
            listed, context = await self._models(model, notes)
            fields = ("stream_options", "min_tokens", "ignore_eos") if ignore_eos else ("stream_options",)
            dialect = Dialect(api, model or listed, "words", fields=fields, extra=extra)
            if api == "completions":
                dialect = await self._ids(dialect, notes)
            dialect, usage = await self._fields(dialect, notes)
            if usage is None:
                notes.append(
                    "The server reports no usage: prompt lengths are in words, and answers are counted in chunks."
                )
                return Found(dialect, context, {"tokens": dialect.tokens, "calibrated": False}, notes)
            dialect, calibration = await self._calibrate(dialect, typical, context)
            if warmup:
                dialect, calibration["warmup"] = await self._warm(dialect, warmup)
            return Found(dialect, context, calibration, notes)
        finally:
            self._pool.close()

    async def _models(self, model: str | None, notes: list[str]) -> tuple[str | None, int | None]:
        """The first model listed, and the context of the model to be used."""
        url = self._target.url
        exchange = await self._ask(self._target.question("/models"))
        if exchange.ending.startswith(("refused", "timeout")) or exchange.http_status is None:
            what = exchange.message or exchange.ending
            raise InputError(
                f"--url {url}: no HTTP answer to a question for its models ({what}); correct the host, port or scheme."
            )
        self._check_key(exchange)
        body = b"".join(exchange.datas)
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            models = []
        if not models:
            if model is None:
                raise InputError(
                    f"--url {url}: {self._target.base}/models answered {exchange.http_status} and lists no model; "
                    "correct the URL, or name the model with --model."
                )
            notes.append(f"{self._target.base}/models answered {exchange.http_status} and lists no model.")
            return None, None
        chosen = next((entry for entry in models if entry.id == model), models[0] if model is None else None)
        if chosen is None:
            names = ", ".join(entry.id for entry in models[:5])
            notes.append(f"The server does not list the model {model}; it lists {names}.")
            return None, None
        return chosen.id, chosen.max_model_len or (chosen.meta or {}).get("n_ctx")

    async def _ids(self, dialect: Dialect, notes: list[str]) -> Dialect:
        """Token ids where the server takes them and counts them as they are, words elsewhere."""
        by_ids = replace(dialect, tokens="ids")
        length = PROBE_WORDS[0]
        _, outcome = await self._probe(replace(by_ids, fields=()), length, 1)
        if outcome.status == "ok":
            return by_ids
        notes.append(
            f"The server takes no token ids as a prompt ({outcome.message or outcome.status}); words are sent."
        )
        return dialect

    async def _fields(self, dialect: Dialect, notes: list[str]) -> tuple[Dialect, int | None]:
        """The dialect without the optional fields that the server refuses, and the prompt tokens that it reported."""
        while True:
            exchange, outcome = await self._probe(dialect, PROBE_WORDS[0], 1)
            if outcome.status == "ok" and exchange.reply is not None:
                return dialect, exchange.reply.prompt_tokens
            self._check_key(exchange)
            said = outcome.message or outcome.reason or outcome.status
            refused = exchange.http_status in (400, 404, 405, 422)
            if not refused:
                notes.append(
                    f"A one-token request before the run failed ({outcome.status}: {said}); nothing is calibrated."
                )
                return dialect, None
            if "max_completion_tokens" in said and dialect.limit == "max_tokens":
                dialect = replace(dialect, limit="max_completion_tokens")
                continue
            if not dialect.fields or exchange.http_status in (404, 405):
                where = f"{self._target.base}{dialect.path}"
                raise InputError(
                    f"--url {self._target.url}: {where} refuses a plain request with {exchange.http_status} ({said}); "
                    "correct --url, --api, --model or --extra-body."
                )
            left_out = next((name for name in dialect.fields if name in said), dialect.fields[-1])
            dialect = replace(dialect, fields=tuple(name for name in dialect.fields if name != left_out))
            notes.append(f"The server refuses {left_out}; it is left out.")

    async def _calibrate(self, dialect: Dialect, typical: int, context: int | None) -> tuple[Dialect, dict[str, Any]]:
        """Fit tokens = overhead + slope × words, and check it on a request of a length that the run will ask for."""
        words, tokens = [], []
        for count in PROBE_WORDS:
            exchange, _ = await self._probe(dialect, count, 1)
            if exchange.reply is not None and exchange.reply.prompt_tokens is not None:
                words.append(count)
                tokens.append(exchange.reply.prompt_tokens)
        if not words:
            return dialect, {"tokens": dialect.tokens, "calibrated": False}
        fit = Fit.through(words, tokens)
        if not 0.25 <= fit.slope <= 8:  # a server that counts something else
            return dialect, {"tokens": dialect.tokens, "calibrated": False}
        dialect = replace(dialect, fit=fit)
        asked = min(max(typical, 1), (context or 4096) // 2)
        exchange, _ = await self._probe(dialect, fit.words(asked), 1)
        measured = exchange.reply.prompt_tokens if exchange.reply is not None else None
        if measured is not None and measured != fit.tokens(fit.words(asked)):
            dialect = replace(dialect, fit=Fit.through([*words, fit.words(asked)], [*tokens, measured]))
        return dialect, {
            "tokens": dialect.tokens,
            "calibrated": True,
            "overhead": round(dialect.fit.overhead, 3),
            "slope": round(dialect.fit.slope, 5),
            "check": {"asked": asked, "measured": measured},
        }

    async def _warm(self, dialect: Dialect, lengths: list[tuple[int, int]]) -> tuple[Dialect, dict[str, int]]:
        """Send requests of these lengths, a few at once; if they show that prompts have another length, fit anew."""
        turn = asyncio.Semaphore(WARM_AT_ONCE)
        points: list[tuple[int, int]] = []
        failed = 0

        async def one(prompt: int, response: int) -> None:
            nonlocal failed
            async with turn:
                words = dialect.fit.words(prompt)
                exchange, outcome = await self._probe(dialect, words, response)
                failed += outcome.status != "ok"
                if exchange.reply is not None and exchange.reply.prompt_tokens is not None:
                    points.append((words, exchange.reply.prompt_tokens))

        await asyncio.gather(*(one(*pair) for pair in lengths))
        if any(tokens != dialect.fit.tokens(words) for words, tokens in points) and len(set(points)) > 1:
            dialect = replace(
                dialect, fit=Fit.through([words for words, _ in points], [tokens for _, tokens in points])
            )
        return dialect, {"requests": len(lengths), "failed": failed}

    async def _probe(self, dialect: Dialect, words: int, response_tokens: int) -> tuple[Exchange, Outcome]:
        self._number += 1
        prompts = self._prompts(dialect.tokens)
        text = prompts.text(self._number, words)
        exchange = await self._ask(self._target.request(dialect.path, dialect.body(text, response_tokens)))
        _, outcome = exchange.outcome()
        said = outcome.message
        return exchange, outcome._replace(message=None if said is None else self._target.hide(said))

    def _prompts(self, tokens: Tokens) -> Prompts:
        known: dict[Tokens, Prompts] = self.__dict__.setdefault("_made", {})
        if tokens not in known:  # with a salt of its own for each: no prompt of the run begins like these
            known[tokens] = Prompts(tokens, salt="request", seed=0, fresh=os.urandom(8))
        return known[tokens]

    async def _ask(self, payload: bytes) -> Exchange:
        """Send and wait for the end; once more on a fresh connection if a kept one was stale."""
        for fresh in (False, True):
            over: asyncio.Future[Exchange] = self._loop.create_future()
            exchange = Exchange(0, 1, payload, 0, over.set_result)
            self._pool.send(exchange, fresh=fresh)
            await asyncio.wait([over], timeout=self._timeout)
            if not over.done():
                raise InputError(
                    f"--url {self._target.url}: no answer to a one-token request in {self._timeout:g} s; is it stuck?"
                )
            if exchange.ending != "stale_reuse":
                break
        return exchange

    def _check_key(self, exchange: Exchange) -> None:
        if exchange.http_status in (401, 403):
            raise InputError(
                f"--url {self._target.url}: the server answers {exchange.http_status}: it wants an API key; "
                "put it into the environment variable OPENAI_API_KEY, or name another with --api-key-env."
            )


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    meta: dict[str, Any] | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []
