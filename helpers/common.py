"""1 · What a language model is.

Made from notebooks/01_overview.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.download.
"""

import os
import platform
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import torch

__all__ = [
    "set_plot_style",
    "DATA_SOURCES",
    "BASES",
    "resolve_settings",
    "find_root",
    "data_path",
    "atomic_write",
    "set_seed",
    "get_device",
    "print_versions",
]


# cell set-plot-style of notebooks/01_overview.ipynb
def set_plot_style() -> None:
    """Set matplotlib's defaults for the figures of this series."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    matplotlib.rcParams.update({
        "figure.figsize": (5, 3), "figure.dpi": 100, "savefig.dpi": 100,
        "figure.facecolor": "white", "axes.facecolor": "white",
        "savefig.facecolor": "white", "savefig.transparent": False,
        "figure.constrained_layout.use": True,
        "axes.prop_cycle": matplotlib.cycler(color=colours),    # safe for colour-blind readers
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9", "grid.linewidth": 0.8,
        "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "viridis",
    })


# cell sources of notebooks/01_overview.ipynb
DATA_SOURCES = ("sample", "real")


# cell bases of notebooks/01_overview.ipynb
BASES = ("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
         "smollm2-135m", "smollm2-135m-instruct")


# cell resolve-settings of notebooks/01_overview.ipynb
def resolve_settings(source: str | None = None, base: str | None = None) -> tuple[str, str]:
    """Return the data source and the base model; LLM_SOURCE and LLM_BASE win over the arguments.

    Example:
        >>> resolve_settings("sample", "gpt2")
        ('sample', 'gpt2')
    """
    chosen = []
    for name, given, allowed in (("SOURCE", source, DATA_SOURCES), ("BASE", base, BASES)):
        setting = os.environ.get("LLM_" + name)
        value = setting or given or allowed[0]
        is_path = allowed is BASES and ("/" in value or os.sep in value)
        if value not in allowed and not is_path:
            where = "the environment variable LLM_" + name if setting else name
            more = ", or a folder or a hub name with a slash in it" if allowed is BASES else ""
            raise ValueError(f"{where} is {value!r}; allowed: {', '.join(allowed)}{more}")
        chosen.append(value)
    return chosen[0], chosen[1]


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


# cell atomic-write of notebooks/01_overview.ipynb
@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which takes the place of `path` at the end.

    A reader finds the old file or the whole new one, never a part. On an error the temporary
    file is removed and the old one stays.

    Example:
        >>> with atomic_write("note.txt") as temporary:
        ...     temporary.write_text("all or nothing", encoding="utf-8")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())              # on the disk, before the old file goes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


# cell print-versions of notebooks/01_overview.ipynb
def print_versions() -> None:
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
