"""From GPT-2 to Llama, one exchange at a time: the ablation of chapter 8.

    python tests/benchmarks/llama.py --small --out data/results/llama_small.csv    # two cores
    python tests/benchmarks/llama.py --out data/results/llama.csv --steps 1100 \\
        --text books-0[0-6]* books-1[89]* books-20* --validation books-07*         # a GPU

Trains GPT-2's architecture, the same with one part exchanged, and Llama with all of them, from
random weights on the same batches. The width of the feed-forward network is chosen so that all have
the same number of parameters (but the variant with an untied head, which has more). Every variant
is trained with each learning rate at the first seed; the rate with the lowest validation loss is
then used with the other seeds. A seed decides the initialization and the batches, so two variants
can be compared seed by seed.

Rows of the experiment `loss` have the loss on held-out text, in windows of the training length.
Rows of `length` have, for windows four times as long, the mean loss in each eighth of the window
(`by_position`), with the positions as trained or adapted as `positions` says.

GPT-2 initializes weights with a standard deviation of 0.02, for an embedding dimension of 768.
Narrower layers add up fewer terms, and `--small` uses a larger one for outputs of about the same
size; its rows of `init 0.02` have three variants with GPT-2's own.

On CUDA the training step is recorded once as a CUDA graph and replayed, since launching such small
kernels takes longer than they do. With `--seconds` and without `--steps`, the step is timed first
(and the graph compared with `fit`), and all runs take as many steps as end in time. The column
`seconds` compares runs of one file only, roughly: processes share the device.
"""

from __future__ import annotations

import argparse
import csv
import glob
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.attention import CausalSelfAttention
from helpers.common import data_path, set_seed
from helpers.corpus import read_documents, tokenize_documents
from helpers.gpt import GPT, GPTConfig, LayerNorm, init_weights
from helpers.instruction import load_examples
from helpers.llama import (
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    SwiGLU,
    apply_rope,
    repeat_kv,
    rope_frequencies,
    rope_tables,
)
from helpers.tokenizer import load_tokenizer
from helpers.training import (
    TrainConfig,
    configure_optimizer,
    cosine_lr_with_warmup,
    eval_mode,
    fit,
)

VARIANTS = ("GPT-2", "RMSNorm", "SwiGLU", "no biases", "RoPE", "grouped-query", "Llama",
            "Llama, multi-head", "untied head")
GPT2_INIT = ("GPT-2", "SwiGLU", "Llama")
ADAPTED = ("as trained", "sliding window", "linear scaling", "llama3 scaling", "larger base")
FACTOR, BINS = 4, 8                      # windows so many times as long, in so many parts
COLUMNS = ("experiment", "variant", "positions", "lr", "seed", "val_loss", "bits_per_byte",
           "train_loss", "by_position", "n_params", "width", "n_embd", "n_head", "n_kv_head",
           "n_layer", "init_std", "vocab_size", "context_length", "batch_size", "steps",
           "train_tokens", "val_tokens", "seconds", "device", "text")


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    n_embd: int = 192
    n_head: int = 6
    n_kv_head: int = 2                   # of grouped-query attention
    n_layer: int = 4
    context_length: int = 128
    batch_size: int = 32
    steps: int = 1100
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    seeds: int = 3
    init_std: float = 0.02               # standard deviation of the initial weights
    length_windows: int = 256            # long windows that are read for the experiment `length`


SMALL = Setting(n_embd=64, n_head=4, n_kv_head=2, n_layer=3, context_length=64, batch_size=16,
                steps=120, lrs=(6e-3, 1.2e-2), init_std=0.07, length_windows=32)


# ---------------------------------------------------------------------------------------------
# The variants


class ExchangedAttention(CausalSelfAttention):
    """GPT-2's attention with rotary positions, or with fewer heads for keys and values."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int, rope: bool) -> None:
        super().__init__(n_embd, n_head)
        hs = n_embd // n_head
        self.n_kv_head, self.rope = n_kv_head, rope
        self.qkv = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * hs)
        self.register_buffer("inv_freq", rope_frequencies(hs), persistent=False)

    def forward(self, x: Tensor, kv_cache: None = None, attn_mask: None = None) -> Tensor:
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, C // self.n_head).transpose(1, 2)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.rope:
            cos, sin = rope_tables(torch.arange(T, device=x.device), self.inv_freq)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        n_rep = self.n_head // self.n_kv_head
        y = F.scaled_dot_product_attention(q, repeat_kv(k, n_rep), repeat_kv(v, n_rep),
                                           is_causal=True)
        return self.output_projection(y.transpose(1, 2).reshape(B, T, C))


class NoPositions(nn.Module):
    """In the place of the position embedding, where attention has the positions."""

    def forward(self, positions: Tensor) -> float:
        return 0.0


def exchange(model: GPT, variant: str, width: int, n_kv_head: int) -> None:
    """Exchange one part of a GPT, in place, and set the width of its feed-forward networks."""
    C, nh = model.config.n_embd, model.config.n_head
    for block in model.blocks:
        network = block.feed_forward
        network.up_projection, network.down_projection = nn.Linear(C, width), nn.Linear(width, C)
        if variant == "SwiGLU":
            block.feed_forward = SwiGLU(C, width)
        elif variant in ("RoPE", "grouped-query"):
            kv_heads = n_kv_head if variant == "grouped-query" else nh
            block.attention = ExchangedAttention(C, nh, kv_heads, variant == "RoPE")
    if variant == "RoPE":
        model.position_embedding = NoPositions()
    if variant == "RMSNorm":
        for parent in [*model.blocks, model]:
            for name in [n for n, part in parent.named_children() if isinstance(part, LayerNorm)]:
                setattr(parent, name, RMSNorm(C, model.config.norm_eps))
    if variant == "no biases":
        for part in model.modules():
            if isinstance(part, nn.Linear | LayerNorm):
                part.register_parameter("bias", None)


def initialize(model: nn.Module, std: float) -> None:
    """As GPT-2 does, with another standard deviation than 0.02."""
    model.apply(init_weights)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            is_residual = name.endswith(("output_projection.weight", "down_projection.weight"))
            factor = (2 * model.config.n_layer) ** -0.5 if is_residual else 1.0
            nn.init.normal_(weight, std=factor * std)


def build(variant: str, width: int, setting: Setting, vocab_size: int) -> nn.Module:
    """A variant with random weights; `width` is that between the layers of the feed-forward."""
    shape = {"vocab_size": vocab_size, "context_length": setting.context_length,
             "n_embd": setting.n_embd, "n_head": setting.n_head, "n_layer": setting.n_layer}
    if variant.startswith("Llama"):
        heads = setting.n_head if "multi-head" in variant else setting.n_kv_head
        model: nn.Module = Llama(LlamaConfig(**shape, n_kv_head=heads, intermediate_size=width))
    else:
        model = GPT(GPTConfig(**shape, tie_word_embeddings=variant != "untied head"))
        exchange(model, variant, width, setting.n_kv_head)
    initialize(model, setting.init_std)
    return model


def count(variant: str, width: int, setting: Setting, vocab_size: int) -> int:
    """The parameters of a variant, without building its tensors."""
    with torch.device("meta"):
        return build(variant, width, setting, vocab_size).n_params


def matching_width(variant: str, setting: Setting, vocab_size: int) -> int:
    """The width, a multiple of 8, with which a variant has as many parameters as GPT-2."""
    width = 4 * setting.n_embd
    if variant == "untied head":
        return width
    wanted = count("GPT-2", width, setting, vocab_size)
    few, more = (count(variant, w, setting, vocab_size) for w in (8, 16))
    return 8 + 8 * round((wanted - few) / (more - few))


def lengthened(model: nn.Module, length: int, positions: str) -> nn.Module:
    """The trained model for windows of `length`, its positions as trained or adapted."""
    config = replace(model.config, context_length=length)
    trained, hs = model.config.context_length, config.n_embd // config.n_head
    factor = length / trained
    if isinstance(model, Llama):
        change: dict = {
            "as trained": {},
            "sliding window": {"sliding_window": trained},
            "linear scaling": {"rope_scaling": RopeScaling(factor, kind="linear")},
            "llama3 scaling": {"rope_scaling": RopeScaling(factor, kind="llama3",
                                                           original_context_length=trained)},
            "larger base": {"rope_base": config.rope_base * factor ** (hs / (hs - 2))},
        }[positions]
        longer: nn.Module = Llama(replace(config, **change))
        longer.load_state_dict(model.state_dict())
        return longer.to(next(model.parameters()).device)
    if isinstance(model.position_embedding, nn.Embedding) and length > trained:
        table = nn.Embedding(length, config.n_embd)         # the rows that no text has trained
        init_weights(table)
        table.weight.data[:trained] = model.position_embedding.weight.data
        model.position_embedding = table.to(next(model.parameters()).device)
    model.config = config
    return model


# ---------------------------------------------------------------------------------------------
# Text


def tokenize_file(path: str) -> np.ndarray:
    """The ids of all documents of a file, two bytes each."""
    documents = tokenize_documents(list(read_documents(path)), load_tokenizer("tiny"))
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents])


def shipped_text() -> tuple[np.ndarray, np.ndarray]:
    """The texts of data/instructions.json: ids to train on, and those of a held-out tenth."""
    examples = load_examples(data_path("instructions.json"))
    texts = ["\n".join(e[name] for name in ("instruction", "input", "output") if e[name])
             for e in examples]
    ids = tokenize_documents(texts, load_tokenizer("tiny"))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(ids) // 10
    held_out, train = (np.concatenate([np.array(ids[i], dtype=np.uint16) for i in part])
                       for part in (order[:cut], order[cut:]))
    return train, held_out


def prepare_text(options: argparse.Namespace,
                 pool: ProcessPoolExecutor) -> tuple[np.ndarray, np.ndarray]:
    """Ids to train on and held-out ids."""
    if not options.text:
        return shipped_text()
    parts = []
    for patterns in (options.text, options.validation):
        files = sorted({path for pattern in patterns for path in glob.glob(pattern)})
        if not files:
            raise FileNotFoundError(f"no file matches {' '.join(patterns) or 'nothing'}")
        parts.append(np.concatenate(list(pool.map(tokenize_file, files))))
    return parts[0], parts[1]


def n_bytes(ids: np.ndarray) -> int:
    """The bytes of UTF-8 text that ids stand for; the end token stands for none."""
    tokenizer = load_tokenizer("tiny")
    counts = np.bincount(ids, minlength=tokenizer.n_vocab)
    return sum(int(n) * len(tokenizer.decode_single_token_bytes(i))
               for i, n in enumerate(counts) if i != tokenizer.eot_token)


# ---------------------------------------------------------------------------------------------
# One run


@dataclass(frozen=True)
class Run:
    """One training; `width` is that which makes the parameters equal."""

    variant: str
    lr: float
    seed: int
    width: int
    init_std: float


WORK: dict = {}                          # of a process: setting, tokens, device, graph or not


def prepare(setting: Setting, train: np.ndarray, val: np.ndarray, graph: bool,
            deadline: float) -> None:
    """Load once in each process what all its runs need; it ends with the one that started it."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")               # TF32 on CUDA
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = (torch.from_numpy(ids.astype(np.int64)).to(device) for ids in (train, val))
    WORK.update(zip(("train", "val"), tokens, strict=True), setting=setting, device=device,
                graph=graph, deadline=deadline, bytes=n_bytes(val),
                vocab_size=load_tokenizer("tiny").n_vocab)


def draw_starts(seed: int, steps: int, setting: Setting) -> Tensor:
    """Where the windows of each step begin, (steps, B): the same for all variants."""
    generator = torch.Generator().manual_seed(seed)
    high = len(WORK["train"]) - setting.context_length
    return torch.randint(high, (steps, setting.batch_size), generator=generator)


def train_config(lr: float, steps: int) -> TrainConfig:
    return TrainConfig(max_steps=steps, lr=lr, warmup_steps=steps // 10)


def train_by_fit(model: nn.Module, starts: Tensor, lr: float) -> float:
    """Train by `fit`; returns the mean training loss of the last tenth of the steps."""
    offsets = torch.arange(WORK["setting"].context_length + 1, device=WORK["device"])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for row in starts.to(WORK["device"]):
            windows = WORK["train"][row[:, None] + offsets]                  # (B, T + 1)
            yield windows[:, :-1], windows[:, 1:]

    history = fit(model, batches(), train_config(lr, len(starts))).require_complete()
    return history.frame["train_loss"].tail(max(1, len(starts) // 10)).mean()


def train_by_graph(model: nn.Module, starts: Tensor, lr: float) -> float:
    """The steps of `fit`, recorded once as a CUDA graph and replayed."""
    steps, device, tokens = len(starts), WORK["device"], WORK["train"]
    config, offsets = train_config(lr, steps), torch.arange(
        WORK["setting"].context_length + 1, device=device)
    rates = torch.tensor([cosine_lr_with_warmup(
        s, lr=lr, min_lr=lr / 10, warmup_steps=config.warmup_steps, total_steps=steps)
        for s in range(1, steps + 1)], device=device)
    starts, losses = starts.to(device), torch.zeros(steps, device=device)
    row, rate = starts[0].clone(), rates[0].clone()          # what the graph reads
    optimizer = configure_optimizer(model, lr, config.weight_decay, config.betas)
    for group in optimizer.param_groups:
        group.update(lr=rate, capturable=True)
    params = list(model.parameters())

    def step() -> Tensor:
        windows = tokens[row[:, None] + offsets]                             # (B, T + 1)
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        return loss

    first = [p.detach().clone() for p in params]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                            # makes the optimizer's state
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():                                    # back to the start, in place
        for p, value in zip(params, first, strict=True):
            p.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for i in range(steps):
        row.copy_(starts[i])
        rate.copy_(rates[i])
        graph.replay()
        losses[i].copy_(loss.detach())
    torch.cuda.synchronize()
    if not losses.isfinite().all():
        raise FloatingPointError("the loss is not finite")
    for p in params:                                         # their memory is the graph's
        p.grad = None
    return losses[-max(1, steps // 10):].mean().item()


@torch.no_grad()
def loss_by_position(model: nn.Module, ids: Tensor, T: int, n_windows: int | None = None) -> Tensor:
    """The mean cross-entropy at each position of windows of T that do not overlap, (T,)."""
    n = min((len(ids) - 1) // T, n_windows or len(ids))
    inputs, targets = ids[:n * T].view(n, T), ids[1:n * T + 1].view(n, T)
    total = torch.zeros(T, dtype=torch.float64, device=ids.device)
    with eval_mode(model):
        for x, y in zip(inputs.split(32), targets.split(32), strict=True):
            loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="none")
            total += loss.view_as(y).double().sum(dim=0)
    return total / n


def measure(run: Run) -> list[dict]:
    """Train once; returns the rows of the run, none after the deadline."""
    began, setting = time.perf_counter(), replace(WORK["setting"], init_std=run.init_std)
    if time.time() > WORK["deadline"]:
        return []
    set_seed(run.seed)
    model = build(run.variant, run.width, setting, WORK["vocab_size"])
    model = model.to(WORK["device"])
    train = train_by_graph if WORK["graph"] else train_by_fit
    train_loss = train(model, draw_starts(run.seed, setting.steps, setting), run.lr)
    T, val = setting.context_length, WORK["val"]
    loss = loss_by_position(model, val, T).mean().item()
    n_targets = (len(val) - 1) // T * T
    row = asdict(setting) | asdict(run) | {
        "experiment": "loss" if setting == WORK["setting"] else "init 0.02",
        "positions": "as trained", "n_params": model.n_params,
        "train_loss": round(train_loss, 4), "val_loss": round(loss, 5), "val_tokens": n_targets,
        "bits_per_byte": round(loss / math.log(2) * (len(val) - 1) / WORK["bytes"], 5),
        "train_tokens": setting.steps * setting.batch_size * T, "vocab_size": WORK["vocab_size"],
        "n_kv_head": setting.n_kv_head if run.variant in ("grouped-query", "Llama")
        else setting.n_head,
        "device": torch.cuda.get_device_name() if WORK["device"].type == "cuda" else "cpu",
        "seconds": round(time.perf_counter() - began, 2)}
    rows = [row]
    if run.variant in ("GPT-2", "RoPE", "Llama") and setting == WORK["setting"]:
        for positions in ADAPTED if run.variant == "Llama" else ADAPTED[:1]:
            longer = lengthened(model, FACTOR * T, positions)
            found = loss_by_position(longer, val, FACTOR * T, setting.length_windows)
            parts = found.view(BINS, -1).mean(dim=1).tolist()
            rows.append(row | {"experiment": "length", "positions": positions,
                               "val_loss": round(sum(parts) / BINS, 5), "bits_per_byte": "",
                               "by_position": " ".join(f"{x:.4f}" for x in parts)})
    return rows


# ---------------------------------------------------------------------------------------------
# All runs


def check_graph(steps: int = 20) -> None:
    """RuntimeError unless the recorded steps train as `fit` does."""
    setting = WORK["setting"]
    starts = draw_starts(0, steps, setting)
    for variant in ("GPT-2", "RoPE", "Llama"):
        found = []
        for train in (train_by_fit, train_by_graph):
            set_seed(0)
            model = build(variant, 4 * setting.n_embd, setting, WORK["vocab_size"])
            found.append(train(model.to(WORK["device"]), starts, 2e-3))
        if abs(found[0] - found[1]) > 0.02:
            raise RuntimeError(f"{variant}: loss {found[0]} by fit and {found[1]} by the graph")


def time_step(steps: int = 100) -> float:
    """Seconds for a step of GPT-2 and Llama, the mean, while the other processes measure too."""
    setting, train = WORK["setting"], train_by_graph if WORK["graph"] else train_by_fit
    if WORK["graph"]:
        check_graph()
    models = [build(variant, 4 * setting.n_embd, setting, WORK["vocab_size"]).to(WORK["device"])
              for variant in ("GPT-2", "Llama")]
    began = time.perf_counter()
    for model in models:
        train(model, draw_starts(0, steps, setting), 2e-3)
    return (time.perf_counter() - began) / (len(models) * steps)


def plan_rates(setting: Setting, widths: dict[str, int]) -> list[Run]:
    """Each variant with each learning rate, at the first seed; the middle rates first."""
    order = sorted(setting.lrs, key=lambda lr: abs(math.log(lr / sorted(setting.lrs)[
        len(setting.lrs) // 2])))
    return [Run(variant, lr, 0, width, setting.init_std)
            for lr in order for variant, width in widths.items()]


def best_rates(rows: Iterable[dict]) -> dict[str, float]:
    """For each variant the learning rate with the lowest validation loss at the first seed."""
    found = [(row["val_loss"], row["lr"], row["variant"]) for row in rows
             if row["experiment"] == "loss" and row["seed"] == 0]
    return {variant: lr for _, lr, variant in sorted(found, reverse=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--text", nargs="*", default=[], help="files to train on (.txt, .txt.xz); "
                        "data/instructions.json unless given")
    parser.add_argument("--validation", nargs="*", default=[], help="files to validate on")
    parser.add_argument("--small", action="store_true", help="models for two processor cores")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=3 if torch.cuda.is_available()
                        else min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    began, deadline = time.perf_counter(), time.time() + options.seconds
    setting = SMALL if options.small else Setting()
    given = {"steps": options.steps, "seeds": options.seeds}
    setting = replace(setting, **{name: value for name, value in given.items() if value})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), context) as pool:
        train, val = prepare_text(options, pool)
    print(f"{len(train):,} tokens to train on, {len(val):,} held out "
          f"({time.perf_counter() - began:.0f} s)", flush=True)
    vocab_size = load_tokenizer("tiny").n_vocab
    widths = {v: matching_width(v, setting, vocab_size) for v in options.variants}
    graph = torch.cuda.is_available() and not options.eager
    others = setting.seeds if setting.init_std != 0.02 else 0        # runs with GPT-2's own
    n_runs = (len(widths) * (len(setting.lrs) + setting.seeds - 1)
              + others * len(set(widths) & set(GPT2_INIT)))

    def open_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(options.processes, context, prepare,
                                   (setting, train, val, graph, deadline))

    while options.steps is None and options.seconds < math.inf:
        try:                             # in processes of its own: an error may be for good
            with open_pool() as pool:
                jobs = [pool.submit(time_step) for _ in range(options.processes)]
                rate = sum(1 / job.result() for job in jobs)
        except Exception as error:
            if not graph:
                raise
            graph = False
            print(f"without CUDA graphs: {error!r}", flush=True)
            continue
        left = options.seconds - (time.perf_counter() - began) - 10
        print(f"{rate:.0f} steps/s in {options.processes} processes, {left:.0f} s left", flush=True)
        steps = int(0.8 * left * rate / n_runs) // 50 * 50
        setting = replace(setting, steps=min(max(200, steps), 4000))
        break
    print(f"{n_runs} runs of {setting.steps} steps", flush=True)
    rows: list[dict] = []
    label = " ".join(Path(p).name for p in options.text or ["instructions.json"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="", encoding="utf-8") as file, open_pool() as pool:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()

        def do(runs: Iterable[Run]) -> None:
            jobs = {pool.submit(measure, run): run for run in runs}
            for job in as_completed(jobs):
                try:
                    found = job.result()
                except FloatingPointError as error:          # a rate that is too high
                    print(f"{jobs[job]}: {error}", flush=True)
                    continue
                rows.extend(found)
                writer.writerows(row | {"text": label} for row in found)
                file.flush()
                if found:
                    row = found[0]
                    print(f"{row['variant']:18} lr {row['lr']:g} seed {row['seed']}  "
                          f"{row['bits_per_byte']:.4f} bits/byte  {row['n_params']:,} parameters  "
                          f"{row['seconds']:.0f} s", flush=True)

        do(plan_rates(setting, widths))
        best = best_rates(rows)
        do(Run(variant, best[variant], seed, width, setting.init_std)
           for seed in range(1, setting.seeds) for variant, width in widths.items()
           if variant in best)
        do(Run(variant, best[variant], seed, widths[variant], 0.02)
           for seed in range(others) for variant in GPT2_INIT if variant in best)
    print(f"{sum(row['experiment'] != 'length' for row in rows)} of {n_runs} runs in "
          f"{time.perf_counter() - began:.0f} s, written to {options.out}")


if __name__ == "__main__":
    main()
