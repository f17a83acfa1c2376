"""The process that transformers runs in, without torch: a script, which `worker` starts and may end.

A line of JSON in, {"do", "tokenizer", ...}; one out: {"got"}, or {"fault", "reason"}. The fault is `closed` for a
tokenizer that is not open (any more), `files` where none can be read, `template` where there is none, `source` for one
that is no template, `refused` for one that refused its variables, and `bounds` for one that asked for too much.
"""

import collections
import contextlib
import datetime
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

# On top of what the process holds before it renders.
MEMORY_BYTES = 1 << 30
OUTPUT_CHARACTERS = 1 << 24
MOST_OPEN = 8


class FaultError(Exception):
    def __init__(self, fault: str, reason: str):
        super().__init__(reason)
        self.fault = fault


class _Clock(datetime.datetime):
    """What `strftime_now` of a template reads: a day that the request names."""

    moment = datetime.datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.moment.astimezone(tz) if tz else cls.moment


_OPEN: collections.OrderedDict[int, Any] = collections.OrderedDict()


def opened(tokenizer: int, directory: str) -> dict[str, Any]:
    """Reads a directory's tokenizer, as any user of transformers does, but runs no code of it."""
    from transformers import AutoTokenizer

    try:
        _OPEN[tokenizer] = read = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        highest = max(read.get_vocab().values(), default=-1)
    except Exception as error:  # whatever its parsers raise
        if "trust_remote_code" in str(error):
            raise FaultError("files", "its tokenizer is code of its own, which is never run here") from None
        raise FaultError("files", str(error) or type(error).__name__) from None
    while len(_OPEN) > MOST_OPEN:
        _OPEN.popitem(last=False)
    return {"vocab_size": highest + 1, "eos": read.eos_token_id, "set_by_call": sorted(set_by_call(read))}


def set_by_call(read: Any) -> set[str]:
    """Names that the call of a template sets itself, for the template or for the call."""
    return {"self", "messages", *inspect.signature(read.apply_chat_template).parameters}


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        import resource  # not on Windows

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, limits[1]))
    except (ImportError, OSError, ValueError):  # the limits on time and output still hold
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def chat(read: Any, messages: list[Any], variables: dict[str, Any], date: str, prompt: bool) -> list[int]:
    """Ids of a conversation; with `prompt` up to where the answer begins."""
    if not read.chat_template:
        raise FaultError("template", "none of its files has one")
    own = sorted(variables.keys() & set_by_call(read))
    if own:
        raise FaultError("refused", f"{', '.join(own)} can't be set from outside")
    _Clock.moment = datetime.datetime.fromisoformat(date)
    try:
        with _bounded_memory():
            text = read.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
    except MemoryError:
        raise FaultError("bounds", f"it takes more than {MEMORY_BYTES >> 20} MiB of memory") from None
    except RecursionError:
        raise FaultError("source", "it nests too deeply") from None
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:
        raise FaultError("source", str(error)) from None
    # A message that a template doesn't expect may raise any error.
    except Exception as error:
        raise FaultError("refused", str(error) or type(error).__name__) from None
    if len(text) > OUTPUT_CHARACTERS:
        raise FaultError("bounds", f"its text is longer than {OUTPUT_CHARACTERS} characters")
    return encode(read, text)


def encode(read: Any, text: str, begin: bool = False) -> list[int]:
    """Ids as apply_chat_template makes them of its text; with `begin` those of any text, the tokenizer's front too."""
    # A tokenizer.json may say to cut or to pad.
    return list(read(text, add_special_tokens=begin, padding=False, truncation=False)["input_ids"])


def answer(request: dict[str, Any]) -> Any:
    do, tokenizer = request.pop("do"), request.pop("tokenizer")
    if do == "open":
        return opened(tokenizer, **request)
    if tokenizer not in _OPEN:
        raise FaultError("closed", "")
    read = _OPEN[tokenizer]
    if do == "chat":
        return chat(read, **request)
    if do == "encode":
        return encode(read, request["text"], request["begin"])
    if do == "id":
        return read.get_vocab().get(request["token"])
    known = [i for i in request["ids"] if 0 <= i < 1 << 31 and read.convert_ids_to_tokens(i) is not None]
    if do == "unknown":
        return sorted(set(request["ids"]) - set(known))
    return read.decode(known, skip_special_tokens=request["skip_special_tokens"])


def main() -> None:
    # Tokenizers have no use for torch, and it takes seconds.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    from transformers.utils import chat_template_utils

    vars(chat_template_utils)["datetime"] = _Clock
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    answers.write(b'{"got": null}\n')
    answers.flush()
    for line in sys.stdin.buffer:
        try:
            reply = {"got": answer(json.loads(line))}
        except FaultError as error:
            reply = {"fault": error.fault, "reason": " ".join(str(error).split())[:400]}
        except MemoryError:
            reply = {"fault": "bounds", "reason": "it takes more memory than there is"}
        except Exception as error:  # a tokenizer that was read may still refuse a text
            reply = {"fault": "refused", "reason": " ".join(str(error).split())[:400] or type(error).__name__}
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
