"""3 · Attention.

Made from notebooks/03_attention.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "naive_attention",
    "KVCache",
    "causal_mask",
    "prefer_naive_attention",
    "CausalSelfAttention",
]


# cell naive-attention of notebooks/03_attention.ipynb
def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with its attention matrix written out: (..., T, hs) each, and the result.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1. The division is done on the queries, which
    are fewer numbers than the scores where T > hs, and the mask M is added, as in the formula.

    Example:
        >>> naive_attention(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([[2.0], [4.0]]))
        tensor([[2.],
                [3.]])
    """
    T, hs = q.shape[-2:]
    M = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return ((q / hs**0.5) @ k.transpose(-2, -1) + M).softmax(dim=-1) @ v


# cell kv-cache of notebooks/03_attention.ipynb
class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for generation.

    The buffers grow by need: whenever they are full their length doubles, up to max_seq_len. Use
    it without gradients.

    Args:
        batch_size, n_head, max_seq_len, head_size: the largest shape (B, nh, S, hs).
        dtype, device: of the buffers; those of the model's weights.

    Example:
        >>> kv_cache = KVCache(1, 2, max_seq_len=8, head_size=4)
        >>> keys, values = kv_cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
        >>> kv_cache.seq_len, keys.shape
        (3, torch.Size([1, 2, 3, 4]))
    """

    def __init__(self, batch_size: int, n_head: int, max_seq_len: int, head_size: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.keys = torch.zeros(batch_size, n_head, 0, head_size, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.max_seq_len, self.seq_len = max_seq_len, 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, nh, T, hs) of new tokens; return all, (B, nh, seq_len, hs).

        Raises:
            ValueError: another shape, dtype or device than the cache was made for, or it is full.
        """
        B, nh, capacity, hs = self.keys.shape
        if keys.shape != (B, nh, keys.shape[-2], hs) or values.shape != keys.shape:
            raise ValueError(f"The cache was made for (B, nh, T, hs) = ({B}, {nh}, up to "
                             f"{self.max_seq_len}, {hs}), but the keys are {tuple(keys.shape)} and "
                             f"the values {tuple(values.shape)}.")
        for new in (keys, values):
            if (new.dtype, new.device) != (self.keys.dtype, self.keys.device):
                raise ValueError(f"The cache was made for {self.keys.dtype} on {self.keys.device}, "
                                 f"but was given {new.dtype} on {new.device}.")
        end = self.seq_len + keys.shape[2]
        if end > self.max_seq_len:
            raise ValueError(f"The cache holds up to {self.max_seq_len} tokens; "
                             f"{end} were asked for.")
        if end > capacity:
            extra = min(max(end, 2 * capacity), self.max_seq_len) - capacity
            with torch.inference_mode(False):       # else only inference mode could write into them
                self.keys, self.values = (F.pad(t, (0, 0, 0, extra))
                                          for t in (self.keys, self.values))
        self.keys[:, :, self.seq_len:end] = keys
        self.values[:, :, self.seq_len:end] = values
        self.seq_len = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# cell causal-mask-function of notebooks/03_attention.ipynb
def causal_mask(T: int, S: int, attn_mask: Tensor | None = None,
                device: torch.device | str = "cpu") -> Tensor:
    """The causal mask (T, S) of T queries, the last of S positions: True where one may attend.

    Args:
        attn_mask: bool, broadcastable to (B, nh, T, S), True where a query may attend. It is
            combined with the causal mask by a logical and; a query that is left without any key
            attends to itself, as the softmax of an empty row would be nan.

    Raises:
        ValueError: attn_mask is not bool, or its shape does not fit.

    Example:
        >>> causal_mask(2, 3).int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if attn_mask is None:
        return mask
    sizes = zip(reversed(attn_mask.shape), (S, T), strict=False)
    if attn_mask.dtype != torch.bool or any(n not in (1, size) for n, size in sizes):
        raise ValueError(f"attn_mask must be bool and broadcastable to (B, nh, T, S) with T = {T} "
                         f"queries and S = {S} keys, but it is {attn_mask.dtype} of shape "
                         f"{tuple(attn_mask.shape)}.")
    diagonal = mask.triu(S - T)
    mask = mask & attn_mask
    return mask | (diagonal & ~mask.any(dim=-1, keepdim=True))


# cell prefer-naive-attention of notebooks/03_attention.ipynb
def prefer_naive_attention(q: Tensor) -> bool:
    """Whether `naive_attention` is the faster form to train with, for queries (B, nh, T, hs).

    On a server CPU with bfloat16 instructions it was, up to a few hundred tokens: appendix D
    measures it. The limit of 512 tokens keeps the attention matrix small.

    Example:
        >>> q = torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
        >>> prefer_naive_attention(q)
        True
    """
    return (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
            and 1 < q.shape[-2] <= 512)


# cell causal-self-attention of notebooks/03_attention.ipynb
class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention: each position attends to itself and to earlier ones.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.2, in GPT-2's form: one linear layer makes
    queries, keys and values, another one is the output projection.

    Args:
        n_embd: C, the embedding dimension; a multiple of n_head.
        n_head: nh, the number of heads.
        dropout: probability of dropout on attention weights and on the output, while training.
        qkv_bias: whether the layer that makes q, k and v has a bias, as GPT-2's does.

    Raises:
        ValueError: n_embd is not a multiple of n_head, or an argument is out of range.

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
                attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C), the new tokens if there is a cache.
            kv_cache: keys and values of earlier tokens; those of `x` are appended.
            attn_mask: bool, broadcastable to (B, nh, T, S), True where a query may attend, S
                counting cached tokens too; combined with the causal mask, see `causal_mask`.
        """
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.qkv(x).split(C, dim=-1))   # (B, nh, T, hs) each
        past, mask = 0 if kv_cache is None else kv_cache.seq_len, None
        if attn_mask is not None or (past and T > 1):
            mask = causal_mask(T, past + T, attn_mask, x.device)
        if kv_cache is not None:
            if torch.is_autocast_enabled(x.device.type):       # k and v are in autocast's dtype
                k, v = k.to(kv_cache.keys.dtype), v.to(kv_cache.keys.dtype)
            k, v = kv_cache.update(k, v)                       # (B, nh, S, hs), S = past + T
        dropout = self.dropout if self.training else 0.0
        if mask is None and not dropout and not past and prefer_naive_attention(q):
            y = naive_attention(q, k, v)                       # (B, nh, T, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                               is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)                 # (B, T, C)
        return self.residual_dropout(self.output_projection(y))
