"""Chapter 8: Llama folders, ours and those of transformers, in both directions.

Weights of the hub cannot be had here: transformers writes folders of random weights, each tensor
moved off its start, in odd shapes. Tokenizers are those of test_hf_tokenizer.
"""
# ruff: noqa: F811 (fixtures are imported)

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fitting import perturb
from safetensors.torch import load_file, save_file
from test_hf_tokenizer import CHAT, HOSTILE, TEXT, encodings, folders, trained  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from helpers.chat import (
    CHATML,
    add_special_tokens,
    apply_chat_template,
    encode_chat,
    resize_token_embeddings,
)
from helpers.common import resolve_settings
from helpers.generation import generate
from helpers.hf_tokenizer import encode_messages, encode_prompt, load_hf_tokenizer
from helpers.llama import Llama, LlamaConfig, RopeScaling
from helpers.llama_pretrained import llama_key_map, load_llama_config
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import encode, load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 411, "max_position_embeddings": 40, "hidden_size": 48,
         "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
         "intermediate_size": 56,
         "tie_word_embeddings": True, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5,
         "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}
VARIANTS = {
    "as SmolLM2": {}, "untied": {"tie_word_embeddings": False},
    "no groups": {"num_key_value_heads": 6}, "wide heads": {"head_dim": 14},
    "one key head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "Llama 3's scaling": {"rope_scaling": LLAMA_3, "head_dim": 16, "tie_word_embeddings": False},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 500.0},
}
IDS = torch.arange(36).view(2, 18) * 11 % 405


def theirs(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    said = SHAPE | changes
    # transformers 5 reads rope_theta from rope_parameters, earlier versions beside rope_scaling
    if "rope_scaling" in said:
        said["rope_scaling"] = {"rope_theta": said["rope_theta"]} | said["rope_scaling"]
    return perturb(LlamaForCausalLM(TheirConfig(**said))).eval()


def write(folder: Path, tokenizer_folder: Path, model: LlamaForCausalLM | None = None, **options):
    """A folder as transformers saves it."""
    model = model or theirs()
    model.save_pretrained(folder, **options)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder / file.name)
    return model


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    write(tmp_path / "llama", folders["smollm"])
    return tmp_path / "llama"


def assert_equal_logits(model: Llama, other: LlamaForCausalLM) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), other(IDS).logits, rtol=1e-4, atol=1e-4)


def assert_equal_text(model: Llama, other: LlamaForCausalLM) -> None:
    """Greedily, with our cache and without, up to the length of the context."""
    prompt = [5, 90, 17, 300, 8]
    with torch.no_grad():
        wanted = other.generate(torch.tensor([prompt]), max_new_tokens=30,
                                do_sample=False)[0].tolist()
    assert len(wanted) == 35
    assert generate(model, prompt, 30) == generate(model, prompt, 30, use_cache=False) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_of_transformers(variant, folders, tmp_path):
    other = write(tmp_path, folders["smollm"], theirs(**VARIANTS[variant]))
    model, tokenizer = load_pretrained(tmp_path)
    assert type(model) is Llama and not model.training
    assert_equal_logits(model, other)
    assert_equal_text(model, other)
    tied = model.lm_head.weight is model.token_embedding.weight
    assert tied == VARIANTS[variant].get("tie_word_embeddings", True)
    assert encode(tokenizer, "low 12") == encode(load_hf_tokenizer(folders["smollm"]), "low 12")
    assert model.n_params == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_older_config_json(variant, folders, tmp_path):
    """transformers 4 wrote rope_theta at the top, and rope_scaling, with "type" before that."""
    other = write(tmp_path, folders["smollm"], theirs(**VARIANTS[variant]))
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_equal_logits(load_pretrained(tmp_path)[0], other)


@pytest.mark.parametrize("size", ["20KB", "60KB"])
def test_shards(size, folders, tmp_path):
    untied = theirs(tie_word_embeddings=False)
    other = write(tmp_path, folders["smollm"], untied, max_shard_size=size)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_equal_logits(load_pretrained(tmp_path)[0], other)


def test_half_precision(folders, tmp_path):
    other = write(tmp_path, folders["smollm"], theirs().to(torch.bfloat16), max_shard_size="60KB")
    model, _ = load_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_equal_logits(model, again)
    assert_equal_text(model, again)
    half, _ = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        difference = (half(IDS).float() - other(IDS).logits.float()).abs().max()
        assert difference < 0.05 * other(IDS).logits.float().abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_what_we_save(variant, folders, tmp_path):
    write(tmp_path / "theirs", folders["llama-bpe"], theirs(**VARIANTS[variant]))
    model, tokenizer = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tokenizer, tmp_path / "ours")
    again, again_tokenizer = load_pretrained(tmp_path / "ours")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert again.config == model.config
    assert_equal_logits(again, other)
    assert_equal_text(again, other)
    opened = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in HOSTILE:
        assert opened(text)["input_ids"] == encode_prompt(again_tokenizer, text) == encode_prompt(
            tokenizer, text)
    asked = [{"role": "user", "content": "Are 12 flowers low?"}]
    assert opened.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == (
        encode_messages(again_tokenizer, asked))


def test_a_model_of_the_reader(tmp_path):
    """A Llama that was never a folder, with chapter 2's tokenizer; several end ids; bfloat16."""
    tokenizer = train_bpe(TEXT, 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=303, context_length=24, n_embd=32, n_head=4, n_layer=2,
                         n_kv_head=2, bos_token_id=299, eos_token_id=(299, 7),
                         rope_scaling=RopeScaling(4.0, original_context_length=8))
    model = perturb(Llama(config)).eval()
    save_pretrained(model, tokenizer, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = IDS % 300
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids), load_pretrained(tmp_path)[0](ids))
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.eos_token == "<|endoftext|>" and other.config.eos_token_id == [299, 7]
    assert load_pretrained(tmp_path)[0].config == config
    assert all(opened(text)["input_ids"] == encode(tokenizer, text) for text in HOSTILE)
    save_pretrained(model, tokenizer, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_the_format_has_no_word_for(tmp_path):
    tokenizer = train_bpe(TEXT, 300)
    shape = {"vocab_size": 300, "context_length": 24, "n_embd": 32, "n_head": 4, "n_layer": 1}
    for extra in ({"qk_norm": True}, {"sliding_window": 4}):
        with pytest.raises(ValueError, match="no word for qk_norm or sliding_window"):
            save_pretrained(Llama(LlamaConfig(**shape, **extra)), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="300 tokens, the model 290"):
        save_pretrained(Llama(LlamaConfig(**shape | {"vocab_size": 290})), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_file_stays_as_it_is_while_a_model_trains(folder):
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_key_map_is_whole(folder):
    model, _ = load_pretrained(folder)
    names = llama_key_map(model.config)
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert set(names.values()) == set(load_file(folder / "model.safetensors"))
    untied = LlamaConfig(**{**vars(model.config), "tie_word_embeddings": False})
    assert set(llama_key_map(untied)) - set(names) == {"lm_head.weight"}


# What goes wrong


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({k: v.clone() for k, v in state.items()}, path)


def test_every_wrong_name_and_shape_is_told(folder):
    def change(state):
        layer = "model.layers.1."
        state[layer + "mlp.gateproj.weight"] = state.pop(layer + "mlp.gate_proj.weight")
        down = state[layer + "mlp.down_proj.weight"]
        state[layer + "mlp.down_proj.weight"] = down.t().contiguous()
        state[layer + "self_attn.q_proj.bias"] = torch.zeros(48)
        state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(48, 48)
        del state["model.norm.weight"]

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    for part in ("model.layers.1.mlp.gate_proj.weight is missing",
                 "model.layers.1.mlp.gateproj.weight is unexpected",
                 "model.layers.1.mlp.down_proj.weight has shape (56, 48), expected (48, 56)",
                 "model.layers.1.self_attn.q_proj.bias is unexpected",
                 "model.layers.0.self_attn.k_proj.weight has shape (48, 48), expected (16, 48)",
                 "model.norm.weight is missing", str(folder)):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_old_buffers_and_a_second_copy_of_the_tied_head(folder):
    model, _ = load_pretrained(folder)
    rewrite(folder, lambda state: state.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
         "lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(folder)[0](IDS), model(IDS))


def test_an_untied_model_needs_its_head(folders, tmp_path):
    write(tmp_path, folders["smollm"], theirs(tie_word_embeddings=False))
    rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_pretrained(tmp_path)


@pytest.fixture
def sharded(folders, tmp_path) -> Path:
    write(tmp_path, folders["smollm"], max_shard_size="60KB")
    return tmp_path


def set_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard(sharded):
    sorted(sharded.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-0000\d\.safetensors"):
        load_pretrained(sharded)


def test_a_key_in_no_shard(sharded):
    first = sorted(sharded.glob("model-*.safetensors"))[0].name
    set_index(sharded, lambda index: index["weight_map"].update({"model.norm.extra": first}))
    with pytest.raises(ValueError, match=rf"model\.norm\.extra should be in {first}, and is not"):
        load_pretrained(sharded)


def test_a_key_that_the_index_does_not_name(sharded):
    set_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in model-.* is not in the index"):
        load_pretrained(sharded)


def test_a_key_in_two_shards(sharded):
    paths = sorted(sharded.glob("model-*.safetensors"))
    state = load_file(paths[-1])
    name, tensor = next(iter(load_file(paths[0]).items()))
    save_file({k: v.clone() for k, v in (state | {name: tensor}).items()}, paths[-1])
    with pytest.raises(ValueError, match=f"{name} in {paths[-1].name} is not in the index"):
        load_pretrained(sharded)


def test_a_damaged_shard(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole safetensors file"):
        load_pretrained(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}',
                                     '{"weight_map": {"a": 3}}',
                                     '{"weight_map": {"a": "../../etc/passwd"}}',
                                     '{"weight_map": {"a": "/etc/passwd"}}'])
def test_an_index_that_is_none(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is not an index of shards"):
        load_pretrained(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_pretrained(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors.*index\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention_bias": True}, "attention_bias = True; this series builds False only"),
    ({"mlp_bias": True}, "mlp_bias = True"), ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions of type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
     "'llama3' without low_freq_factor, high_freq_factor, original_max_position_embeddings"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'linear' without factor"),
    ({"hidden_size": "drop", "vocab_size": "drop"}, "lacks vocab_size, hidden_size"),
    ({"num_key_value_heads": 4}, r"n_head \(6\) must be a multiple of n_kv_head \(4\)"),
    ({"num_attention_heads": 7}, r"n_head \(7\) must be a multiple of n_kv_head"),
    ({"num_hidden_layers": "3"}, "n_layer must be"), ({"bos_token_id": -1}, "bos_token_id"),
    ({"eos_token_id": ["a"]}, "eos_token_id"), ({"vocab_size": 50}, "tokens, the model 50"),
    ({"intermediate_size": 57}, r"mlp.gate_proj.weight has shape \(56, 48\), expected \(57, 48\)"),
    ({"model_type": "mistral"}, "'mistral'; expected 'gpt2', or 'llama'"),
])
def test_configs_that_are_refused(changes, message, folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "drop"}))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_config_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a config"):
        load_llama_config(tmp_path / "config.json")


def test_configs_of_published_models(tmp_path):
    """The values of SmolLM2-135M, and of Llama 3.2 1B with its three end ids, in the old form."""
    smollm = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
              "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
              "num_attention_heads": 9,
              "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
              "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None,
              "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
              "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
              "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(smollm))
    config = load_llama_config(tmp_path / "config.json")
    with torch.device("meta"):
        assert Llama(config).n_params == 134_515_008
    llama = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, "head_dim": 64,
             "intermediate_size": 8192, "max_position_embeddings": 131072,
             "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
             "rms_norm_eps": 1e-5,
             "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
             "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                              "original_max_position_embeddings": 8192, "rope_type": "llama3"},
             "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000,
             "eos_token_id": [128001, 128008, 128009]}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    config = load_llama_config(tmp_path / "config.json")
    assert config.eos_token_id == (128001, 128008, 128009)
    assert config.rope_scaling == RopeScaling(32.0, "llama3", 1.0, 4.0, 8192)
    with torch.device("meta"):
        assert Llama(config).n_params == 1_235_814_400


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path):
    config = TheirConfig()
    said = {"model_type": "llama", "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_hidden_layers": 2, "eos_token_id": [3, 95]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    mine = load_llama_config(tmp_path / "config.json")
    assert (mine.context_length, mine.norm_eps, mine.rope_base, mine.tie_word_embeddings) == (
        config.max_position_embeddings, config.rms_norm_eps, config.rope_parameters["rope_theta"],
        config.tie_word_embeddings)
    assert (mine.n_kv_head, mine.head_size, mine.eos_token_id) == (4, 16, 3)


# A GPT-2 as today's transformers saves it


def test_a_gpt2_with_tokenizer_json_alone(folders, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    torch.manual_seed(0)
    theirs = perturb(GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=20, n_embd=24,
                                                n_head=3, n_layer=2))).eval()
    theirs.save_pretrained(tmp_path)
    tiny = ROOT / "data" / "models" / "tiny"
    GPT2TokenizerFast.from_pretrained(tiny).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    model, tokenizer = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert all(encode(tokenizer, t) == encode(load_tokenizer("tiny"), t) for t in HOSTILE)
    save_pretrained(model, tokenizer, tmp_path / "again")
    assert not (tmp_path / "again" / "vocab.json").exists()
    again, again_tokenizer = load_pretrained(tmp_path / "again")
    assert again.config == model.config
    opened = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(encode(again_tokenizer, t) == opened(t)["input_ids"] for t in HOSTILE)


# Short names, and the memory of opening

HUB = """
    import sys, time
    from pathlib import Path
    import torch
    from helpers.common import resolve_settings
    from helpers.generation import generate
    from helpers.hf_tokenizer import encode_messages
    from helpers.pretrained import load_pretrained

    for name in ("smollm2-135m", "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M"):
        _, base = resolve_settings("sample", name)
        model, tokenizer = load_pretrained(base)
        print(name, type(model).__name__, tokenizer.n_vocab, tokenizer.chat_template is not None)
    try:
        load_pretrained("HuggingFaceTB/SmolLM2-360M")
    except FileNotFoundError as error:
        print("OFFLINE", str(error).replace(chr(10), " "))

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    if Path("/proc/self/status").exists():
        before = anonymous()
        start = time.perf_counter()
        big, _ = load_pretrained(sys.argv[1], dtype=torch.bfloat16)
        after = anonymous()
        print("COPIED", (after - before) / (big.n_params * 2 / 2**20), big.n_params * 2 / 2**20)
"""


def test_short_names_in_the_hubs_cache_and_weights_that_are_mapped(folders, tmp_path):
    """The real hub client on a cache laid out as it lays it out; no name leaves this machine."""
    write(tmp_path / "base", folders["smollm"], max_shard_size="60KB")
    write(tmp_path / "chat", folders["smollm"])
    (tmp_path / "base" / "chat_template.jinja").unlink()
    for name, source in (("SmolLM2-135M", "base"), ("SmolLM2-135M-Instruct", "chat")):
        cache = tmp_path / "home" / "hub" / f"models--HuggingFaceTB--{name}"
        sha = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
        for part in ("blobs", "refs", f"snapshots/{sha}"):
            (cache / part).mkdir(parents=True)
        (cache / "refs" / "main").write_text(sha)
        for file in (tmp_path / source).iterdir():
            shutil.copy(file, cache / "blobs" / file.name)
            (cache / "snapshots" / sha / file.name).symlink_to(Path("../../blobs") / file.name)
    large = theirs(hidden_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
                   intermediate_size=2048, num_hidden_layers=5).to(torch.bfloat16)
    write(tmp_path / "large", folders["smollm"], large, max_shard_size="20MB")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1",
                                "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LLM_BASE", "LLM_SOURCE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(HUB), str(tmp_path / "large")],
                          env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    n = load_hf_tokenizer(folders["smollm"]).n_vocab
    assert lines[:3] == [f"smollm2-135m Llama {n} False", f"smollm2-135m-instruct Llama {n} True",
                         f"HuggingFaceTB/SmolLM2-135M Llama {n} False"]
    assert lines[3].startswith("OFFLINE") and "SmolLM2-360M" in lines[3]
    if len(lines) > 4:
        share, megabytes = map(float, lines[4].split()[1:])
        assert megabytes > 60 and share < 0.2


def test_base_is_a_choice_of_the_chapters(monkeypatch):
    for name in ("LLM_SOURCE", "LLM_BASE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_settings(None, "smollm2-135m") == ("sample", "smollm2-135m")
    monkeypatch.setenv("LLM_BASE", "smollm2-135m-instruct")
    assert resolve_settings() == ("sample", "smollm2-135m-instruct")


def test_the_chat_functions_of_chapter_7(folder):
    """Special tokens for a tokenizer of another order of ids, and rows for them."""
    model, tokenizer = load_pretrained(folder)
    assert add_special_tokens(tokenizer, list(CHATML.values())).n_vocab == tokenizer.n_vocab
    longer = add_special_tokens(tokenizer, ["<|tool|>"])
    assert longer.encode_single_token("<|tool|>") == tokenizer.n_vocab
    assert all(encode(longer, t) == encode(tokenizer, t) for t in HOSTILE if not (
        set(t.encode()) & tokenizer.absent_bytes))
    chat = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    ids, _ = encode_chat(longer, chat)
    assert longer.decode(ids.tolist()) == apply_chat_template(chat)
    larger = resize_token_embeddings(model, 420)
    with torch.no_grad():
        torch.testing.assert_close(larger(IDS)[..., :411], model(IDS))


def test_a_copy_of_an_opened_model_is_one(folder):
    model, tokenizer = load_pretrained(folder)
    again = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0)
    assert tokenizer.chat_template == CHAT
