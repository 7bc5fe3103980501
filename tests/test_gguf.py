"""Chapters 7, 8: a GGUF file, read by the package gguf, by transformers, and by llama.cpp itself.

The tests of llama.cpp are skipped where llama-cpp-python is not installed: pip builds it from
source, for many minutes.
"""
# ruff: noqa: F811 (fixtures are imported)

import socket
import subprocess
import sys
import time

import gguf
import jinja2
import numpy as np
import pytest
import requests
import torch
from fitting import make_model, perturb
from test_hf_tokenizer import CHAT, WHOLE, encodings, folders, trained  # noqa: F401

from helpers.generation import generate
from helpers.gguf_export import ALPACA_CHAT_TEMPLATE, gguf_names, ollama_modelfile, save_gguf
from helpers.gpt import GPT
from helpers.hf_tokenizer import encode_prompt
from helpers.instruction import format_prompt
from helpers.judge import ChatClient
from helpers.llama import Llama, LlamaConfig, RopeScaling, interleaved_to_half_split
from helpers.llama_gguf import llama_gguf_names, load_llama_gguf
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import (
    END_OF_TEXT,
    decode,
    encode,
    eos_token_id,
    make_encoding,
    train_bpe,
)

TEXT = "low lower lowest slow slowly is the tower, don't lower it, 12 flowers flow over\n" * 3
IDS = torch.arange(24).view(2, 12) * 7 % 280
HOSTILE = [
    "", " ", "  a", "a  ", "\n\n \n", "\t\tx\r\n", "I'll don't we've THEY'RE 'tis", "''s '' 's",
    "12 345x6 \u0664\u0665 \u2160 \u00bd", "Zo\u00eb Zoe\u0308 \ufb01 \u00df \u0130",
    "\u0416\u0443\u043a \u03a9 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\r\n\t\x0b\x0c\x1c\x1f\x85\u00a0\u2028\u3000a\u200b b", "\ufeff\ufffd\uffff\U0010ffff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001f408\ufe0f\U0001f1eb\U0001f1f7",
    "null\x00byte", f"{END_OF_TEXT} is text {END_OF_TEXT}", "[PAD300] [INST] <s> ### Response:",
    "a" * 300, "\u0301\u0301 e\u0301", "x\u00a0\u00a0y   z", "_snake_case(x)->y; 3.14e-5 !!?",
]
PROMPTS = ["Once upon a time", "The old man", "\"Where are you going?\" asked", "It was a dark",
           "In the garden there was", "The king said to his"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 280)


@pytest.fixture(scope="module")
def tiny():
    return load_pretrained("tiny")


def base_model(tokenizer, **changes) -> GPT:
    shape = {"vocab_size": tokenizer.n_vocab + 3, "context_length": 12, "n_embd": 32, "n_head": 4,
             "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
    return perturb(make_model(**shape | changes)).eval()


def tensors(path) -> dict[str, np.ndarray]:
    """Every tensor of a file, dequantized."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def metadata(path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False}])
def test_every_tensor_is_in_the_file(changes, tmp_path, tokenizer):
    model = base_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    found, state = tensors(tmp_path / "m.gguf"), model.state_dict()
    assert found.keys() == set(gguf_names(model.config).values())
    assert ("output.weight" in found) != model.config.tie_word_embeddings
    for ours, theirs in gguf_names(model.config).items():
        wanted = state[ours].numpy() if ours in state else np.zeros(3 * model.config.n_embd)
        np.testing.assert_array_equal(found[theirs], wanted, err_msg=theirs)
    unsaid = {n for n in state if n not in gguf_names(model.config)}
    assert unsaid <= {"lm_head.weight"}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_transformers_reads_the_file_with_equal_logits(changes, tmp_path, tokenizer):
    """A map of names that swaps two tensors of one shape fails here; transformers has its own."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    model = base_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    c = model.config
    config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd,
                        n_head=c.n_head, n_layer=c.n_layer,
                        tie_word_embeddings=c.tie_word_embeddings)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file="m.gguf", config=config,
                                             dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    opened = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("lower towers don't slow 123", " low\n\nlow  ", "\u017c\u00f3\u0142w \U0001f422"):
        assert opened(text, add_special_tokens=False)["input_ids"] == encode(tokenizer, text)


def test_float16_rounds_the_matrices_and_nothing_else(tmp_path, tokenizer):
    model = base_model(tokenizer)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    state = model.state_dict()
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for ours, theirs in gguf_names(model.config).items():
        half = state[ours].dim() == 2 and "position" not in ours
        assert stored[theirs].tensor_type.name == ("F16" if half else "F32"), theirs
        wanted = state[ours].half() if half else state[ours]
        np.testing.assert_array_equal(stored[theirs].data, wanted.numpy())
    assert all(w.dtype == torch.float32 for w in model.parameters())


def test_q8_0_is_blocks_of_32_with_one_scale(tmp_path, tokenizer):
    model = base_model(tokenizer, n_embd=64)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_qkv.bias"] == "F32"
    weight = model.blocks[1].feed_forward.down_projection.weight.detach()
    block = weight.reshape(-1, 32)
    scale = block.abs().amax(dim=1, keepdim=True) / 127
    q = (block / scale).round()
    found = torch.from_numpy(tensors(tmp_path / "m.gguf")["blk.1.ffn_down.weight"])
    torch.testing.assert_close(found.reshape(-1, 32), q * scale.half().float(), rtol=0, atol=1e-6)
    assert ((found.reshape(-1, 32) - block).abs() <= scale * 0.57).all()
    assert not torch.equal(found, weight)
    raw = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert raw.n_bytes == weight.numel() // 32 * 34


def test_metadata(tmp_path, tokenizer):
    model = base_model(tokenizer, norm_eps=1e-3)
    save_gguf(model, tokenizer, tmp_path / "my model.gguf", chat_template=ALPACA_CHAT_TEMPLATE)
    said = metadata(tmp_path / "my model.gguf")
    assert (said["general.architecture"], said["general.name"]) == ("gpt2", "my model")
    sizes = ("context_length", "embedding_length", "feed_forward_length", "block_count",
             "attention.head_count")
    assert [said[f"gpt2.{name}"] for name in sizes] == [12, 32, 128, 2, 4]
    assert said["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-3)
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.chat_template"] == ALPACA_CHAT_TEMPLATE
    end = eos_token_id(tokenizer)
    assert said["tokenizer.ggml.bos_token_id"] == said["tokenizer.ggml.eos_token_id"] == end
    assert said["tokenizer.ggml.add_bos_token"] is False
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.config.vocab_size == 283
    assert tokens[end:] == [END_OF_TEXT, "[PAD280]", "[PAD281]", "[PAD282]"]
    kind = gguf.TokenType
    assert types[end:] == [kind.CONTROL, *[kind.UNUSED] * 3] and set(types[:end]) == {kind.NORMAL}
    assert len(said["tokenizer.ggml.merges"]) == 280 - 257
    assert "".join(said["tokenizer.ggml.merges"][-1].split(" ")) == tokens[end - 1]
    save_gguf(model, tokenizer, tmp_path / "plain.gguf")
    assert "tokenizer.chat_template" not in metadata(tmp_path / "plain.gguf")


def test_the_ids_of_config_go_before_the_tokenizers(tmp_path, tokenizer):
    model = base_model(tokenizer, bos_token_id=5, eos_token_id=None)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    said = metadata(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.bos_token_id"] == 5
    assert said["tokenizer.ggml.eos_token_id"] == eos_token_id(tokenizer)


@pytest.mark.parametrize("changes, dtype, message", [
    ({}, "int4", r"dtype must be one of float32, float16, q8_0, not 'int4'"),
    ({"n_embd": 24}, "q8_0", r"multiple of 32, not 24"),
    ({"vocab_size": 270}, "float16", r"The tokenizer has 280 tokens, the model 270"),
])
def test_what_is_refused(changes, dtype, message, tmp_path, tokenizer):
    ids = {"bos_token_id": None, "eos_token_id": None}
    with pytest.raises(ValueError, match=message):
        save_gguf(base_model(tokenizer, **ids | changes), tokenizer, tmp_path / "m.gguf", dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_an_end_is_refused(tmp_path, tokenizer):
    bare = make_encoding("bare", [], special_tokens=())
    with pytest.raises(ValueError, match="has no <|endoftext|>".replace("|", r"\|")):
        save_gguf(base_model(tokenizer), bare, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(base_model(tokenizer), tokenizer, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("asked", ["Name a colour.", "{{ 1 + 1 }} {% raw %}", "a\n\n### Input:\nb",
                                   " leading and trailing \n", "<b>&amp; 'quotes'</b>"])
def test_the_chat_template_makes_the_prompt_of_the_chapter(asked):
    turns = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"},
             {"role": "user", "content": asked}]
    made = jinja2.Environment().from_string(ALPACA_CHAT_TEMPLATE).render(messages=turns)
    assert made == format_prompt({"instruction": asked})


def test_the_modelfile_has_the_prompt_of_the_chapter():
    text = ollama_modelfile("runs/tuned.gguf", 256)
    assert text.startswith("FROM ./tuned.gguf\n")
    prompt = text.split('"""')[1].replace("{{ .Prompt }}", "Name a colour.")
    assert prompt == format_prompt({"instruction": "Name a colour."})
    parameters = [line.split(" ", 2)[1:] for line in text.splitlines() if line.startswith("PARAM")]
    assert dict(parameters) == {"stop": f'"{END_OF_TEXT}"', "num_ctx": "256", "temperature": "0"}


def test_a_saved_folder_opens_in_a_pipeline_of_transformers(tiny, tmp_path):
    from transformers import pipeline

    model, tokenizer = tiny
    save_pretrained(model, tokenizer, tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32, device="cpu")
    for prompt in PROMPTS[:2]:
        made = writer(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
        assert made == decode(tokenizer, generate(model, encode(tokenizer, prompt), 20))


# llama.cpp itself. Its table of GELU values is in float16, so logits differ in the last digits.


def open_llama(path, **options):
    """The file as llama.cpp opens it; skips the test where it is not installed."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python)")
    float32 = {"type_k": 0, "type_v": 0}           # keys and values, which it keeps in float16
    return llama_cpp.Llama(str(path), n_ctx=0, n_threads=1, n_threads_batch=1, verbose=False,
                           **float32, **options)


def logits_of(llama, ids: list[int]) -> np.ndarray:
    """Logits (T, V) for the token after each of the ids (T,)."""
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[:len(ids)])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False}])
def test_llama_cpp_computes_our_logits(changes, tmp_path, tokenizer):
    model = base_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    llama = open_llama(tmp_path / "m.gguf", logits_all=True)
    for row in IDS:
        with torch.no_grad():
            ours = model(row[None])[0].numpy()
        np.testing.assert_allclose(logits_of(llama, row.tolist()), ours, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_generates_our_text(dtype, tiny, tmp_path):
    """Token by token the same greedy text, but for ties: another token within 0.01 of ours."""
    model, tokenizer = tiny
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    llama = open_llama(tmp_path / "m.gguf", logits_all=True)
    assert llama.n_ctx() == model.config.context_length
    equal = 0
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt)
        ours = generate(model, ids, 40)
        scores = logits_of(llama, ours)[len(ids) - 1:-1]
        chosen = scores[np.arange(40), ours[len(ids):]]
        assert (scores.max(axis=-1) - chosen < 0.01).all(), prompt
        said = llama.create_completion(prompt, max_tokens=40, temperature=0)
        new = [i for i in ours[len(ids):] if i != eos_token_id(tokenizer)]
        equal += said["choices"][0]["text"] == decode(tokenizer, new)
    assert equal >= len(PROMPTS) - 1


def test_llama_cpp_makes_our_tokens(tiny, tmp_path):
    model, tokenizer = tiny
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    llama = open_llama(tmp_path / "m.gguf")
    for text in HOSTILE:
        ids = llama.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        assert ids == encode(tokenizer, text), text
        assert llama.detokenize(ids) == text.encode("utf-8")
    end = eos_token_id(tokenizer)
    assert llama.token_eos() == end
    assert llama.tokenize(END_OF_TEXT.encode(), add_bos=True, special=True) == [end]


def test_llama_cpp_reads_q8_0(tiny, tmp_path):
    model, tokenizer = tiny
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="q8_0")
    llama = open_llama(tmp_path / "m.gguf", logits_all=True)
    same = []
    for prompt in PROMPTS:
        ids = generate(model, encode(tokenizer, prompt), 60)
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0].argmax(dim=-1).numpy()
        same += (logits_of(llama, ids).argmax(axis=-1) == ours).tolist()
    assert sum(same) / len(same) > 0.95, f"{sum(same)} of {len(same)} next tokens agree"


def test_the_server_of_llama_cpp_chats(tiny, tmp_path):
    pytest.importorskip("llama_cpp.server.app", reason="llama-cpp-python[server] is not installed")
    model, tokenizer = tiny
    save_gguf(model, tokenizer, tmp_path / "m.gguf", chat_template=ALPACA_CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(tmp_path / "m.gguf"),
               "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "0", "--n_threads", "1",
               "--type_k", "0", "--type_v", "0"]
    asked = "What is the opposite of hot?"
    body = {"messages": [{"role": "user", "content": asked}], "temperature": 0, "max_tokens": 20,
            "repeat_penalty": 1.0}
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = ChatClient(f"http://127.0.0.1:{port}", "tiny", retries=0)
        deadline = time.monotonic() + 90
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        said = requests.post(client.url, json=body, timeout=60).json()
        reply = client.complete(asked)
    finally:
        server.terminate()
        server.wait(20)
    prompt, end = encode(tokenizer, format_prompt({"instruction": asked})), eos_token_id(tokenizer)
    ids = generate(model, prompt, 20, eos_token_id=end)[len(prompt):]
    ours = decode(tokenizer, [i for i in ids if i != end])
    assert said["usage"]["prompt_tokens"] == len(prompt)
    assert said["choices"][0]["message"]["content"] == ours
    assert isinstance(reply, str) and reply


# The architecture llama, of chapter 8


LLAMA = {"vocab_size": 283, "context_length": 32, "n_embd": 64, "n_head": 4, "n_kv_head": 2,
         "n_layer": 2, "intermediate_size": 96}
LLAMAS = {
    "as SmolLM2": {}, "untied": {"tie_word_embeddings": False},
    "one key head, wide heads": {"n_kv_head": 1, "head_size": 32, "rope_base": 500.0},
    "no groups, larger eps": {"n_kv_head": 4, "norm_eps": 1e-2},
    "Llama 3's scaling": {"rope_base": 500_000.0, "rope_scaling": RopeScaling(
        8.0, original_context_length=64)},
    "linear scaling": {"rope_scaling": RopeScaling(3.0, "linear")},
}


def llama_model(tokenizer, **changes) -> Llama:
    torch.manual_seed(0)
    end = eos_token_id(tokenizer)
    config = LlamaConfig(**LLAMA | {"bos_token_id": end, "eos_token_id": end} | changes)
    return perturb(Llama(config)).eval()


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_a_llama_file_holds_every_tensor(changes, tmp_path, tokenizer):
    """Queries and keys in the interleaved layout, all else as it is."""
    model = llama_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    found, c = tensors(tmp_path / "m.gguf"), model.config
    factors = found.pop("rope_freqs.weight", None)
    assert found.keys() == set(llama_gguf_names(c).values())
    for ours, theirs in llama_gguf_names(c).items():
        weight = torch.from_numpy(found[theirs].copy())
        if "attn_q" in theirs or "attn_k" in theirs:
            n_head = c.n_head if "attn_q" in theirs else c.n_kv_head
            assert not torch.equal(weight, model.get_parameter(ours))
            weight = interleaved_to_half_split(weight, n_head)
        assert torch.equal(weight, model.get_parameter(ours)), theirs
    with torch.no_grad():
        torch.testing.assert_close(load_llama_gguf(tmp_path / "m.gguf", c)(IDS), model(IDS))
    llama_3 = c.rope_scaling is not None and c.rope_scaling.kind == "llama3"
    assert (factors is not None) == llama_3
    if llama_3:
        assert factors.shape == (c.head_size // 2,) and factors[0] == 1 and 7.9 < factors[-1] < 8.1


@pytest.mark.parametrize("changes", [v for k, v in LLAMAS.items() if "scaling" not in k])
def test_transformers_reads_a_llama_file_with_equal_logits(changes, tmp_path, tokenizer):
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = llama_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf",
                                              dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    opened = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert opened("lower towers", add_special_tokens=False)["input_ids"] == encode(
        tokenizer, "lower towers")


def test_the_metadata_of_a_llama(tmp_path, encodings):
    tokenizer = encodings["llama-bpe"]
    model = llama_model(train_bpe(TEXT, 280), vocab_size=tokenizer.n_vocab + 2, head_size=24,
                        bos_token_id=tokenizer.begin[0], eos_token_id=(5, 7), norm_eps=1e-3,
                        rope_base=12345.0)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    said = metadata(tmp_path / "m.gguf")
    sizes = ("context_length", "embedding_length", "feed_forward_length", "block_count",
             "attention.head_count", "attention.head_count_kv", "attention.key_length",
             "rope.dimension_count", "rope.freq_base", "vocab_size")
    assert said["general.architecture"] == "llama"
    assert [said[f"llama.{name}"] for name in sizes] == [32, 64, 96, 2, 4, 2, 24, 24, 12345.0,
                                                         tokenizer.n_vocab + 2]
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert said["tokenizer.ggml.pre"] == "llama-bpe"
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.bos_token_id"] == tokenizer.begin[0]
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"]) == (5, 7)
    assert said["tokenizer.chat_template"] == CHAT
    assert len(said["tokenizer.ggml.tokens"]) == tokenizer.n_vocab + 2


@pytest.mark.parametrize(("changes", "dtype", "message"), [
    ({}, "int4", r"dtype must be one of float32, float16, q8_0, not 'int4'"),
    ({"intermediate_size": 100}, "q8_0", r"multiples of 32, not \(64, 100, 64\)"),
    ({"vocab_size": 270, "bos_token_id": None, "eos_token_id": None}, "float16",
     r"The tokenizer has 280 tokens, the model 270"),
    ({"qk_norm": True}, "float16", "no qk_norm"), ({"sliding_window": 4}, "float16", "no qk_norm"),
])
def test_what_is_refused_of_a_llama(changes, dtype, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        save_gguf(llama_model(tokenizer, **changes), tokenizer, tmp_path / "m.gguf", dtype)
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_no_merge_makes(tmp_path, encodings, tokenizer):
    """llama.cpp takes a piece that is a token as it is for the pattern of Llama 3 alone."""
    llama_3 = encodings["llama-bpe"]
    save_gguf(llama_model(tokenizer, vocab_size=llama_3.n_vocab), llama_3, tmp_path / "m.gguf")
    said = metadata(tmp_path / "m.gguf")
    merged = {merge.replace(" ", "") for merge in said["tokenizer.ggml.merges"]}
    for i, token in WHOLE.items():
        token = token.replace(" ", "\u0120").replace("\u1ec7", "\u00e1\u00bb\u0129")
        assert said["tokenizer.ggml.tokens"][i] == token not in merged
    made = make_encoding("made", [b"abc"])
    with pytest.raises(ValueError, match="1 tokens that no merge makes"):
        save_gguf(llama_model(tokenizer), made, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_llama_cpp_runs_a_llama(changes, tmp_path, tokenizer):
    """Equal logits, and token by token the same greedy text to the end of the context."""
    model = llama_model(tokenizer, **changes)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="float32")
    llama = open_llama(tmp_path / "m.gguf", logits_all=True)
    for row in IDS:
        with torch.no_grad():
            wanted = model(row[None])[0].numpy()
        np.testing.assert_allclose(logits_of(llama, row.tolist()), wanted, rtol=0, atol=2e-3)
        made = generate(model, row.tolist(), 20)
        scores = logits_of(llama, made)[len(row) - 1:-1]
        assert scores.argmax(axis=-1).tolist() == made[len(row):]


@pytest.mark.parametrize("form", ["gpt-2", "smollm", "llama-bpe"])
def test_llama_cpp_makes_the_tokens_of_tokenizer_json(form, tmp_path, encodings):
    tokenizer = encodings[form]
    model = llama_model(train_bpe(TEXT, 280), vocab_size=tokenizer.n_vocab,
                        bos_token_id=tokenizer.encode_single_token(tokenizer.names["bos_token"]),
                        eos_token_id=tokenizer.encode_single_token("<|im_end|>"))
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    llama = open_llama(tmp_path / "m.gguf")
    for text in HOSTILE:
        if tokenizer.absent_bytes and set(text.encode()) & tokenizer.absent_bytes:
            continue
        ids = llama.tokenize(text.encode("utf-8"), add_bos=True, special=False)
        assert ids == encode_prompt(tokenizer, text), text
    marked = "<|im_start|>user\nlow 12<|im_end|>\n"
    assert llama.tokenize(marked.encode(), add_bos=False, special=True) == tokenizer.encode(
        marked, allowed_special="all")
    assert llama.metadata["tokenizer.chat_template"] == CHAT
