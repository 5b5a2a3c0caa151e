"""Which conversation a request belongs to: named by the client, or found because its message list goes on from one."""

import os
from collections import OrderedDict

from squall.capture.asked import Asked

Place = tuple[int | None, int | None]
"""Session and turn, or (None, None)."""
MOST_KNOWN = 200_000
"""Requests that are remembered; the oldest are forgotten first."""


class Conversations:
    """Gives every request a session number and a turn (from 1)."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._last: OrderedDict[tuple[str, int], tuple[int, int]] = OrderedDict()  # what names it -> (session, turn)
        # A random start: the sessions of two captures in one folder stay apart.
        self._next = int.from_bytes(os.urandom(5), "little") << 20

    def place(self, request: Asked) -> Place:
        """Session and turn of `request`; (None, None) where nothing says that it is part of a conversation.

        A list of messages goes on from an earlier request if it begins with all of that request's messages and has
        more of them. The same list sent again opens a session of its own: a retry cannot be told from another client.
        """
        if request.session_key is not None:
            return self._step(("key", request.session_key), self._last.get(("key", request.session_key)))
        if request.previous is not None:
            return self._next_turn(self._last.get(("response", request.previous)))
        if not request.chain:
            return None, None
        before = None
        for known in reversed(request.chain[:-1]):
            before = self._last.get(("chain", known))
            if before is not None:
                break
        return self._step(("chain", request.chain[-1]), before)

    def answered(self, identity: int, place: Place) -> Place:
        """The answer to the request at `place` has the hashed `identity`, by which a later request may go on from it.

        Returns the place, now with a session if it had none.
        """
        session, turn = place
        known = self._next_turn(None) if session is None or turn is None else (session, turn)
        self._remember(("response", identity), known)
        return known

    def _step(self, name: tuple[str, int], before: tuple[int, int] | None) -> Place:
        place = self._next_turn(before)
        self._remember(name, place)
        return place

    def _next_turn(self, before: tuple[int, int] | None) -> tuple[int, int]:
        return (self._open(), 1) if before is None else (before[0], before[1] + 1)

    def _open(self) -> int:
        self._next += 1
        return self._next - 1

    def _remember(self, name: tuple[str, int], what: tuple[int, int]) -> None:
        self._last[name] = what
        self._last.move_to_end(name)
        if len(self._last) > self._most:
            self._last.popitem(last=False)
