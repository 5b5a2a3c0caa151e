"""The OpenAI API of the served model: what a request asks for in tokens, and the bytes of its answer.

A token is a word between spaces, or one id of a prompt that is given in ids; a chat adds `TEMPLATE` tokens. The answer
is as long as `max_tokens` says: the modelled engine does not know when a model would stop. For prefix caching the full
blocks of a prompt become a chain of hashes, each of all tokens up to the block's end, as in vLLM; the tokens themselves
are forgotten.
"""

import time
from typing import Any

import msgspec

TEMPLATE = 8
"""Tokens that a chat template adds to the words of the messages."""
WORD = "tok "
PATHS = {"/v1/chat/completions": True, "/v1/completions": False}
"""Whether a path is that of chats."""


class ApiError(Exception):
    """A request that cannot be served: its HTTP status, and what is wrong with which field."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Message(msgspec.Struct):
    content: str | list[dict[str, Any]] | None = None
    role: str | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    messages: list[_Message] | None = None
    prompt: str | list[Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    priority: int | None = None
    user: Any = None
    prompt_cache_key: Any = None
    cache_salt: Any = None


_decode = msgspec.json.Decoder(_Body).decode


class Ask(msgspec.Struct):
    """A request in tokens."""

    chat: bool
    prompt: int
    output: int
    stream: bool
    usage: bool
    """Whether a stream ends with its usage."""
    priority: int = 0
    client: str = ""
    """Its `user`."""
    session: str | None = None
    """Its `prompt_cache_key`, or else its `user`."""
    hashes: list[int] = []
    """Of the prompt's full blocks, where they are asked for."""


class Limits(msgspec.Struct, frozen=True):
    """What the served model is."""

    model: str
    context: int
    default_output: int
    block: int = 0
    """Tokens of a block whose hash is asked for; 0: none is."""
    priorities: bool = False
    """Whether requests may have a priority other than 0."""


def read(chat: bool, body: bytes, limits: Limits) -> Ask:
    """What the body of a request asks for. Raises ApiError."""
    try:
        it = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body cannot be read: {error}") from error
    if it.model is not None and it.model != limits.model:
        raise ApiError(404, f"The model `{it.model[:100]}` does not exist.", "model")
    if (it.n or 1) != 1 or (it.best_of or 1) != 1:
        raise ApiError(400, "only one answer per request is modelled", "n")
    if it.priority and not limits.priorities:
        raise ApiError(400, f"Got priority {it.priority} but Priority scheduling is not enabled.", "priority")
    tokens = _chat_tokens(it.messages) if chat else _prompt_tokens(it.prompt, "prompt")
    prompt = len(tokens)
    asked = it.max_completion_tokens if it.max_completion_tokens is not None else it.max_tokens
    if asked is not None and asked < 1:
        raise ApiError(400, f"max_tokens must be at least 1, got {asked}.", "max_tokens")
    if prompt >= limits.context or (asked is not None and prompt + asked > limits.context):
        wanted = "" if asked is None else f" and {asked} for the completion"
        raise ApiError(
            400,
            f"This model's maximum context length is {limits.context} tokens. However, you requested {prompt} in the "
            f"prompt{wanted}. Please reduce the length.",
            "max_tokens",
        )
    output = min(limits.default_output, limits.context - prompt) if asked is None else asked
    usage = it.stream_options is not None and bool(it.stream_options.include_usage)
    user = it.user if isinstance(it.user, str) else None
    key = it.prompt_cache_key if isinstance(it.prompt_cache_key, str) else user
    hashes = _hashes(tokens, limits.block, it.cache_salt if isinstance(it.cache_salt, str) else "")
    return Ask(chat, prompt, output, bool(it.stream), usage, it.priority or 0, user or "", key, hashes)


def _hashes(tokens: list[Any], block: int, salt: str) -> list[int]:
    """The chain over the full blocks; Python's hash of a text has a key of its own in every process."""
    if not block:
        return []
    known, chain = hash(salt), []
    for end in range(block, len(tokens) + 1, block):
        known = hash((known, *tokens[end - block : end]))
        chain.append(known)
    return chain


def _chat_tokens(messages: list[_Message] | None) -> list[Any]:
    """The template's tokens and the words; the first word of a message stands for its role too."""
    if not messages:
        raise ApiError(400, "messages are missing", "messages")
    tokens: list[Any] = [None] * TEMPLATE
    for message in messages:
        parts = message.content if isinstance(message.content, list) else [{"text": message.content or ""}]
        words = [word for part in parts if isinstance(text := part.get("text"), str) for word in text.split()]
        if words:
            tokens.append((message.role, words[0]))
            tokens += words[1:]
    return tokens


def _prompt_tokens(prompt: Any, param: str) -> list[Any]:
    """The tokens of a prompt: text, or ids, or a list of one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt.split() or [""]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise ApiError(400, f"{param} must be one text or one list of token ids that is not empty", param)


class Reply:
    """The bytes of one answer."""

    __slots__ = ("_ask", "_created", "_id", "_model", "cached", "event")

    def __init__(self, ask: Ask, number: int, model: str) -> None:
        self._ask, self._model, self._created = ask, model, int(time.time())
        self.cached: int | None = None
        """Tokens of the prompt that were found in the prefix cache; None: there is none."""
        self._id = f"{'chatcmpl' if ask.chat else 'cmpl'}-squall{number:012x}"
        self.event = self._event({"delta": {"content": WORD}} if ask.chat else {"text": WORD}, None)
        """The event of one token; all are the same."""

    def first(self) -> bytes:
        """The events of the first token."""
        return (
            self._event({"delta": {"role": "assistant", "content": ""}}, None) + self.event
            if self._ask.chat
            else self.event
        )

    def last(self, generated: int) -> bytes:
        """The events after the last token."""
        end = self._event({"delta": {}} if self._ask.chat else {"text": ""}, "length")
        if self._ask.usage:
            end += _data({**self._head(".chunk"), "choices": [], "usage": self._usage(generated)})
        return end + b"data: [DONE]\n\n"

    def whole(self, generated: int) -> bytes:
        """The answer of a request that is not streamed."""
        text = WORD * generated
        said = {"message": {"role": "assistant", "content": text}} if self._ask.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": "length"}
        return msgspec.json.encode({**self._head(""), "choices": [choice], "usage": self._usage(generated)})

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self._ask.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, said: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return _data({**self._head(".chunk"), "choices": [choice]})

    def _usage(self, generated: int) -> dict[str, Any]:
        details = {} if self.cached is None else {"prompt_tokens_details": {"cached_tokens": self.cached}}
        return {
            "prompt_tokens": self._ask.prompt,
            "completion_tokens": generated,
            "total_tokens": self._ask.prompt + generated,
            **details,
        }


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def models(limits: Limits, started: int) -> bytes:
    """The answer of /v1/models."""
    entry = {
        "id": limits.model,
        "object": "model",
        "created": started,
        "owned_by": "squall",
        "root": limits.model,
        "max_model_len": limits.context,
    }
    return msgspec.json.encode({"object": "list", "data": [entry]})


class _Tokenize(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[_Message] | None = None


def tokenize(body: bytes, limits: Limits) -> bytes:
    """The answer of /tokenize: one invented id per token. Raises ApiError."""
    try:
        it = msgspec.json.decode(body, type=_Tokenize)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body cannot be read: {error}") from error
    tokens = len(_chat_tokens(it.messages) if it.messages else _prompt_tokens(it.prompt, "prompt"))
    return msgspec.json.encode({"count": tokens, "max_model_len": limits.context, "tokens": list(range(tokens))})
