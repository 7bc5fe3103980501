"""data/instruction_labels.json, and the benchmark that compares a judge with it."""

from __future__ import annotations

import csv
import json
import runpy
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.instruction import exact_match

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
LABELS = json.loads((DATA / "instruction_labels.json").read_text(encoding="utf-8"))
KINDS = json.loads((DATA / "instruction_kinds.json").read_text(encoding="utf-8"))
MODELS = {"fine-tuned": 12, "prompt not masked": 8, "LoRA": 8, "base": 6}
PROBES = {"reference": 3, "other words": 3, "fluent, wrong": 4, "verbose": 3, "injected": 2,
          "empty": 1}


def test_labels_are_whole_and_stratified() -> None:
    assert len(LABELS) == 50
    assert Counter(row["source"] for row in LABELS) == MODELS | PROBES
    for row in LABELS:
        assert set(row) == {"source", "kind", "instruction", "input", "output", "response",
                            "first_reading", "second_reading"}
        assert 0 <= row["first_reading"] <= 100 and 0 <= row["second_reading"] <= 100
    of_models = [row for row in LABELS if row["source"] in MODELS]
    assert sum(KINDS[row["kind"]]["closed"] for row in of_models) == len(of_models) / 2


def test_labels_are_of_the_recorded_test_set() -> None:
    with open(DATA / "results" / "instruction_responses.csv", encoding="utf-8",
              newline="") as file:
        recorded = {(r["instruction"], r["input"], r["reference"]): r
                    for r in csv.DictReader(file)}
    columns = {"fine-tuned": "full", "prompt not masked": "unmasked", "LoRA": "lora",
               "base": "base"}
    for row in LABELS:
        found = recorded[row["instruction"], row["input"], row["output"]]
        if row["source"] in columns:
            assert row["response"] == found[columns[row["source"]]]


@pytest.mark.parametrize("reading", ["first_reading", "second_reading"])
def test_grades_follow_the_rubric(reading: str) -> None:
    for row in LABELS:
        if row["source"] == "reference" or exact_match(row["response"], row["output"]):
            assert row[reading] == 100
        if not row["response"]:
            assert row[reading] == 0
        if row["source"] in ("injected", "fluent, wrong", "base"):
            assert row[reading] <= 30
        if row["source"] == "other words":
            assert row[reading] >= 75


def test_the_card_counts_right() -> None:
    card = (DATA / "instructions.md").read_text(encoding="utf-8")
    pairs = [(row["first_reading"], row["second_reading"]) for row in LABELS]
    assert f"{sum(a == b for a, b in pairs)} of 50 grades are equal" in card
    assert f"difference is {sum(abs(a - b) for a, b in pairs) / 50:.1f}" in card


def test_the_stored_judge_graded_every_label_twice() -> None:
    with open(DATA / "results" / "instruction_judge.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("free", "grammar"):
        assert [int(r["label"]) for r in rows if r["judge"] == name] == list(range(50))
    assert all(r["reply"] == f"Score: {r['score']}" for r in rows if r["judge"] == "grammar")


def test_the_benchmark_asks_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            content = "Score: 100" if b"pool" in asked else "I cannot say."
            body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path / "judge.csv"
    monkeypatch.setattr("sys.argv", ["judge", "--url", f"http://127.0.0.1:{server.server_port}",
                                     "--model", "some", "--out", str(out)])
    script = runpy.run_path(str(ROOT / "tests/benchmarks/instruction_judge.py"))
    assert script["main"]() == 0
    server.shutdown()
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50 and {r["judge"] for r in rows} == {"some"}
    graded = [LABELS[int(r["label"])] for r in rows if r["score"] == "100"]
    assert graded and all("pool" in json.dumps(row) for row in graded)
