"""Write the tables of results into the README, from the files in data/results.

    python tests/benchmarks/tables.py           # rewrites what stands between the markers
    python tests/benchmarks/tables.py --check   # fails if the README says something else

The files come from the benchmarks beside this one: `spam.py`, `lora.py` and `instruction.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from helpers.instruction import exact_match, wilson_interval  # noqa: E402

RESULTS = ROOT / "data" / "results"
SPAM = {"majority": "majority class", "length": "length alone", "keywords": "keywords",
        "tfidf": "TF-IDF, logistic regression", "features": "frozen features, logistic regression",
        "last": "fine-tuned: last block and final norm", "lora": "fine-tuned: LoRA",
        "all": "fine-tuned: all parameters", "dropout": "fine-tuned: all, with dropout",
        "auxiliary": "fine-tuned: all, language-model loss beside it",
        "random": "random start: all parameters"}


def percent(values: pd.Series) -> str:
    """Mean in per cent, and the standard deviation where there are several seeds."""
    deviation = f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{deviation}" if len(values) else "-"


def spam_table() -> str:
    """Accuracy on both test sets, and on the other collection's."""
    rows = pd.read_csv(RESULTS / "spam.csv")
    rows = rows[rows["experiment"].isin(["seeds", "baselines"])]
    sizes = {name: int(part["n_test"].iloc[0]) for name, part in rows.groupby("collection")}
    lines = [f"| classifier | this project's messages ({sizes['sample']} in the test) "
             f"| UCI ({sizes['uci']}) | trained on ours, tested on UCI "
             "| trained on UCI, tested on ours | seeds |", "|---|---|---|---|---|---|"]
    for method, name in SPAM.items():
        found = rows[rows["method"] == method]
        if found.empty:
            continue
        ours, uci = (found[found["collection"] == c] for c in ("sample", "uci"))
        cells = [percent(ours["accuracy"]), percent(uci["accuracy"]),
                 percent(ours["cross_accuracy"].dropna()), percent(uci["cross_accuracy"].dropna())]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['seed'].nunique()} |")
    return "\n".join(lines)


def instruction_table() -> str:
    """Exact match of the closed kinds, before and after fine-tuning, with Wilson intervals."""
    kinds = json.loads((ROOT / "data" / "instruction_kinds.json").read_text(encoding="utf-8"))
    rows = pd.read_csv(RESULTS / "instruction_responses.csv", keep_default_na=False)
    rows = rows[[kinds[kind]["closed"] for kind in rows["kind"]]]
    for name in ("base", "full"):
        rows[f"{name} right"] = [exact_match(a, b) > 0
                                 for a, b in zip(rows[name], rows["reference"], strict=True)]
    lines = ["| kind of task | test examples | base | fine-tuned | 95% interval |",
             "|---|---|---|---|---|"]

    def line(name: str, part: pd.DataFrame) -> str:
        right, n = int(part["full right"].sum()), len(part)
        low, high = wilson_interval(right, n)
        return (f"| {name} | {n} | {100 * part['base right'].mean():.0f}% | {100 * right / n:.0f}% "
                f"| {100 * low:.0f} to {100 * high:.0f}% |")

    order = rows.groupby("kind")["full right"].mean().sort_values(ascending=False, kind="stable")
    lines += [line(f"`{kind}`", rows[rows["kind"] == kind]) for kind in order.index]
    return "\n".join([*lines, line("all closed kinds", rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check, path = parser.parse_args().check, ROOT / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, table in (("spam", spam_table()), ("instruction", instruction_table())):
        block = f"<!-- results: {name} -->\n\n{table}\n\n<!-- end -->"
        place = re.search(rf"<!-- results: {name} -->.*?<!-- end -->", new, flags=re.DOTALL)
        if place:
            new = new[:place.start()] + block + new[place.end():]
        else:
            print(f"README.md has no place for the results of {name}.")
            return 1
    if check and new != old:
        print("The README's tables are not those of data/results: run tests/benchmarks/tables.py.")
    elif new != old:
        path.write_text(new, encoding="utf-8", newline="\n")
    return int(check and new != old)


if __name__ == "__main__":
    raise SystemExit(main())
