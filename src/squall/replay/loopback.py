"""A streaming server that costs next to nothing, on the loopback: for measuring what a sender costs, here and in
`benchmarks/replay.py`. It costs less than any client."""

import argparse
import asyncio
import heapq
import json
import re
import time
from typing import Any

import uvloop

from squall.replay.machine import raise_file_limit

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: keep-alive\r\n\r\n"
)
_LIMIT = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*(\d+)')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


def _chunk(**fields: Any) -> bytes:
    base = {"id": "chatcmpl-6f1c2a", "object": "chat.completion.chunk", "created": 1764000000, "model": "loopback"}
    event = b"data: " + json.dumps(base | fields).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "text": delta.get("content", ""), "finish_reason": finish}]}


_ROLE = _chunk(**_choice({"role": "assistant", "content": ""}))
_TOKEN = _chunk(**_choice({"content": " word"}))


class Server:
    """Streams `max_tokens` chunks per request, the first after `first` and the others every `gap` seconds."""

    def __init__(self, first: float, gap: float) -> None:
        self.first, self.gap = first, gap
        self.arrivals: list[float] = []
        self._due: list[tuple[float, int, _Stream]] = []  # a heap
        self._number = 0
        self._loop = asyncio.get_running_loop()
        self._awake = False

    def add(self, at: float, stream: "_Stream") -> None:
        """Call `stream.step` at `at`."""
        self._number += 1
        heapq.heappush(self._due, (at, self._number, stream))
        if not self._awake:
            self._awake = True
            self._loop.call_later(0.001, self._tick)

    def _tick(self) -> None:
        """Write everything that is due: one timer for all streams."""
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            at, _, stream = heapq.heappop(self._due)
            if stream.step():
                self._number += 1
                heapq.heappush(self._due, (at + self.gap, self._number, stream))
        self._awake = bool(self._due)
        if self._awake:
            self._loop.call_later(max(0.0005, self._due[0][0] - time.monotonic()), self._tick)


class _Stream:
    """One answer."""

    __slots__ = ("last", "left", "transport", "write")

    def __init__(self, transport: Any, tokens: int, last: bytes) -> None:
        self.transport, self.write, self.left, self.last = transport, transport.write, tokens, last

    def step(self) -> bool:
        """Write what is due now; whether more is to come."""
        if self.transport.is_closing():
            return False
        if self.left == 0:
            self.write(self.last)
            return False
        self.left -= 1
        if self.left == 0:
            self.write(_TOKEN + self.last)
            return False
        self.write(_TOKEN)
        return True


class _Serve(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server, self.held = server, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.held = held = self.held + data if self.held else data
        end = held.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        found = _LENGTH.search(held, 0, end)
        whole = end + (int(found[1]) if found else 0)
        if len(held) >= whole:
            self.held = held[whole:]
            self.answer(held[:end], held[end:whole])

    def answer(self, head: bytes, body: bytes) -> None:
        at = time.monotonic()
        if head.startswith(b"POST") and b"tokens" in body:
            asked = _LIMIT.search(body)
            tokens = int(asked[1]) if asked else 16
            stream = b'"stream":true' in body or b'"stream": true' in body or b'"stream"' not in body
            prompt = body.count(b" ") if b'"messages"' in body else body.count(b",")
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            if not stream:
                message = {"role": "assistant", "content": " word" * tokens}
                choice = {"index": 0, "message": message, "text": " word" * tokens, "finish_reason": "length"}
                self.document({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
                return
            if tokens > 1:
                self.server.arrivals.append(at)
            last = _chunk(**_choice({}, "length")) + _chunk(choices=[], usage=usage)
            self.transport.write(_HEAD + _ROLE)
            done = _Stream(self.transport, tokens, last + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            self.server.add(at + self.server.first, done)
        elif b"/arrivals" in head:
            self.document(self.server.arrivals)
            self.server.arrivals = []
        else:
            self.document({"object": "list", "data": [{"id": "loopback", "object": "model", "owned_by": "squall"}]})

    def document(self, value: Any) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


async def _serve(port: int, first: float, gap: float) -> None:
    server = Server(first, gap)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: _Serve(server), "127.0.0.1", port, backlog=8192)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; prints the port."""
    parser = argparse.ArgumentParser(description="A streaming server that costs next to nothing, on the loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first", type=float, default=20, help="ms to the first chunk")
    parser.add_argument("--gap", type=float, default=5, help="ms between chunks")
    given = parser.parse_args()
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(given.port, given.first / 1e3, given.gap / 1e3))


if __name__ == "__main__":
    main()
