"""Chapter 5: GPT-2 folders, ours and those of transformers, in both directions."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fitting import Bomb, assert_same, make_model, perturb, train, weights_of, windows
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.gpt import GPT
from helpers.pretrained import hf_key_map, load_config, load_pretrained, save_pretrained
from helpers.tokenizer import encode, eos_token_id, save_tokenizer, train_bpe
from helpers.training import configure_optimizer

ROOT = Path(__file__).resolve().parent.parent


TEXT = "low lower lowest slow slowly is the tower, don't lower it, 12 flowers flow over\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 280)


def base_model(tokenizer, **changes) -> GPT:
    shape = {"vocab_size": tokenizer.n_vocab + 3, "context_length": 12, "n_embd": 24, "n_head": 3,
             "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
    return perturb(make_model(**shape | changes)).eval()


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    save_pretrained(base_model(tokenizer), tokenizer, tmp_path / "gpt")
    return tmp_path / "gpt"


IDS = torch.arange(24).view(2, 12) * 7 % 280


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False},
                                     {"norm_eps": 1e-3, "dropout": 0.3}])
def test_transformers_opens_what_we_save(changes, tmp_path, tokenizer):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = base_model(tokenizer, **changes)
    save_pretrained(model, tokenizer, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
        again, _ = load_pretrained(tmp_path)
        torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=1e-6)
    tied = again.lm_head.weight is again.token_embedding.weight
    assert tied == model.config.tie_word_embeddings and not again.training
    wanted = {**vars(model.config), "qkv_bias": True}   # the format has no word for its absence
    assert vars(again.config) == wanted
    assert theirs.config.eos_token_id == eos_token_id(tokenizer)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("lower towers don't slow 123", " low\n\nlow  ", "żółw 🐢"):
        assert opened(text)["input_ids"] == encode(tokenizer, text)
    assert opened.eos_token_id == eos_token_id(tokenizer)


@pytest.fixture(scope="module")
def theirs(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(**changes):
        torch.manual_seed(0)
        shape = {"vocab_size": tokenizer.n_vocab, "n_positions": 12, "n_embd": 24, "n_head": 3,
                 "n_layer": 2, "bos_token_id": eos_token_id(tokenizer),
                 "eos_token_id": eos_token_id(tokenizer)}
        return perturb(GPT2LMHeadModel(GPT2Config(**shape | changes))).eval()

    return build


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False},
                                     {"n_inner": 96, "layer_norm_epsilon": 1e-3}])
def test_we_open_what_transformers_saves(changes, theirs, tmp_path, tokenizer):
    model = theirs(**changes)
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    ours, opened = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.tie_word_embeddings == changes.get("tie_word_embeddings", True)
    assert opened.encode_ordinary("lower") == encode(tokenizer, "lower")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_hubs_old_file(prefix, theirs, tmp_path, tokenizer):
    """Bare names, causal masks among the weights, an old config, as openai-community/gpt2 has."""
    model = theirs()
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    state = {name.replace("transformer.", prefix): tensor.clone()
             for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for i in range(2):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    config = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
              "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02, "n_ctx": 12,
              "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 24, "n_head": 3,
              "n_layer": 2, "resid_pdrop": 0.1, "vocab_size": tokenizer.n_vocab,
              "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.context_length == 12 and ours.config.eos_token_id == eos_token_id(tokenizer)


def test_files_of_half_precision_open_as_float32(tmp_path, tokenizer):
    model = base_model(tokenizer)
    for dtype in (torch.float16, torch.bfloat16):
        save_pretrained(model, tokenizer, tmp_path, dtype=dtype)
        assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
        again, _ = load_pretrained(tmp_path)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        torch.testing.assert_close(again.final_norm.weight,
                                   model.final_norm.weight.detach().to(dtype).float())
    half, _ = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}      # saving changed nothing


def test_a_loaded_model_trains_and_is_saved_where_it_came_from(folder, tokenizer):
    before = (folder / "model.safetensors").read_bytes()
    model, opened = load_pretrained(folder)
    assert all(p.requires_grad for p in model.parameters())
    train(model, windows(), max_steps=2, lr=0.1)
    assert (folder / "model.safetensors").read_bytes() == before     # the file is not the memory
    other = weights_of(load_pretrained(folder)[0])
    assert any(not torch.equal(w, other[n]) for n, w in weights_of(model).items())
    save_pretrained(model, opened, folder)
    assert_same(load_pretrained(folder)[0], model)
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_wrapped_models_are_saved_as_they_are_inside(folder, tokenizer):
    model, _ = load_pretrained(folder)
    save_pretrained(torch.compile(model, backend="eager"), tokenizer, folder)
    assert_same(load_pretrained(folder)[0], model)


def test_the_order_of_keys_and_the_map_are_whole(tokenizer):
    for changes in ({}, {"tie_word_embeddings": False}, {"qkv_bias": False}):
        model = base_model(tokenizer, **changes)
        assert set(hf_key_map(model.config)) == set(weights_of(model))
        assert len({theirs for theirs, _ in hf_key_map(model.config).values()}) == len(
            hf_key_map(model.config))


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_every_wrong_name_and_shape_is_told(folder):
    def change(state):
        for i in range(2):
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.bias"):
                del state[f"transformer.h.{i}.{name}"]
        state["transformer.h.7.extra"] = torch.ones(1)
        state["score.weight"] = torch.ones(2)
        state["transformer.wpe.weight"] = torch.ones(13, 24)
        weight = state["transformer.h.0.mlp.c_fc.weight"]
        state["transformer.h.0.mlp.c_fc.weight"] = weight.t().contiguous()

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    message = str(caught.value)
    for i in range(2):
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.bias"):
            assert f"h.{i}.{name} is missing" in message
    assert "h.7.extra is unexpected" in message and "score.weight is unexpected" in message
    assert "wpe.weight has shape (13, 24), expected (12, 24)" in message
    assert "h.0.mlp.c_fc.weight has shape" in message and str(folder) in message


def test_an_untied_model_needs_its_head(tmp_path, tokenizer):
    save_pretrained(base_model(tokenizer, tie_word_embeddings=False), tokenizer, tmp_path)
    rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        load_pretrained(tmp_path)


def test_names_with_and_without_the_prefix_in_one_file(folder):
    expected = weights_of(load_pretrained(folder)[0])

    def change(state):
        state["wte.weight"] = state.pop("transformer.wte.weight")

    rewrite(folder, change)
    assert_same(load_pretrained(folder)[0], expected)


def test_weights_that_are_no_safetensors(folder, tmp_path):
    path = folder / "model.safetensors"
    whole, target = path.read_bytes(), tmp_path / "it ran"
    torch.save({"wte.weight": Bomb(target)}, tmp_path / "pickle")
    for content in (b"", b"hello", whole[:100], whole[:-10], (tmp_path / "pickle").read_bytes(),
                    pickle.dumps(Bomb(target)), b"\xff" * 64, whole + b"tail"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_pretrained(folder)
    assert not target.exists()


def test_pickled_weights_are_never_opened(folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    torch.save({"wte.weight": Bomb(tmp_path / "it ran")}, folder / "pytorch_model.bin")
    load_pretrained(folder)                             # not even beside a good file
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_pretrained(folder)
    assert not (tmp_path / "it ran").exists()


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}), encoding="utf-8")


def test_configs_that_transformers_opens_too(folder):
    set_config(folder, eos_token_id=50256, bos_token_id=50256,
               activation_function="gelu_pytorch_tanh")
    config = load_pretrained(folder)[0].config           # the ids are those of a larger vocabulary
    assert config.eos_token_id is None and config.bos_token_id is None
    set_config(folder, attn_pdrop=0.3)
    with pytest.warns(UserWarning, match=r"dropout \[.*0\.3\].*uses .* for all three"):
        load_pretrained(folder)


def test_the_file_may_go_while_its_weights_are_in_use(folder):
    model, _ = load_pretrained(folder)                    # in the file's dtype: mapped, not copied
    expected = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    for ours, (theirs, transposed) in hf_key_map(model.config).items():
        tensor = expected[f"transformer.{theirs}"]
        assert torch.equal(model.get_parameter(ours), tensor.t() if transposed else tensor)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "mistral"}, "'mistral'; expected 'gpt2', or 'llama'"),
    ({"model_type": "drop"}, "type None"),
    ({"activation_function": "gelu"}, "'gelu'; this series builds 'gelu_new'"),
    ({"activation_function": "relu"}, "relu"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_inner": 95}, "n_inner = 95"),
    ({"n_head": "drop", "n_embd": "drop"}, "lacks n_embd, n_head"),
    ({"n_positions": "drop"}, "lacks n_positions"),
    ({"n_head": 5}, "multiple of n_head"),
    ({"n_layer": "2"}, "n_layer must be"),
    ({"eos_token_id": -1}, "eos_token_id -1 is outside"),
    ({"eos_token_id": [279]}, r"eos_token_id must be one id, a whole number, not \[279\]"),
    ({"vocab_size": 283, "n_embd": 48}, "wte.weight has shape"),
])
def test_configs_of_other_models(changes, message, folder):
    set_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_config_that_is_none(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a config"):
        load_config(folder / "config.json")


def test_gpt2s_own_config_is_our_gpt2(tmp_path):
    from transformers import GPT2Config

    from helpers.gpt import GPT2_CONFIGS

    for name, shape in GPT2_CONFIGS.items():
        GPT2Config(n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head).save_pretrained(
            tmp_path)
        assert load_config(tmp_path / "config.json") == shape, name


def test_a_tokenizer_larger_than_the_model(folder, tmp_path, tokenizer):
    larger = train_bpe(TEXT, 290)
    save_tokenizer(larger, folder)
    with pytest.raises(ValueError, match="290 tokens, the model 283"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="290 tokens, the model 283"):
        save_pretrained(base_model(tokenizer), larger, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_pretrained(folder)


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_pretrained("no such model")


def test_the_shipped_model_opens_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_pretrained("tiny")
    assert model.config.eos_token_id == eos_token_id(tokenizer) and model.config.vocab_size == 8192
    same, _ = load_pretrained("data/models/tiny")
    assert_same(same, model)
    assert model.n_params == sum(p.numel() for p in model.parameters())


HUB = """
    import os, sys, torch
    from pathlib import Path
    from helpers.pretrained import load_pretrained

    def rss():
        lines = Path("/proc/self/status").read_text().splitlines()
        kinds = dict(line.split(":", 1) for line in lines)
        return {k: int(kinds[k].split()[0]) / 1024 for k in ("RssAnon", "VmHWM")}

    for name in ("gpt2", "openai-community/gpt2"):
        model, tokenizer = load_pretrained(name)
        torch.save(model(torch.arange(8)[None]).detach(), sys.argv[1])
        print(tokenizer.n_vocab, model.config.eos_token_id)
    try:
        load_pretrained("gpt2-medium")
    except FileNotFoundError as error:
        print("OFFLINE", str(error).replace(chr(10), " "))
    if Path("/proc/self/status").exists():
        before = rss()
        big, _ = load_pretrained(sys.argv[2])
        size = big.n_params * 4 / 2**20
        after = rss()
        print("COPIES", (after["RssAnon"] - before["RssAnon"]) / size,
              (after["VmHWM"] - before["VmHWM"]) / size, size)
    import time
    import huggingface_hub.constants as constants
    constants.HF_HUB_OFFLINE = False
    time.sleep = lambda seconds: None           # the hub's client tries again, later and later
    try:
        load_pretrained("gpt2-large")
    except FileNotFoundError as error:
        print("NO NETWORK", str(error).replace(chr(10), " "))
"""


def test_the_hubs_cache_offline_and_the_memory_of_loading(folder, tmp_path, tokenizer):
    """The real hub client on a cache laid out as it lays it out; no name leaves this machine."""
    sha = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    cache = tmp_path / "home" / "hub" / "models--openai-community--gpt2"
    for name in ("blobs", "refs", f"snapshots/{sha}"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text(sha)
    for file in folder.iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (cache / "snapshots" / sha / file.name).symlink_to(Path("../../blobs") / file.name)
    large = make_model(vocab_size=300, n_embd=768, n_head=12, n_layer=4)
    save_pretrained(large, tokenizer, tmp_path / "large", dtype=torch.float16)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1",
                                "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", textwrap.dedent(HUB), str(tmp_path / "out.pt"),
               str(tmp_path / "large")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert first == second == f"{tokenizer.n_vocab} {eos_token_id(tokenizer)}"
    expected = load_pretrained(folder)[0](torch.arange(8)[None])
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)
    lines = dict((line.split()[0], line) for line in lines)
    for word in ("OFFLINE", "NO"):
        assert "openai-community/gpt2-" in lines[word] and "network" in lines[word]
    if "COPIES" in lines:
        kept, peak, size = map(float, lines["COPIES"].split()[1:])
        assert size > 100 and kept < 1.15 and peak < 1.8    # the file itself is half a copy


def test_weights_in_another_memory_order_train_to_the_same() -> None:
    """The fused AdamW of the CPU ruins them without a word (torch 2.13): not used there."""
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    turned = copy.deepcopy(plain)
    turned.weight.data = turned.weight.data.t().contiguous().t()
    x = torch.randn(8, 6)
    for layer in (plain, turned):
        optimizer = configure_optimizer(layer, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(turned.weight, plain.weight)
