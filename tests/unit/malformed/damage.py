"""What becomes of files in this world: each kind of damage takes the bytes of a file and draws from a generator."""

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[bytes, random.Random], bytes]
DEEP = 100_000


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, max(len(data) - 2, 2))]


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(8):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


# A needed file with any of these can't be read as what it should be.
BROKEN: dict[str, Damage] = {
    "empty": lambda data, draw: b"",
    "cut": _cut,
    "noise": lambda data, draw: draw.randbytes(max(len(data) // 2, 16)),
    "zeros": lambda data, draw: bytes(len(data)),
}
BROKEN_JSON: dict[str, Damage] = BROKEN | {
    "deep lists": lambda data, draw: b"[" * DEEP + b"]" * DEEP,
    "deep objects": lambda data, draw: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "null": lambda data, draw: b"null",
    "list": lambda data, draw: b"[" + data + b"]",
    "text": lambda data, draw: json.dumps(data.decode()).encode(),
    "number": lambda data, draw: b"7",
    "utf-16": lambda data, draw: data.decode().encode("utf-16"),
    "NaN": lambda data, draw: data.replace(b"{", b'{"extra": NaN, ', 1),
    "5000 digits": lambda data, draw: data.replace(b"{", b'{"extra": ' + b"9" * 5000 + b", ", 1),
    "half a character": lambda data, draw: data.replace(b"{", b'{"extra": "\\ud800", ', 1),
    "twice": lambda data, draw: data.replace(b"{", b'{"same": 1, "same": 2, ', 1),
}
# Some of these change nothing that is read.
LESS_BROKEN: dict[str, Damage] = {"bits": _flipped, "longer": lambda data, draw: data + draw.randbytes(64)}

_NESTED: Any = 1
for _ in range(40):
    _NESTED = [_NESTED]
VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", True, -1, 0, 10**30, 1e308, -0.5, [None], {"a": [1]},
    "9" * 5000, "x" * 100_000, _NESTED, ...,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, by its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, v in inner for place in _places(v, (*path, key)))]


def change_value(data: bytes, draw: random.Random) -> bytes:
    """Another value, or none, at a random place of a JSON object."""
    whole = json.loads(data)
    # Lists of numbers would else take all draws.
    places = [p for p in _places(whole) if p and not (isinstance(p[-1], int) and p[-1] > 1)]
    if not places:
        return json.dumps(draw.choice(VALUES[:-1])).encode()
    *way, key = draw.choice(places)
    inside = whole
    for step in way:
        inside = inside[step]
    value = draw.choice(VALUES)
    if value is ...:
        del inside[key]
    else:
        inside[key] = copy.deepcopy(value)
    return json.dumps(whole).encode()


def on_a_line(change: Damage) -> Damage:
    """A change to one line of a file."""

    def changed(data: bytes, draw: random.Random) -> bytes:
        lines = data.splitlines()
        place = draw.randrange(len(lines))
        lines[place] = change(lines[place], draw)
        return b"\n".join(lines) + b"\n"

    return changed


def safetensors(change: Callable[[dict, random.Random], None]) -> Damage:
    """A change to the header of a safetensors file."""

    def changed(data: bytes, draw: random.Random) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header, draw)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return changed


def _tensor(header: dict, draw: random.Random) -> dict:
    return header[draw.choice([name for name in sorted(header) if name != "__metadata__"])]


def _unfinite(value: float) -> Damage:
    def changed(data: bytes, draw: random.Random) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        floats = [h for n, h in sorted(header.items()) if n != "__metadata__" and h["dtype"] == "F32"]
        if not floats:  # a bfloat16's upper half
            floats = [h for n, h in sorted(header.items()) if n != "__metadata__" and h["dtype"] == "BF16"]
        tensor = draw.choice(floats)
        begin, end = tensor["data_offsets"]
        width = 4 if tensor["dtype"] == "F32" else 2
        place = 8 + size + begin + width * draw.randrange((end - begin) // width)
        return data[:place] + np.float32(value).tobytes()[4 - width :] + data[place + width :]

    return changed


BROKEN_WEIGHTS: dict[str, Damage] = BROKEN | {
    "NaN": _unfinite(np.nan),
    "infinity": _unfinite(np.inf),
    "huge header": lambda data, draw: struct.pack("<Q", 1 << draw.randrange(40, 64)) + data[8:],
    "deep header": lambda data, draw: struct.pack("<Q", DEEP) + b"[" * DEEP,
    "other shape": safetensors(lambda header, draw: _tensor(header, draw)["shape"].append(2)),
    "other dtype": safetensors(lambda header, draw: _tensor(header, draw).update(dtype="I64")),
    "other offsets": safetensors(lambda header, draw: _tensor(header, draw).update(data_offsets=[0, 2**50])),
    "no tensor": safetensors(lambda header, draw: header.pop(draw.choice([n for n in header if n != "__metadata__"]))),
    "another tensor": safetensors(lambda header, draw: header.update(zz=_tensor(header, draw))),
    "one byte less": lambda data, draw: data[:-1],
}


# ---- a file that is none


def be_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def be_missing(path: Path) -> None:
    path.unlink()


def be_a_pipe(path: Path) -> None:
    """Whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def be_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


NO_FILES = {"directory": be_a_directory, "missing": be_missing, "pipe": be_a_pipe, "loop of links": be_a_loop}


# ---- chat templates and what a server says, as texts

TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long": "{{ 'x' * 10**10 }}",
    "break": "{% break %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "raises": "{{ raise_exception('no') }}",
    "unknown": "{{ strange.thing }}",
    "open": "{% for m in messages %}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "blank": "",
}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "HTML": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>Welcome",
    "401": b"HTTP/1.1 401 No\r\n\r\nno",
    "500": b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 5_000_000,
    "redirect": b"HTTP/1.1 302 There\r\nLocation: http://127.0.0.1:9/\r\n\r\n",
    "no events": _HEAD,
    "done at once": _HEAD + b"data: [DONE]\n\n",
    "no JSON": _HEAD + b"data: {]\n\n",
    "deep": _HEAD + b"data: " + b"[" * DEEP + b"\n\n",
    "an error": _HEAD + b'data: {"error": {"message": "out of memory"}}\n\n',
    "comments": _HEAD + b": ping\n\n" * 100_000,
    "compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno gzip",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab",
}
HEAD = _HEAD
