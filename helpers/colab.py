"""The Colab badge and set-up cell of every notebook, stamped from one address.

    python -m helpers.colab                          stamp the notebooks
    python -m helpers.colab --check                  fail where a notebook has another stamp
    python -m helpers.colab https://github.com/you/your-fork      set the address, then stamp

The address stands in `pyproject.toml`, under `[project.urls]`, and nowhere else. While there is
none, the notebooks carry no badge, and the set-up cell says on Colab what to do. The workflow of a
repository on GitHub, a fork's too, stamps its own address on its default branch.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

# It needs no restart: the repository goes onto sys.path (an editable install would need one), and
# only packages that Colab lacks are installed, so that its own torch and numpy stay.
SETUP_CELL = '''\
# On Colab this fetches the series and the packages that are missing; elsewhere it does nothing.
import importlib.util
import os
import subprocess
import sys

repository = "{repository}"
if "COLAB_RELEASE_TAG" in os.environ and importlib.util.find_spec("helpers") is None:
    if not repository:
        raise SystemExit("Put the address of the series, https://github.com/OWNER/NAME, between "
                         "the quotes after `repository =` above, and run this cell again.")
    folder = os.path.abspath(repository.rsplit("/", 1)[1])
    if not os.path.isdir(folder):
        done = subprocess.run(["git", "clone", "-q", "--depth", "1", repository, folder],
                              capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(repository + f" could not be fetched: {done.stderr.strip()}")
    needed = ["gguf", "huggingface_hub", "pandas", "pooch", "requests", "safetensors", "tiktoken",
              "tqdm"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
    sys.path.insert(0, folder)
    os.chdir(os.path.join(folder, "notebooks"))
'''
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def repository(root: Path) -> str:
    """The address in `pyproject.toml`, or "" where none has been set.

    Raises:
        ValueError: it is not of the form https://github.com/OWNER/NAME.
    """
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    url = tomllib.loads(text)["project"].get("urls", {}).get("Repository", "")
    return _checked(url) if url else ""


def _checked(url: str) -> str:
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"{url!r} is not of the form https://github.com/OWNER/NAME.")
    return url.removesuffix(".git")


def set_repository(root: Path, url: str) -> None:
    """Put another address into `pyproject.toml`; ValueError if it is none."""
    path, url = root / "pyproject.toml", _checked(url)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'^(# )?Repository = ".*"$', f'Repository = "{url}"', text, flags=re.MULTILINE)
    text = re.sub(r"^# \[project\.urls\]$", "[project.urls]", text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8", newline="\n")


def badge(url: str, notebook: str) -> str:
    """The line at the top of a notebook that opens it in Colab.

    Example:
        >>> badge("https://github.com/a/b", "notebooks/02_text.ipynb")[-52:]
        'github.com/a/b/blob/main/notebooks/02_text.ipynb)'
    """
    page = url.removeprefix("https://github.com/")
    return (f"[![Open in Colab]({BADGE})]"
            f"(https://colab.research.google.com/github/{page}/blob/main/{notebook})")


def stamped(content: dict, url: str, notebook: str) -> dict:
    """The notebook with badge (where there is an address) and collapsed set-up cell.

    Raises:
        ValueError: it has no cell that begins with `# On Colab`, or no first Markdown cell.
    """
    content = json.loads(json.dumps(content))
    first = content["cells"][0]
    if first["cell_type"] != "markdown":
        raise ValueError(f"{notebook}: the first cell is not Markdown.")
    lines = "".join(first["source"]).split("\n")
    if lines[0].startswith("[![Open in Colab]"):
        lines = lines[1:]
    while lines and not lines[0].strip():
        lines = lines[1:]
    top = [badge(url, notebook), ""] if url else []
    first["source"] = "\n".join([*top, *lines]).splitlines(keepends=True)
    setups = [c for c in content["cells"] if c["cell_type"] == "code"
              and "".join(c["source"]).startswith("# On Colab")]
    if len(setups) != 1:
        raise ValueError(f"{notebook}: expected one cell that begins with '# On Colab', "
                         f"found {len(setups)}.")
    source = SETUP_CELL.replace("{repository}", url).rstrip("\n")
    setups[0]["source"] = source.splitlines(keepends=True)
    setups[0]["metadata"] = setups[0].get("metadata", {}) | {"jupyter": {"source_hidden": True}}
    return content


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m helpers.colab", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", help="https://github.com/OWNER/NAME")
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    arguments = parser.parse_args(argv)
    root = root or Path(__file__).resolve().parent.parent
    if arguments.repository:
        set_repository(root, arguments.repository)
    url, stale = repository(root), []
    for path in sorted((root / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(root).as_posix()
        old = json.loads(path.read_text(encoding="utf-8"))
        new = stamped(old, url, name)
        if new != old:
            stale.append(name)
            if not arguments.check:
                text = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
                path.write_text(text, encoding="utf-8", newline="\n")
    verb = "differs" if arguments.check else "stamped"
    for name in stale:
        print(f"{name}: {verb}")
    return int(bool(stale and arguments.check))


if __name__ == "__main__":
    raise SystemExit(main())
