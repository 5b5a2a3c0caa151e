"""The server as it is found before the run: reachable, its model, the fields it takes, and what its tokens cost.

All of this is asked with a few one-token requests, before the run's clock starts; nothing of it is in the Run's rows.
"""

import asyncio
import base64
import os
import socket
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from squall import __version__
from squall.errors import InputError
from squall.progress import printable
from squall.replay.connection import Transports
from squall.replay.exchange import Exchange
from squall.replay.prompt import Api, Dialect, Fit, Prompts, Text, Tokens
from squall.replay.stream import Outcome
from squall.replay.text import Tokenizer, most_common_words, sample_words, text_of_ids, text_of_words
from squall.run.attempt import MEANINGS, told

PROBE_TIMEOUT = 120.0
"""Seconds that a server has for a one-token answer: it may be loading."""
PROBE_WORDS = (16, 144)
WARM_AT_ONCE = 4
TOKENIZE_AT_ONCE = 1 << 18
OURS = (
    "model",
    "messages",
    "prompt",
    "input",
    "stream",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "min_tokens",
)
"""Fields of the request that `--extra-body` may not set, since the Run's numbers speak of them."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Which certificates are believed, and which one is shown."""

    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure: bool = False

    @classmethod
    def of(
        cls, *, cacert: str | Path | None, cert: str | Path | None, key: str | Path | None, insecure: bool
    ) -> "Trust":
        """Raises InputError for files that are missing or of no use."""
        if key is not None and cert is None:
            raise InputError("--key: a key is of no use without its certificate; give --cert as well.")
        if insecure and cacert is not None:
            raise InputError("--insecure believes every certificate, --cacert only its own; give one of them.")
        for flag, file in (("--cacert", cacert), ("--cert", cert), ("--key", key)):
            if file is not None and not Path(file).is_file():
                raise InputError(f"{flag} {file}: there is no such file.")
        paths = (None if file is None else str(file) for file in (cacert, cert, key))
        trust = cls(**dict(zip(("cacert", "cert", "key"), paths, strict=True)), insecure=insecure)
        if trust.asked:
            trust.context()
        return trust

    @property
    def asked(self) -> bool:
        """Whether anything was asked for."""
        return self != Trust()

    def context(self) -> ssl.SSLContext:
        """How to speak TLS."""
        try:
            context = ssl.create_default_context(cafile=self.cacert)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--cacert {self.cacert}: not a PEM file of certificates ({error}).") from error
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password=lambda: "")
            except (OSError, ssl.SSLError) as error:
                what = f"--cert {self.cert}" + (f" --key {self.key}" if self.key else "")
                raise InputError(f"{what}: no usable certificate with its unencrypted key ({error}).") from error
        return context


OWN_HEADERS = (
    "accept-encoding",
    "connection",
    "content-length",
    "content-type",
    "expect",
    "te",
    "transfer-encoding",
    "upgrade",
)
"""Headers that say how a request is framed and how its answer may be: no user's."""


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
    trust: Trust = Trust()

    def request(self, path: str, body: bytes, base: str | None = None) -> bytes:
        """The bytes of a POST to `path` under the base, or under another one."""
        line = f"POST {self.base if base is None else base}{path}{self.query} HTTP/1.1\r\n".encode()
        return b"".join(
            (line, self.headers, b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body)
        )

    def question(self, path: str) -> bytes:
        """The bytes of a GET of `path` under the base."""
        return f"GET {self.base}{path}{self.query} HTTP/1.1\r\n".encode() + self.headers + b"\r\n"

    def context(self) -> ssl.SSLContext | None:
        """How to speak TLS; None for plain HTTP."""
        return self.trust.context() if self.tls else None

    def hide(self, text: str) -> str:
        """`text` without the secrets that a server may have echoed."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def find_target(
    url: str, *, api_key: str | None, headers: dict[str, str], connect_timeout: float, trust: Trust = Trust()
) -> Target:
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
    if trust.asked and not tls:
        raise InputError(
            "--cacert, --cert, --key and --insecure do nothing for an http:// URL; write https:// or leave them out."
        )
    port = port or (443 if tls else 80)
    where = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = f"{parts.scheme}://{where}:{port}{parts.path.rstrip('/')}"
    base = parts.path.rstrip("/")
    for known in ("/chat/completions", "/completions", "/responses", "/models"):
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
    own = {name.lower() for name in headers}
    fields = {name: value for name, value in fields.items() if name.lower() not in own} | headers
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
        trust=trust,
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
    engine: str | None = None
    """Who owns the model, as the server lists it: vllm, sglang, llamacpp, …"""
    text: Text | None = None
    """The user's text, cut for this server."""


class Preflight:
    """Questions to a target, one at a time."""

    def __init__(self, target: Target, connect_timeout: float, timeout: float | None, seed: int = 0) -> None:
        """`seed` is the run's: the random text that prompts are sliced from is then made once."""
        self._target, self._seed = target, seed
        self._timeout = max(PROBE_TIMEOUT, timeout or 0)
        self._loop = asyncio.get_running_loop()
        self._pool = Transports(
            self._loop, target.address, tls=target.context(), hostname=target.host, connect_timeout=connect_timeout
        )
        self._number = 0
        self._engine: str | None = None
        self._text: Text | None = None
        self._made: dict[Tokens, Prompts] = {}

    async def find(
        self,
        *,
        model: str | None,
        api: Api,
        words_only: bool,
        extra: dict[str, Any] | None,
        ignore_eos: bool,
        typical: int,
        warmup: list[tuple[int, int]],
        own: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Found:
        """Model, context, fields, token mode and calibration; then the warm-up.

        `own` is text to cut prompts from, counted by `tokenizer`, else by the server's /tokenize, else not. `typical`
        is a prompt length that the run will ask for; `warmup` are (prompt, response) lengths to be sent.

        Raises InputError if the server cannot be asked, or refuses even the plainest request.
        """
        notes: list[str] = []
        try:
            listed, context = await self._models(model, notes)
            fields: tuple[str, ...] = ("stream_options", "min_tokens", "ignore_eos")
            if not ignore_eos:
                fields = ("stream_options",)
            if api == "responses":  # it reports usage unasked, and names its limit otherwise
                fields = ("ignore_eos",) if ignore_eos else ()
            limit = "max_output_tokens" if api == "responses" else "max_tokens"
            dialect = Dialect(api, model or listed, "words", fields=fields, extra=extra, limit=limit)
            if api == "completions" and not words_only:
                dialect = await self._ids(dialect, notes)
            if own is not None or tokenizer is not None:
                dialect = await self._cut(dialect, own, tokenizer, notes)
            dialect, answered, usage = await self._fields(dialect, notes, bool(warmup))
            if not answered:
                calibration: dict[str, Any] = {"tokens": dialect.tokens, "calibrated": False}
            elif usage is None:
                notes.append(
                    "The server reports no usage: prompt lengths are in words, and answers are counted in chunks."
                )
                calibration = {"tokens": dialect.tokens, "calibrated": False}
            else:
                dialect, calibration = await self._calibrate(dialect, typical, context)
            if self._text is not None:
                calibration |= {"text": "own" if own is not None else "words", "counted": self._text.exact}
            if warmup and answered:
                dialect, calibration["warmup"] = await self._warm(dialect, warmup)
            return Found(dialect, context, calibration, notes, self._engine, self._text)
        finally:
            self._pool.close()

    async def _models(self, model: str | None, notes: list[str]) -> tuple[str | None, int | None]:
        """The first model listed, and the context of the model to be used."""
        url = self._target.url
        exchange = await self._ask(self._target.question("/models"))
        if exchange.ending.startswith(("refused", "timeout")) or exchange.http_status is None:
            raise InputError(
                f"--url {url}: no HTTP answer to a question for its models ({_unanswered(exchange)}); "
                f"{self._other_scheme(exchange) or 'correct the host, port or scheme'}."
            )
        self._check_key(exchange)
        body = b"".join(exchange.pieces)
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            models = []
        if not models:
            if model is None:
                moved = f" (redirect to {printable(self._target.hide(exchange.location))})" if exchange.location else ""
                raise InputError(
                    f"--url {url}: {self._target.base}/models answered {exchange.http_status}{moved} and lists no "
                    "model; correct the URL, or name the model with --model."
                )
            notes.append(f"{self._target.base}/models answered {exchange.http_status} and lists no model.")
            return None, None
        chosen = next((entry for entry in models if entry.id == model), models[0] if model is None else None)
        if chosen is None:
            names = ", ".join(entry.id for entry in models[:5])
            notes.append(f"The server does not list the model {model}; it lists {names}.")
            return None, None
        self._engine = chosen.owned_by if isinstance(chosen.owned_by, str) else None
        return chosen.id, chosen.max_model_len or (chosen.meta or {}).get("n_ctx")

    def _other_scheme(self, exchange: Exchange) -> str | None:
        """What to do if the port speaks TLS where http:// was said, or the other way round."""
        if not self._target.tls and "\\x15\\x03" in (exchange.message or ""):  # the alert of a TLS server
            return "it speaks TLS: write https://"
        if self._target.tls and not exchange.http_status and exchange.ending.startswith(("refused/tls", "reset")):
            return "correct the host and port, or write http:// if it speaks no TLS"
        return None

    async def _cut(self, dialect: Dialect, own: str | None, tokenizer: Tokenizer | None, notes: list[str]) -> Dialect:
        """Cut the user's text, or the words that are there anyway, into pieces whose tokens are known."""
        text = sample_words() if own is None else own
        ids: list[int] | None = None
        if dialect.tokens == "ids":
            ids = tokenizer.ids(text) if tokenizer is not None else await self._tokenized(dialect, text)
            if ids:
                self._text = text_of_ids(ids)
                self._made.clear()
                return dialect
            notes.append(
                "Nothing here can turn the text into token ids (no --tokenizer, no /tokenize): words are sent."
            )
            dialect = replace(dialect, tokens="words")
        counts: dict[str, int] | None = None
        words = most_common_words(text)
        if tokenizer is not None:
            counts = tokenizer.counts(words)
        elif await self._tokenized(dialect, words[0]):
            counts = {}
            for word in words:
                counts[word] = len(await self._tokenized(dialect, word) or ())
        else:
            notes.append(
                "Nothing here can count the text's tokens (no --tokenizer, no /tokenize): lengths are fitted to the "
                "server's usage and vary with the words."
            )
        self._text = text_of_words(text, counts)
        self._made.clear()
        return dialect

    async def _tokenized(self, dialect: Dialect, text: str) -> list[int] | None:
        """The ids of `text` by the server's own tokenizer; None if it offers none."""
        ids: list[int] = []
        for start in range(0, len(text), TOKENIZE_AT_ONCE):
            piece = text[start : start + TOKENIZE_AT_ONCE]
            asked = {"prompt": piece, "content": piece, "inputs": piece, "add_special_tokens": False}
            body = msgspec.json.encode(asked if dialect.model is None else asked | {"model": dialect.model})
            exchange = await self._ask(self._target.request("/tokenize", body, self._target.base.removesuffix("/v1")))
            if exchange.http_status != 200:
                return None
            try:
                found = msgspec.json.decode(b"".join(exchange.pieces), type=_Tokens | list[_Token])
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
            ids += found.tokens if isinstance(found, _Tokens) else [token.id for token in found]
        return ids

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

    async def _fields(self, dialect: Dialect, notes: list[str], warm: bool) -> tuple[Dialect, bool, int | None]:
        """The dialect without the optional fields that the server refuses; whether it then answers; the prompt tokens
        that it reported."""
        while True:
            exchange, outcome = await self._probe(dialect, PROBE_WORDS[0], 1)
            if outcome.status == "ok" and exchange.reply is not None:
                return dialect, True, exchange.reply.prompt_tokens
            self._check_key(exchange)
            said = outcome.message or outcome.reason or outcome.status
            refused = exchange.http_status in (400, 404, 405, 422)
            if not refused:
                what = told(outcome.status, outcome.reason, exchange.http_status, outcome.message)
                notes.append(
                    f"A one-token request before the run failed ({what}); nothing is calibrated: prompt lengths are in "
                    "words." + (" The warm-up is left out." if warm else "")
                )
                return dialect, False, None
            if "max_completion_tokens" in said and dialect.api != "responses" and dialect.limit == "max_tokens":
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
        if tokens not in self._made:  # with a salt of its own for each: no prompt of the run begins like these
            self._made[tokens] = Prompts(tokens, salt="request", seed=self._seed, fresh=os.urandom(8), own=self._text)
        return self._made[tokens]

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


def _unanswered(exchange: Exchange) -> str:
    """Why there was no answer."""
    status, _, reason = exchange.ending.partition("/")
    return exchange.message or MEANINGS.get(reason or status) or exchange.ending


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    owned_by: Any = None
    meta: dict[str, Any] | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Token(msgspec.Struct):
    id: int


class _Models(msgspec.Struct):
    data: list[_Model] = []
