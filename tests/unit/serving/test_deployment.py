"""What options of servers come to: what makes no sense is refused before one is started, and a draft is named."""

import pytest

from dflash import load_target, write_draft
from dflash.config import ConfigError, ConvConfig, SelectorConfig
from dflash.serving.connection import ServingError
from dflash.serving.deployment import deployment
from dflash.serving.options import ServerOptions
from dflash.weights import load, smollm2
from dflash.weights.load import new_draft
from dflash.weights.snapshot import WeightsError
from dflash.weights.tiny import write_tiny_target

URL = "http://127.0.0.1:1"
KEY = "averysecretkey-0123456789"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("deployment") / "target", num_hidden_layers=5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"server": "openai"}, "give --base-url, or --server KIND"),
        ({"server": "vllm", "draft_base_url": "http://x"}, "give its --base-url too"),
        ({"server": "vllm", "base_url": "x:80"}, "http://HOST:PORT"),
        ({"base_url": URL, "draft_base_url": "ftp://x"}, "http://HOST:PORT"),
        ({"server": "vllm", "base_url": "http://x", "server_args": "-a"}, "for servers that are started here"),
        ({"server": "vllm", "server_args": "'"}, "words as in a shell"),
        ({"base_url": URL, "key_variable": "DFLASH_NO_SUCH"}, "--key-variable"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, named, target):
    with pytest.raises(ServingError, match=named):
        deployment(ServerOptions(**({"target": str(target)} | options)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("server", "tgi"), ("ready_timeout", 0.0), ("request_timeout", float("nan")), ("request_timeout", float("inf"))],
)
def test_values_of_no_use_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        ServerOptions(**{name: value})


def test_what_can_not_be_decoded_here_is_refused_before_a_server_starts(target, tmp_path):
    write_draft(new_draft(load_target(target).config, num_layers=2, block_size=4), tmp_path / "draft")
    config = (target / "config.json").read_text()
    for name, text in (("bare", config), ("strange", config.replace('"llama"', '"mamba"'))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "strange" / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes())
    both = {"base_url": URL, "draft_base_url": "http://127.0.0.1:2", "offline": True}
    given = both | {"target": str(target), "draft": str(tmp_path / "draft")}
    assert deployment(ServerOptions(**given)).draft is not None
    for change, named in (
        ({"draft": ""}, "--draft"),
        ({"temperature": 0.5}, "--temperature 0.5"),
        ({"target": str(tmp_path / "bare")}, "holds no weights"),
        ({"target": str(tmp_path / "strange")}, "mamba"),
    ):
        with pytest.raises((ServingError, ConfigError), match=named):
            deployment(ServerOptions(**given | change))


def test_a_key_is_read_from_its_variable_and_never_shown(target, monkeypatch):
    monkeypatch.setenv("MY_SERVER", KEY)
    servers = deployment(ServerOptions(target=str(target), base_url=f"{URL}/v1", key_variable="MY_SERVER"))
    assert servers.key == KEY
    assert KEY not in repr(servers)


@pytest.mark.parametrize("held", ["", f"{KEY}\n", f"{KEY} {KEY}"])
def test_a_key_in_the_wrong_place_or_form_is_refused_unseen(held, target, monkeypatch):
    monkeypatch.setenv("MY_SERVER", held)
    for variable in ("MY_SERVER", KEY):
        with pytest.raises(ServingError, match="--key-variable") as error:
            deployment(ServerOptions(target=str(target), base_url=URL, key_variable=variable))
        assert KEY not in str(error.value)


def test_a_server_gets_no_draft_that_is_not_named(target, monkeypatch, tmp_path):
    """The target of that name comes with a draft, which no server could read; named, it is refused by what it is."""
    config = load_target(target).config
    parts = {"conv": ConvConfig(kernel_size=3, group_size=16), "selector": SelectorConfig(rank=8, top_k=5)}
    second = new_draft(config, num_layers=1, block_size=4, **parts)
    write_draft(second, tmp_path / "draft")
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", tmp_path / "draft")
    monkeypatch.setattr(smollm2, "snapshot_dir", lambda: target)
    named = {"target": "smollm2-135m", "base_url": URL, "draft_base_url": "http://127.0.0.1:2"}
    assert deployment(ServerOptions(**named)).draft is None
    with pytest.raises(ServingError, match="no server knows DFlash 2 drafts"):
        deployment(ServerOptions(draft="smollm2-135m", **named))


def test_a_draft_that_is_not_there_is_not_taken_for_a_target(target):
    with pytest.raises(WeightsError, match=r"^/no/such/dir holds no draft: name .*DFlashDraftModel directory"):
        deployment(ServerOptions(target=str(target), base_url=URL, draft="/no/such/dir"))
    with pytest.raises(WeightsError, match=r"a target is named by .* got '': name one"):
        deployment(ServerOptions(target="", base_url=URL))


def test_why_nothing_is_drafted(target, monkeypatch, tmp_path):
    for package in ("sgl_jax", "transformers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "--draft names one" in deployment(ServerOptions(server="sglang-jax", target=str(target))).no_draft
    assert "--draft-base-url" in deployment(ServerOptions(target=str(target), base_url=URL)).no_draft
    both = {"base_url": URL, "draft_base_url": "http://127.0.0.1:2"}
    assert deployment(ServerOptions(target=str(target), **both)).no_draft is None
    write_draft(new_draft(load_target(target).config, num_layers=2, block_size=4), tmp_path / "draft")
    drafting = {"target": str(target), "draft": str(tmp_path / "draft")}
    assert deployment(ServerOptions(server="transformers", **drafting)).no_draft == "transformers has no DFLASH"
    assert "install a version that has" in deployment(ServerOptions(server="sglang-jax", **drafting)).no_draft


def test_the_weights_of_a_server_elsewhere_may_be_elsewhere(target, tmp_path):
    (tmp_path / "config.json").write_text((target / "config.json").read_text())
    assert deployment(ServerOptions(target=str(tmp_path), base_url=URL)).target_sha256 is None
    assert len(deployment(ServerOptions(target=str(target), base_url=URL)).target_sha256) == 64
