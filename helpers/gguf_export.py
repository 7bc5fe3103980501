"""7 · Instruction tuning.

Made from notebooks/07_instruction_tuning.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.instruction, helpers.chat, helpers.judge.
"""

from pathlib import Path

import torch
from tiktoken import Encoding

from helpers.gpt import GPT
from helpers.tokenizer import eos_token_id
import tempfile
from importlib import import_module

import gguf

from helpers.common import atomic_write
from helpers.gpt import GPTConfig
from helpers.tokenizer import END_OF_TEXT, load_merges, save_tokenizer
from helpers.training import unwrap_model
from helpers.instruction import PROMPT_NO_INPUT

__all__ = ["gguf_names", "save_gguf", "ALPACA_CHAT_TEMPLATE", "ollama_modelfile"]


# cell gguf-names of notebooks/07_instruction_tuning.ipynb
def gguf_names(config: GPTConfig) -> dict[str, str]:
    """Our parameter names, each with its name in a GGUF file of the architecture `gpt2`.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> gguf_names(config)["blocks.0.attention.qkv.weight"]
        'blk.0.attn_qkv.weight'
    """
    names = {"token_embedding.weight": "token_embd.weight",
             "position_embedding.weight": "position_embd.weight",
             "final_norm.weight": "output_norm.weight", "final_norm.bias": "output_norm.bias"}
    parts = {"norm_1": "attn_norm", "attention.qkv": "attn_qkv",
             "attention.output_projection": "attn_output", "norm_2": "ffn_norm",
             "feed_forward.up_projection": "ffn_up", "feed_forward.down_projection": "ffn_down"}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{kind}"] = f"blk.{i}.{theirs}.{kind}"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    return names


# cell write-tokenizer of notebooks/07_instruction_tuning.ipynb
def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Encoding, config: GPTConfig) -> None:
    """Add the tokenizer to the metadata: tokens, their types, merges, and the special ids."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)             # checks that it is of GPT-2's kind
        vocab, merges = load_merges(Path(folder, "vocab.json"), Path(folder, "merges.txt"))
    unused = [f"[PAD{i}]" for i in range(len(vocab), config.vocab_size)]
    special, kind = tokenizer.special_tokens_set, gguf.TokenType
    types = [kind.CONTROL if token in special else kind.NORMAL for token in vocab]
    end = eos_token_id(tokenizer)
    writer.add_tokenizer_model("gpt2")                # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")                 # the name of SPLIT_PATTERN
    writer.add_token_list([*vocab, *unused])
    writer.add_token_types([*types, *[kind.UNUSED] * len(unused)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(end if config.bos_token_id is None else config.bos_token_id)
    writer.add_eos_token_id(end if config.eos_token_id is None else config.eos_token_id)
    writer.add_add_bos_token(False)                   # a prompt is encoded as it stands


# cell write-tensors of notebooks/07_instruction_tuning.ipynb
def _write_tensors(writer: gguf.GGUFWriter, model: GPT, kind: gguf.GGMLQuantizationType) -> None:
    """Add each tensor: matrices as `kind`; norms, biases and positions stay float32."""
    state = model.state_dict()
    no_bias = torch.zeros(3 * model.config.n_embd)    # the format demands a bias of qkv
    for ours, theirs in gguf_names(model.config).items():
        weight = state.get(ours, no_bias).detach().to("cpu", torch.float32).numpy()
        is_matrix = weight.ndim == 2 and ours != "position_embedding.weight"
        stored = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quantize(weight, stored), raw_dtype=stored)


# cell save-gguf of notebooks/07_instruction_tuning.ipynb
def save_gguf(model: GPT, tokenizer: Encoding, path: str | Path,
              dtype: str = "float16", chat_template: str | None = None) -> None:
    """Write model and tokenizer as one GGUF file, which llama.cpp, Ollama and others run.

    A file that is there is replaced as a whole. A model without qkv bias gets a bias of zeros.

    Args:
        dtype: of the matrices: "float32", "float16", or "q8_0" (blocks of 32 integers of 8 bits
            with a common scale).
        chat_template: a Jinja template that makes a prompt of `messages`, for servers.

    Raises:
        ValueError: an unknown dtype, an n_embd that "q8_0" cannot divide into blocks, or a
            tokenizer that is not of GPT-2's kind or has more tokens than the model.
        OSError: the file cannot be written, for example because the disk is full.

    Example:
        >>> save_gguf(model, tokenizer, "runs/tuned.gguf", "q8_0")          # doctest: +SKIP
    """
    types = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
    model, path = unwrap_model(model), Path(path)
    if type(model).__name__ == "Llama":             # of a later chapter: imported when it is needed
        later = import_module("helpers.llama_gguf")
        return later.save_llama_gguf(model, tokenizer, path, dtype, chat_template)
    config = model.config
    if dtype not in types:
        raise ValueError(f"dtype must be one of {', '.join(types)}, not {dtype!r}.")
    if dtype == "q8_0" and config.n_embd % 32:
        raise ValueError(f"q8_0 needs an n_embd that is a multiple of 32, not {config.n_embd}.")
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}.")
    file_type = "ALL_F32" if dtype == "float32" else f"MOSTLY_{types[dtype]}"
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_name(path.stem)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        _write_tokenizer(writer, tokenizer, config)
        _write_tensors(writer, model, gguf.GGMLQuantizationType[types[dtype]])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


# cell chat-template-gguf of notebooks/07_instruction_tuning.ipynb
ALPACA_CHAT_TEMPLATE = PROMPT_NO_INPUT.replace("{instruction}", "{{ messages[-1]['content'] }}")


# cell ollama-modelfile of notebooks/07_instruction_tuning.ipynb
def ollama_modelfile(gguf_path: str | Path, context_length: int) -> str:
    """The text of an Ollama Modelfile for a GGUF file beside it, with Alpaca's prompt.

    Example:
        >>> ollama_modelfile("tuned.gguf", 256).splitlines()[0]
        'FROM ./tuned.gguf'
    """
    prompt = PROMPT_NO_INPUT.replace("{instruction}", "{{ .Prompt }}")
    return (f"FROM ./{Path(gguf_path).name}\n"
            f'TEMPLATE """{prompt}"""\n'
            f'PARAMETER stop "{END_OF_TEXT}"\n'
            f"PARAMETER num_ctx {context_length}\nPARAMETER temperature 0\n")
