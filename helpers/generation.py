"""4 · The GPT: transformer blocks, the model, generation.

Made from notebooks/04_gpt.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.gpt.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.attention import KVCache
from helpers.gpt import GPT, GPTConfig, validate_token_ids

__all__ = ["greedy", "next_token_logits", "left_pad", "generate_stream", "generate"]


# cell greedy of notebooks/04_gpt.ipynb
def greedy(logits: Tensor) -> Tensor:
    """Greedy decoding: the id with the largest logit in each row, (B, V) to (B,).

    Example:
        >>> greedy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        tensor([1, 0])
    """
    return logits.argmax(dim=-1)


# cell next-token-logits of notebooks/04_gpt.ipynb
@torch.inference_mode()
def next_token_logits(model: GPT, tokens: Tensor, n_pad: Tensor | None,
                      kv_cache: list[KVCache] | None) -> Tensor:
    """Logits (B, V) for the token after the last column of `tokens` (B, T), any T.

    `n_pad` (B,) counts the padding at the left of each row. The cache must hold the columns before
    the last, or nothing.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> next_token_logits(GPT(config), torch.tensor([[1, 2, 3]]), None, None).shape
        torch.Size([1, 9])
    """
    beyond = tokens.shape[1] - model.config.context_length
    if beyond > 0:                               # the window slides: all positions are new
        tokens, kv_cache = tokens[:, beyond:], None
        n_pad = None if n_pad is None else (n_pad - beyond).clamp(min=0)
    elif kv_cache and kv_cache[0].seq_len:
        tokens = tokens[:, kv_cache[0].seq_len:]
    return model.lm_head(model.hidden_states(tokens, kv_cache, n_pad)[:, -1])


# cell left-pad of notebooks/04_gpt.ipynb
def left_pad(prompts: Sequence[Sequence[int]], config: GPTConfig) -> tuple[Tensor, Tensor | None]:
    """Align prompts of any lengths at the right: ids (B, T), and the padding (B,) of each row.

    The padding is None where there is none.

    Raises:
        TypeError: a prompt is not a list of whole numbers.
        ValueError: no prompt, an empty one, one longer than the context, or an id outside the
            vocabulary.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> left_pad([[1, 2, 3], [4]], config)
        (tensor([[1, 2, 3],
                [0, 0, 4]]), tensor([0, 2]))
    """
    limit, rows = config.context_length, []
    for prompt in prompts:
        try:
            rows.append(torch.as_tensor(prompt))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"A prompt must be a list of token ids, not {prompt!r:.80}.") from None
    lengths = [row.shape[0] if row.dim() else 0 for row in rows]
    if not lengths or min(lengths) < 1 or max(lengths) > limit:
        raise ValueError(f"Prompts need 1 to {limit} tokens (the context_length), got {lengths}.")
    for row in rows:
        validate_token_ids(row[None], config.vocab_size)
    width = max(lengths)
    tokens = torch.stack([F.pad(row.long(), (width - len(row), 0)) for row in rows])   # (B, T)
    n_pad = torch.tensor([width - n for n in lengths], device=tokens.device)           # (B,)
    return tokens, n_pad if min(lengths) < width else None


# cell generate-stream of notebooks/04_gpt.ipynb
def generate_stream(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                    sample: Callable[[Tensor], Tensor] = greedy, *,
                    eos_token_id: int | Sequence[int] | None = None,
                    use_cache: bool = True) -> Iterator[list[int | None]]:
    """Generate for a batch of prompts, one new id a row at a time; None for a row that has ended.

    The prompts are checked at the call; the model works, and is in eval mode, only from the first
    id that is asked for until the iterator ends or is dropped.

    Raises:
        TypeError, ValueError: an empty prompt or one longer than the context, ids outside the
            vocabulary or not integers, or a negative max_new_tokens.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> len(list(generate_stream(GPT(config), [[1, 2], [3]], max_new_tokens=5)))
        5
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}.")
    tokens, n_pad = left_pad(prompts, model.config)
    device = model.token_embedding.weight.device
    tokens, n_pad = tokens.to(device), None if n_pad is None else n_pad.to(device)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    ends = torch.tensor(eos, dtype=torch.long, device=device)

    def steps(tokens: Tensor) -> Iterator[list[int | None]]:
        kv_cache = model.make_kv_cache(len(tokens)) if use_cache else None
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)       # (B,)
        was_training = model.training
        try:
            for _ in range(max_new_tokens):
                if model.training:               # at first, and if somebody switched in between
                    model.eval()
                new = sample(next_token_logits(model, tokens, n_pad, kv_cache))  # (B,)
                yield [None if end else i
                       for i, end in zip(new.tolist(), ended.tolist(), strict=True)]
                ended |= torch.isin(new, ends)
                if ended.all():
                    break
                tokens = torch.cat([tokens, new[:, None]], dim=1)               # (B, T + 1)
        finally:
            model.train(was_training)

    return steps(tokens)


# cell generate of notebooks/04_gpt.ipynb
def generate(model: GPT, tokens: Sequence[int] | Sequence[Sequence[int]] | Tensor,
             max_new_tokens: int, sample: Callable[[Tensor], Tensor] = greedy, *,
             eos_token_id: int | Sequence[int] | None = None, use_cache: bool = True,
             on_token: Callable[[list[int | None]], object] | None = None
             ) -> list[int] | list[list[int]]:
    """Continue a prompt, or each of a batch of prompts, by up to max_new_tokens ids.

    Args:
        tokens: one prompt (a list of ids or a tensor) or several (a list of such, or a tensor
            (B, T)), of any lengths up to context_length.
        sample: chooses ids (B,) from logits (B, V); see `make_sampler` in chapter 5 for others.
        eos_token_id: the id, or ids, that end a row, which keeps it as its last id.
        use_cache: False computes the whole window at each step; the result is the same.
        on_token: called after each step with the new ids, None for rows that have ended.

    Returns:
        The prompt followed by the new ids; a list of such lists if several prompts came in.

    Raises:
        TypeError, ValueError: see `generate_stream`.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> len(generate(GPT(config), [1, 2, 3], max_new_tokens=5))
        8
    """
    prompts = [p.tolist() if isinstance(p, Tensor) else p for p in tokens]
    single = not prompts or not isinstance(prompts[0], Sequence)
    results = [list(p) for p in ([prompts] if single else prompts)]
    for new in generate_stream(model, [list(r) for r in results], max_new_tokens, sample,
                               eos_token_id=eos_token_id, use_cache=use_cache):
        for row, token in zip(results, new, strict=True):
            if token is not None:
                row.append(token)
        if on_token is not None:
            on_token(new)
    return results[0] if single else results
