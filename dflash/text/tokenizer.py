"""Text to token ids and back, by transformers itself: the ids of a snapshot are those of its AutoTokenizer.

It runs in a process of its own (`worker`), without torch, without a network, and without any code of the snapshot.
"""

import datetime
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dflash.config import UserError
from dflash.host.disk import expanded, read_object
from dflash.text.worker import WORKER, WorkerFaultError
from dflash.weights import named
from dflash.weights.snapshot import ARRAY_INDEX

# What templates that print the date take for today, so that a prompt is the same tomorrow.
FIXED_DAY = "2026-01-01"
_NUMBERS = itertools.count()


class TokenizerError(UserError, ValueError):
    """Tokenizer files, or text for them, that can't be used: the rule, what came, and what to do."""


class Tokenizer:
    """The tokenizer and chat template of one snapshot directory.

    `vocab_size` is one more than the highest id, special tokens included; `stop_token_ids` (sorted) are the ids that
    end an answer.
    """

    vocab_size: int
    stop_token_ids: tuple[int, ...]

    def __init__(self, directory: Path, *, variables: Mapping[str, Any] | None = None, template_date: str = FIXED_DAY):
        """`variables` go to the template with every conversation; `template_date` is what it takes for today: an ISO
        date, or `today`. Raises TokenizerError if transformers reads no tokenizer there.
        """
        self._directory = directory
        self.variables, self.template_date = _json_values(variables or {}), template_date
        if template_date != "today" and not _is_day(template_date):
            raise TokenizerError(f"a template's date is YYYY-MM-DD or today, got {template_date!r:.60}")
        self._number = next(_NUMBERS)
        _read_json(directory / "tokenizer_config.json")  # transformers takes what is no JSON, such as half a character
        facts = self._open()
        if taken := [name for name in self.variables if name in facts["set_by_call"]]:
            raise TokenizerError(
                f"variables of a chat template are those that its call does not set itself; got {', '.join(taken)}: "
                "leave out what is not the template's own"
            )
        self.vocab_size = facts["vocab_size"]
        self.stop_token_ids = self._find_stop_token_ids(facts["eos"])

    @property
    def facts(self) -> dict[str, Any]:
        """What decides a prompt besides its messages, as results record it."""
        return {"chat_template_args": self.variables, "template_date": self.template_date}

    def id_of(self, token: str) -> int:
        """The id of exactly this token, as the vocabulary has it. Raises TokenizerError if there is none."""
        token_id: int | None = self._ask("id", token=token)
        if token_id is None:
            raise TokenizerError(
                f"{token!r} is not one token of {self._directory}; see its vocabulary, or use encode() for text of "
                "several tokens"
            )
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it are recognised, none is added. Raises TokenizerError."""
        return self._encode(text, begin=False)

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a prompt for a base model: plain text with what the tokenizer begins every text with."""
        return self._encode(text, begin=True)

    def _encode(self, text: str, begin: bool) -> list[int]:
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"text must be a str that UTF-8 can hold, got {text!r:.80}") from error
        ids: list[int] = self._ask("encode", text=text, begin=begin)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. An id that the tokenizer doesn't have, as of a padded head, is no text."""
        text: str = self._ask("decode", ids=[int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return text

    def unknown(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that the tokenizer doesn't have, sorted."""
        unknown: list[int] = self._ask("unknown", ids=[int(i) for i in ids])
        return unknown

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of the prompt that asks for the next answer: `messages` through the chat template.

        `messages` are dicts with `role` and `content`, as in transformers; `variables` go to the template beside the
        tokenizer's own. Raises TokenizerError for what the template refuses, and for a snapshot without one.
        """
        return self._chat(messages, variables, prompt=True)

    def encode_answered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[list[int], list[int]]:
        """A conversation that ends with the assistant's turn: ids of its prompt, and of that answer with its end.

        The template writes both: the prompt is the front of the whole, the rest goes up to and with the first stop
        token after the answer's own words. Raises TokenizerError where a template writes neither.
        """
        prompt = self._chat(messages[:-1], variables, prompt=True)
        whole = self._chat(messages, variables, prompt=False)
        answer = whole[len(prompt) :]
        ends = [i for i, token in enumerate(answer) if token in self.stop_token_ids]
        if whole[: len(prompt)] != prompt or not ends:
            what = "does not begin with the prompt" if ends else "has no stop token after the answer"
            raise TokenizerError(
                f"a given answer is what the chat template writes after the prompt, and with that of {self._directory} "
                f"the conversation {what}; let the target answer (--answers target)"
            )
        return prompt, answer[: ends[-1] + 1]

    def _chat(self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any], prompt: bool) -> list[int]:
        rule = 'messages must be a list of at least one dict like {"role": "user", "content": "Hello"}'
        if not isinstance(messages, list | tuple) or not messages:
            raise TokenizerError(f"{rule}, got {messages!r:.80}")
        faults = [
            f"message {i} is {message!r:.80}"
            for i, message in enumerate(messages)
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str))
        ]
        if faults:
            raise TokenizerError(f"{rule}, but " + "; ".join(faults[:4]))
        date = datetime.datetime.now().isoformat() if self.template_date == "today" else self.template_date
        request = {"variables": self.variables | variables, "date": date, "prompt": prompt}
        roles = f"roles were {[message['role'] for message in messages]}"
        try:
            ids: list[int] = self._request("chat", messages=[dict(message) for message in messages], **request)
        except (TypeError, RecursionError) as error:
            raise TokenizerError(f"messages must be JSON values, got {messages!r:.80}: {error}") from error
        except WorkerFaultError as error:
            template = f"the chat template of {self._directory}"
            if error.fault == "template":
                raise TokenizerError(
                    f"a chat needs a template, and {self._directory} has none in chat_template.jinja or "
                    "tokenizer_config.json; use an instruct model, or plain text (--raw, encode())"
                ) from error
            if error.fault == "source":
                raise TokenizerError(f"{template} must be one of jinja2, got: {error}; repair the file") from error
            if error.fault == "bounds":
                raise TokenizerError(
                    f"{template} must end within bounds: {error}; {roles}; repair the template"
                ) from error
            raise TokenizerError(f"{template} or its tokenizer refused the messages: {error}; {roles}") from error
        return ids

    def _open(self) -> dict[str, Any]:
        # Where it lies now: a relative path must still be the same after a chdir.
        request = {"do": "open", "tokenizer": self._number, "directory": str(self._directory.resolve())}
        try:
            answer: dict[str, Any] = WORKER.ask(request)
        except WorkerFaultError as error:
            remedy = "fetch the snapshot again"
            if (self._directory / ARRAY_INDEX).is_file():
                remedy = "EasyDeL saves none: copy the tokenizer's files from the snapshot that the weights are of"
            raise TokenizerError(
                f"{self._directory} must hold a tokenizer that transformers reads, got: {error}; {remedy}"
            ) from error
        return answer

    def _ask(self, do: str, **request: Any) -> Any:
        try:
            return self._request(do, **request)
        except WorkerFaultError as error:
            rule = "must end within bounds" if error.fault == "bounds" else "must take any text"
            raise TokenizerError(f"the tokenizer of {self._directory} {rule}, got: {error}") from error

    def _request(self, do: str, **request: Any) -> Any:
        """What the process answers; it may have been ended since the last request, or have closed this tokenizer."""
        request |= {"do": do, "tokenizer": self._number}
        try:
            return WORKER.ask(request)
        except WorkerFaultError as error:
            if error.fault != "closed":
                raise
        self._open()
        return WORKER.ask(request)

    def _find_stop_token_ids(self, eos: int | None) -> tuple[int, ...]:
        path = self._directory / "generation_config.json"
        stops = _read_json(path).get("eos_token_id")
        if stops is None:
            path = self._directory / "config.json"
            stops = _read_json(path).get("eos_token_id")
        ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise TokenizerError(
                f"eos_token_id of {path} must be an id or a list of ids, got {stops!r}; correct the file"
            )
        return tuple(sorted({*ids, *([] if eos is None else [eos])}))


def load_tokenizer(
    name_or_dir: str | Path, *, variables: Mapping[str, Any] | None = None, template_date: str = FIXED_DAY
) -> Tokenizer:
    """The tokenizer of a snapshot directory, or of a model known by name (`smollm2-135m`, fetched on first use).

    `variables` and `template_date` as for `Tokenizer`. Raises TokenizerError if the directory or one of its files can't
    be used, SnapshotError if the model can't be fetched.
    """
    if str(name_or_dir) == "smollm2-135m":
        # Imported here, because a directory does not need what fetches and converts that model.
        from dflash.weights import smollm2

        return Tokenizer(smollm2.snapshot_dir(), variables=variables, template_date=template_date)
    directory = expanded(named.directory_of(name_or_dir))
    if not directory.is_dir():
        raise TokenizerError(
            f"a tokenizer is that of a snapshot directory, a model of the hub or 'smollm2-135m', got "
            f"{str(name_or_dir)!r}, which is none of them; check the path"
        )
    return Tokenizer(directory, variables=variables, template_date=template_date)


def template_variables(words: Iterable[str]) -> dict[str, Any]:
    """Variables of a chat template from `name=value` words: a value is JSON, else text. Raises TokenizerError."""
    variables = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise TokenizerError(f"a variable of a chat template is written name=value, got {word!r}")
        if name in variables:
            raise TokenizerError(f"a variable of a chat template has one value, got {name} twice")
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


def _json_values(variables: Any) -> dict[str, Any]:
    """Variables of a chat template, which results record. Raises TokenizerError for what no JSON can hold."""
    try:
        json.dumps(dict(variables), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"variables of a chat template are JSON values by their names, got {variables!r:.80}: {error}"
        ) from None
    return dict(variables)


def _is_day(text: Any) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    return read_object(path, TokenizerError, "fetch the snapshot again") if path.exists() else {}
