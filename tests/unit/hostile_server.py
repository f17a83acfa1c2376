"""A server on loopback that answers with whatever bytes a test says, endless ones too, and counts what it sent."""

import contextlib
import itertools
import json
import socket
import threading
import time

HEAD = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nConnection: close\r\n%s\r\n"


def head(code=200, kind="text/event-stream", more=""):
    """Status line and headers of an answer without a length."""
    return HEAD % (code, b"Whatever", kind.encode(), more.encode())


def event(**fields):
    return f"data: {json.dumps(fields)}\n\n".encode()


def endless(piece, pause=0.0):
    """The piece again and again, as fast as it is taken or with pauses."""
    for _ in itertools.count():
        yield piece
        if pause:
            time.sleep(pause)


class Hostile:
    """`url`; the raw `requests` that came; `sent` bytes, of all answers."""

    def __init__(self, answer):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests, self.sent, self._open = [], 0, True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            before, _, body = received.partition(b"\r\n\r\n")
            sizes = [
                line.split(b":")[1] for line in before.lower().split(b"\r\n") if line.startswith(b"content-length")
            ]
            while sizes and len(body) < int(sizes[0]):
                body += connection.recv(65536)
            self.requests.append((before, body))
            for piece in self._answer(len(self.requests) - 1, before):
                if not self._open:
                    return
                connection.sendall(piece)
                self.sent += len(piece)

    def close(self):
        self._open = False
        self._listener.shutdown(socket.SHUT_RDWR)  # which ends accept(), in its thread
        self._listener.close()


@contextlib.contextmanager
def hostile(answer):
    """A server whose `answer(number, request)` yields the bytes of an answer; or one that always sends these bytes."""
    server = Hostile((lambda number, request: [answer]) if isinstance(answer, bytes) else answer)
    try:
        yield server
    finally:
        server.close()
