"""One request over HTTP: what is sent, how answers are cut and counted, and what is said when one fails."""

import asyncio
import dataclasses

import pytest
from hostile_server import event, head, hostile
from stub_server import serving

from dflash import load_tokenizer
from dflash.decoding.sampling import Sampling
from dflash.serving.client import Completion, OpenAIClient, Reply, SglangClient
from dflash.serving.connection import Connection, ServingError
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

BUDGET = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("client") / "target"
    return load_tokenizer(write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260)))


@pytest.fixture(scope="module")
def letters(tokenizer):
    return [tokenizer.encode(chr(97 + i))[0] for i in range(26)]


@pytest.fixture
def client(tokenizer):
    """Asks the server at a URL."""

    def client(url, api="openai", model="m", **sampling):
        kind = OpenAIClient if api == "openai" else SglangClient
        connection, rule = Connection(url, timeout_s=20), Sampling(**sampling)
        return kind(connection, model=model, tokenizer=tokenizer, sampling=rule)

    return client


@pytest.fixture
def ask(client, tokenizer, letters):
    """Asks a stub with these settings: (completion, its request)."""

    def ask(api="openai", **settings):
        with serving(**({"letters": letters} | settings)) as (url, requests):
            asking = client(url, api, model="")
            ids = tokenizer.encode("a question")
            asking.learn(ids, unnamed="nobody")
            requests.clear()
            return asyncio.run(asking.ask(ids, BUDGET)), requests[0]

    return ask


@pytest.mark.parametrize("api", ["openai", "sglang"])
def test_ids_are_sent_and_taken_where_a_server_can(ask, tokenizer, api):
    answer, request = ask(api)
    ids = tokenizer.encode("a question")
    assert (request["input_ids"] if api == "sglang" else request["prompt"]) == ids
    assert answer.text == "klmnopqr"
    assert answer.tokens == tuple(tokenizer.encode("klmnopqr"))
    assert answer.exact
    assert answer.counted == answer.emitted == BUDGET
    assert 0 < answer.ttft_s <= answer.seconds


def test_a_request_is_greedy_and_asks_for_nothing_that_kills_a_server(ask):
    _, request = ask("openai")
    assert request["temperature"] == 0
    assert request["model"] == "stub"
    plain = {"model", "prompt", "max_tokens", "temperature", "stream"}
    assert set(request) == plain | {"stream_options", "return_token_ids"}
    _, request = ask("sglang")
    assert request["sampling_params"] == {"temperature": 0, "max_new_tokens": BUDGET}
    assert set(request) == {"input_ids", "sampling_params", "stream"}


def test_settings_of_sampling_are_sent(client):
    drawn = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    _, request = client("http://127.0.0.1:1", **drawn).request([1], BUDGET)
    assert {name: request[name] for name in request if name not in ("model", "prompt", "max_tokens", "stream")} == (
        drawn | {"stream_options": {"include_usage": True}, "return_token_ids": True}
    )
    _, request = client("http://127.0.0.1:1", "sglang", **drawn, top_k=4).request([1], BUDGET)
    assert request["sampling_params"] == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 4, "sampling_seed": 5, "max_new_tokens": BUDGET
    }  # fmt: skip


def test_text_is_sent_and_encoded_again_where_a_server_has_no_ids(ask, tokenizer):
    answer, request = ask(takes_ids=False, gives_ids=False, letters=[])
    assert request["prompt"] == "a question"
    assert "return_token_ids" not in request
    assert not answer.exact
    assert answer.tokens == tuple(tokenizer.encode("klmnopqr"))
    assert answer.counted == BUDGET


@pytest.mark.parametrize("code", [400, 422, 500])
def test_a_server_that_takes_and_tells_the_least_is_asked_so(ask, tokenizer, code):
    answer, request = ask(takes_ids=False, gives_ids=False, counts=False, letters=[], refuses_with=code)
    assert set(request) == {"model", "prompt", "max_tokens", "temperature", "stream"}
    assert answer.tokens == tuple(tokenizer.encode("klmnopqr"))
    assert answer.counted == BUDGET


@pytest.mark.parametrize("api", ["openai", "sglang"])
def test_an_answer_is_cut_to_the_budget_before_it_is_counted(ask, api):
    answer, _ = ask(api, over=4)
    assert answer.emitted == BUDGET + 4
    assert answer.counted == len(answer.tokens) == BUDGET
    plain, _ = ask(api)
    assert plain.divergence(answer, BUDGET) is None


def test_an_answer_ends_with_its_stop_token_which_counts(ask, tokenizer, letters):
    stop = tokenizer.stop_token_ids[0]
    stopping = [stop if chr(97 + i) == "n" else token for i, token in enumerate(letters)]
    answer, _ = ask(letters=stopping)
    assert answer.tokens == (*tokenizer.encode("klm"), stop)
    assert answer.counted == 4
    assert answer.emitted == BUDGET


def test_a_server_that_reads_another_prompt_is_refused(ask):
    with pytest.raises(ServingError, match=r"prompt of 10 tokens.* read 11: .*tokenizer"):
        ask(adds=1)


def test_a_stream_that_is_cut_is_no_answer(client, letters):
    with serving(letters=letters, cut=True) as (url, _), pytest.raises(ServingError, match="after 1 characters"):
        asyncio.run(client(url).ask([5], BUDGET))


def test_a_refusal_says_what_the_server_said(client, letters):
    with serving(letters=letters, counts=False) as (url, _), pytest.raises(ServingError) as error:
        asyncio.run(client(url).ask([5], BUDGET))
    assert str(error.value).startswith(f"{url}/v1/completions refused a request with 400: ")
    # What the stub adds to it has the form of a secret.
    assert "unknown field stream_options ***" in str(error.value)


SHAPES = {
    "a number": (b"7", "an event that is no object: 7"),
    "a list": (b"[]", "an event that is no object"),
    "text": (b'"text"', "an event that is no object"),
    "choices as an object": (b'{"choices": {"text": "a"}}', "choices that is no list"),
    "a choice as text": (b'{"choices": ["a"]}', "an entry of choices that is no object"),
    "two choices": (b'{"choices": [{"text": "a"}, {"text": "b"}]}', "more than the one choice"),
    "another choice": (b'{"choices": [{"text": "a", "index": 1}]}', "more than the one choice"),
    "text as a number": (b'{"choices": [{"text": 7}]}', "text that is no text: 7"),
    "ids as text": (b'{"choices": [{"token_ids": "12"}]}', "token_ids that is no list"),
    "an id as a fraction": (b'{"choices": [{"token_ids": [1.5]}]}', "an entry of token_ids that is no count"),
    "an id below 0": (b'{"choices": [{"token_ids": [-1]}]}', "an entry of token_ids that is no count"),
    "usage as a list": (b'{"choices": [], "usage": []}', "usage that is no object: []"),
    "a count as text": (b'{"usage": {"prompt_tokens": "1"}}', "prompt_tokens that is no count"),
    "a count that is true": (b'{"usage": {"completion_tokens": true}}', "completion_tokens that is no count"),
    "an error": (b'{"error": {"message": "out of memory"}}', "an error: {'message': 'out of memory'}"),
}
SGLANG_SHAPES = {
    "meta_info as a list": (b'{"meta_info": [1]}', "meta_info that is no object"),
    "text as a list": (b'{"text": ["a"]}', "text that is no text"),
    "output_ids as an object": (b'{"output_ids": {"0": 1}}', "output_ids that is no list"),
    "a count as a fraction": (b'{"meta_info": {"completion_tokens": 1.0}}', "completion_tokens that is no count"),
}


@pytest.mark.parametrize(("api", "kind"), [*(("openai", k) for k in SHAPES), *(("sglang", k) for k in SGLANG_SHAPES)])
def test_an_event_of_another_shape_is_one_sentence(client, api, kind):
    data, named = (SHAPES if api == "openai" else SGLANG_SHAPES)[kind]
    with hostile(head() + b"data: " + data + b"\n\n") as server, pytest.raises(ServingError) as error:
        asyncio.run(client(server.url, api).ask([5], BUDGET))
    assert named in str(error.value)
    assert str(error.value).startswith(server.url)


def test_half_a_surrogate_pair_is_no_crash(client):
    parts = [b'"\\ud83d"', b'"\\ude00"', b'"\\ud83d"']
    choices = b"".join(b'data: {"choices": [{"text": %s, "finish_reason": "length"}]}\n\n' % part for part in parts)
    with hostile(head() + choices) as server:
        assert asyncio.run(client(server.url).ask([5], BUDGET)).text == "\U0001f600\ufffd"


def test_an_answer_that_claims_more_tokens_than_any_budget_is_refused(client):
    answer = event(choices=[{"text": "a", "finish_reason": "length"}], usage={"completion_tokens": 10**300})
    with hostile(head() + answer) as server, pytest.raises(ServingError, match="must answer with the 8 tokens"):
        asyncio.run(client(server.url).ask([5], BUDGET))


@pytest.mark.parametrize(
    "models",
    [b"[]", b'{"data": [7]}', b'{"data": []}', b'{"data": [{"id": "a"}, {"id": "b"}]}', b'"x"', b"x", b"[" * 9999],
)
def test_a_list_of_models_that_tells_no_name_is_passed_over(client, models):
    done = event(choices=[{"text": "a", "finish_reason": "length"}])
    page = head(200, "application/json") + models
    with hostile(lambda number, request: [page if request.startswith(b"GET") else head() + done]) as server:
        asking = client(server.url, model="")
        asking.learn([5], unnamed="nobody")
    assert asking.model == "nobody"


@pytest.mark.parametrize("code", [401, 403, 302, 429])
def test_what_another_request_would_not_change_ends_the_learning(client, code, monkeypatch):
    monkeypatch.setattr("dflash.serving.connection.time.sleep", lambda seconds: None)
    with hostile(head(code) + b"no") as server, pytest.raises(ServingError, match=f"{code}"):
        client(server.url).learn([5], unnamed="nobody")
    assert len(server.requests) <= 2


SGLANG = SglangClient(Connection("http://127.0.0.1:1", timeout_s=1), model="", tokenizer=None)


def test_a_character_in_halves_is_read_once_whole():
    reply = Reply()
    for i, so_far in enumerate(["a", "a\ufffd", "aé"]):
        SGLANG.take(reply, {"text": so_far, "meta_info": {"completion_tokens": i + 1}})
    assert reply.text == "aé"


def test_incremental_ids_are_put_together():
    whole, parts = Reply(), Reply()
    for i, so_far in enumerate(["a", "ab", "abc"]):
        meta = {"completion_tokens": i + 1, "finish_reason": None if i < 2 else {"type": "stop"}}
        SGLANG.take(whole, {"text": so_far, "output_ids": [10, 11, 12][: i + 1], "meta_info": meta})
        SGLANG.take(parts, {"text": so_far[-1], "output_ids": [10 + i], "meta_info": meta})
    assert whole.ids == parts.ids == [10, 11, 12]
    assert whole.text == parts.text == "abc"
    assert whole.finished
    assert parts.finished


TEXT = Completion(tokens=(1, 2, 3), exact=False, counted=3, emitted=3, text="abc", ttft_s=0.1, seconds=0.2, meta={})


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, None),
        ({"tokens": (1, 9, 3), "text": "axc"}, 1),
        ({"tokens": (1, 2), "text": "ab", "emitted": 2}, 2),
        # Ran over: where the third token ends in "abcd" is unknown, and the text begins as the other's.
        ({"tokens": (1, 2, 4), "text": "abcd", "emitted": 4}, None),
        ({"tokens": (1, 5, 4), "text": "axcd", "emitted": 4}, 1),
        # The same, but the server gave its ids.
        ({"tokens": (1, 2, 4), "text": "abcd", "emitted": 4, "exact": True}, None),
    ],
)
def test_divergence(changes, place):
    assert TEXT.divergence(dataclasses.replace(TEXT, **changes), 3) == place
    assert dataclasses.replace(TEXT, **changes).divergence(TEXT, 3) == place


def test_a_longer_answer_is_no_equal_of_one_that_ended_by_itself():
    ended = dataclasses.replace(TEXT, emitted=2, tokens=(1, 2), text="ab")
    longer = dataclasses.replace(TEXT, emitted=5, tokens=(1, 2, 3), text="abcde")
    assert ended.divergence(longer, 3) == 2
