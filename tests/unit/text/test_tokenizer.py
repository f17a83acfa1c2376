"""The tokenizer: the ids and prompts that transformers would make, and one clear error for each thing that is wrong."""

import datetime
import json
import resource
import time

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dflash.text import worker
from dflash.text.tokenizer import TokenizerError, load_tokenizer, template_variables

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
    backend.enable_padding(length=8, pad_id=1, pad_token="</s>")
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
        "{{ strftime_now('%Y-%m-%d') }}{% if tools is none and documents is none %} no tools{% endif %}"
    )
    tokenizer = load_tokenizer(write_snapshot(tmp_path, template))
    message = {"role": "user", "content": "<a> & 'é'"}
    expected = '{"role": "user", "content": "<a> & \'é\'"}2026-01-01 no tools'
    assert prompt(tokenizer, [message, message]) == expected


DATED = "{{ strftime_now('%Y-%m-%d') }}"


def test_the_date_of_a_template_is_one_day_unless_another_is_asked_for(tmp_path):
    write_snapshot(tmp_path, DATED)
    assert prompt(load_tokenizer(tmp_path), USER) == "2026-01-01"
    assert prompt(load_tokenizer(tmp_path, template_date="2025-12-05"), USER) == "2025-12-05"
    before = datetime.date.today().isoformat()
    told = prompt(load_tokenizer(tmp_path, template_date="today"), USER)
    assert told in (before, datetime.date.today().isoformat())
    with pytest.raises(ValueError, match="YYYY-MM-DD or today, got '5 December'"):
        load_tokenizer(tmp_path, template_date="5 December")


def test_variables_of_a_template_are_the_tokenizers_and_the_calls(tmp_path):
    write_snapshot(tmp_path, "{{ effort }} {% if enable_thinking is defined and not enable_thinking %}off{% endif %}")
    given = template_variables(["effort=low", "enable_thinking=false"])
    assert given == {"effort": "low", "enable_thinking": False}
    tokenizer = load_tokenizer(tmp_path, variables=given)
    assert prompt(tokenizer, USER) == "low off"
    assert tokenizer.decode(tokenizer.encode_chat(USER, effort="high")) == "high off"
    assert tokenizer.facts == {"chat_template_args": given, "template_date": "2026-01-01"}
    assert prompt(load_tokenizer(tmp_path), USER) == " "
    with pytest.raises(ValueError, match="tokenize can't be set"):
        tokenizer.encode_chat(USER, tokenize=False)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "documents", "tokenize", "self"])
def test_what_the_call_of_a_template_sets_is_no_variable(tmp_path, name):
    folder = write_snapshot(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(TokenizerError, match=f"does not set itself; got {name}: leave out"):
        load_tokenizer(folder, variables=template_variables(["effort=low", f"{name}=1"]))
    # What a template may be given, though transformers gives it too.
    assert prompt(load_tokenizer(folder, variables={"bos_token": "x"}), USER) == USER[0]["content"]


@pytest.mark.parametrize("word", ["", "x", "=1", "a b=1"])
def test_a_variable_that_is_none_is_refused(word):
    with pytest.raises(ValueError, match="is written name=value"):
        template_variables([word])


@pytest.mark.parametrize("word", ["x=NaN", "x=1e999", "x=-Infinity", 'x="\\ud83d"', "x=\udcff"])
def test_a_variable_that_no_result_could_record_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match="JSON values"):
        load_tokenizer(write_snapshot(tmp_path), variables=template_variables([word]))


@pytest.mark.parametrize("variables", ["x=1", {"x": object()}, 5, [1]])
def test_variables_are_json_values_by_name(tmp_path, variables):
    with pytest.raises(ValueError, match="JSON values by their names"):
        load_tokenizer(write_snapshot(tmp_path), variables=variables)


def test_a_variable_has_one_value():
    with pytest.raises(ValueError, match="x twice"):
        template_variables(["x=1", "y=2", "x=3"])


@pytest.mark.parametrize("date", ["5 December", "20251205", "2025-W49-5", "", None, 5])
def test_a_day_is_written_one_way(tmp_path, date):
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        load_tokenizer(write_snapshot(tmp_path), template_date=date)


def test_a_given_answer_is_what_the_template_writes(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path, generation_config={"eos_token_id": [0, 1]}))
    asked, answer = tokenizer.encode_answered(TALK[:2])
    assert asked == tokenizer.encode_chat(USER)
    # The template's own end, not the lowest of the stop tokens.
    assert tokenizer.decode(answer, skip_special_tokens=False) == " hello</s>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no stop token after the answer"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", "does not begin with the p"),
    ],
)
def test_a_template_that_does_not_write_answers_is_refused(tmp_path, template, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(write_snapshot(tmp_path, template)).encode_answered(TALK[:2])


def test_a_template_file_goes_before_the_config(tmp_path):
    write_snapshot(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert prompt(load_tokenizer(tmp_path), USER) == "from the file"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert prompt(load_tokenizer(write_snapshot(tmp_path, named)), USER) == "plain"


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
    with pytest.raises(ValueError, match=r"template.*none in chat_template\.jinja"):
        tokenizer.encode_chat(USER)


def test_a_name_or_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'smollm2-135m', got '.*absent'"):
        load_tokenizer(tmp_path / "absent")


def test_a_snapshot_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} .*tokenizer .*fetch the snapshot"):
        load_tokenizer(tmp_path)
    (tmp_path / "tensorstore_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"EasyDeL saves none: copy .*tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer .*transformers"),
        ("tokenizer.json", '{"model": {"type": "none"}}', "tokenizer .*transformers"),
        ("tokenizer_config.json", "{", "is no valid JSON "),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "code .*never"),
        ("generation_config.json", '{"eos_token_id": ', "is no valid JSON "),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id .*got '2'"),
        ("generation_config.json", '{"eos_token_id": [2, true]}', r"eos_token_id .*got \[2, True\]"),
        ("config.json", '{"eos_token_id": -1}', "eos_token_id .*got -1"),
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
    with pytest.raises(ValueError, match="is no valid JSON "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "template, .*instruct model"),
        ([{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}], r"no default .*\['rag', 'tools'\]"),
        ("{% for m in messages %}", "jinja2, got: Unexpected end"),
        ("{{ messages[0]['content'] + 1 }}", r"refused .*concatenate.*\['user'\]"),
        ("{{ nothing.at.all }}", "refused the messages: 'nothing' is undefined"),
        ("{{ raise_exception('no chat today') }}", "refused the messages: no chat today"),
    ],
    ids=["none", "names", "syntax", "type", "undefined", "raised"],
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
        ([{"role": "system", "content": "x"}], r"only user and assistant .*\['system'\]"),
    ],
    ids=["empty", "text", "none", "texts", "role", "template"],
)
def test_messages_that_are_none_are_refused(tmp_path, messages, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(write_snapshot(tmp_path)).encode_chat(messages)


def test_text_and_ids_that_cannot_be_converted_are_refused(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    with pytest.raises(ValueError, match=r"text .*UTF-8 .*got 'a.*ud800'"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="text must be a str"):
        tokenizer.encode(None)
    with pytest.raises(ValueError, match="'Hello' is not one token"):
        tokenizer.id_of("Hello")


def test_an_id_that_the_tokenizer_does_not_have_is_no_text(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    assert tokenizer.decode([4, 263, -1, 10**7, 5]) == tokenizer.decode([4, 5])
    assert tokenizer.unknown([4, 263, -1, 263]) == [-1, 263]


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
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    for messages in (USER, TALK):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt(ours, messages) == text
        assert ours.encode_chat(messages) == theirs(text, add_special_tokens=False, padding=False)["input_ids"]


def _added(content, **more):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | more


def _extra(folder):
    """`added_tokens_decoder` of the config has a token that tokenizer.json has not."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"263": _added("<|extra|>", special=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _only(folder, **kept):
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))


def _cut(folder, prefix):
    """A tokenizer.json that puts a beginning before every text, as Llama's."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A", special_tokens=[(prefix, SPECIAL.index(prefix))]
    )
    backend.save(str(folder / "tokenizer.json"))


def _padded(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"<unused{i}>" for i in range(9)])
    backend.save(str(folder / "tokenizer.json"))


def _write(name, content):
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


DIRECTORIES = {
    "as written": lambda folder: None,
    "a llama": _write("config.json", {"model_type": "llama"}),
    "a qwen3": _write("config.json", {"model_type": "qwen3"}),
    "a gpt_oss": _write("config.json", {"model_type": "gpt_oss"}),
    "a class of the config": lambda f: _only(
        f, tokenizer_class="Qwen2Tokenizer", eos_token="</s>", chat_template=CHATML
    ),
    "special tokens in a map": lambda f: (
        _only(f, chat_template=CHATML),
        _write("special_tokens_map.json", {"bos_token": "<s>", "eos_token": _added("</s>")})(f),
    ),
    "added tokens in the config": _extra,
    "added tokens in their own file": _write("added_tokens.json", {"<|extra|>": 263}),
    "several templates": lambda f: _only(
        f,
        bos_token="<s>",
        chat_template=[{"name": "default", "template": "{{ bos_token }}x"}, {"name": "tool_use", "template": "y"}],
    ),
    "a template of its own file": _write("chat_template.jinja", "{{ eos_token }}{{ messages[0].content }}"),
    "templates of their own files": lambda f: (
        _write("chat_template.jinja", "{{ messages[0].content }}!")(f),
        (f / "additional_chat_templates").mkdir(),
        _write("additional_chat_templates/tool_use.jinja", "tools")(f),
    ),
    "a beginning before every text": lambda f: _cut(f, "<s>"),
    "a padded vocabulary": _padded,
    "no template": lambda f: _only(f, bos_token="<s>"),
    "no config": lambda f: (f / "tokenizer_config.json").unlink(),
    "an end that is no token": lambda f: _only(f, eos_token="<|end|>", chat_template=CHATML),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", DIRECTORIES)
def test_any_directory_gives_the_ids_of_autotokenizer(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    DIRECTORIES[name](write_snapshot(tmp_path))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    for text in (*TEXTS, "<|extra|> <unused3> </s>x"):
        ids = theirs(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    eos = theirs.eos_token_id
    assert ours.stop_token_ids == (() if eos is None else (eos,))
    for messages in (USER, TALK):
        if theirs.chat_template is None:
            with pytest.raises(ValueError, match="a chat needs a template"):
                ours.encode_chat(messages)
            continue
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, padding=False, truncation=False)
        assert ours.encode_chat(messages) == expected["input_ids"]


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


# ---- templates are programs


LONG = "x" * 1000
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested messages": "".join(f"{{% for m{i} in range(9000) %}}" for i in range(4)) + "{% endfor %}" * 4,
    "many small texts": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
}
LARGE = {
    "a multiplied string": "{{ 'a' * 10 ** 10 }}",
    "a multiplied list": "{{ [0] * 10 ** 10 }}",
    "a doubled string": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a centred string": "{{ 'a' | center(10 ** 10) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a long text": "{% for i in range(50000) %}{{ '" + LONG + "' }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch, name):
    monkeypatch.setattr(worker, "RENDER_S", 0.5)
    tokenizer = load_tokenizer(write_snapshot(tmp_path, ENDLESS[name]))
    begun = time.monotonic()
    with pytest.raises(ValueError, match="must end within bounds"):
        tokenizer.encode_chat(USER)
    assert time.monotonic() - begun < 120
    # The next one is served as if nothing had been.
    assert prompt(load_tokenizer(write_snapshot(tmp_path)), USER).endswith("<|assistant|>")


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_fills_the_memory_is_ended(tmp_path, name):
    tokenizer = load_tokenizer(write_snapshot(tmp_path, LARGE[name]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"must end within bounds|refused the messages") as error:
        tokenizer.encode_chat(USER)
    assert len(str(error.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert prompt(load_tokenizer(write_snapshot(tmp_path)), USER).endswith("<|assistant|>")


@pytest.mark.parametrize(
    "template",
    [
        "{% break %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{% if %}",
        "{{ 1 +",
    ],
    ids=["break", "parentheses", "minus", "if", "cut"],
)
def test_what_python_can_not_compile_is_one_sentence(tmp_path, template):
    with pytest.raises(ValueError, match=r"jinja2, got: |within bounds") as error:
        load_tokenizer(write_snapshot(tmp_path, template)).encode_chat(USER)
    assert len(str(error.value)) < 1000


def test_messages_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="messages must be JSON"):
        load_tokenizer(write_snapshot(tmp_path)).encode_chat([{"role": "user", "content": object()}])


def test_a_worker_that_was_killed_is_replaced(tmp_path):
    tokenizer = load_tokenizer(write_snapshot(tmp_path))
    expected = tokenizer.encode_chat(USER)
    worker.WORKER._process.kill()
    worker.WORKER._process.wait()
    assert tokenizer.encode_chat(USER) == expected
