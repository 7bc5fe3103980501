"""tests/benchmarks/instruction.py and the results it stored: the rows are those of its plan."""

from __future__ import annotations

import csv
import json
import runpy
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"
PLAN = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "instruction.py"))["plan"](False)


def rows_of(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_no_run_twice() -> None:
    assert len(set(PLAN)) == len(PLAN) and PLAN[0].experiment == "base"
    assert sorted(run.record for run in PLAN if run.record) == [
        "base", "full", "lora", "more", "unmasked"]


@pytest.mark.parametrize("row", rows_of("instruction.csv"), ids=lambda row: f"run {row['run']}")
def test_a_stored_row_has_the_settings_of_its_run(row: dict[str, str]) -> None:
    run = PLAN[int(row["run"])]
    for name in ("experiment", "method", "seed", "rank", "epochs", "batch_size", "n_extra",
                 "mixed", "mask_prompt", "mask_end", "include_held_out"):
        assert row[name] == str(getattr(run, name))
    assert float(row["lr"]) == run.lr and float(row["dropout"]) == run.dropout
    assert row["split"] in run.splits and int(row["epoch"]) <= max(run.epochs, 200)


def test_scores_by_kind_add_up() -> None:
    """The mean over the closed kinds, weighted by their examples, is the exact match."""
    kinds = json.loads((ROOT / "data" / "instruction_kinds.json").read_text(encoding="utf-8"))
    found = defaultdict(list)
    for row in rows_of("instruction_kinds.csv"):
        if kinds[row["kind"]]["closed"] and row["kind"] != "negative":
            found[row["run"], row["split"]].append((int(row["n"]), float(row["score"])))
    scores = {(row["run"], row["split"]): row for row in rows_of("instruction.csv")
              if row["epoch"] == row["epochs"]}
    assert len(found) >= 20
    for key, parts in found.items():
        n = sum(n for n, _ in parts)
        assert n == int(scores[key]["n_closed"])
        mean = sum(n * score for n, score in parts) / n
        assert mean == pytest.approx(float(scores[key]["exact_match"]), abs=0.05)
