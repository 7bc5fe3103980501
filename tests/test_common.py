"""helpers.common: folders, settings, seeds, the device, and files written as a whole."""

import errno
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from helpers import common
from helpers.common import atomic_write, data_path, find_root, get_device, resolve_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in ("LLM_SOURCE", "LLM_BASE", "LLM_DEVICE"):
        monkeypatch.delenv(variable, raising=False)



def test_resolve_settings(monkeypatch, capsys):
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


def test_resolve_settings_refuses(monkeypatch):
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
    monkeypatch.delitem(common.__dict__, "__file__")  # as in a notebook
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

    common.set_seed(3)
    first = draw()
    assert draw() != first
    common.set_seed(3)
    assert draw() == first
    common.set_seed(-1)  # PyTorch allows it, so all three do


def test_set_plot_style():
    with matplotlib.rc_context():
        common.set_plot_style()
        assert tuple(matplotlib.rcParams["figure.figsize"]) == (5.0, 3.0)
        for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor"):
            assert matplotlib.rcParams[key] == "white"
        assert not matplotlib.rcParams["savefig.transparent"]


def test_print_versions(capsys):
    common.print_versions()
    printed = capsys.readouterr().out
    assert "Python" in printed and torch.__version__ in printed
    assert str(find_root()) not in printed  # no path of this machine


# --------------------------------------------------------------------------- atomic_write


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "folder" / "note.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent  # so that the last step is a rename
        temporary.write_text("first")
        assert not path.exists()
    with atomic_write(str(path)) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_atomic_write_leaves_nothing_half_written(tmp_path, error):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_when_the_move_fails(tmp_path, monkeypatch):
    def locked(*args):
        raise PermissionError("another process holds the file open")

    path = tmp_path / "note.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(PermissionError), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "note.txt") as temporary:
        temporary.write_text("new")
    assert steps == ["fsync", "replace"]


def test_atomic_write_by_several_at_once(tmp_path):
    """Each writes its own temporary file; the last one to finish stays, whole."""
    path = tmp_path / "note.txt"

    def write(letter):
        with atomic_write(path) as temporary:
            temporary.write_text(letter * 10_000)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "abcdefgh"))
    assert len(set(path.read_text())) == 1 and path.stat().st_size == 10_000
    assert list(tmp_path.iterdir()) == [path]
