"""3 · Attention.

Made from notebooks/03_attention.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["naive_attention", "prefer_naive_attention", "KVCache", "CausalSelfAttention"]


# cell attend-by-table of notebooks/03_attention.ipynb
def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out, with its table of shares: (..., T, hs) each, and as the result.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1.

    Example:
        >>> naive_attention(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([[2.0], [4.0]]))
        tensor([[2.],
                [3.]])
    """
    T, hs = q.shape[-2:]
    later = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return ((q / hs**0.5) @ k.transpose(-2, -1) + later).softmax(dim=-1) @ v


# cell table-is-faster of notebooks/03_attention.ipynb
def prefer_naive_attention(q: Tensor) -> bool:
    """Whether `naive_attention` is the faster form to train with, for queries (B, nh, T, hs).

    Measured on a server CPU with bfloat16 instructions, at T = 256; the limit of 512 tokens keeps
    the table small.

    Example:
        >>> prefer_naive_attention(torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True))
        True
    """
    return (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
            and 1 < q.shape[-2] <= 512)


# cell kv-cache of notebooks/03_attention.ipynb
class KVCache:
    """Keys and values that one attention layer has seen, in buffers allocated once.

    It is for writing, not for training: use it without gradients.

    Args:
        batch_size, n_head, context_length, head_size: the shape (B, nh, T, hs) of the buffers.
        dtype, device: of the buffers; those of the model's weights.

    Example:
        >>> kv_cache = KVCache(1, 2, 8, 4)
        >>> keys, values = kv_cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        >>> kv_cache.seq_len, keys.shape
        (3, torch.Size([1, 2, 3, 4]))
    """

    def __init__(self, batch_size: int, n_head: int, context_length: int, head_size: int,
                 dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        shape = (batch_size, n_head, context_length, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.seq_len = 0                            # tokens held so far

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, nh, T, hs) of new tokens; return all, (B, nh, length, hs).

        Raises:
            ValueError: another batch size or model than the cache was made for, or it is full.
        """
        B, nh, room, hs = self.keys.shape
        if keys.shape[:2] != (B, nh) or keys.shape[3] != hs or keys.shape != values.shape:
            raise ValueError(f"The cache was made for (B, nh, T, hs) = ({B}, {nh}, up to {room}, "
                             f"{hs}), but the keys are {tuple(keys.shape)} and the values "
                             f"{tuple(values.shape)}.")
        end = self.seq_len + keys.shape[2]
        if end > room:
            raise ValueError(f"The cache holds up to {room} tokens; {end} were asked for.")
        self.keys[:, :, self.seq_len:end] = keys
        self.values[:, :, self.seq_len:end] = values
        self.seq_len = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# cell causal-self-attention of notebooks/03_attention.ipynb
class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.2, in GPT-2's form: one projection makes
    queries, keys and values together, one mixes the heads.

    Args:
        n_embd: C, the width of a token's vector; a multiple of n_head.
        n_head: nh, the number of heads.
        dropout: share of attention weights and of outputs dropped while training.
        qkv_bias: whether the first projection has a bias, as GPT-2's does.

    Raises:
        ValueError: n_embd is not a multiple of n_head, or a number is out of range.

    Example:
        >>> CausalSelfAttention(n_embd=8, n_head=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.0,
                 qkv_bias: bool = True) -> None:
        super().__init__()
        if n_embd < 1 or n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, both positive: "
                             f"got n_embd {n_embd} and n_head {n_head}.")
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=qkv_bias)
        self.output_projection = nn.Linear(n_embd, n_embd)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, kv_cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Mix each position with those before it.

        Args:
            x: (B, T, C).
            kv_cache: keys and values of earlier tokens, to which those of `x` are added.
            mask: bool (B, 1, T, S), True where looking is allowed, S counting the cached tokens
                too; it replaces the causal mask, which is made here unless it is given.

        Returns:
            (B, T, C).
        """
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.qkv(x).split(C, dim=-1))      # (B, nh, T, hs) each
        past = 0 if kv_cache is None else kv_cache.seq_len
        if kv_cache is not None:
            k, v = kv_cache.update(k, v)                             # (B, nh, past + T, hs)
        if mask is None and past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        if mask is None and not dropout and not past and prefer_naive_attention(q):
            y = naive_attention(q, k, v)                          # (B, nh, T, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                               is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)                    # (B, T, C)
        return self.residual_dropout(self.output_projection(y))
