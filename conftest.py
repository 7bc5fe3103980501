"""Settings of the whole test run, notebooks included, and a copy of the checkout to play with."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
CHOICES = ("LLM_SOURCE", "LLM_BASE", "LLM_DATA_DIR", "LLM_JUDGE_URL", "LLM_JUDGE_MODEL")


def pytest_configure(config: pytest.Config) -> None:
    """Strict runs compare outputs, so they get the settings the outputs were made with.

    Processes beside each other share the cores: each takes its part of them, and threads that wait
    for work do not spin. The kernels of the notebooks inherit both.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not config.getoption("nbval_lax", default=False):
        for name in CHOICES:
            os.environ.pop(name, None)
        os.environ["LLM_DEVICE"] = "cpu"      # inherited by the notebooks' kernels


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files of this checkout as they are now, in a git repository of its own."""
    copy = tmp_path / "checkout"
    listing = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, found.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run([*git, *command], cwd=copy, check=True)
    return copy
