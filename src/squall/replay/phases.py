"""The words between the compiled half of a plain connection (reading.py) and the other one (sockets.py)."""

OTHERS, HEAD, SIZE, SIZE_END, DATA, DATA_CR, DATA_LF, TRAILER, TRAILER_LINE, TRAILER_END, LENGTH, UNTIL_CLOSE, OVER = (
    range(13)
)
"""Phases of a socket: what its next byte is. OTHERS are Python's affair: idle connections, timers."""
RAW, END, BAD, FULL, EOF, ERROR, READY = range(7)
"""Kinds of notes: bytes of a header, a message's end (with what follows it), a fault of the framing, no room left, the
connection's end, an errno, and that something is ready that is not read here."""
PHASE, LEFT, LINE, DIGITS, BODY, MARKS, USED, PIECES, LAST, FIRST, SAID = range(11)
COLUMNS = 16
"""Of a socket's row, which has its descriptor as number: the phase; the bytes that are left of the chunk or the body;
the length of the chunk-size line or of the trailers so far, and the digits of the size; the addresses of its buffers
and how much of them is used; the times (ns) of the last read, and of a header that was the known one; what that
said. A piece's marks are its time and its end in the body."""
EPOLL, TIMERS, UNTIL, NAP, TIRED, READS, QUICK, ENDS, KNOWN, KNOWN_SIZE, KNOWN_SAID = range(11)
EVENTS, ROWS, LOG, CLOCK, MESSAGE, VECTOR, CONTROL, DESK = range(11, 19)
"""Of the desk: epoll's descriptors for everything and for the timers alone; until when to wait (monotonic ns; 0: not at
all); milliseconds of a nap, and whether one is due; reads of bodies, those soon after a stream's last; how many ends of
answers may wait for a timer; the header that is known, its size, and a number for what it says; other addresses."""
FIELDS = 5
"""Of a note: descriptor, kind, time (ns), and where in the body's buffer it begins and ends."""
NOTES, READY_AT_ONCE = 1 << 12, 512
BODY_ROOM, PIECES_ROOM = 1 << 16, 1 << 10
"""Bytes and pieces of an answer that are kept until Python must take them."""
SOCKETS = 1 << 17
"""Descriptors below this can be served."""
