"""Measure training, generation and loading beside transformers, and print a table for each.

    python tests/benchmarks/run.py                       # all, about ten minutes on two cores
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
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import load_tokenizer
from helpers.training import configure_optimizer, lm_loss, train_step

SHAPES = {
    "tiny": GPTConfig(vocab_size=8192, context_length=256, n_embd=256, n_head=4, n_layer=6),
    "124M": GPT2_CONFIGS["gpt2"],
}
BATCH = {"tiny": 8, "124M": 2}           # of 256 tokens
T, PROMPT = 256, 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best(run: Callable[[], object], seconds: float = 6.0, at_least: int = 3) -> float:
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


def machine(precision: str) -> dict:
    """Multiplications a second of large matrices, and bytes a second read, at their best."""
    dtype = DTYPES[precision]
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    flops = 2 * 2048**3 / best(lambda: a @ b, 3.0)
    weights = torch.randn(24, 768, 3072).to(dtype)           # more than the caches hold
    flat = weights.view(torch.float32).view(-1)
    return {"flops": flops, "bytes": weights.nbytes / best(lambda: flat.sum(), 2.0)}


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
    seconds = best(lambda: train_step(running, [batch], loss, optimizer, lr=1e-4,
                                      precision=precision), 10.0)
    flops = 3 * flops_per_token(replace(config, context_length=T))
    return {"tokens_per_s": B * T / seconds, "flops": flops * B * T / seconds}


def generation(who: str, shape: str, precision: str, n_new: int, cached: bool) -> dict:
    """New tokens a second after a prompt of ten, greedily, with weights of the precision.

    "prepared" and "compiled" are ours after `optimize_for_inference`, without and with `compile`.
    """
    config = SHAPES[shape]
    torch.manual_seed(0)
    model = (theirs(config) if who == "transformers" else GPT(config)).to(DTYPES[precision]).eval()
    if who in ("prepared", "compiled"):
        optimize_for_inference(model, compile=who == "compiled")
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT))

    def ours_writes() -> int:
        return len(generate(model, prompt[0].tolist(), n_new, use_cache=cached))

    def they_write() -> int:
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                  max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False,
                                  use_cache=cached).shape[1]

    write = they_write if who == "transformers" else ours_writes
    start = time.perf_counter()
    assert write() == PROMPT + n_new
    seconds = best(write, 5.0) if cached else time.perf_counter() - start    # one is long enough
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
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(what: str, rounds: int, key: str, *variants: tuple) -> list[dict]:
    """The best round of each variant, the rounds taken in turns."""
    results = [[measure(what, *variant) for variant in variants] for _ in range(rounds)]
    return [max(column, key=lambda r: r[key]) for column in zip(*results, strict=True)]


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT",
                        help="training, generation, loading; all unless given")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="ours once more, compiled")
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
    wanted = options.what or known
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          f"cores, {torch.backends.cpu.get_cpu_capability()}")
    rates = {p: measure("machine", p) for p in options.precisions}
    show("The machine", ["precision", "matrix products, GFLOP/s", "reading, GB/s"],
         [[p, f"{r['flops'] / 1e9:.0f}", f"{r['bytes'] / 1e9:.0f}"] for p, r in rates.items()])

    if "training" in wanted:
        rows = []
        for shape in options.shapes:
            for p in options.precisions:
                variants = [("ours", shape, p, False), ("transformers", shape, p, False)]
                if options.compile:
                    variants.append(("ours", shape, p, True))
                found = in_turns("training", options.rounds, "tokens_per_s", *variants)
                for (who, _, _, compiled), r in zip(variants, found, strict=True):
                    rows.append([shape, p, who + (", compiled" if compiled else ""),
                                 f"{r['tokens_per_s']:,.0f}",
                                 f"{r['tokens_per_s'] / found[1]['tokens_per_s']:.2f}",
                                 f"{r['flops'] / rates[p]['flops']:.0%}", f"{r['peak_mib']:,.0f}"])
        show("Training", ["shape", "precision", "who", "tokens/s", "ratio to transformers",
                          "share of matmul rate", "peak MiB"], rows)

    if "generation" in wanted:
        rows = []
        for shape in options.shapes:
            for p in options.precisions:
                for n_new in (50, 200):
                    variants = [(who, shape, p, n_new, True) for who in
                                ("ours", "transformers", "prepared", "compiled")]
                    found = in_turns("generation", options.rounds, "tokens_per_s", *variants)
                    variants += [("ours", shape, p, n_new, False)]
                    found += in_turns("generation", 1, "tokens_per_s", variants[-1])
                    for (who, *_, cached), r in zip(variants, found, strict=True):
                        share = r["bytes_per_s"] / rates[p]["bytes"] if cached else None
                        rows.append([shape, p, str(n_new), who, "yes" if cached else "no",
                                     f"{r['tokens_per_s']:,.1f}",
                                     f"{r['tokens_per_s'] / found[1]['tokens_per_s']:.2f}",
                                     f"{share:.0%}" if cached else "", f"{r['peak_mib']:,.0f}"])
        show("Generation", ["shape", "weights", "new tokens", "who", "cache", "tokens/s",
                            "ratio to transformers' cached", "share of reading rate",
                            "peak MiB"], rows)

    if "loading" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = replace(SHAPES["124M"], bos_token_id=8191, eos_token_id=8191)   # the tokenizer is small
            save_pretrained(GPT(config), load_tokenizer("tiny"), Path(folder))
            found = {who: [measure("loading", who, folder) for _ in range(options.rounds)]
                     for who in ("ours", "transformers")}
            size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        show(f"Loading {size:,.0f} MiB of float32", ["who", "seconds", "memory grown, MiB"],
             [[who, f"{min(r['seconds'] for r in rs):.2f}",
               f"{min(r['grown_mib'] for r in rs):,.0f}"] for who, rs in found.items()])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
