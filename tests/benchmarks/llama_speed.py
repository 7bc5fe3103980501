"""Cached generation and opening at SmolLM2-135M's shape, beside transformers, with random weights.

    python tests/benchmarks/llama_speed.py                      # about ten minutes on two cores
    python tests/benchmarks/llama_speed.py --device cuda --out llama_speed.csv

Each measurement is a process of its own; ours and theirs take turns, and the best round of each is
printed. Run it alone on the machine. "prepared" and "compiled" are ours after
`optimize_for_inference`, without and with `compile`. Opened is a folder in bfloat16, as the hub
has it, and the mean of every weight is read once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from helpers.generation import generate
from helpers.inference import optimize_for_inference
from helpers.llama import Llama, LlamaConfig
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import load_tokenizer

SHAPE = LlamaConfig(vocab_size=49152, context_length=8192, n_embd=576, n_head=9, n_layer=30,
                    n_kv_head=3, intermediate_size=1536, rope_base=100_000.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHO = ("transformers", "ours", "prepared", "compiled")
PROMPT, N_NEW = 10, 50


def theirs(config: LlamaConfig) -> nn.Module:
    """A randomly initialized model of transformers, of the same shape."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(TheirConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.context_length,
        hidden_size=config.n_embd, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, num_hidden_layers=config.n_layer,
        intermediate_size=config.intermediate_size, rope_theta=config.rope_base,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=0, eos_token_id=None, pad_token_id=0))


def generation(who: str, precision: str, device: str, n_new: int = N_NEW,
               config: LlamaConfig = SHAPE, at_least: int = 3) -> dict:
    """New tokens a second after a prompt of ten, greedily, and the bytes of weights read for it."""
    torch.manual_seed(0)
    model = theirs(config) if who == "transformers" else Llama(config)
    model = model.to(device, DTYPES[precision]).eval()
    if who in ("prepared", "compiled"):
        optimize_for_inference(model, compile=who == "compiled")
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT))

    def run() -> int:
        if who != "transformers":
            return len(generate(model, prompt[0].tolist(), n_new))
        with torch.inference_mode():
            ids = prompt.to(device)
            return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new,
                                  min_new_tokens=n_new, do_sample=False).shape[1]

    assert run() == PROMPT + n_new                            # a compiled model compiles here
    times = []
    for _ in range(at_least):
        start = time.perf_counter()
        run()                                                 # ends with ids on the host
        times.append(time.perf_counter() - start)
    read = sum(p.nbytes for p in model.parameters())          # each weight once for each token
    return {"tokens_per_s": n_new / min(times), "gb_per_s": read * n_new / min(times) / 1e9}


def opening(who: str, precision: str, folder: str) -> dict:
    """Seconds to open a folder, and to read all of it once; MiB of memory that is no file's."""
    if who == "transformers":
        from transformers import LlamaForCausalLM  # the import is not counted
    before, start = anonymous_mib(), time.perf_counter()
    if who == "ours":
        model, _ = load_pretrained(folder, dtype=DTYPES[precision])
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])
    opened = time.perf_counter() - start
    assert sum(p.float().mean().item() for p in model.parameters()) != 0
    return {"seconds": opened, "seconds_read": time.perf_counter() - start,
            "grown_mib": anonymous_mib() - before}


def anonymous_mib() -> float:
    """Memory of this process that is not that of files (Linux only)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def measure(what: str, *arguments: object) -> dict:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([what, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict]) -> None:
    """Print the best round of each, and its ratio to transformers of the same precision."""
    for what, key, better in (("generation", "tokens_per_s", max), ("opening", "seconds", min)):
        best: dict[tuple, dict] = {}
        for row in (r for r in rows if r["what"] == what):
            place = row["precision"], row["who"]
            if place not in best or better(row[key], best[place][key]) == row[key]:
                best[place] = row
        for (precision, who), row in best.items():
            reference = best.get((precision, "transformers"), row)
            ratio = row[key] / reference[key]
            print(f"{what:10}  {precision:8}  {who:12}  " + "  ".join(
                f"{name} {row[name]:.2f}" for name in row if isinstance(row[name], float))
                + f"  ratio {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-opening", action="store_true")
    parser.add_argument("--out", help="a CSV file for every round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *arguments = json.loads(options.child)
        print(json.dumps({"generation": generation, "opening": opening}[what](*arguments)))
        return 0
    cuda = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    setting = {"device": options.device, "machine": machine, "threads": torch.get_num_threads(),
               "cores": os.cpu_count(), "torch": torch.__version__,
               "python": platform.python_version()}
    print(", ".join(f"{k} {v}" for k, v in setting.items()))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_opening:
            torch.manual_seed(0)
            model = Llama(SHAPE)
            save_pretrained(model, load_tokenizer("tiny"), folder, dtype=torch.bfloat16)
            del model
        for n in range(options.rounds):
            for precision in options.precisions:
                for who in options.who:
                    found = measure("generation", who, precision, options.device)
                    rows.append({"what": "generation", "who": who, "precision": precision,
                                 "round": n + 1} | setting | found)
                    print(f"round {n + 1} {precision} {who} {found}", file=sys.stderr, flush=True)
                for who in () if options.no_opening else ("transformers", "ours"):
                    found = measure("opening", who, precision, folder)
                    rows.append({"what": "opening", "who": who, "precision": precision,
                                 "round": n + 1} | setting | found)
    table(rows)
    if options.out:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(options.out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
