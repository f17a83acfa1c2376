"""Text to token ids and back: the tokenizer and chat template of a Hugging Face snapshot, without transformers.

Reads tokenizer.json, the chat template and the stop tokens; runs no code from the directory, and needs no network.
Templates run in jinja2's sandbox with what transformers gives them, so the prompt is the one that it would build.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers


class TokenizerError(ValueError):
    """Tokenizer files, or text for them, that can't be used: the rule, what came, and what to do."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a trainer learns from; for a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Not jinja2's own filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class Tokenizer:
    """The tokenizer of one snapshot directory. `stop_token_ids` (sorted) are the ids that end an answer."""

    stop_token_ids: tuple[int, ...]

    def __init__(self, directory: Path):
        """Reads tokenizer.json (required), tokenizer_config.json, chat_template.jinja, generation_config.json and
        config.json (each optional). Raises TokenizerError when one of them can't be read.
        """
        self._directory = directory
        self._backend = _read_backend(directory / "tokenizer.json")
        self._settings = _read_json(directory / "tokenizer_config.json")
        self.stop_token_ids = self._find_stop_token_ids()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, special tokens included: the fewest logits that a target must have."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int:
        """The id of exactly this token, as it stands in tokenizer.json. Raises TokenizerError when there is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{token!r} is not one token of {self._directory / 'tokenizer.json'}; see its vocabulary, or use "
                "encode() for text of several tokens"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised, none is added. Raises TokenizerError."""
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"text must be a str that UTF-8 can hold, got {text!r:.80}") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Raises TokenizerError for an id that the tokenizer doesn't have."""
        ids = [int(i) for i in ids]
        unknown = sorted({i for i in ids if i < 0 or self._backend.id_to_token(i) is None})
        if unknown:
            raise TokenizerError(
                f"ids must be of this tokenizer (below {self.vocab_size}), got {unknown[:8]}; decode with the "
                "tokenizer of the target that produced them"
            )
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the prompt that asks for the next answer: `messages` through the chat template.

        `messages` are dicts with `role` and `content`, as in transformers. Raises TokenizerError for messages that the
        template refuses, and for a snapshot without a template.
        """
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
        return self.encode(self._render(messages))

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        template = self._template
        special = {key: value for key in self._settings if key.endswith("_token") and (value := self._token(key))}
        try:
            return template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **special
            )
        # What a template does with a message that it doesn't expect is Python's error, not jinja2's.
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise TokenizerError(
                f"the chat template of {self._directory} refused the messages: {error}; roles were "
                f"{[message['role'] for message in messages]}"
            ) from error

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        source, path = self._template_source()
        try:
            return _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{path} must hold a jinja2 chat template, got: {error}; repair the file") from error

    def _template_source(self) -> tuple[str, Path]:
        """The template and the file it is from; a file of its own goes before tokenizer_config.json."""
        path = self._directory / "chat_template.jinja"
        if path.is_file():
            return _read_text(path), path
        path = self._directory / "tokenizer_config.json"
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default") if len(named) != 1 else next(iter(named.values()))
            if template is None:
                raise TokenizerError(
                    f"chat_template of {path} must have one named 'default', got {sorted(map(str, named))}; name one so"
                )
        if not isinstance(template, str):
            raise TokenizerError(
                f"a chat needs a template: {self._directory} has no chat_template.jinja and chat_template of "
                f"tokenizer_config.json is {template!r:.80}; use an instruct model, or encode() for plain text"
            )
        return template, path

    def _token(self, key: str) -> str | None:
        """A special token of tokenizer_config.json, which stands there as text or as a dict."""
        value = self._settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _find_stop_token_ids(self) -> tuple[int, ...]:
        path = self._directory / "generation_config.json"
        stops = _read_json(path).get("eos_token_id")
        if stops is None:
            path = self._directory / "config.json"
            stops = _read_json(path).get("eos_token_id")
        ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise TokenizerError(
                f"eos_token_id of {path} must be an id or a list of ids, got {stops!r}; correct the file"
            )
        eos = self._token("eos_token")
        return tuple(sorted({*ids, *([self.id_of(eos)] if eos else [])}))


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of a snapshot directory, or of a model known by name (`smollm2-135m`, fetched on first use).

    Raises TokenizerError when the directory or a file of it can't be used, SnapshotError when the model can't be
    fetched.
    """
    if str(name_or_dir) == "smollm2-135m":
        # Imported here: a directory needs nothing of what fetches and converts that model.
        from dflash.weights import smollm2

        return Tokenizer(smollm2.snapshot_dir())
    directory = Path(name_or_dir).expanduser()
    if not directory.is_dir():
        raise TokenizerError(
            f"a tokenizer is named by a snapshot directory or 'smollm2-135m', got {str(name_or_dir)!r}, which is "
            "neither; check the path"
        )
    return Tokenizer(directory)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} must be a readable UTF-8 file, got: {error}; fetch the snapshot anew") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} must be JSON, got: {error}; fetch the snapshot anew") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, got {type(content).__name__}; fetch the snapshot anew")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        remedy = "fetch the snapshot anew"
        if (path.parent / "tensorstore_index.json").is_file():
            remedy = "EasyDeL saves none: copy the tokenizer's files from the snapshot that the weights are of"
        raise TokenizerError(f"a snapshot must have a tokenizer.json, {path} is missing; {remedy}")
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"{path} must be a tokenizer of the tokenizers library, got: {error}") from error
    # Some files were saved with settings for training, which would cut or pad every prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend
