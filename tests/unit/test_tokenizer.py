"""The tokenizer: the ids and prompts that transformers would make, and one clear error for each thing that is wrong."""

import datetime
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dflash.tokenizer import load_tokenizer

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHATML = (
    "{{ bos_token }}\n"
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'user' %}\n"
    "<|user|>{{ message['content'] }}{{ eos_token }}\n"
    "    {% elif message['role'] == 'assistant' %}\n"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}\n"
    "    {% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = [{"role": "user", "content": "Hi 12!"}]
TALK = [*USER, {"role": "assistant", "content": " hello"}, {"role": "user", "content": "naïve\n日本 🎉"}]

TEXTS = [
    "Hello world",
    "  leading and trailing  ",
    "",
    "2024-11-21 3.14159 1,000,000",
    "x1y22z333",
    "def f(x):\n\treturn x**2  # ok\n",
    "naïve café — “quotes”",
    "日本語のテキスト",
    "👩‍👩‍👧 emoji 🎉",
    "Привет, мир!",
    "السلام عليكم",
    "\n\n\n",
    "    indented\n        more",
    "don't I'll we've",
    "½ ² ٣ ๔",
    "tab\tcr\r\nend",
    "combining e\u0301 and \u00c5",
    "a" * 300,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "<s>not a special text</s>",
    "<|im_start|>user\nhi<|im_end|>",
]


def write_snapshot(folder, template=CHATML, **files):
    """A snapshot directory with a tiny byte-level tokenizer; `files` are further JSON files by stem."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "He", "Hel", "in"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("H", "e"), ("He", "l"), ("i", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    # A real file was saved so: left on, they would cut and pad every prompt.
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>"}
    config = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
    for stem, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def prompt(tokenizer, messages):
    return tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_survives_a_round_trip(tmp_path, text):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_encode_adds_nothing_and_recognises_special_tokens(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    assert tokenizer.encode("Hel") == [tokenizer.id_of("Hel")]
    assert tokenizer.encode("<|user|>in</s>") == [2, tokenizer.id_of("in"), 1]
    assert tokenizer.decode([2, tokenizer.id_of("in"), 1]) == "in"
    assert tokenizer.vocab_size == 4 + 256 + 3


def test_a_chat_is_what_the_template_says(tmp_path):
    tokenizer = load_tokenizer(str(write_snapshot(tmp_path)))
    assert prompt(tokenizer, USER) == "<s>\n<|user|>Hi 12!</s>\n<|assistant|>"
    expected = "<s>\n<|user|>Hi 12!</s>\n<|assistant|> hello</s>\n<|user|>naïve\n日本 🎉</s>\n<|assistant|>"
    assert prompt(tokenizer, TALK) == expected
    assert tokenizer.encode_chat(TALK).count(tokenizer.id_of("</s>")) == 3


def test_what_templates_of_real_models_use(tmp_path):
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{% if tools is none and documents is none %} no tools{% endif %}"
    )
    tokenizer = load_tokenizer(write_snapshot(tmp_path, template))
    message = {"role": "user", "content": "<a> & 'é'"}
    years = {str(datetime.date.today().year), str((datetime.date.today() + datetime.timedelta(days=1)).year)}
    expected = '{"role": "user", "content": "<a> & \'é\'"}'
    assert prompt(tokenizer, [message, message]) in {f"{expected}{year} no tools" for year in years}


def test_a_template_file_goes_before_the_config(tmp_path):
    write_snapshot(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert prompt(load_tokenizer(tmp_path), USER) == "from the file"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert prompt(load_tokenizer(write_snapshot(tmp_path, named)), USER) == "plain"
    assert prompt(load_tokenizer(write_snapshot(tmp_path, named[:1])), USER) == "tools"


def test_a_template_runs_in_a_sandbox(tmp_path):
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        tokenizer = load_tokenizer(write_snapshot(tmp_path, template))
        with pytest.raises(ValueError, match="is unsafe"):
            tokenizer.encode_chat(USER)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (1, 7)),
        ({"eos_token_id": [9, 7, 1]}, {}, (1, 7, 9)),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, (1, 9)),
        ({}, {"eos_token_id": 0}, (0, 1)),
        ({}, {}, (1,)),
    ],
    ids=["generation", "list", "null", "config", "tokenizer"],
)
def test_stop_tokens_come_from_every_file_that_names_them(tmp_path, generation, config, expected):
    write_snapshot(tmp_path, generation_config=generation, config=config)
    assert load_tokenizer(tmp_path).stop_token_ids == expected


def test_a_base_model_without_a_config_still_reads_text(tmp_path):
    write_snapshot(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_token_ids == ()
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    with pytest.raises(ValueError, match=r"a chat needs a template: .* has no chat_template\.jinja"):
        tokenizer.encode_chat(USER)


def test_a_name_or_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"snapshot directory or 'smollm2-135m', got '.*absent', which is neither"):
        load_tokenizer(tmp_path / "absent")


def test_a_snapshot_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; fetch the snapshot anew"):
        load_tokenizer(tmp_path)
    (tmp_path / "tensorstore_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is missing; EasyDeL saves none: copy the tokenizer's files from the snap"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "must be a tokenizer of the tokenizers library"),
        ("tokenizer.json", '{"model": {"type": "none"}}', "must be a tokenizer of the tokenizers library"),
        ("tokenizer_config.json", "{", "must be JSON, got: "),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"eos_token": "<stop>"}', "'<stop>' is not one token of"),
        ("generation_config.json", '{"eos_token_id": ', "must be JSON, got: "),
        ("generation_config.json", '{"eos_token_id": "2"}', "must be an id or a list of ids, got '2'"),
        ("generation_config.json", '{"eos_token_id": [2, true]}', r"must be an id or a list of ids, got \[2, True\]"),
        ("config.json", '{"eos_token_id": -1}', "must be an id or a list of ids, got -1"),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, name, content, said):
    write_snapshot(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    write_snapshot(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be a readable UTF-8 file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "a chat needs a template: .* is None; use an instruct model"),
        (12, "a chat needs a template: .* is 12;"),
        ([{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}], r"one named 'default', got \['rag'"),
        ("{% for m in messages %}", "must hold a jinja2 chat template, got: Unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", r"refused the messages: .*concatenate.*; roles were \['user'\]"),
        ("{{ nothing.at.all }}", "refused the messages: 'nothing' is undefined"),
        ("{{ raise_exception('no chat today') }}", "refused the messages: no chat today"),
    ],
    ids=["none", "number", "names", "syntax", "type", "undefined", "raised"],
)
def test_a_chat_template_that_fails_is_one_error(tmp_path, template, said):
    tokenizer = load_tokenizer(write_snapshot(tmp_path, template))
    assert tokenizer.encode("in") == [tokenizer.id_of("in")]  # plain text needs no template
    with pytest.raises(ValueError, match=said):
        tokenizer.encode_chat(USER)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], r"got \[\]"),
        ("Hello", "got 'Hello'"),
        (None, "got None"),
        (["Hello"], "message 0 is 'Hello'"),
        ([*USER, {"content": "x"}], r"message 1 is \{'content': 'x'\}"),
        ([{"role": "system", "content": "x"}], r"only user and assistant speak here; roles were \['system'\]"),
    ],
    ids=["empty", "text", "none", "texts", "role", "template"],
)
def test_messages_that_are_none_are_refused(tmp_path, messages, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(write_snapshot(tmp_path)).encode_chat(messages)


def test_text_and_ids_that_cannot_be_converted_are_refused(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    with pytest.raises(ValueError, match=r"text must be a str that UTF-8 can hold, got 'a.*ud800'"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="text must be a str"):
        tokenizer.encode(None)
    with pytest.raises(ValueError, match=r"below 263\), got \[-1, 263\]"):
        tokenizer.decode([4, 263, -1])
    with pytest.raises(ValueError, match="'Hello' is not one token"):
        tokenizer.id_of("Hello")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- for m in messages -%}\n  {{- m['role'] | upper }}: {{ m.content | trim }}\n{% endfor %}{{ eos_token }}",
        "{% for m in messages %}{{ m | tojson(indent=2) }}{% if loop.last %}{% continue %}{% endif %},{% endfor %}",
        "{% set s = namespace(n=0) %}{% for _ in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{{bos_token}}",
        "{% if tools %}tools{% endif %}{% generation %}{{ messages[0].content }}{% endgeneration %}\n{{ absent }}\n",
    ],
    ids=["chatml", "whitespace", "tojson", "namespace", "generation"],
)
def test_prompts_equal_those_of_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    write_snapshot(tmp_path, template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    for messages in (USER, TALK):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt(ours, messages) == text
        assert ours.encode_chat(messages) == theirs(text, add_special_tokens=False, padding=False)["input_ids"]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2-135m")


@pytest.mark.model
def test_smollm2_speaks_chatml_with_its_own_system_prompt(smollm2):
    assert prompt(smollm2, [{"role": "user", "content": "Hi 123"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 123<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.stop_token_ids == (smollm2.id_of("<|im_end|>"),) == (2,)
    assert smollm2.vocab_size == 49152
    own = prompt(smollm2, [{"role": "system", "content": "Be brief."}, *USER])
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_smollm2_text_survives_a_round_trip(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


@pytest.mark.model
def test_smollm2_has_a_token_for_each_digit(smollm2):
    assert smollm2.encode("2024") == [smollm2.id_of(digit) for digit in "2024"]


@pytest.mark.model
@pytest.mark.oracle
def test_smollm2_ids_equal_those_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    from dflash.weights.smollm2 import snapshot_dir

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(snapshot_dir()))
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        messages = [{"role": "user", "content": text}, *TALK[1:]]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert smollm2.encode_chat(messages) == theirs(rendered, add_special_tokens=False)["input_ids"]
