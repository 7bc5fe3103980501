"""helpers.setup: choices, device, folders, and checked downloads from a server on this machine."""

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
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pooch
import pytest
import torch

from helpers import setup
from helpers.common import data_path, find_root, get_device, resolve_settings
from helpers.download import DownloadError, fetch, read_sources

TEXT = b"It was a dark and stormy night.\n" * 300
DIGEST = hashlib.sha256(TEXT).hexdigest()
VARIABLES = (
    "LLM_SOURCE", "LLM_BASE", "LLM_DEVICE", "LLM_DATA_DIR", "LLM_CACHE_DIR",
    "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


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
    assert "/gone.txt: HTTPError: 404" in message and "/also-gone.txt: HTTPError: 404" in message
    assert DIGEST in message and f"{len(TEXT):,} bytes" in message
    assert "put night.txt into a folder" in message and "LLM_DATA_DIR" in message
    assert 'SOURCE = "sample"' in message and "https://example.org" in message
    assert in_folder(cache) == []


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
    def full(source, target):
        target.write(source.read()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(setup.shutil, "copyfileobj", full)
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
    with pytest.warns(UserWarning, match="has 9,599 bytes, not 9,600"), pytest.raises(DownloadError):
        ask(sha256=None)


def test_data_dir_missing(server, cache, monkeypatch, tmp_path, ask):
    monkeypatch.setenv("LLM_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="LLM_DATA_DIR: there is no folder"):
        ask(serve(server, "/night.txt", TEXT))


def test_data_dir_is_relative_to_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_DATA_DIR", "data/models")
    assert setup.folder_of("LLM_DATA_DIR") == find_root() / "data" / "models"


def test_unknown_name():
    with pytest.raises(DownloadError, match="'night'.*the-verdict"):
        fetch("night")


def test_default_cache_is_of_this_system(monkeypatch, tmp_path, server, ask):
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    assert ask(serve(server, "/a.txt", TEXT)) == tmp_path / "llm-from-tensors" / "night.txt"


# --------------------------------------------------------------------------- sources.json


def test_sources_json():
    entries = read_sources()
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


# --------------------------------------------------------------------------- the small tools


def test_choose(monkeypatch, capsys):
    assert resolve_settings() == ("sample", "tiny")
    assert resolve_settings("real", "gpt2-xl") == ("real", "gpt2-xl")
    assert resolve_settings(base="openai-community/gpt2")[1] == "openai-community/gpt2"
    assert resolve_settings(base="data/models/tiny")[1] == "data/models/tiny"
    monkeypatch.setenv("LLM_SOURCE", "real")
    monkeypatch.setenv("LLM_BASE", "gpt2")
    assert resolve_settings("sample", "tiny") == ("real", "gpt2")
    monkeypatch.setenv("LLM_SOURCE", "")  # set to nothing is not set
    assert resolve_settings("sample")[0] == "sample"
    assert capsys.readouterr() == ("", "")


def test_choose_refuses(monkeypatch):
    with pytest.raises(ValueError, match=r"SOURCE is 'Real'; allowed: sample, real$"):
        resolve_settings("Real")
    with pytest.raises(ValueError, match=r"BASE is 'gpt3'; allowed: tiny, gpt2, .* slash"):
        resolve_settings(base="gpt3")
    monkeypatch.setenv("LLM_SOURCE", "a/b")
    with pytest.raises(ValueError, match="environment variable LLM_SOURCE is 'a/b'"):
        resolve_settings("sample")


@pytest.mark.parametrize(
    ("cuda", "mps", "version", "macos", "expected"),
    [
        (True, True, "2.13.0", True, "cuda"),
        (False, True, "2.13.0", True, "mps"),
        (False, True, "2.12.1", True, "cpu"),
        (False, True, "2.14.0", False, "cpu"),
        (False, False, "2.14.0", True, "cpu"),
    ],
)
def test_get_device_picks(monkeypatch, cuda, mps, version, macos, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert get_device() == torch.device(expected)


def test_get_device_by_name(monkeypatch):
    assert get_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert get_device("cuda:1") == torch.device("cuda:1")
    assert get_device("mps") == torch.device("mps")  # asked for: no version is checked
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    assert get_device("cuda") == torch.device("cpu")  # the variable wins
    with pytest.raises(ValueError, match="finds 2 CUDA devices"):
        monkeypatch.setenv("LLM_DEVICE", "cuda:2")
        get_device()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda", "mps"])
def test_get_device_refuses(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LLM_DEVICE", name)
    with pytest.raises(ValueError, match=f"LLM_DEVICE is '{name}'"):
        get_device()


def test_find_root(monkeypatch, tmp_path):
    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(tmp_path)
    assert find_root() == root  # from the module's own file
    monkeypatch.delitem(setup.__dict__, "__file__")  # as in a notebook
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        find_root()
    below = tmp_path / "copy" / "notebooks" / "solutions"
    below.mkdir(parents=True)
    (tmp_path / "copy" / "data").mkdir()
    (tmp_path / "copy" / "data" / "sources.json").write_text("{}")
    monkeypatch.chdir(below)
    assert find_root() == tmp_path / "copy"


def test_data_path():
    assert data_path("story.txt").read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"novel\.txt is missing"):
        data_path("novel.txt")


def test_set_seed():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    setup.set_seed(3)
    first = draw()
    assert draw() != first
    setup.set_seed(3)
    assert draw() == first
    setup.set_seed(-1)  # PyTorch allows it, so all three do


def test_use_style():
    with matplotlib.rc_context():
        setup.set_plot_style()
        assert tuple(matplotlib.rcParams["figure.figsize"]) == (5.0, 3.0)
        for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor"):
            assert matplotlib.rcParams[key] == "white"
        assert not matplotlib.rcParams["savefig.transparent"]


def test_report_environment(capsys):
    setup.print_versions()
    printed = capsys.readouterr().out
    assert "Python" in printed and torch.__version__ in printed
    assert str(find_root()) not in printed  # no path of this machine
