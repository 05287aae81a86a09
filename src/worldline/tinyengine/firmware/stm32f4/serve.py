"""Serve a board over its serial line: python3 serve.py /dev/ttyACM0 INPUT OUTPUT. Wants nothing but Python.

It sends INPUT as the board asks for it, keeps what the board gives back in OUTPUT, and ends when the input does.
"""

import os
import sys
import termios
import tty


def serve(line: int, data: bytes) -> bytes:
    """Answer the board at a file descriptor until it ends, or asks for more than is left; return what it gave."""
    given, said, out = 0, False, b""
    while True:
        kind = _take(line, 1)
        if kind == b"+":
            if not said:
                os.write(line, b"\n")
            said = True
            continue
        length = int.from_bytes(_take(line, 4), "little")
        if kind == b"?":
            if given + length > len(data):
                return out
            for at in range(given, given + length, 256):
                os.write(line, data[at : min(at + 256, given + length)])
            given += length
        elif kind == b"!":
            out += _take(line, length)
        elif kind == b"#":
            sys.stderr.write(_take(line, length).decode())
        elif kind == b".":
            if length:
                raise SystemExit(f"the board ended with status {length}")
            return out
        else:
            raise SystemExit(f"the board said {kind!r}: reset it and begin again")


def _take(line: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += os.read(line, count - len(found))
    return found


if __name__ == "__main__":
    place, source, to = sys.argv[1:]
    descriptor = os.open(place, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(descriptor)
    settings = termios.tcgetattr(descriptor)
    settings[4] = settings[5] = termios.B115200
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)
    with open(source, "rb") as file:
        answers = serve(descriptor, file.read())
    with open(to, "wb") as result:
        result.write(answers)
