"""8 · From GPT-2 to Llama: the modern decoder.

Made from notebooks/08_llama.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.llama, helpers.llama_pretrained, helpers.hf_tokenizer.
"""

import torch
from torch import Tensor

from pathlib import Path

import gguf
import tiktoken

from helpers.common import atomic_write
from helpers.pretrained import _empty_model
from helpers.training import unwrap_model
from helpers.hf_tokenizer import split_name, token_table
from helpers.llama import Llama, LlamaConfig, interleaved_to_half_split, rope_frequencies

__all__ = ["llama_gguf_names", "half_split_to_interleaved", "save_llama_gguf", "load_llama_gguf"]


# cell llama-gguf-names of notebooks/08_llama.ipynb
def llama_gguf_names(config: LlamaConfig) -> dict[str, str]:
    """Our parameter names, each with its name in a GGUF file of the architecture `llama`.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> llama_gguf_names(config)["blocks.0.attention.k_projection.weight"]
        'blk.0.attn_k.weight'
    """
    names = {"token_embedding.weight": "token_embd.weight",
             "final_norm.weight": "output_norm.weight"}
    parts = {"norm_1": "attn_norm", "attention.q_projection": "attn_q",
             "attention.k_projection": "attn_k", "attention.v_projection": "attn_v",
             "attention.output_projection": "attn_output", "norm_2": "ffn_norm",
             "feed_forward.gate_projection": "ffn_gate", "feed_forward.up_projection": "ffn_up",
             "feed_forward.down_projection": "ffn_down"}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            names[f"blocks.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    return names


# cell half-split-to-interleaved of notebooks/08_llama.ipynb
def half_split_to_interleaved(weight: Tensor, n_head: int) -> Tensor:
    """Reorder the rows of a query or key weight for the interleaved layout, which llama.cpp has.

    The inverse of `interleaved_to_half_split`.

    Example:
        >>> half_split_to_interleaved(torch.arange(4.0)[:, None], n_head=1).flatten()
        tensor([0., 2., 1., 3.])
    """
    rows, *rest = weight.shape
    return weight.view(n_head, 2, rows // n_head // 2, *rest).transpose(1, 2).reshape(weight.shape)


# cell llama-gguf-shape of notebooks/08_llama.ipynb
def _write_llama_shape(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Add the hyperparameters to the metadata."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


# cell llama-gguf-tokenizer of notebooks/08_llama.ipynb
def _write_llama_tokenizer(writer: gguf.GGUFWriter, tokenizer: tiktoken.Encoding,
                           config: LlamaConfig) -> None:
    """Add the tokenizer to the metadata: pattern, tokens, their types, merges, special ids."""
    vocab, merges = token_table(tokenizer)
    special = tokenizer.special_tokens_set
    unmerged = sum(len(token) > 1 and token not in special for token in vocab) - len(merges)
    if unmerged and split_name(tokenizer) != "llama-bpe":
        raise ValueError(f"The tokenizer has {unmerged} tokens that no merge makes; llama.cpp "
                         "takes them with Llama 3's split pattern only.")
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, i in vocab.items():
        tokens[i] = token
        types[i] = gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")                            # byte-level BPE
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if ends[0] is not None:
        writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[-1])                         # another that ends an answer
    writer.add_add_bos_token(bool(getattr(tokenizer, "begin", ())))


# cell llama-gguf-tensors of notebooks/08_llama.ipynb
def _write_llama_tensors(writer: gguf.GGUFWriter, model: Llama,
                         kind: gguf.GGMLQuantizationType) -> None:
    """Add each tensor: matrices as `kind`; norms, and the factors of Llama 3's scaling, float32."""
    config, state = model.config, model.state_dict()
    heads = {"q_projection": config.n_head, "k_projection": config.n_kv_head}
    tensors = {theirs: state[ours].detach().to("cpu", torch.float32)
               for ours, theirs in llama_gguf_names(config).items()}
    for ours, theirs in llama_gguf_names(config).items():
        if n_head := heads.get(ours.split(".")[-2]):
            tensors[theirs] = half_split_to_interleaved(tensors[theirs], n_head)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain, scaled = (rope_frequencies(config.head_size, config.rope_base, scaling)
                         for scaling in (None, config.rope_scaling))
        tensors["rope_freqs.weight"] = plain / scaled             # (hs / 2,)
    for name, weight in tensors.items():
        stored = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight.numpy(), stored), raw_dtype=stored)


# cell save-llama-gguf of notebooks/08_llama.ipynb
def save_llama_gguf(model: Llama, tokenizer: tiktoken.Encoding, path: str | Path,
                    dtype: str = "float16", chat_template: str | None = None) -> None:
    """Write model and tokenizer as one GGUF file; `save_gguf` comes here for a Llama.

    Args:
        dtype: of the matrices: "float32", "float16", or "q8_0".
        chat_template: of the tokenizer, unless given.

    Raises:
        ValueError: an unknown dtype, rows that "q8_0" cannot divide into blocks of 32, a model or
            a tokenizer that the format has no word for, or that do not belong together.
        OSError: the file cannot be written, for example because the disk is full.
    """
    types = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
    model, path = unwrap_model(model), Path(path)
    config = model.config
    rows = (config.n_embd, config.intermediate_size, config.n_head * config.head_size)
    if dtype not in types:
        raise ValueError(f"dtype must be one of {', '.join(types)}, not {dtype!r}.")
    if dtype == "q8_0" and any(n % 32 for n in rows):
        raise ValueError("q8_0 needs an n_embd, an intermediate_size and an n_head * head_size "
                         f"that are multiples of 32, not {rows}.")
    if config.qk_norm or config.sliding_window is not None:
        raise ValueError("The architecture llama of GGUF has no qk_norm and no sliding_window.")
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}.")
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name(path.stem)
        file_type = "ALL_F32" if dtype == "float32" else f"MOSTLY_{types[dtype]}"
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_llama_shape(writer, config)
        if template := chat_template or getattr(tokenizer, "chat_template", None):
            writer.add_chat_template(template)
        _write_llama_tokenizer(writer, tokenizer, config)
        _write_llama_tensors(writer, model, gguf.GGMLQuantizationType[types[dtype]])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


# cell load-llama-gguf of notebooks/08_llama.ipynb
def load_llama_gguf(path: str | Path, config: LlamaConfig) -> Llama:
    """The model of a file of `save_llama_gguf`, its tensors turned back into float32."""
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type))
             for t in gguf.GGUFReader(path).tensors}
    heads = {"q_projection": config.n_head, "k_projection": config.n_kv_head}
    model = _empty_model(config, Llama)
    state = {}
    for ours, theirs in llama_gguf_names(config).items():
        n_head = heads.get(ours.split(".")[-2])
        state[ours] = interleaved_to_half_split(found[theirs], n_head) if n_head else found[theirs]
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
