"""helpers.download: checked downloads from a server on this machine, and model files."""

import errno
import hashlib
import http.server
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pooch
import pytest

from helpers import download
from helpers.common import data_path, find_root
from helpers.download import DownloadError, fetch, find_files, verify_file

TEXT = b"It was a dark and stormy night.\n" * 300
DIGEST = hashlib.sha256(TEXT).hexdigest()
VARIABLES = (
    "LLM_DATA_DIR", "LLM_CACHE_DIR", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    # pooch waits a second before it tries again
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=lambda seconds: None))


# ---------------------------------------------------------------------------------- fetch


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.both:
            self.server.both.wait()
        if self.path not in self.server.pages:
            self.send_error(404)
            return
        body, length = self.server.pages[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A web server on this machine: fill server.pages with path: (body, length it claims)."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.pages, running.asked, running.both = {}, [], None
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLM_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The folder that LLM_DATA_DIR names."""
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    monkeypatch.setenv("LLM_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def ask(tmp_path):
    """Write a sources.json with one entry and fetch it."""

    number = itertools.count()  # a file for each call: two may run at once

    def run(*urls, **changes):
        entry = {
            "file": "night.txt", "urls": list(urls), "size": len(TEXT), "sha256": DIGEST,
            "licence": "none", "source": "https://example.org", "about": "a night",
        } | changes  # fmt: skip
        path = tmp_path / f"sources-{next(number)}.json"
        path.write_text(json.dumps({"files": {"night": entry}}), encoding="utf-8")
        return fetch("night", sources=path)

    return run


def serve(server, path, body, length=None):
    server.pages[path] = (body, len(body) if length is None else length)
    return server.url + path


def in_folder(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def zipped(member, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "not this one")
        archive.writestr(member, content)
    return out.getvalue()


def test_download_then_cache(server, cache, ask):
    url = serve(server, "/night.txt", TEXT)
    path = ask(url)
    assert path == cache / "night.txt" and path.read_bytes() == TEXT
    assert ask(url) == path
    assert server.asked == ["/night.txt"]  # the second time from the cache
    assert in_folder(cache) == ["night.txt"]


def test_mirror_after_404(server, cache, ask):
    good = serve(server, "/mirror/night.txt", TEXT)
    assert ask(server.url + "/gone.txt", good).read_bytes() == TEXT
    assert server.asked == ["/gone.txt", "/mirror/night.txt"]


def test_all_addresses_fail_with_their_reasons(server, cache, ask):
    with pytest.raises(DownloadError) as caught:
        ask(server.url + "/gone.txt", server.url + "/also-gone.txt")
    message = str(caught.value)
    assert "/gone.txt: FileNotFoundError: 404" in message
    assert "/also-gone.txt: FileNotFoundError: 404" in message
    assert DIGEST in message and f"{len(TEXT):,} bytes" in message
    assert "put night.txt into a folder" in message and "LLM_DATA_DIR" in message
    assert 'SOURCE = "sample"' in message and "https://example.org" in message
    assert in_folder(cache) == []


def test_a_dropped_connection_gets_a_second_try(server, cache, ask):
    url = serve(server, "/night.txt", TEXT[:1000], len(TEXT))
    answer = Handler.do_GET

    def recover(self):
        answer(self)
        serve(server, "/night.txt", TEXT)

    Handler.do_GET = recover
    try:
        assert ask(url).read_bytes() == TEXT and server.asked == ["/night.txt"] * 2
    finally:
        Handler.do_GET = answer


def test_wrong_hash(server, cache, ask):
    other = TEXT.replace(b"dark", b"bark")
    with pytest.raises(DownloadError) as caught:
        ask(serve(server, "/night.txt", other))
    assert hashlib.sha256(other).hexdigest() in str(caught.value) and DIGEST in str(caught.value)
    assert in_folder(cache) == []


@pytest.mark.parametrize("known", [{}, {"sha256": None}, {"sha256": None, "size": None}])
def test_truncated_body(server, cache, ask, known):
    with pytest.raises(DownloadError, match=r"(?i)incomplete|more expected"):
        ask(serve(server, "/night.txt", TEXT[:1000], len(TEXT)), **known)
    assert in_folder(cache) == []


def test_truncated_file_that_claims_to_be_whole(server, cache, ask):
    with pytest.raises(DownloadError, match="has 1,000 bytes, not 9,600"):
        ask(serve(server, "/night.txt", TEXT[:1000]), sha256=None)


def test_web_page_in_place_of_the_file(server, cache, ask):
    page = b"\n<!DOCTYPE html><title>Please sign in</title>"
    url = serve(server, "/night.txt", page)
    for known in ({}, {"sha256": None}):
        with pytest.raises(DownloadError, match="web page"):
            ask(url, **known)
    with pytest.raises(DownloadError, match=r"is not JSON.*web page"):
        ask(url, file="night.json", sha256=None, size=None)
    with pytest.raises(DownloadError, match="web page"):
        ask(url, member="night.txt")
    assert in_folder(cache) == []


def test_json_without_hash(server, cache, ask):
    body = json.dumps([{"instruction": "Sleep."}] * 10).encode()
    unknown = {"file": "night.json", "sha256": None, "size": None}
    with pytest.raises(DownloadError, match="is not JSON"):
        ask(serve(server, "/half.json", body[:50]), **unknown)
    assert ask(serve(server, "/whole.json", body), **unknown).read_bytes() == body


def test_zip_member(server, cache, ask):
    url = serve(server, "/a+night%20or%20two.zip", zipped("inner/Night", TEXT))
    assert ask(url, member="inner/Night").read_bytes() == TEXT
    assert in_folder(cache) == ["night.txt"]
    os.remove(cache / "night.txt")
    with pytest.raises(DownloadError, match="Day"):
        ask(url, member="Day")
    assert in_folder(cache) == []


def test_damaged_zip(server, cache, ask):
    packed = bytearray(zipped("Night", random.Random(0).randbytes(5000)))
    packed[2000:2010] = bytes(10)
    with pytest.raises(DownloadError, match=r"BadZipFile|error|sha256"):
        ask(serve(server, "/night.zip", bytes(packed)), member="Night")
    assert in_folder(cache) == []


def test_xz(server, cache, ask):
    packed = lzma.compress(TEXT)
    assert ask(serve(server, "/night.txt.xz", packed), unpack="xz").read_bytes() == TEXT
    os.remove(cache / "night.txt")
    with pytest.raises(DownloadError, match="EOFError"):
        ask(serve(server, "/half.txt.xz", packed[:-20]), unpack="xz")
    assert in_folder(cache) == []


def test_unpacked_copy_at_a_mirror(server, cache, ask):
    """A mirror may offer the file itself where the first address has an archive around it."""
    assert ask(serve(server, "/night.txt", TEXT), member="Night").read_bytes() == TEXT


def test_no_network(server, cache, ask):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="ConnectionRefusedError") as caught:
        ask(f"http://127.0.0.1:{port}/night.txt")
    assert len(str(caught.value)) < 1000
    assert in_folder(cache) == []


def test_reasons_stay_right_inside_an_except_block(server, cache, ask):
    try:
        raise KeyError("earlier trouble")
    except KeyError:
        with pytest.raises(DownloadError, match="404") as caught:
            ask(server.url + "/gone.txt")
    assert "earlier trouble" not in str(caught.value)


def test_no_address(cache, ask):
    with pytest.raises(DownloadError, match="no address is known"):
        ask()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_nothing_half_written(server, cache, ask, monkeypatch, error):
    url = serve(server, "/night.txt", TEXT)
    real = pooch.HTTPDownloader.__call__

    def stopped(self, url, output_file, *args, **kwargs):
        real(self, url, output_file, *args, **kwargs)
        Path(output_file).write_bytes(TEXT[:1000])
        raise error

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", stopped)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else DownloadError
    with pytest.raises(expected) as caught:
        ask(url, url)
    if expected is DownloadError:
        assert "No space left" in str(caught.value) and "LLM_CACHE_DIR" in str(caught.value)
    assert len(server.asked) == 1  # the next address would not help
    assert in_folder(cache) == []


def test_full_disk_while_unpacking(server, cache, ask, monkeypatch):
    def full(source, target, *length):
        target.write(source.read()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)     # zipfile calls it, for pooch
    with pytest.raises(DownloadError, match="No space left"):
        ask(serve(server, "/night.zip", zipped("Night", TEXT)), member="Night")
    assert in_folder(cache) == []


def test_damaged_cache_is_fetched_again(server, cache, ask):
    url = serve(server, "/night.txt", TEXT)
    path = ask(url)
    path.write_bytes(TEXT[:-1])
    assert ask(url).read_bytes() == TEXT and len(server.asked) == 2
    path.write_bytes(TEXT[:-1])
    server.pages.clear()
    with pytest.raises(DownloadError) as caught:
        ask(url)
    assert str(path) in str(caught.value)  # the damaged copy is named too


def test_cache_that_can_not_be_made(server, tmp_path, monkeypatch, ask):
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "taken"))
    with pytest.raises(DownloadError, match="LLM_CACHE_DIR"):
        ask(serve(server, "/night.txt", TEXT))


def test_two_at_once(server, cache, ask):
    """Both downloads are under way before either may finish, as with two processes."""
    url = serve(server, "/night.txt", TEXT)
    server.both = threading.Barrier(2, timeout=10)
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(ask, [url, url]))
    assert server.asked == ["/night.txt"] * 2
    assert paths == [cache / "night.txt"] * 2 and paths[0].read_bytes() == TEXT
    assert in_folder(cache) == ["night.txt"]


def test_data_dir(server, cache, shelf, ask):
    """Found in a folder below LLM_DATA_DIR, used where it lies, with no network."""
    (shelf / "deep" / "night.txt").write_bytes(TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(server.url + "/night.txt") == shelf / "deep" / "night.txt"
        (shelf / "a").mkdir()
        (shelf / "a" / "night.txt").write_bytes(b"another night")  # the hash decides, not the order
        assert ask(server.url + "/night.txt") == shelf / "deep" / "night.txt"
    assert server.asked == [] and in_folder(cache) == []


def test_data_dir_with_a_wrong_file(server, cache, shelf, ask):
    (shelf / "night.txt").write_bytes(b"another night")
    url = serve(server, "/night.txt", TEXT)
    with pytest.warns(UserWarning) as caught:
        assert ask(url) == cache / "night.txt"
    message = str(caught[0].message)
    assert DIGEST in message and hashlib.sha256(b"another night").hexdigest() in message
    assert str(shelf / "night.txt") in message
    os.remove(cache / "night.txt")
    with pytest.warns(UserWarning), pytest.raises(DownloadError, match=re.escape(str(shelf))):
        ask(server.url + "/gone.txt")


def test_data_dir_with_the_archive(cache, shelf, ask):
    (shelf / "deep" / "the night.zip").write_bytes(zipped("Night", TEXT))
    path = ask("https://example.org/the%20night.zip?raw=1", member="Night")
    assert path == cache / "night.txt" and path.read_bytes() == TEXT
    assert in_folder(cache) == ["night.txt"] and in_folder(shelf / "deep") == ["the night.zip"]


def test_data_dir_with_a_damaged_archive(server, cache, shelf, ask):
    (shelf / "night.txt.xz").write_bytes(lzma.compress(TEXT)[:-20])
    with pytest.warns(UserWarning, match="EOFError"):
        ask(serve(server, "/night.txt.xz", lzma.compress(TEXT)), unpack="xz")
    assert in_folder(cache) == ["night.txt"]


def test_data_dir_without_a_hash(server, cache, shelf, ask):
    (shelf / "night.txt").write_bytes(TEXT)
    assert ask(sha256=None) == shelf / "night.txt"
    assert ask(sha256=None, size=None) == shelf / "night.txt"
    (shelf / "night.txt").write_bytes(TEXT[1:])
    warned = pytest.warns(UserWarning, match="has 9,599 bytes, not 9,600")
    with warned, pytest.raises(DownloadError):
        ask(sha256=None)


def test_data_dir_missing(server, cache, monkeypatch, tmp_path, ask):
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="LLM_DATA_DIR: there is no folder"):
        ask(serve(server, "/night.txt", TEXT))


def test_data_dir_is_relative_to_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_DATA_DIR", "data/models")
    assert download._folder_of("LLM_DATA_DIR") == find_root() / "data" / "models"


def test_unknown_name():
    with pytest.raises(DownloadError, match="'night'.*the-verdict"):
        fetch("night")


def test_default_cache_is_of_this_system(monkeypatch, tmp_path, server, ask):
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    assert ask(serve(server, "/a.txt", TEXT)) == tmp_path / "gpt-from-tensors" / "night.txt"


def test_verify_file(tmp_path):
    path = tmp_path / "night.txt"
    path.write_bytes(TEXT)
    entry = {"file": "night.txt", "size": len(TEXT), "sha256": DIGEST}
    assert verify_file(path, entry) is None
    path.write_bytes(b"<html>sign in</html>")
    with pytest.raises(DownloadError, match=rf"20 bytes.*{DIGEST} \(9,600 bytes\).*web page"):
        verify_file(path, entry)


# --------------------------------------------------------------------------- model files


def test_find_files_in_a_folder(tmp_path, monkeypatch):
    tiny = find_root() / "data" / "models" / "tiny"
    monkeypatch.chdir(tmp_path)  # "tiny" and "data/..." are relative to the series
    assert find_files("tiny", ["config.json"]) == [tiny / "config.json"]
    assert find_files("data/models/tiny", ["vocab.json"]) == [tiny / "vocab.json"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mine lacks config\.json, vocab\.json; expected"):
        find_files("mine", ["config.json", "vocab.json"])


def test_find_files_that_are_nowhere(monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a folder here .* nor a hub name"):
        find_files("no such thing", ["config.json"])


@pytest.mark.parametrize(("name", "asked"), [("gpt2-medium", "openai-community/gpt2-medium"),
                                             ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
                                             ("smollm2-135m-instruct",
                                              "HuggingFaceTB/SmolLM2-135M-Instruct"),
                                             ("me/mine", "me/mine")])
def test_find_files_on_the_hub(monkeypatch, tmp_path, name, asked):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"{repo}/{file}")
    assert find_files(name, ["config.json"]) == [Path(asked) / "config.json"]

    def fail(repo, file):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = f"hub did not give {asked} .ConnectionError: no network.. Check the name"
    with pytest.raises(FileNotFoundError, match=message):
        find_files(name, ["config.json"])


# --------------------------------------------------------------------------- sources.json


def test_sources_json():
    entries = json.loads(data_path("sources.json").read_text(encoding="utf-8"))["files"]
    assert {"the-verdict", "sms-spam", "alpaca", "alpaca-9k", "gpt2-vocab", "gpt2-merges"} <= set(
        entries
    )
    known = {"file", "urls", "member", "unpack", "size", "sha256", "note", "licence", "source",
             "about"}  # fmt: skip
    for name, entry in entries.items():
        assert set(entry) <= known, name
        for key in ("file", "licence", "source", "about"):
            assert isinstance(entry[key], str) and entry[key], (name, key)
        assert "/" not in entry["file"] and "\\" not in entry["file"], name
        assert entry["urls"] and len(set(entry["urls"])) == len(entry["urls"]), name
        assert all(url.startswith("https://") for url in [*entry["urls"], entry["source"]]), name
        if entry["sha256"] is None:
            assert entry["note"], name
        else:
            assert re.fullmatch("[0-9a-f]{64}", entry["sha256"]), name
            assert isinstance(entry["size"], int) and entry["size"] > 0, name
        assert entry["size"] is None or isinstance(entry["size"], int), name
        assert entry.get("unpack") in (None, "xz"), name
        if any(url.endswith(".zip") for url in entry["urls"]):
            assert entry["member"], name
    files = [entry["file"] for entry in entries.values()]
    assert len(set(files)) == len(files)  # they share one cache folder
