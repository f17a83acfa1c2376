"""Files are written whole; JSON from outside is read, or refused in one sentence."""

import os
import threading

import pytest

from dflash.host import disk
from dflash.host.disk import check_writable, claim, nearest, parse_object, read_object, whole_lines, write_atomically


class BadFileError(ValueError):
    pass


GOOD = {
    "plain": (
        '{"a": 1, "b": [1.5, null, true], "c": {"d": "\\u00e9"}}',
        {"a": 1, "b": [1.5, None, True], "c": {"d": "é"}},
    ),
    "a nest of 64": ('{"a":' * 63 + "{}" + "}" * 63, None),
    "40 digits": ('{"a": ' + "9" * 40 + "}", {"a": int("9" * 40)}),
    "a surrogate pair": ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_json_is_read(tmp_path, name):
    text, value = GOOD[name]
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    read = read_object(tmp_path / "x.json", BadFileError, "fetch it again")
    assert value is None or read == value


BAD = {
    "cut": (b'{"a": 1', "is no valid JSON"),
    "empty": (b"", "is no valid JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is no valid JSON"),
    "an object's place, a list": (b"[]", "must hold a JSON object, got list"),
    "an object's place, null": (b"null", "must hold a JSON object, got NoneType"),
    "an object's place, text": (b'"a"', "must hold a JSON object, got str"),
    "an object's place, a number": (b"1", "must hold a JSON object, got int"),
    "lists, 100000 deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper than 64"),
    "objects, 65 deep": (b'{"a":' * 65 + b"1" + b"}" * 65, "nests deeper than 64"),
    "lists, 700 deep": (b'{"a": ' + b"[" * 700 + b"]" * 700 + b"}", "nests deeper than 64"),
    "5000 digits": (b'{"a": ' + b"7" * 5000 + b"}", "an integer has 5000 digits"),
    "minus 5000 digits": (b'{"a": [-' + b"7" * 5000 + b"]}", "an integer has 5001 digits"),
    "beyond every float": (b'{"a": 1e999}', "1e999 is beyond every float"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no JSON"),
    "a key twice": (b'{"a": 1, "b": {"c": 2, "c": 3}}', "'c' occurs twice"),
    "a long key twice": (b'{"' + b"k" * 999 + b'": 1, "' + b"k" * 999 + b'": 1}', "kkk occurs twice"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "is no valid JSON"),
    "half a pair in a key": (b'{"\\ud800": 1}', "is no valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_refused_in_one_sentence(tmp_path, name):
    text, said = BAD[name]
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(BadFileError) as caught:
        read_object(path, BadFileError, "fetch it again")
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith(": fetch it again")
    assert said in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_a_file_that_is_not_there_or_is_a_directory_is_refused(tmp_path):
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "it is no file")):
        with pytest.raises(BadFileError, match=f"can't be read .{reason}.*: fetch it again"):
            read_object(path, BadFileError, "fetch it again")


def test_a_file_that_takes_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MAX_BYTES", 1 << 20)
    path = tmp_path / "x.json"
    path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(BadFileError, match="at most 1 MiB"):
        read_object(path, BadFileError, "fetch it again")


def test_text_from_elsewhere_is_named_by_its_source():
    with pytest.raises(BadFileError, match=r"^meta of a\.npz .*JSON .*: build it again$"):
        parse_object("{", "meta of a.npz", BadFileError, "build it again")


# ---- writing


def test_writers_at_once_leave_one_whole_content(tmp_path):
    path = tmp_path / "x"
    contents = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"\xff")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_is_asked_whether_it_may_be_written_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "x")
    write_atomically(tmp_path / "x", "kept")
    check_writable(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "kept"
    # Of a file that is not there yet, its directory is what is missing.
    below, none = tmp_path / "x" / "y", tmp_path / "none"
    for path, kind, at_fault in (
        (tmp_path, IsADirectoryError, tmp_path),
        (below, NotADirectoryError, below),
        (none / "y", FileNotFoundError, none),
    ):
        with pytest.raises(kind) as caught:
            check_writable(path)
        assert caught.value.filename == str(at_fault)


@pytest.mark.parametrize(
    ("text", "lines", "size"),
    [(b"", [], 0), (b"{", [], 0), (b"{}\n", [b"{}"], 3), (b"{}\n\n{}\n{}", [b"{}", b"", b"{}"], 7)],
)
def test_what_follows_the_last_line_break_is_no_line(tmp_path, text, lines, size):
    (tmp_path / "x").write_bytes(text)
    assert whole_lines(tmp_path / "x") == (lines, size)


def test_a_pipe_is_written_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_atomically(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_names_is_written(tmp_path, there):
    (tmp_path / "kept").mkdir()
    content, link = tmp_path / "kept" / "x", tmp_path / "latest"
    if there:
        content.write_text("old")
    link.symlink_to(content)
    check_writable(link)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert content.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "latest", "x"]


def test_a_file_that_is_claimed_is_one_process_own_until_it_is_released(tmp_path):
    first = claim(tmp_path / "x.json")
    assert claim(tmp_path / "x.json") is None
    assert claim(tmp_path / "y.json") is not None
    first.release()
    assert claim(tmp_path / "x.json") is not None
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        claim(tmp_path / "file" / "x.json")


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "x", "new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "none" / "x"), None)


def test_the_nearest_folder_that_is_there(tmp_path):
    assert nearest(tmp_path / "a" / "b") == nearest(tmp_path) == tmp_path
