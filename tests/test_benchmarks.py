"""The benchmarks run; what they measure is for a person to read, and no time is looked at."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.gpt import GPT

PATH = Path(__file__).parent / "benchmarks" / "run.py"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in which a measurement is a single call that takes one second."""
    spec = importlib.util.spec_from_file_location("benchmarks_run", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "best", lambda run, *args, **options: (run(), 1.0)[1])
    return module


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_a_training_step_is_one_batch(benchmarks: ModuleType, who: str) -> None:
    benchmarks.BATCH["tiny"] = 1
    result = benchmarks.training(who, "tiny", "float32", False)
    assert result["tokens_per_s"] == benchmarks.BATCH["tiny"] * benchmarks.T
    n_params = GPT(benchmarks.SHAPES["tiny"]).n_params
    assert 6 < result["flops_per_s"] / result["tokens_per_s"] / n_params < 8      # for each token


@pytest.mark.parametrize("who", ["ours", "prepared", "transformers", "without cache"])
def test_generation_counts_new_tokens(benchmarks: ModuleType, who: str) -> None:
    result = benchmarks.generation(who, "tiny", "float32", 3)
    assert result["tokens_per_s"] == 3
    config = benchmarks.SHAPES["tiny"]
    n_params = GPT(config).n_params - config.context_length * config.n_embd   # all but positions
    assert abs(result["bytes_per_s"] / (3 * 4 * n_params) - 1) < 0.01


def test_a_child_prints_its_result(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(PATH), "--child", '["machine", "float32", 0.05]'],
                          capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["flops"] > 1e8 and result["bytes"] > 1e7 and result["peak_mib"] > 100


def test_rounds_end_in_time_and_the_tables_hold_the_best(
        benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    """A clock that each measurement sets forward by a minute; the second rounds are faster."""
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: clock[0])

    def measure(what: str, *variant: object) -> dict:
        clock[0] += 60
        calls.append((what, *variant))
        return {"wall": 60.0, "flops": 4e9, "bytes": 2e9, "flops_per_s": 1e9, "bytes_per_s": 1e9,
                "tokens_per_s": 100.0 * calls.count((what, *variant)) / (1 + ("ours" in variant)),
                "peak_mib": 5.0, "seconds": 0.5, "grown_mib": 7.0}

    monkeypatch.setattr(benchmarks, "measure", measure)
    options = argparse.Namespace(what=["training", "generation", "loading"], shapes=["tiny"],
                                 precisions=["float32"], compile=False)
    groups = benchmarks.plan(options, "folder")
    found = benchmarks.measure_all(groups, rounds=2, minutes=13.5)
    assert len(calls) == 10 + 3                       # of the second round, machine and training
    benchmarks.tables(groups, found)
    shown = capsys.readouterr().out
    assert "| tiny | float32 | ours | 100.0 | 0.50 | 25% | 5 |" in shown
    assert "| tiny | float32 | transformers | 200 | 1.00 | 25% | 5 |" in shown
    assert "| tiny | float32 | compiled | 100.0 | 1.00 | 50% | 5 |" in shown
    assert "| ours | 0.50 | 7 |" in shown


def test_an_unknown_benchmark_is_named(
        benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "training", "cooking"])
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main()
    assert stopped.value.code == 2 and "unknown: cooking" in capsys.readouterr().err
