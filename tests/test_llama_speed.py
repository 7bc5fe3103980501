"""The benchmark of chapter 8 runs; what it measures is for a person to read."""

import importlib.util
from pathlib import Path

import pytest
import torch

from helpers.llama import Llama, LlamaConfig
from helpers.pretrained import save_pretrained
from helpers.tokenizer import load_tokenizer

PATH = Path(__file__).parent / "benchmarks" / "llama_speed.py"
SMALL = LlamaConfig(vocab_size=8192, context_length=64, n_embd=32, n_head=4, n_layer=2, n_kv_head=2)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("llama_speed", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("who", ["transformers", "ours", "prepared"])
def test_generation_reads_each_weight_once_for_each_token(script, who):
    result = script.generation(who, "float32", "cpu", 3, SMALL, at_least=1)
    read = result["gb_per_s"] * 1e9 / result["tokens_per_s"]
    assert read == pytest.approx(4 * Llama(SMALL).n_params)


def test_the_shape_is_that_of_smollm2(script):
    with torch.device("meta"):
        assert Llama(script.SHAPE).n_params == 134_515_008
        assert sum(p.numel() for p in script.theirs(script.SHAPE).parameters()) == 134_515_008


@pytest.mark.parametrize("who", ["transformers", "ours"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_opening(script, who, tmp_path):
    save_pretrained(Llama(SMALL), load_tokenizer("tiny"), tmp_path, dtype=torch.bfloat16)
    result = script.opening(who, "bfloat16", str(tmp_path))
    assert 0 < result["seconds"] <= result["seconds_read"]


def test_the_table_takes_the_best_round(script, capsys):
    rows = [{"what": "generation", "who": who, "precision": "float32", "tokens_per_s": rate}
            for who, rate in (("transformers", 4.0), ("ours", 5.0), ("transformers", 2.0),
                              ("ours", 8.0))]
    script.table(rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "ours" in last and "8.00" in last and last.endswith("ratio 2.00")
