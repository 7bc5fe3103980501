"""1 · What a language model is.

Made from notebooks/01_overview.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import errno
import hashlib
import json
import lzma
import os
import platform
import random
import shutil
import tempfile
import warnings
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib
import numpy as np
import torch

__all__ = [
    "find_root",
    "data_path",
    "use_style",
    "SOURCES",
    "BASES",
    "choose",
    "set_seed",
    "get_device",
    "report_environment",
    "sha256",
    "read_sources",
    "FetchError",
    "what_is_wrong",
    "is_packed",
    "unpack",
    "store",
    "BROKEN",
    "explain",
    "folder_of",
    "find_local",
    "quiet_pooch",
    "download",
    "fetch",
]


# cell find-root of notebooks/01_overview.ipynb
def find_root() -> Path:
    """Return the folder that holds data/sources.json: the root of the repository."""
    here = globals().get("__file__")               # unknown while this runs in a notebook
    starts = [Path(here).resolve().parent] if here else []
    starts.append(Path.cwd())
    for start in starts:
        for folder in (start, *start.parents):
            if (folder / "data" / "sources.json").is_file():
                return folder
    raise FileNotFoundError(
        f"found no data/sources.json in or above {' or '.join(map(str, starts))}. "
        "Start Jupyter inside the folder of the series, or copy its data folder along."
    )


# cell data-path of notebooks/01_overview.ipynb
def data_path(name: str) -> Path:
    """Return the path of data/<name>, a file or folder that ships with the series."""
    path = find_root() / "data" / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, though it ships with the series: fetch the repository again."
        )
    return path


# cell use-style of notebooks/01_overview.ipynb
def use_style() -> None:
    """Set matplotlib's defaults for the figures of this series."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    matplotlib.rcParams.update({
        "figure.figsize": (5, 3), "figure.dpi": 100, "savefig.dpi": 100,
        "figure.facecolor": "white", "axes.facecolor": "white",
        "savefig.facecolor": "white", "savefig.transparent": False,
        "figure.constrained_layout.use": True,
        "axes.prop_cycle": matplotlib.cycler(color=colours),    # told apart by the colour-blind
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9", "grid.linewidth": 0.8,
        "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "viridis",
    })


# cell source-names of notebooks/01_overview.ipynb
SOURCES = ("sample", "real")


# cell base-names of notebooks/01_overview.ipynb
BASES = ("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


# cell choose of notebooks/01_overview.ipynb
def choose(source: str | None = None, base: str | None = None) -> tuple[str, str]:
    """Return the data source and the base model; LLM_SOURCE and LLM_BASE win over the arguments.

    >>> choose("sample", "gpt2")
    ('sample', 'gpt2')
    """
    picked = []
    for name, given, allowed in (("SOURCE", source, SOURCES), ("BASE", base, BASES)):
        setting = os.environ.get("LLM_" + name)
        value = setting or given or allowed[0]
        is_path = allowed is BASES and ("/" in value or os.sep in value)
        if value not in allowed and not is_path:
            where = "the environment variable LLM_" + name if setting else name
            more = ", or a folder or a hub name with a slash in it" if allowed is BASES else ""
            raise ValueError(f"{where} is {value!r}; allowed: {', '.join(allowed)}{more}")
        picked.append(value)
    return picked[0], picked[1]


# cell set-seed of notebooks/01_overview.ipynb
def set_seed(seed: int) -> None:
    """Start Python's, NumPy's and PyTorch's random numbers from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# cell get-device of notebooks/01_overview.ipynb
def get_device(name: str | None = None) -> torch.device:
    """Return the device to compute on: LLM_DEVICE, else `name`, else the best that is reliable."""
    where = "LLM_DEVICE" if os.environ.get("LLM_DEVICE") else "the device"
    name = os.environ.get("LLM_DEVICE") or name
    mps = torch.backends.mps
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        # MPS, the graphics chip of a Mac, is taken unasked from PyTorch 2.13 on. Before, attention
        # there could silently be wrong: for transposed tensors, as chapter 3 makes them (pytorch
        # issues 163597 and 181133, mended in 2.9 and 2.12), and with a causal mask in half
        # precision (195910, mended in 2.13). PyTorch itself supports macOS 14 and newer.
        reliable = torch.__version__ >= (2, 13) and mps.is_available()
        return torch.device("mps" if reliable and mps.is_macos_or_newer(14, 0) else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{where} is {name!r}; allowed: cpu, cuda, cuda:0, cuda:1, ..., mps")
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_cuda:
        raise ValueError(f"{where} is {name!r}, but PyTorch finds {n_cuda} CUDA devices here")
    if device.type == "mps" and not mps.is_available():
        raise ValueError(f"{where} is {name!r}, but PyTorch finds no MPS device here")
    return device


# cell report-environment of notebooks/01_overview.ipynb
def report_environment() -> None:
    """Print the versions and the device that the notebooks run on."""
    device = get_device()
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"device {device}{name}, {torch.get_num_threads()} CPU threads")
    for package in ("torch", "tiktoken", "numpy", "pandas", "matplotlib", "safetensors",
                    "huggingface_hub", "pooch", "tqdm", "jupyterlab", "nbval"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<16} {version}")


# cell sha256 of notebooks/01_overview.ipynb
def sha256(path: Path) -> str:
    """Return the SHA-256 of a file: 64 hexadecimal digits, in practice shared by no other file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# cell read-sources of notebooks/01_overview.ipynb
def read_sources(path: Path | None = None) -> dict[str, dict]:
    """Return the entries of data/sources.json (or of another file like it) by name."""
    path = Path(path) if path else find_root() / "data" / "sources.json"
    return json.loads(path.read_text(encoding="utf-8"))["files"]


# cell fetch-error of notebooks/01_overview.ipynb
class FetchError(RuntimeError):
    """A public file could not be had; the message says what was tried and what to do."""


# cell what-is-wrong of notebooks/01_overview.ipynb
def what_is_wrong(path: Path, entry: dict) -> str | None:
    """Return why the file at `path` is not the one that `entry` means, or None where it is."""
    size, expected = path.stat().st_size, entry.get("size")
    problem = None
    if entry.get("sha256"):
        found = sha256(path)
        if found != entry["sha256"]:
            problem = f"has sha256 {found} ({size:,} bytes), not {entry['sha256']}"
            problem += f" ({expected:,} bytes)" if expected else ""
    elif expected and size != expected:
        problem = f"has {size:,} bytes, not {expected:,}"
    elif entry["file"].endswith(".json"):          # no hash to go by: at least it is whole
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problem = f"is not JSON: {error}"
    if problem:
        with open(path, "rb") as file:
            is_page = file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html"))
        problem += "; it looks like a web page" if is_page else ""
    return problem


# cell is-packed of notebooks/01_overview.ipynb
def is_packed(path: Path, entry: dict) -> bool:
    """Return whether the file at `path` is the archive around the file that `entry` means."""
    with open(path, "rb") as file:
        start = file.read(6)
    is_xz = entry.get("unpack") == "xz" and start == b"\xfd7zXZ\x00"
    return is_xz or ("member" in entry and zipfile.is_zipfile(path))


# cell unpack of notebooks/01_overview.ipynb
def unpack(path: Path, entry: dict, target: Path) -> None:
    """Write what is packed in the archive at `path` to `target`."""
    with open(target, "wb") as out:
        if "member" in entry:
            with zipfile.ZipFile(path) as archive, archive.open(entry["member"]) as packed:
                shutil.copyfileobj(packed, out)
        else:
            with lzma.open(path) as packed:
                shutil.copyfileobj(packed, out)


# cell store of notebooks/01_overview.ipynb
def store(path: Path, entry: dict, target: Path) -> str | None:
    """Unpack a file, check it, and move it to `target` in one step; return what is wrong, if so."""
    if is_packed(path, entry):
        unpacked = path.parent / "unpacked"
        unpack(path, entry, unpacked)
        path = unpacked
    problem = what_is_wrong(path, entry)
    if problem is None:
        try:
            os.replace(path, target)
        except PermissionError:          # Windows: another process holds the file open
            if what_is_wrong(target, entry):
                raise
    return problem


# cell broken of notebooks/01_overview.ipynb
BROKEN = (OSError, EOFError, KeyError, RuntimeError, ValueError,
          lzma.LZMAError, zipfile.BadZipFile, zlib.error)


# cell explain of notebooks/01_overview.ipynb
def explain(error: BaseException) -> str:
    """Return the root of an error in one line: network libraries wrap theirs several times."""
    while (
        type(error).__module__.partition(".")[0] in ("requests", "urllib3")
        and getattr(error, "response", None) is None
        and (error.__cause__ or error.__context__)
    ):
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}"


# cell folder-of of notebooks/01_overview.ipynb
def folder_of(variable: str) -> Path | None:
    """Return the folder that an environment variable names, relative to the repository's root."""
    value = os.environ.get(variable)
    return (find_root() / Path(value).expanduser()).resolve() if value else None


# cell find-local of notebooks/01_overview.ipynb
def find_local(entry: dict, target: Path) -> tuple[Path | None, list[str]]:
    """Look for a file under LLM_DATA_DIR: (its path or None, what is wrong with candidates)."""
    folder = folder_of("LLM_DATA_DIR")
    if folder is None:
        return None, []
    if not folder.is_dir():
        return None, [f"LLM_DATA_DIR: there is no folder {folder}"]
    names = [entry["file"], *(unquote(urlsplit(url).path.split("/")[-1]) for url in entry["urls"])]
    found = sorted(path for path in folder.rglob("*") if path.name in names and path.is_file())
    wrong = []
    for path in sorted(found, key=lambda path: names.index(path.name)):
        try:
            if not is_packed(path, entry):
                problem = what_is_wrong(path, entry)
                if problem is None:
                    return path, []
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as work:
                    packed = shutil.copy(path, Path(work) / "packed")
                    problem = store(Path(packed), entry, target)
                if problem is None:
                    return target, []
        except BROKEN as error:
            problem = f"cannot be read: {explain(error)}"
        wrong.append(f"{path} {problem}")
    return None, wrong


# cell quiet-pooch of notebooks/01_overview.ipynb
def quiet_pooch():
    """Return pooch, the download library, without tqdm's advice to install notebook widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pooch
    return pooch


# cell download of notebooks/01_overview.ipynb
def download(entry: dict, target: Path) -> list[str] | None:
    """Try each URL until one gives the right file; return why all of them failed, if so."""
    get = quiet_pooch().HTTPDownloader(progressbar=True, timeout=30, chunk_size=2**16)
    reasons = []
    for url in entry["urls"]:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as work:
            packed = Path(work) / "packed"
            try:
                get(url, str(packed), None)
                problem = store(packed, entry, target)
            except BROKEN as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise                          # the next address would not help
                problem = explain(error)
        if problem is None:
            return None
        reasons.append(f"{url}: {problem}")
    return reasons


# cell fetch of notebooks/01_overview.ipynb
def fetch(name: str, *, sources: Path | None = None) -> Path:
    """Return the path of a public file, checked: from LLM_DATA_DIR, the cache, or the network.

    `name` is an entry of data/sources.json. LLM_DATA_DIR is a folder of files fetched before,
    LLM_CACHE_DIR another place for the cache; both relative to the repository's root.
    """
    entries = read_sources(sources)
    if name not in entries:
        raise FetchError(f"no file is named {name!r}; known: {', '.join(sorted(entries))}")
    entry = entries[name]
    cache = folder_of("LLM_CACHE_DIR") or quiet_pooch().os_cache("llm-from-tensors")
    target = cache / entry["file"]
    found, tried = find_local(entry, target)
    if found:
        return found
    for line in tried:
        warnings.warn(f"not used: {line}", stacklevel=2)
    try:
        if target.is_file():
            problem = what_is_wrong(target, entry)
            if problem is None:
                return target
            tried.append(f"{target} {problem}")
        cache.mkdir(parents=True, exist_ok=True)
        reasons = download(entry, target)
        if reasons is None:
            return target
        tried += reasons
    except OSError as error:
        tried.append(f"{cache}: {error}. LLM_CACHE_DIR can name another folder")
    size = f"{entry['size']:,}" if entry.get("size") else "an unknown number of"
    raise FetchError(
        f"could not get {entry['file']} ({name}). Tried:\n"
        + "".join(f"  - {line}\n" for line in tried or ["nothing: no address is known"])
        + f"Expected: {size} bytes, sha256 {entry.get('sha256') or 'unknown'}; "
        f"published at {entry['source']}\n"
        f"What helps: put {entry['file']} into a folder and set LLM_DATA_DIR to it, "
        'or stay with SOURCE = "sample", which needs no network.'
    )
