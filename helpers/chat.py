"""7 · Instruction tuning.

Made from notebooks/07_instruction_tuning.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.instruction, helpers.judge, helpers.gguf_export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tiktoken import Encoding
from torch import Tensor

from helpers.gpt import GPT
from helpers.tokenizer import encode, mergeable_ranks
from helpers.training import IGNORE_INDEX

__all__ = [
    "CHATML",
    "apply_chat_template",
    "add_special_tokens",
    "resize_token_embeddings",
    "encode_chat",
]


# cell chatml of notebooks/07_instruction_tuning.ipynb
CHATML = {"begin": "<|im_start|>", "end": "<|im_end|>"}    # around each message: two special tokens


# cell apply-chat-template of notebooks/07_instruction_tuning.ipynb
def apply_chat_template(messages: Sequence[Mapping[str, str]],
                        add_generation_prompt: bool = False) -> str:
    """A conversation in ChatML.

    Args:
        messages: dicts with `role` ("system", "user" or "assistant") and `content`.
        add_generation_prompt: end with the opening of an assistant's message, for the model to
            complete.

    Example:
        >>> apply_chat_template([{"role": "user", "content": "Hello."}], add_generation_prompt=True)
        '<|im_start|>user\\nHello.<|im_end|>\\n<|im_start|>assistant\\n'
    """
    begin, end = CHATML["begin"], CHATML["end"]
    text = "".join(f"{begin}{m['role']}\n{m['content']}{end}\n" for m in messages)
    return text + (f"{begin}assistant\n" if add_generation_prompt else "")


# cell add-special-tokens of notebooks/07_instruction_tuning.ipynb
def add_special_tokens(tokenizer: Encoding, tokens: Sequence[str]) -> Encoding:
    """A tokenizer with more special tokens; their ids follow those that there are.

    Example:
        >>> longer = add_special_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
        >>> longer.n_vocab - tokenizer.n_vocab
        2
    """
    special = {t: tokenizer.encode_single_token(t) for t in tokenizer.special_tokens_set}
    new = [token for token in tokens if token not in special]
    special |= {token: tokenizer.n_vocab + i for i, token in enumerate(new)}
    if not new:
        return tokenizer
    return type(tokenizer)(tokenizer.name, pat_str=tokenizer._pat_str,
                           mergeable_ranks=mergeable_ranks(tokenizer), special_tokens=special)


# cell resize-token-embeddings of notebooks/07_instruction_tuning.ipynb
def resize_token_embeddings(model: GPT, vocab_size: int) -> GPT:
    """A copy of the model with rows for a longer vocabulary; new rows are the mean of the old.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> resize_token_embeddings(GPT(config), 11)(torch.tensor([[10]])).shape
        torch.Size([1, 1, 11])
    """
    n_old = model.config.vocab_size
    if vocab_size < n_old:
        raise ValueError(f"the model has {n_old} tokens already, more than {vocab_size}")
    weight = model.token_embedding.weight
    config = replace(model.config, vocab_size=vocab_size)
    longer = type(model)(config).to(weight.device, weight.dtype)
    state = model.state_dict()
    for name in ("token_embedding.weight", "lm_head.weight"):
        new = state[name].mean(dim=0, keepdim=True).expand(vocab_size - n_old, -1)
        state[name] = torch.cat([state[name], new])                                       # (V, C)
    longer.load_state_dict(state)
    return longer.train(model.training)


# cell encode-chat of notebooks/07_instruction_tuning.ipynb
def encode_chat(tokenizer: Encoding,
                messages: Sequence[Mapping[str, str]]) -> tuple[Tensor, Tensor]:
    """A conversation as an item `(ids, labels)`: every assistant message counts, with its end.

    The text is that of `apply_chat_template`. The two marks are special tokens, put in by id; the
    contents are encoded as ordinary text, so that no message can forge a mark.

    Raises:
        ValueError: the tokenizer lacks the marks (see `add_special_tokens`), or a role is unknown.

    Example:
        >>> ids, labels = encode_chat(longer, [{"role": "user", "content": "Say yes."},
        ...                                    {"role": "assistant", "content": "Yes."}])
        >>> longer.decode(labels[labels != IGNORE_INDEX].tolist())
        'Yes.<|im_end|>'
    """
    if missing := set(CHATML.values()) - tokenizer.special_tokens_set:
        raise ValueError(f"the tokenizer has no {' and no '.join(sorted(missing))}")
    begin, end = (tokenizer.encode_single_token(CHATML[name]) for name in ("begin", "end"))
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"a role is system, user or assistant, not {message['role']!r}")
        head = [begin, *encode(tokenizer, message["role"] + "\n")]
        body = [*encode(tokenizer, message["content"]), end]
        tail = encode(tokenizer, "\n")
        counted = message["role"] == "assistant"
        ids += head + body + tail
        labels += [IGNORE_INDEX] * len(head)
        labels += body if counted else [IGNORE_INDEX] * len(body)
        labels += [IGNORE_INDEX] * len(tail)
    return torch.tensor(ids), torch.tensor(labels)
