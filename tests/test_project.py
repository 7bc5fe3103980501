"""The project's own promises: packages in step, commands as the README gives them, clean style."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUESTED = {"torch", "tiktoken", "jupyterlab", "matplotlib", "pandas", "nbval", "tqdm"}


def packages(lines: list[str]) -> dict[str, str]:
    """Package name to version range, from lines of a requirements file."""
    found = {}
    for line in lines:
        line = line.split("#")[0].strip()
        if match := re.fullmatch(r"([A-Za-z][\w.-]*)(.*)", line):
            found[match[1].replace("-", "_").lower()] = match[2].replace(" ", "")
    return found


def requirements(name: str = "requirements.txt") -> dict[str, str]:
    return packages((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_conda_and_pip_ask_for_the_same_packages() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = text.split("dependencies:")[1]
    conda = packages(re.findall(r"^  - ([^:\n]+)$", listed, flags=re.MULTILINE))
    conda["torch"] = conda.pop("pytorch")
    python = conda.pop("python")
    conda.pop("pip")
    assert conda == requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert python.startswith(project["requires-python"])


def test_requested_packages_are_there_and_none_is_pinned() -> None:
    wanted = requirements()
    assert wanted.keys() >= REQUESTED
    assert wanted.pop("torch").endswith(",<2.14"), "an open range of torch brings CUDA"
    assert all(re.fullmatch(r">=[\d.]+", version) for version in wanted.values()), wanted


def test_the_series_itself_is_installed() -> None:
    assert "-e ." in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


def test_imports_of_helpers_are_among_the_requirements() -> None:
    known = {"torch", "numpy", "regex"} | requirements().keys()   # numpy, regex: with tiktoken etc.
    known |= {"nbformat", "nbconvert", "jinja2", "ipython"}       # with jupyterlab
    known |= {"urllib3"}                                          # with requests
    known |= set(sys.stdlib_module_names) | {"helpers"}
    for path in (ROOT / "helpers").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        unknown = {name.split(".")[0] for name in names} - known - {"google"}
        unknown -= {"datasets", "latex2mathml"}     # named where missing; for corpora, for the site
        assert unknown == set(), path.name


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^(python3 -m venv .*pytest)$", readme, flags=re.MULTILINE)
    assert command, "the README has no one-line test command"
    assert command[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_links_of_the_readme_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_notebook_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in (ROOT / "notebooks").glob("*.ipynb")
               if f"(notebooks/{p.name})" not in readme]
    assert missing == []


def test_results_in_the_readme_are_those_of_the_files() -> None:
    run = subprocess.run([sys.executable, "tests/benchmarks/tables.py", "--check"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("command", [["check", "."]])
def test_ruff(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_nothing_of_a_machine_or_a_registry_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".safetensors", ".png"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"/(?:home|root|work|Users)/\w[\w./-]*|site-packages", text)
        assert name.startswith("tests/test_") or not found, f"{name}: {found[:3]}"


def test_one_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {n: (ROOT / n).stat().st_size for n in filter(None, listed.stdout.split("\0"))
             if (ROOT / n).is_file()}
    large = [n for n, size in sizes.items() if size > 1_000_000]
    assert large in ([], ["data/models/tiny/model.safetensors"])
    assert all(sizes[n] < 20_000_000 for n in large)
