"""The wire between the suite and a worker: length-prefixed messages of one JSON header and raw byte blobs.

Both sides load this file; it imports only the standard library, and reading a message runs no code.
"""

import json
import select
import socket
import struct

_PREFIX = struct.Struct("<IQ")


class Closed(Exception):
    """The other side is gone."""


class TimedOut(Exception):
    """Nothing arrived in time."""


def send(channel: socket.socket, header: dict, blobs=()) -> None:
    """Send one message. `blobs` are bytes-like; their sizes travel in the header."""
    views = [memoryview(b).cast("B") if len(b) else memoryview(b"") for b in blobs]
    text = json.dumps({**header, "blobs": [v.nbytes for v in views]}).encode()
    try:
        channel.sendall(b"".join([_PREFIX.pack(len(text), sum(v.nbytes for v in views)), text, *views]))
    except OSError as error:
        raise Closed(str(error)) from None


def receive(channel: socket.socket, timeout: float | None = None) -> tuple[dict, list[memoryview]]:
    """The next message; `timeout` (seconds) limits the wait for its first byte."""
    if timeout is not None and not select.select([channel], [], [], max(timeout, 0.0))[0]:
        raise TimedOut
    header_size, blob_size = _PREFIX.unpack(_exactly(channel, _PREFIX.size))
    header = json.loads(bytes(_exactly(channel, header_size)))
    data = memoryview(_exactly(channel, blob_size))
    blobs, at = [], 0
    for size in header.pop("blobs"):
        blobs.append(data[at : at + size])
        at += size
    return header, blobs


def _exactly(channel: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        try:
            n = channel.recv_into(view[got:])
        except OSError as error:
            raise Closed(str(error)) from None
        if n == 0:
            raise Closed("end of file")
        got += n
    return buffer
