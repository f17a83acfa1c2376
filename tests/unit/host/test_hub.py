"""The hub: whether it answers, asked without a traceback whatever the environment says."""

import importlib.util

import pytest

from dflash.host import hub


@pytest.mark.parametrize("name", ["ALL_PROXY", "HF_ENDPOINT"])
def test_a_proxy_or_an_endpoint_that_can_not_be_used_is_out_of_reach(name, monkeypatch, capfd):
    if name == "ALL_PROXY" and importlib.util.find_spec("socksio"):
        pytest.skip("httpx speaks to such a proxy here")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://[" if name == "HF_ENDPOINT" else "http://h.invalid"
    )
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1" if name == "ALL_PROXY" else "")
    assert not hub.reachable()
    assert capfd.readouterr() == ("", "")
