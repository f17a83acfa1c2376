"""Models of the hub by name, in a cache that is laid out as huggingface_hub lays it out."""

import json

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from dflash.host import hub
from dflash.weights import named

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts files of who/what into the local cache, where the network is cut off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    repository = tmp_path / "models--who--what"

    def put(**files):
        folder = repository / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for name, content in files.items():
            (folder / name.replace("__", ".").replace("_of_", "-of-")).write_text(content)
        return folder

    return put


def test_names_are_not_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who" / "here").mkdir(parents=True)
    names = ("who/what", "Qwen/Qwen3-0.6B", "z-lab/Qwen3-8B-DFlash-b16")
    paths = ("who/here", "/who/what", "./who/what", "../who", "who", "who/what/more", "who/..", "~/what", "", tmp_path)
    assert [name for name in (*names, *paths) if named.is_name(name)] == list(names)


def test_a_whole_snapshot_is_taken_from_the_cache(cache, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("it asked the hub"))
    folder = cache(config__json="{}", model__safetensors="")
    assert named.snapshot("who/what") == folder


def test_without_a_network_it_says_what_to_run(cache):
    with pytest.raises(hub.HubError, match=r"no directory who/what, .*hf download who/what"):
        named.snapshot("who/what")
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    folder = cache(config__json="{}", model__safetensors__index__json=json.dumps({"weight_map": shards}))
    (folder / "one.safetensors").touch()
    with pytest.raises(hub.HubError, match="incomplete"):
        named.snapshot("who/what")
    (folder / "two.safetensors").touch()
    assert named.snapshot("who/what") == folder


def test_what_is_read_is_downloaded_and_no_token_shown(cache, monkeypatch, tmp_path):
    asked = []

    def download(name, *, local_files_only=False, **more):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        asked.append((name, more))
        if name == "who/secret":
            raise OSError("401 for https://user:hf_abcdefghijkl@hub and sesame")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setenv("HF_TOKEN", "sesame")
    assert named.snapshot("who/what") == tmp_path
    assert "*.bin" not in asked[0][1]["allow_patterns"]
    assert asked[0][1]["ignore_patterns"] == ["*/*"]
    with pytest.raises(hub.HubError, match=r"hub .*no model") as error:
        named.snapshot("who/secret")
    assert "hf_abc" not in str(error.value)
    assert "sesame" not in str(error.value)
