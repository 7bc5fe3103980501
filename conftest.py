"""Strict runs compare outputs, so they get the settings with which the outputs were made."""

import os


def pytest_configure(config) -> None:
    """Set the default source, base and device, unless outputs are not compared (--nbval-lax)."""
    if config.getoption("nbval_lax", default=False):
        return
    for name in ("LLM_SOURCE", "LLM_BASE", "LLM_DATA_DIR", "LLM_JUDGE_URL", "LLM_JUDGE_MODEL"):
        os.environ.pop(name, None)
    os.environ["LLM_DEVICE"] = "cpu"      # inherited by the notebooks' kernels
