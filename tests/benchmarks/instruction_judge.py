"""A language model as judge, compared with the labels of data/instruction_labels.json.

    python tests/benchmarks/instruction_judge.py --gguf runs/tuned.gguf \
        --out data/results/instruction_judge.csv

starts llama.cpp's OpenAI-compatible server with the file (needs `llama-cpp-python[server]`) and
has it grade the labelled responses twice: free, and with a grammar that lets it write nothing but
a grade. `--url` and `--model` ask a server that runs already; then without the grammar, which is
llama.cpp's own. One row for each grade. Chapter 7 reads the results.
"""

from __future__ import annotations

import argparse
import csv
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.common import data_path
from helpers.data import read_text
from helpers.judge import LLMJudge, mean_score

GRAMMAR = 'root ::= "Score: " ("0" | [1-9] [0-9]? | "100")'


@contextmanager
def llama_server(gguf: Path) -> Iterator[str]:
    """The address of a server on this machine for the file, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1",
         "--port", str(port), "--n_ctx", "0"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError("the server ended; is llama-cpp-python[server] installed?")
            try:
                requests.get(f"{url}/v1/models", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def grade(judge: LLMJudge, name: str, labels: list[dict]) -> list[dict]:
    """A row for each labelled response."""
    grades = judge.grade_all(labels, [row["response"] for row in labels])
    parsed = sum(g.score is not None for g in grades)
    print(f"{name}: {parsed} of {len(grades)} replies hold a grade"
          + (f", mean {mean_score([g for g in grades if g.score is not None]):.1f}" if parsed
             else ""))
    return [{"judge": name, "label": i, "score": "" if g.score is None else g.score,
             "reply": g.reply, "error": "" if g.reply else g.error}
            for i, g in enumerate(grades)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="a model for llama.cpp's server")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--model", default="tuned", help="the name of the model there")
    options = parser.parse_args()
    if (options.gguf is None) == (options.url is None):
        parser.error("give either --gguf or --url")
    labels = json.loads(read_text(data_path("instruction_labels.json")))
    if options.url:
        rows = grade(LLMJudge(options.url, options.model), options.model, labels)
    else:
        with llama_server(options.gguf) as url:
            plain = {"repeat_penalty": 1.0}
            rows = grade(LLMJudge(url, options.model, max_tokens=60, extra_body=plain), "free",
                         labels)
            rows += grade(LLMJudge(url, options.model, max_tokens=60,
                                   extra_body=plain | {"grammar": GRAMMAR}), "grammar", labels)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
