"""1 · What a language model is.

Made from notebooks/01_overview.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.common.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from helpers.common import data_path, find_root

__all__ = ["sha256", "DownloadError", "verify_file", "fetch", "find_files"]


# cell sha256 of notebooks/01_overview.ipynb
def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file: 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# cell download-error of notebooks/01_overview.ipynb
class DownloadError(RuntimeError):
    """A public file could not be fetched, or is not the right one; the message says what to do."""


# cell verify-file of notebooks/01_overview.ipynb
def verify_file(path: Path, entry: dict) -> None:
    """Check that the file at `path` is the one that an entry of data/sources.json means.

    The hash decides. Where the entry has none, the size must do, or that a .json file is whole.

    Raises:
        DownloadError: it is another file; the message says what was found and what was expected.
    """
    size, expected, problem = path.stat().st_size, entry.get("size"), None
    if entry.get("sha256"):
        found = sha256(path)
        if found != entry["sha256"]:
            problem = f"has sha256 {found} ({size:,} bytes), not {entry['sha256']}"
            problem += f" ({expected:,} bytes)" if expected else ""
    elif expected and size != expected:
        problem = f"has {size:,} bytes, not {expected:,}"
    elif entry["file"].endswith(".json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problem = f"is not JSON: {error}"
    if problem:
        with open(path, "rb") as file:
            start = file.read(64).lstrip().lower()
        is_page = start.startswith((b"<!doctype", b"<html"))
        raise DownloadError(problem + "; it looks like a web page" * is_page)


# cell import-pooch of notebooks/01_overview.ipynb
def _import_pooch() -> ModuleType:
    """Return pooch, the download library, without its log and tqdm's advice about widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pooch
    pooch.get_logger().setLevel("WARNING")
    return pooch


# cell unpack of notebooks/01_overview.ipynb
def _unpack(path: Path, entry: dict, folder: Path) -> Path:
    """Unpack an archive into `folder`; return the file inside, or `path` if it is no archive."""
    pooch, unpacked = _import_pooch(), folder / "unpacked"
    if "member" in entry and zipfile.is_zipfile(path):
        pooch.Unzip([entry["member"]], str(unpacked))(str(path), "download", None)
        if not (unpacked / entry["member"]).is_file():
            raise DownloadError(f"the archive holds no file {entry['member']}")
        return unpacked / entry["member"]
    with open(path, "rb") as file:
        is_xz = file.read(6) == b"\xfd7zXZ\x00"
    if is_xz and entry.get("unpack") == "xz":
        return Path(pooch.Decompress("xz", str(unpacked))(str(path), "download", None))
    return path


# cell store of notebooks/01_overview.ipynb
def _store(path: Path, entry: dict, target: Path, folder: Path) -> Path:
    """Unpack a file into `folder`, verify it, and move it to `target` in one step."""
    path = _unpack(path, entry, folder)
    verify_file(path, entry)
    try:
        os.replace(path, target)
    except PermissionError:              # Windows: another process holds the file open
        verify_file(target, entry)
    return target


# cell use-local of notebooks/01_overview.ipynb
def _use_local(path: Path, entry: dict, target: Path) -> Path:
    """Return `path` if it is the file itself, else `target`, unpacked from the archive `path`."""
    if "member" not in entry and "unpack" not in entry or path.name == entry["file"]:
        verify_file(path, entry)
        return path
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
        copied = shutil.copy(path, folder)
        return _store(Path(copied), entry, target, Path(folder))


# cell download of notebooks/01_overview.ipynb
def _download(url: str, entry: dict, target: Path) -> Path:
    """Fetch the file from one address to `target`; a failed connection gets a second try."""
    pooch, name = _import_pooch(), entry["file"]
    http = pooch.HTTPDownloader(progressbar=True, timeout=30, chunk_size=2**16)

    def get(url: str, output: str, manager: object) -> None:
        try:
            http(url, output, manager)
        except OSError as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code < 500:
                raise FileNotFoundError(str(error)) from None     # a second try changes nothing
            raise

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
        manager = pooch.create(folder, "", registry={name: None}, urls={name: url},
                               retry_if_failed=1)
        path = Path(manager.fetch(name, downloader=get))
        return _store(path, entry, target, Path(folder))


# cell explain of notebooks/01_overview.ipynb
def _explain(error: BaseException) -> str:
    """Return the root of an error in one line: network libraries wrap theirs several times."""
    while (
        type(error).__module__.partition(".")[0] in ("requests", "urllib3")
        and getattr(error, "response", None) is None
        and (error.__cause__ or error.__context__)
    ):
        error = error.__cause__ or error.__context__
    return str(error) if isinstance(error, DownloadError) else f"{type(error).__name__}: {error}"


# cell folder-of of notebooks/01_overview.ipynb
def _folder_of(variable: str) -> Path | None:
    """Return the folder that an environment variable names, relative to the repository's root."""
    value = os.environ.get(variable)
    return (find_root() / Path(value).expanduser()).resolve() if value else None


# cell candidates of notebooks/01_overview.ipynb
def _candidates(entry: dict) -> list[Path]:
    """Return the files below LLM_DATA_DIR that have the name of the file or of its archive."""
    folder = _folder_of("LLM_DATA_DIR")
    if folder is None:
        return []
    if not folder.is_dir():
        warnings.warn(f"not used: LLM_DATA_DIR: there is no folder {folder}", stacklevel=3)
        return []
    names = [entry["file"], *(unquote(urlsplit(url).path.split("/")[-1]) for url in entry["urls"])]
    found = [path for path in folder.rglob("*") if path.name in names and path.is_file()]
    return sorted(found, key=lambda path: (names.index(path.name), path))


# cell first-success of notebooks/01_overview.ipynb
def _first_success(attempts: dict[Path | str, Callable[[], Path]],
                   problems: list[str]) -> Path | None:
    """Return the result of the first attempt that succeeds; add to `problems` why others failed."""
    for place, attempt in attempts.items():
        try:
            return attempt()
        except Exception as error:              # a connection or an archive fails in many ways
            problems.append(f"{place}: {_explain(error)}")
            if getattr(error, "errno", None) == errno.ENOSPC:
                break                           # a full disk: the next address would not help
    return None


# cell fetch of notebooks/01_overview.ipynb
def fetch(name: str, *, sources: Path | None = None) -> Path:
    """Return the path of a public file, verified: from LLM_DATA_DIR, the cache, or the network.

    `name` is an entry of data/sources.json. LLM_DATA_DIR is a folder of files fetched before,
    LLM_CACHE_DIR another place for the cache; both relative to the repository's root.

    Raises:
        DownloadError: no place gives the file; the message says what was tried and what to do.
    """
    listing = Path(sources) if sources else data_path("sources.json")
    entries = json.loads(listing.read_text(encoding="utf-8"))["files"]
    if name not in entries:
        raise DownloadError(f"no file is named {name!r}; known: {', '.join(sorted(entries))}")
    entry, problems = entries[name], []
    cache = _folder_of("LLM_CACHE_DIR") or _import_pooch().os_cache("gpt-from-tensors")
    target = cache / entry["file"]
    local = {path: partial(_use_local, path, entry, target) for path in _candidates(entry)}
    found = _first_success(local, problems)
    if found is None:
        for problem in problems:
            warnings.warn(f"not used: {problem}", stacklevel=2)
        cached = {target: partial(_use_local, target, entry, target)} if target.is_file() else {}
        remote = {url: partial(_download, url, entry, target) for url in entry["urls"]}
        found = _first_success(cached | remote, problems)
    if found is None:
        raise DownloadError(_advice(name, entry, cache, problems))
    return found


# cell advice of notebooks/01_overview.ipynb
def _advice(name: str, entry: dict, cache: Path, problems: list[str]) -> str:
    """Say what was tried for a file, what was expected, and what helps."""
    size = f"{entry['size']:,}" if entry.get("size") else "an unknown number of"
    return (
        f"could not get {entry['file']} ({name}). Tried:\n"
        + "".join(f"  - {line}\n" for line in problems or ["nothing: no address is known"])
        + f"Expected: {size} bytes, sha256 {entry.get('sha256') or 'unknown'}; "
        f"published at {entry['source']}\n"
        f"What helps: put {entry['file']} into a folder and set LLM_DATA_DIR to it, "
        'or stay with SOURCE = "sample", which needs no network. '
        f"The cache is {cache}; LLM_CACHE_DIR can name another folder."
    )


# cell find-files of notebooks/01_overview.ipynb
def find_files(folder_or_name: str | Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of `names` in a model folder, or in a repository of the Hugging Face hub.

    A folder counts from the current directory, then from the root of the series. `"tiny"` is
    `data/models/tiny`; `"gpt2"`, `"gpt2-medium"`, ... stand for `openai-community/...` on the hub,
    `"smollm2-135m"` and `"smollm2-135m-instruct"` for those of `HuggingFaceTB`. The hub's own
    variables (`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) are honoured.

    Raises:
        FileNotFoundError: no such folder, a file missing in it, or the hub could not give it.
    """
    name = "data/models/tiny" if str(folder_or_name) == "tiny" else str(folder_or_name)
    for folder in (Path(name), find_root() / name):
        if folder.is_dir():
            missing = [n for n in names if not (folder / n).is_file()]
            if missing:
                raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; expected a folder "
                                        f"in Hugging Face's format with {', '.join(names)}.")
            return [folder / n for n in names]
    smollm = {f"smollm2-135m{kind.lower()}": f"HuggingFaceTB/SmolLM2-135M{kind}"
              for kind in ("", "-Instruct")}
    repository = f"openai-community/{name}" if re.fullmatch(r"gpt2(-\w+)?", name) else name
    repository = smollm.get(name, repository)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise FileNotFoundError(f"{name!r} is neither a folder here (looked in {Path.cwd()} and "
                                f"{find_root()}) nor a hub name such as 'openai-community/gpt2'.")
    from huggingface_hub import hf_hub_download       # here, since only this may need the network
    try:
        return [Path(hf_hub_download(repository, n)) for n in names]
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give {repository} "
            f"({_explain(error).splitlines()[0]}). Check the name and the network, "
            "or give a folder that holds " + ", ".join(names) + "."
        ) from error
