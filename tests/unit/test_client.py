"""One request over HTTP: what is sent, how answers are cut and counted, and what is said when one fails."""

import dataclasses
import http.client
import io
import json

import pytest
from stub_server import serving

from dflash import load_tokenizer
from dflash.serving.client import Answer, Client, _Reply, first_difference
from dflash.serving.server import ServingError
from dflash.tiny import write_tiny_target, write_tiny_tokenizer

BUDGET = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("client") / "target"
    return load_tokenizer(write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260)))


@pytest.fixture(scope="module")
def letters(tokenizer):
    return [tokenizer.encode(chr(97 + i))[0] for i in range(26)]


@pytest.fixture
def ask(tokenizer, letters):
    """Asks a stub with these settings: (answer, its requests)."""

    def ask(api="openai", **settings):
        with serving(**({"letters": letters} | settings)) as (url, requests):
            client = Client(url, api=api, model="", tokenizer=tokenizer, timeout_s=20)
            ids = tokenizer.encode("a question")
            client.learn(ids, unnamed="nobody")
            requests.clear()
            return client.ask(ids, BUDGET), requests[0]

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
    assert first_difference(plain, answer, BUDGET) is None


def test_an_answer_ends_with_its_stop_token_which_counts(ask, tokenizer, letters):
    stop = tokenizer.stop_token_ids[0]
    stopping = [stop if chr(97 + i) == "n" else token for i, token in enumerate(letters)]
    answer, _ = ask(letters=stopping)
    assert answer.tokens == (*tokenizer.encode("klm"), stop)
    assert answer.counted == 4
    assert answer.emitted == BUDGET


def test_a_server_that_reads_another_prompt_is_refused(ask):
    with pytest.raises(ServingError, match=r"same prompt of 10 tokens.* read 11: .*its tokenizer adds tokens"):
        ask(adds=1)


def test_a_stream_that_is_cut_is_no_answer(tokenizer, letters):
    with serving(letters=letters) as (url, _):
        client = Client(url, api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
        client.learn([5], unnamed="")
    with serving(letters=letters, cut=True) as (url, _):
        client = Client(url, api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
        with pytest.raises(ServingError, match="broke off an answer after 1 characters"):
            client.ask([5], BUDGET)


def test_a_refusal_says_what_the_server_said(tokenizer):
    with serving() as (url, _):
        client = Client(url, api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
        with pytest.raises(ServingError, match=r"/nothing refused a request with 404: .*not found"):
            client.get("/nothing")


def test_what_a_server_says_holds_no_secret(tokenizer, letters):
    with serving(letters=letters, counts=False) as (url, _):
        client = Client(url, api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
        with pytest.raises(ServingError, match=r"unknown field stream_options \*\*\*"):
            client.ask([5], BUDGET)


@pytest.mark.parametrize("event", ["7", "[]", '"text"'])
def test_an_event_that_is_no_object_is_refused(tokenizer, monkeypatch, event):
    client = Client("http://127.0.0.1:1", api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
    monkeypatch.setattr(client, "_send", lambda path, body: io.BytesIO(f"data: {event}\n\n".encode()))
    with pytest.raises(ServingError, match="must stream JSON objects"):
        client.ask([5], BUDGET)


@pytest.mark.parametrize("models", [[], {"data": [7]}, {"data": []}, {"data": [{"id": "a"}, {"id": "b"}]}, "x"])
def test_a_list_of_models_that_tells_no_name_is_passed_over(tokenizer, monkeypatch, models):
    client = Client("http://127.0.0.1:1", api="openai", model="", tokenizer=tokenizer, timeout_s=20)
    monkeypatch.setattr(client, "get", lambda path: json.dumps(models))
    monkeypatch.setattr(client, "ask", lambda prompt, budget: None)
    client.learn([5], unnamed="nobody")
    assert client.model == "nobody"


def test_a_page_that_breaks_off_is_told(tokenizer, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise http.client.IncompleteRead(b"")

    client = Client("http://127.0.0.1:1", api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
    monkeypatch.setattr(client, "_send", lambda path, body: Broken())
    with pytest.raises(ServingError, match="/metrics broke off"):
        client.get("/metrics")


def test_a_server_that_is_not_there_is_named(tokenizer):
    with serving() as (url, _):
        pass
    client = Client(url, api="openai", model="m", tokenizer=tokenizer, timeout_s=20)
    with pytest.raises(ServingError, match=f"{url} does not answer: .*refused"):
        client.ask([5], BUDGET)


def test_a_character_in_halves_is_read_once_whole():
    reply = _Reply()
    for i, so_far in enumerate(["a", "a\ufffd", "aé"]):
        reply.take_sglang({"text": so_far, "meta_info": {"completion_tokens": i + 1}})
    assert reply.text == "aé"


def test_incremental_ids_are_put_together():
    whole, parts = _Reply(), _Reply()
    for i, so_far in enumerate(["a", "ab", "abc"]):
        meta = {"completion_tokens": i + 1, "finish_reason": None if i < 2 else {"type": "stop"}}
        whole.take_sglang({"text": so_far, "output_ids": [10, 11, 12][: i + 1], "meta_info": meta})
        parts.take_sglang({"text": so_far[-1], "output_ids": [10 + i], "meta_info": meta})
    assert whole.ids == parts.ids == [10, 11, 12]
    assert whole.text == parts.text == "abc"
    assert whole.finished
    assert parts.finished


TEXT = Answer(tokens=(1, 2, 3), exact=False, counted=3, emitted=3, text="abc", ttft_s=0.1, seconds=0.2, told={})


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
def test_first_difference(changes, place):
    assert first_difference(TEXT, dataclasses.replace(TEXT, **changes), 3) == place
    assert first_difference(dataclasses.replace(TEXT, **changes), TEXT, 3) == place


def test_a_longer_answer_is_no_equal_of_one_that_ended_by_itself():
    ended = dataclasses.replace(TEXT, emitted=2, tokens=(1, 2), text="ab")
    longer = dataclasses.replace(TEXT, emitted=5, tokens=(1, 2, 3), text="abcde")
    assert first_difference(ended, longer, 3) == 2
