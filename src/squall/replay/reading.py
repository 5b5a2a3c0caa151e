"""What a sender does most of its time, compiled: wait for the sockets, read and stamp, take off HTTP's framing.

Compiled by `squall.native`, so nothing else imports this file. `Sockets` (sockets.py) is its other half: it says what
comes on each socket, and does what the notes call for. Numbers and addresses only.
"""

import platform
from typing import Any

from numba import types
from numba.extending import intrinsic

from squall.native import inlined
from squall.replay.phases import (
    BAD,
    BODY,
    BODY_ROOM,
    CLOCK,
    COLUMNS,
    CONTROL,
    DATA,
    DATA_CR,
    DATA_LF,
    DIGITS,
    END,
    ENDS,
    EOF,
    EPOLL,
    ERROR,
    EVENTS,
    FIELDS,
    FIRST,
    FULL,
    HEAD,
    KNOWN,
    KNOWN_SAID,
    KNOWN_SIZE,
    LAST,
    LEFT,
    LENGTH,
    LINE,
    LOG,
    MARKS,
    MESSAGE,
    NAP,
    NOTES,
    OTHERS,
    OVER,
    PHASE,
    PIECES,
    PIECES_ROOM,
    QUICK,
    RAW,
    READS,
    READY,
    READY_AT_ONCE,
    ROWS,
    SAID,
    SIZE,
    SIZE_END,
    TIMERS,
    TIRED,
    TRAILER,
    TRAILER_END,
    TRAILER_LINE,
    UNTIL,
    UNTIL_CLOSE,
    USED,
    VECTOR,
)

_LINE_LIMIT, _TRAILER_LIMIT, _DIGITS_LIMIT = 1 << 12, 1 << 16, 15
_SMALLEST_CHUNK = 6
"""Bytes of `1 CR LF x CR LF`: so many at least belong to each piece."""
_LEAST_ROOM = 1 << 11
_STRIDE, _DATA = (3, 1) if platform.machine() == "x86_64" else (4, 2)  # struct epoll_event, packed on x86
_OUT = 4
_REALTIME, _MONOTONIC, _DONTWAIT, _EAGAIN, _EINTR = 0, 1, 0x40, 11, 4
_CONTROL_ROOM = 64
_SOON = 2_500_000
"""Nanoseconds between reads of one stream that are too few for a nap."""
_CR, _LF, _SEMICOLON, _SPACE, _TAB, _QUOTE, _COLON, _BACKSLASH = 13, 10, 59, 32, 9, 34, 58, 92

_int32, _int64, _uint8 = types.int32, types.int64, types.uint8
_epoll_wait = types.ExternalFunction("epoll_wait", _int32(_int32, _int64, _int32, _int32))
_recvmsg = types.ExternalFunction("recvmsg", _int64(_int32, _int64, _int32))
_memmove = types.ExternalFunction("memmove", _int64(_int64, _int64, _int64))
_memcmp = types.ExternalFunction("memcmp", _int32(_int64, _int64, _int64))
_memchr = types.ExternalFunction("memchr", _int64(_int64, _int32, _int64))
_clock_gettime = types.ExternalFunction("clock_gettime", _int32(_int32, _int64))
_errno = types.ExternalFunction("__errno_location", types.CPointer(_int32)())


def _pointer(to: Any) -> Any:
    @intrinsic
    def at(typing: Any, address: Any) -> Any:
        def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(to)(_int64), make

    return at


_bytes, _ints, _longs = _pointer(_uint8), _pointer(_int32), _pointer(_int64)


@inlined
def _now(clock: int, which: int) -> int:
    _clock_gettime(_int32(which), clock)
    time = _longs(clock)
    return time[0] * 1_000_000_000 + time[1]


@inlined
def _note(log: Any, notes: int, descriptor: int, kind: int, at: int, begin: int, end: int) -> int:
    base = notes * FIELDS
    log[base], log[base + 1], log[base + 2], log[base + 3], log[base + 4] = descriptor, kind, at, begin, end
    return notes + 1


@inlined
def _hexadecimal(byte: int) -> int:
    """The digit's value; -1 if it is none."""
    if 48 <= byte <= 57:
        return byte - 48
    lower = byte | 32
    return lower - 87 if 97 <= lower <= 102 else -1


@inlined
def _frame(rows: Any, log: Any, notes: int, descriptor: int, begin: int, end: int, at: int) -> int:
    """Take the framing off what was read into [begin, end) of the body's buffer; the number of notes afterwards.

    What is left moves to the end of what was there. Chunked transfer coding as RFC 9112, 7.1 has it, with CR LF only;
    bodies of a known length; bodies until the close.
    """
    row = descriptor * COLUMNS
    phase, left, line, digits = rows[row + PHASE], rows[row + LEFT], rows[row + LINE], rows[row + DIGITS]
    used, pieces = rows[row + USED], rows[row + PIECES]
    place = rows[row + BODY]
    body, marks = _bytes(place), _longs(rows[row + MARKS])
    right = True
    while begin < end and phase != OVER:
        if phase == DATA or phase == LENGTH or phase == UNTIL_CLOSE:  # noqa: SIM109  # a tuple costs
            stop = end if phase == UNTIL_CLOSE else min(end, begin + left)
            _memmove(place + used, place + begin, stop - begin)
            used += stop - begin
            marks[2 * pieces], marks[2 * pieces + 1] = at, used
            pieces += 1
            left -= stop - begin
            begin = stop
            if phase != UNTIL_CLOSE and left == 0:
                phase = DATA_CR if phase == DATA else OVER
            continue
        byte = _int64(body[begin])
        if phase == SIZE:
            digit = _hexadecimal(byte)
            line += 1
            if digits >= 0 and digit >= 0:
                left = left * 16 + digit
                digits += 1
                right = digits <= _DIGITS_LIMIT
            elif byte == _CR and digits != 0:
                phase = SIZE_END
            elif digits > 0 and (byte == _SEMICOLON or byte == _SPACE or byte == _TAB):  # noqa: SIM109
                digits = -1  # the rest of the line is an extension
            else:
                right = digits < 0 and byte != _LF and line < _LINE_LIMIT
        elif phase == SIZE_END:
            right = byte == _LF
            phase = DATA if left > 0 else TRAILER
            line = digits = 0
        elif phase == DATA_CR:
            right = byte == _CR
            phase = DATA_LF
        elif phase == DATA_LF:
            right = byte == _LF
            phase = SIZE
        elif phase == TRAILER:
            right = byte != _LF
            phase = TRAILER_END if byte == _CR else TRAILER_LINE
        elif phase == TRAILER_LINE:
            line += 1
            right = line < _TRAILER_LIMIT
            if byte == _LF:
                phase = TRAILER
        else:
            right = byte == _LF
            phase = OVER
        if right:
            begin += 1
        else:
            phase = OVER
    if phase == OVER:
        notes = _note(log, notes, descriptor, END if right else BAD, at, begin, end)
        phase = OTHERS
    rows[row + PHASE], rows[row + LEFT], rows[row + LINE], rows[row + DIGITS] = phase, left, line, digits
    rows[row + USED], rows[row + PIECES], rows[row + LAST] = used, pieces, at
    return notes


@inlined
def _read(table: Any, descriptor: int, to: int, room: int) -> int:
    """As recv; whatever the kernel says of the time is in CONTROL."""
    vector, message = _longs(table[VECTOR]), _longs(table[MESSAGE])
    vector[0], vector[1] = to, room
    message[5] = _CONTROL_ROOM
    return _recvmsg(_int32(descriptor), table[MESSAGE], _DONTWAIT)


@inlined
def _came(table: Any, now: int, offset: int, last: int) -> int:
    """When the kernel got the bytes just read, by the monotonic clock, which is `offset` behind; else `now`.

    The stamp is of the last byte and of the real-time clock: one that cannot be is left out, as after a clock's jump.
    """
    message, control = _longs(table[MESSAGE]), _longs(table[CONTROL])
    if message[5] < 32:  # no stamp of SO_TIMESTAMPNS: length, level and type, seconds, nanoseconds
        return now
    came = control[2] * 1_000_000_000 + control[3] - offset
    return came if last < came <= now else now


def frame(desk: int, descriptor: int, begin: int, end: int, at: int) -> int:
    """Take the framing off the part of a body that came with its header, in [begin, end); the number of notes."""
    table = _longs(desk)
    return _frame(_longs(table[ROWS]), _longs(table[LOG]), 0, descriptor, begin, end, at)


@inlined
def _pressing(log: Any, notes: int) -> bool:
    """Whether a note is there that cannot wait: any but the end of an answer."""
    for note in range(notes):  # noqa: SIM110 - no generators here
        if log[note * FIELDS + 1] != END:
            return True
    return False


def turn(desk: int) -> int:
    """Serve the sockets until Python has something to do or the time has come; the number of notes, or minus errno."""
    table = _longs(desk)
    epoll, until, clock = _int32(table[EPOLL]), table[UNTIL], table[CLOCK]
    ready_at, rows, log = table[EVENTS], _longs(table[ROWS]), _longs(table[LOG])
    events = _ints(ready_at)
    notes = _int64(0)
    while True:
        wait = _int64(0)
        if until > 0:
            if table[TIRED] and table[NAP]:
                _epoll_wait(_int32(table[TIMERS]), ready_at, READY_AT_ONCE, _int32(table[NAP]))
            wait = max(0, (until - _now(clock, _MONOTONIC) + 999_999) // 1_000_000)
        ready = _epoll_wait(epoll, ready_at, READY_AT_ONCE, _int32(0 if table[TIRED] else wait))
        if ready < 0:
            code = _int64(_errno()[0])
            return notes if code == _EINTR else -code
        if ready == 0:
            if wait == 0 or not table[TIRED]:
                return notes
            table[TIRED] = 0
            continue
        now = _now(clock, _MONOTONIC)
        offset = _now(clock, _REALTIME) - now
        for place in range(ready):
            descriptor, flags = _int64(events[place * _STRIDE + _DATA]), events[place * _STRIDE]
            row = descriptor * COLUMNS
            phase, used, pieces = rows[row + PHASE], rows[row + USED], rows[row + PIECES]
            if phase == OTHERS or flags & _OUT:
                notes = _note(log, notes, descriptor, READY, 0, flags, 0)
                if phase == OTHERS or flags == _OUT:
                    continue
            table[TIRED] = 1
            room = BODY_ROOM - used
            if phase != LENGTH and phase != UNTIL_CLOSE and phase != HEAD:
                room = min(room, (PIECES_ROOM - pieces - 2) * _SMALLEST_CHUNK)
            if room < _LEAST_ROOM or pieces >= PIECES_ROOM - 2:
                notes = _note(log, notes, descriptor, FULL, 0, 0, 0)
                continue
            got = _read(table, descriptor, rows[row + BODY] + used, room)
            if got > 0:
                now = _now(clock, _MONOTONIC)
                last = rows[row + LAST]
                at = _came(table, now, offset, last)
                if phase == HEAD:
                    known = table[KNOWN_SIZE]
                    if known > 0 and got >= known and _memcmp(rows[row + BODY], table[KNOWN], known) == 0:
                        rows[row + FIRST], rows[row + SAID], rows[row + PHASE] = at, table[KNOWN_SAID], SIZE
                        notes = _frame(rows, log, notes, descriptor, known, got, at)
                    else:
                        notes = _note(log, notes, descriptor, RAW, at, used, used + got)
                else:
                    notes = _frame(rows, log, notes, descriptor, used, used + got, at)
                    table[READS] += 1
                    table[QUICK] += at - last < _SOON
            elif got == 0:
                notes = _note(log, notes, descriptor, EOF, now, 0, 0)
            else:
                code = _int64(_errno()[0])
                if code != _EAGAIN and code != _EINTR:
                    notes = _note(log, notes, descriptor, ERROR, now, code, 0)
            if notes > NOTES - 4:
                break
        if until <= 0 or notes > table[ENDS] or _pressing(log, notes):
            return notes


@inlined
def _named(body: Any, at: int, end: int) -> int:
    """Where the text begins whose key, `"content"` or `"text"`, begins at `at`; 0 if this is none."""
    place = at + 1
    if place + 11 < end and body[place] == 99:  # content
        if not (
            body[place + 1] == 111
            and body[place + 2] == 110
            and body[place + 3] == 116
            and body[place + 4] == 101
            and body[place + 5] == 110
            and body[place + 6] == 116
        ):
            return 0
        place += 7
    elif place + 8 < end and body[place] == 116:  # text
        if not (body[place + 1] == 101 and body[place + 2] == 120 and body[place + 3] == 116):
            return 0
        place += 4
    else:
        return 0
    if body[place] != _QUOTE or body[place + 1] != _COLON:
        return 0
    place += 2
    if body[place] == _SPACE:
        place += 1
    return place + 1 if body[place] == _QUOTE else 0


@inlined
def _string_end(body: Any, begin: int, end: int) -> int:
    """Where the quote stands that ends the JSON string whose text begins at `begin`; `end` if there is none."""
    place = begin
    while place < end and body[place] != _QUOTE:
        if body[place] < _SPACE:
            return end
        place += 2 if body[place] == _BACKSLASH else 1
    return min(place, end)


def read_events(body_at: int, marks_at: int, pieces: int) -> int:
    """Whether every piece is one whole event of one line; if so, the ends of tokens in the marks become negative.

    A token is an event that differs from the last one that is none in the text of its only "content" or "text", which
    is not empty: what that event means, decoded, it means too.
    """
    body, marks = _bytes(body_at), _longs(marks_at)
    begin = _int64(0)
    for piece in range(pieces):
        end = marks[2 * piece + 1]
        size = end - begin
        if (
            size < 7
            or body[begin] != 100
            or body[begin + 1] != 97
            or body[begin + 2] != 116
            or body[begin + 3] != 97
            or body[begin + 4] != _COLON
            or body[end - 1] != _LF
            or _memchr(body_at + begin, _LF, size) != body_at + end - 2
            or _memchr(body_at + begin, _CR, size) != 0
        ):
            return 0
        begin = end
    begin = model = head = tail_at = tail = _int64(0)
    for piece in range(pieces):
        end = marks[2 * piece + 1]
        if (
            head > 0
            and end - begin > head + tail
            and _memcmp(body_at + begin, body_at + model, head) == 0
            and _memcmp(body_at + end - tail, body_at + tail_at, tail) == 0
            and _string_end(body, begin + head, end) == end - tail
        ):
            marks[2 * piece + 1] = -end
        else:
            model, head, found = begin, _int64(0), _int64(0)
            for place in range(begin + 5, end - 2):
                if body[place] == _QUOTE:
                    text = _named(body, place, end)
                    if text > 0:
                        found += 1
                        head = text - begin
            tail_at = _string_end(body, begin + head, end)
            tail = end - tail_at
            if found != 1 or tail_at == begin + head:
                head = 0
        begin = end
    return 1
