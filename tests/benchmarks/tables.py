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

from helpers.instruction import wilson_interval  # noqa: E402

RESULTS = ROOT / "data" / "results"
SPAM = {"majority": "majority class", "length": "length alone", "keywords": "keywords",
        "tfidf": "TF-IDF, logistic regression", "features": "frozen features, logistic regression",
        "last": "fine-tuned: last block and final norm", "lora": "fine-tuned: LoRA",
        "all": "fine-tuned: all parameters", "dropout": "fine-tuned: all, with dropout",
        "auxiliary": "fine-tuned: all, language-model loss beside it",
        "auxiliary dropout": "fine-tuned: all, language-model loss and dropout",
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


def chosen_run(results: pd.DataFrame, experiment: str) -> int:
    """The run of the experiment with the most exact matches on the validation set."""
    rows = results[(results["experiment"] == experiment) & (results["split"] == "val")
                   & (results["epoch"] == results["epochs"])]
    return int(rows.loc[rows["exact_match"].idxmax(), "run"])


def instruction_table() -> str:
    """Exact match of the closed kinds on the test set, with Wilson intervals."""
    kinds = json.loads((ROOT / "data" / "instruction_kinds.json").read_text(encoding="utf-8"))
    results = pd.read_csv(RESULTS / "instruction.csv")
    scores = pd.read_csv(RESULTS / "instruction_kinds.csv")
    closed = [kind for kind, about in kinds.items() if about["closed"] and kind != "negative"]
    scores = scores[(scores["split"] == "test") & scores["kind"].isin(closed)]
    chosen = [chosen_run(results, name) for name in ("base", "recipe", "more examples")]
    base, tuned, more = (scores[scores["run"] == run].set_index("kind") for run in chosen)
    extra = int(results[results["run"] == chosen[2]]["n_extra"].iloc[0])
    lines = [f"| kind of task | test examples | base | fine-tuned | with {extra:,} more examples | "
             "95% interval |", "|---|---|---|---|---|---|"]

    def line(name: str, n: int, right: list[int]) -> str:
        low, high = wilson_interval(right[-1], n)
        cells = [f"{100 * r / n:.0f}%" for r in right]
        return f"| {name} | {n} | {' | '.join(cells)} | {100 * low:.0f} to {100 * high:.0f}% |"

    def counts(kind: str) -> list[int]:
        return [round(t.loc[kind, "score"] * t.loc[kind, "n"] / 100) for t in (base, tuned, more)]

    order = more.sort_values("score", ascending=False, kind="stable").index
    lines += [line(f"`{kind}`", int(more.loc[kind, "n"]), counts(kind)) for kind in order]
    totals = [sum(column) for column in zip(*map(counts, order), strict=True)]
    return "\n".join([*lines, line("all closed kinds", int(more["n"].sum()), totals)])


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
