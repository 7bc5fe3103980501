"""The ablation of chapter 8: its variants are what their names say, and its rows what was done."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.attention import CausalSelfAttention
from helpers.gpt import LayerNorm
from helpers.llama import (
    GroupedQueryAttention,
    LlamaConfig,
    RMSNorm,
    SwiGLU,
    rope_frequencies,
    rope_tables,
)

PATH = Path(__file__).parent / "benchmarks" / "llama.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_llama", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                          # dataclasses look it up
    spec.loader.exec_module(module)
    module.TINY = replace(module.SMALL, n_embd=16, n_head=4, n_layer=2, context_length=8,
                          batch_size=4, steps=3, length_windows=2)
    tokens = (np.arange(600) * 7 % 97).astype(np.uint16)
    module.prepare(module.TINY, tokens, tokens[:200], False, math.inf)
    module.WORK["vocab_size"] = 97
    return module


@pytest.mark.parametrize("small", [True, False])
def test_all_variants_have_equally_many_parameters(bench: ModuleType, small: bool) -> None:
    setting = bench.SMALL if small else bench.Setting()
    counts = {v: bench.count(v, bench.matching_width(v, setting, 8192), setting, 8192)
              for v in bench.VARIANTS}
    untied = counts.pop("untied head")
    assert max(counts.values()) < 1.01 * min(counts.values())
    assert untied == counts["GPT-2"] + 8192 * setting.n_embd


def test_each_variant_exchanges_what_its_name_says(bench: ModuleType) -> None:
    def has(variant: str, kind: type) -> bool:
        model = bench.build(variant, 24, bench.TINY, 97)
        return any(isinstance(part, kind) for part in model.modules())

    def names(variant: str) -> set[str]:
        return set(dict(bench.build(variant, 24, bench.TINY, 97).named_parameters()))

    gpt = names("GPT-2")
    assert not has("RMSNorm", LayerNorm) and has("RMSNorm", RMSNorm) and has("GPT-2", LayerNorm)
    assert has("SwiGLU", SwiGLU) and not has("RMSNorm", SwiGLU)
    assert names("no biases") == {name for name in gpt if not name.endswith("bias")}
    assert names("RoPE") == gpt - {"position_embedding.weight"}
    assert names("untied head") == gpt | {"lm_head.weight"}
    for variant, rows in (("GPT-2", 48), ("RoPE", 48), ("grouped-query", 32)):
        attention = bench.build(variant, 24, bench.TINY, 97).blocks[0].attention
        assert attention.qkv.weight.shape == (rows, 16)


def test_the_exchanged_attention_is_that_of_both_models(bench: ModuleType) -> None:
    x = torch.randn(2, 6, 16)
    plain, same = CausalSelfAttention(16, 4), bench.ExchangedAttention(16, 4, 4, rope=False)
    same.load_state_dict(plain.state_dict())
    assert_close(same(x), plain(x))
    exchanged = bench.ExchangedAttention(16, 4, 2, rope=True)
    llama = GroupedQueryAttention(LlamaConfig(9, 8, 16, 4, 1, n_kv_head=2))
    parts = exchanged.qkv.weight.split([16, 8, 8])
    for name, part in zip("qkv", parts, strict=True):
        getattr(llama, f"{name}_projection").weight = nn.Parameter(part)
    llama.output_projection.weight = exchanged.output_projection.weight
    nn.init.zeros_(exchanged.qkv.bias)
    nn.init.zeros_(exchanged.output_projection.bias)
    assert_close(exchanged(x), llama(x, rope_tables(torch.arange(6), rope_frequencies(4))))


@pytest.mark.parametrize("variant", ["GPT-2", "no biases", "Llama"])
def test_weights_start_with_the_same_standard_deviation(bench: ModuleType, variant: str) -> None:
    torch.manual_seed(0)
    setting = replace(bench.TINY, n_embd=64)
    for name, weight in bench.build(variant, 256, setting, 97).named_parameters():
        if weight.dim() == 2:
            is_residual = name.endswith(("output_projection.weight", "down_projection.weight"))
            std = setting.init_std / (2 if is_residual else 1)           # two blocks
            assert abs(weight.std().item() / std - 1) < 0.1, name


@pytest.mark.parametrize(("variant", "positions"), [
    ("GPT-2", "as trained"), ("RoPE", "as trained"), ("Llama", "as trained"),
    ("Llama", "sliding window")])
def test_a_longer_model_is_the_trained_one_within_its_length(bench: ModuleType, variant: str,
                                                             positions: str) -> None:
    model = bench.build(variant, 24, bench.TINY, 97).eval()
    tokens = torch.randint(97, (2, 32))
    with torch.no_grad():
        before = model(tokens[:, :8])
        longer = bench.lengthened(model, 32, positions).eval()
        assert longer(tokens).shape == (2, 32, 97)
        assert_close(longer(tokens)[:, :8], before)


def test_rows_hold_every_setting(bench: ModuleType) -> None:
    rows = bench.measure(bench.Run("Llama", 1e-2, 0, 24, bench.TINY.init_std))
    assert {row["experiment"] for row in rows} == {"loss", "length"}
    assert [row["positions"] for row in rows[1:]] == list(bench.ADAPTED)
    assert set(bench.COLUMNS) - set(rows[0]) == {"by_position", "text"}
    assert rows[0]["train_tokens"] == 3 * 4 * 8 and rows[0]["n_kv_head"] == 2
    parts = [float(x) for x in rows[1]["by_position"].split()]
    assert len(parts) == bench.BINS
    assert sum(parts) / len(parts) == pytest.approx(rows[1]["val_loss"], abs=1e-3)
    [row] = bench.measure(bench.Run("SwiGLU", 1e-2, 0, 24, 0.02))
    assert row["experiment"] == "init 0.02" and row["init_std"] == 0.02


def test_no_run_begins_after_the_deadline(bench: ModuleType,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.WORK, "deadline", 0.0)
    assert bench.measure(bench.Run("GPT-2", 1e-2, 0, 24, 0.07)) == []


def test_seeds_decide_the_batches_and_the_best_rate_is_found(bench: ModuleType) -> None:
    first, again, other = (bench.draw_starts(seed, 5, bench.TINY) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = [{"experiment": e, "seed": s, "variant": "RoPE", "lr": lr, "val_loss": loss}
            for e, s, lr, loss in (("loss", 0, 1e-3, 4.0), ("loss", 0, 2e-3, 3.0),
                                   ("loss", 1, 1e-3, 1.0), ("length", 0, 1e-3, 0.5))]
    assert bench.best_rates(rows) == {"RoPE": 2e-3}
    runs = bench.plan_rates(bench.Setting(), {"GPT-2": 8, "RoPE": 8})
    assert [run.lr for run in runs] == [2e-3, 2e-3, 1e-3, 1e-3, 4e-3, 4e-3]
