"""Measure training, generation and loading beside transformers, and print a table for each.

    python tests/benchmarks/run.py                       # all, at most ten minutes on two cores
    python tests/benchmarks/run.py training --shapes tiny --precisions bfloat16
    OMP_NUM_THREADS=1 python tests/benchmarks/run.py generation --shapes 124M

Each measurement is a process of its own, so that its peak memory is its own too; ours and theirs
take turns, and the best round of each counts. Nothing here fails a test run: it only prints. Run it
alone on the machine, since a second busy process changes every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from helpers.generation import generate
from helpers.gpt import GPT, GPT2_CONFIGS, GPTConfig, flops_per_token
from helpers.inference import optimize_for_inference
from helpers.pretrained import load_config, load_pretrained, save_pretrained
from helpers.tokenizer import load_tokenizer
from helpers.training import configure_optimizer, has_fast_bfloat16, lm_loss, train_step

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"tiny": load_config(ROOT / "data" / "models" / "tiny" / "config.json"),
          "124M": GPT2_CONFIGS["gpt2"]}
BATCH = {"tiny": 8, "124M": 2}           # of 256 tokens
T, PROMPT, N_NEW = 256, 10, 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best(run: Callable[[], object], seconds: float = 4.0, at_least: int = 2) -> float:
    """The shortest time of one call, after one that does not count."""
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def theirs(config: GPTConfig) -> nn.Module:
    """A randomly initialized model of transformers, of the same shape and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd,
        n_head=config.n_head, n_layer=config.n_layer, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=None, pad_token_id=0))


# ---------------------------------------------------------------------------------------------
# What a child process measures; each returns a dictionary


def machine(precision: str, seconds: float = 3.0) -> dict:
    """Operations a second of large matrix products, and bytes a second read, at their best."""
    dtype = DTYPES[precision]
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    flops = 2 * 2048**3 / best(lambda: a @ b, seconds)
    weights = torch.randn(24, 768, 3072).to(dtype)           # more than the caches hold
    flat = weights.view(torch.float32).view(-1)
    return {"flops": flops, "bytes": weights.nbytes / best(lambda: flat.sum(), seconds)}


def training(who: str, shape: str, precision: str, compiled: bool) -> dict:
    """Tokens a second of one training step: forward, backward, clipping, AdamW."""
    config, B = SHAPES[shape], BATCH[shape]
    torch.manual_seed(0)
    model = (GPT(config) if who == "ours" else theirs(config)).train()
    optimizer = configure_optimizer(model, 1e-4)
    running = torch.compile(model) if compiled else model
    tokens = torch.randint(0, config.vocab_size, (B, T + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def their_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
        logits = model(batch[0], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten(), reduction="sum")
        return loss, batch[1].numel()

    loss = lm_loss if who == "ours" else their_loss
    seconds = best(lambda: train_step(running, [batch], loss, optimizer, precision=precision))
    flops = 3 * flops_per_token(replace(config, context_length=T))
    return {"tokens_per_s": B * T / seconds, "flops_per_s": flops * B * T / seconds}


def generation(who: str, shape: str, precision: str, n_new: int = N_NEW) -> dict:
    """New tokens a second after a prompt of ten, greedily, with weights of the precision.

    "prepared" and "compiled" are ours after `optimize_for_inference`, without and with `compile`;
    "without cache" computes everything again for each token.
    """
    config = SHAPES[shape]
    torch.manual_seed(0)
    model = (theirs(config) if who == "transformers" else GPT(config)).to(DTYPES[precision]).eval()
    if who in ("prepared", "compiled"):
        optimize_for_inference(model, compile=who == "compiled")
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT))

    def ours() -> int:
        return len(generate(model, prompt[0].tolist(), n_new, use_cache=who != "without cache"))

    def they() -> int:
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                  max_new_tokens=n_new, min_new_tokens=n_new,
                                  do_sample=False).shape[1]

    run = they if who == "transformers" else ours
    assert run() == PROMPT + n_new                            # a compiled model compiles here
    seconds = best(run)
    read = sum(p.nbytes for n, p in model.named_parameters() if "wpe" not in n
               and "position_embedding" not in n)             # each weight once for each token
    return {"tokens_per_s": n_new / seconds, "bytes_per_s": read * n_new / seconds}


def memory(name: str) -> float:
    """A line of /proc/self/status in MiB: "VmRSS" now, "VmHWM" at the peak (Linux only)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def loading(who: str, folder: str) -> dict:
    """Seconds to open a saved model of the 124M shape in float32, and to read all of it once."""
    if who == "transformers":
        from transformers import GPT2LMHeadModel  # the time of the import is not counted
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")    # the peak begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    if who == "ours":
        model, _ = load_pretrained(folder)
    else:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    total = sum(p.sum().item() for p in model.parameters())            # all of it is really there
    seconds = time.perf_counter() - start
    assert math.isfinite(total)
    return {"seconds": seconds, "grown_mib": memory("VmHWM") - before}


MEASURES = {f.__name__: f for f in (machine, training, generation, loading)}


# ---------------------------------------------------------------------------------------------
# The parent


def measure(what: str, *arguments: object) -> dict:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([what, *arguments])]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {"wall": time.perf_counter() - began}


Group = tuple[str, list[tuple]]          # what to measure, and the variants that take turns


def plan(options: argparse.Namespace, folder: str) -> list[Group]:
    """All that is asked for; the first variant but one of each group is transformers."""
    groups: list[Group] = [("machine", [(p,)]) for p in options.precisions]
    each = [(shape, p) for shape in options.shapes for p in options.precisions]
    if "training" in options.what:
        groups += [("training", [("ours", s, p, False), ("transformers", s, p, False)]
                    + ([("ours", s, p, True)] if options.compile else [])) for s, p in each]
    if "generation" in options.what:
        whos = ("ours", "transformers", "prepared", "compiled", "without cache")
        groups += [("generation", [(who, s, p) for who in whos]) for s, p in each]
    if "loading" in options.what:
        groups.append(("loading", [("ours", folder), ("transformers", folder)]))
    return groups


def measure_all(groups: list[Group], rounds: int, minutes: float) -> dict[tuple, list[dict]]:
    """All variants of all groups in turns; no round of a group begins that would be too late."""
    began, found = time.perf_counter(), {}
    for i in range(rounds):
        for number, (what, variants) in enumerate(groups, start=1):
            spent = (time.perf_counter() - began) / 60
            before = sum(found[what, *v][-1]["wall"] for v in variants) / 60 if i else 0.0
            if i and spent + before > minutes:
                continue
            print(f"{spent:4.1f} min  round {i + 1}, {number} of {len(groups)}: {what} "
                  f"{' '.join(map(str, variants[0][1:3]))}", file=sys.stderr, flush=True)
            for variant in variants:
                found.setdefault((what, *variant), []).append(measure(what, *variant))
    return found


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def tables(groups: list[Group], found: dict[tuple, list[dict]]) -> None:
    """Print what was found, the best round of each."""
    def top(key: str, *variant: object) -> float:
        return max(result[key] for result in found[variant])

    def least(key: str, *variant: object) -> str:
        return f"{min(result[key] for result in found[variant]):,.0f}"

    precisions = [variants[0][0] for what, variants in groups if what == "machine"]
    show("The machine", ["precision", "matrix products, GFLOP/s", "reading, GB/s"],
         [[p, *(f"{top(key, 'machine', p) / 1e9:.0f}" for key in ("flops", "bytes"))]
          for p in precisions])
    rows: dict[str, list[list[str]]] = {"training": [], "generation": [], "loading": []}
    for what, variants in groups:
        for variant in variants if what in ("training", "generation") else ():
            who, shape, p, *compiled = variant
            speed = top("tokens_per_s", what, *variant)
            ratio = speed / top("tokens_per_s", what, *variants[1])
            key = "flops" if what == "training" else "bytes"
            part = f"{top(f'{key}_per_s', what, *variant) / top(key, 'machine', p):.0%}"
            rows[what].append([shape, p, who + (", compiled" if any(compiled) else ""),
                               f"{speed:,.0f}" if speed > 100 else f"{speed:.1f}", f"{ratio:.2f}",
                               part if who != "without cache" else "",
                               least("peak_mib", what, *variant)])
        for who, folder in variants if what == "loading" else ():
            seconds = min(result["seconds"] for result in found[what, who, folder])
            rows[what].append([who, f"{seconds:.2f}", least("grown_mib", what, who, folder)])
    head = ["shape", "precision", "who", "tokens/s", "ratio to transformers"]
    if rows["training"]:
        show("Training", [*head, "fraction of the matrix products' rate", "peak MiB"],
             rows["training"])
    if rows["generation"]:
        show(f"Generation of {N_NEW} tokens", [*head, "fraction of the reading rate", "peak MiB"],
             rows["generation"])
    if rows["loading"]:
        show("Loading 124M in float32", ["who", "seconds", "memory grown, MiB"], rows["loading"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT",
                        help="training, generation, loading; all unless given")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    fast = has_fast_bfloat16(torch.device("cpu"))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES,
                        default=["float32", "bfloat16"] if fast else ["float32"],
                        help="unless given, bfloat16 only where the processor has instructions")
    parser.add_argument("--rounds", type=int, default=2, help="of each measurement, at most")
    parser.add_argument("--minutes", type=float, default=9.0,
                        help="no second round begins that would end later")
    parser.add_argument("--compile", action="store_true", help="train ours once more, compiled")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *arguments = json.loads(options.child)
        result = MEASURES[what](*arguments)
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return 0
    known = ["training", "generation", "loading"]
    if unknown := set(options.what) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    options.what = options.what or known
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          f"cores, {torch.backends.cpu.get_cpu_capability()}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if "loading" in options.what:
            torch.manual_seed(0)
            tokenizer = load_tokenizer("tiny")          # smaller than the model's vocabulary
            end = tokenizer.n_vocab - 1
            save_pretrained(GPT(replace(SHAPES["124M"], bos_token_id=end, eos_token_id=end)),
                            tokenizer, Path(folder))
        groups = plan(options, folder)
        found = measure_all(groups, options.rounds, options.minutes)
    tables(groups, found)
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
