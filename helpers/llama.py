"""8 · From GPT-2 to Llama: the modern decoder.

Made from notebooks/08_llama.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.llama_pretrained, helpers.hf_tokenizer, helpers.llama_gguf.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.attention import KVCache, causal_mask, naive_attention, prefer_naive_attention
from helpers.gpt import (
    check_context_length,
    init_weights,
    position_ids_and_mask,
    validate_token_ids,
)

__all__ = [
    "RMSNorm",
    "SwiGLU",
    "RopeScaling",
    "rope_frequencies",
    "rope_tables",
    "apply_rope",
    "apply_rope_interleaved",
    "interleaved_to_half_split",
    "repeat_kv",
    "grouped_attention",
    "sliding_window_mask",
    "LlamaConfig",
    "GroupedQueryAttention",
    "LlamaBlock",
    "rope_and_mask",
    "Llama",
    "LLAMA_LINEAR_LAYERS",
    "MixtureOfExperts",
    "expert_load",
    "load_balancing_loss",
]


# cell rms-norm of notebooks/08_llama.ipynb
class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    Example:
        >>> RMSNorm(2)(torch.tensor([1.0, 7.0])).detach()                 # divided by 5
        tensor([0.2000, 1.4000])
    """

    def __init__(self, n_embd: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide the last dimension of x, (..., C), by its root mean square."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# cell swiglu of notebooks/08_llama.ipynb
class SwiGLU(nn.Module):
    """The gated feed-forward network of Shazeer 2020 (arXiv:2002.05202), without biases.

    Example:
        >>> SwiGLU(8, 24)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, n_embd: int, intermediate_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_projection = nn.Linear(n_embd, intermediate_size, bias=False)
        self.up_projection = nn.Linear(n_embd, intermediate_size, bias=False)
        self.down_projection = nn.Linear(intermediate_size, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C) by way of (..., intermediate_size)."""
        gate = F.silu(self.gate_projection(x))
        return self.dropout(self.down_projection(gate * self.up_projection(x)))


# cell rope-scaling of notebooks/08_llama.ipynb
@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are changed for contexts longer than pretraining's.

    "linear" divides all of them by `factor` (Chen et al. 2023, arXiv:2306.15595). "llama3" is Llama
    3.1's rule: it divides by `factor` where a wavelength is longer than
    original_context_length / low_freq_factor, changes nothing where it is shorter than
    original_context_length / high_freq_factor, and interpolates between.

    Raises:
        ValueError: another kind, a factor below 1, or high_freq_factor not above low_freq_factor.

    Example:
        >>> RopeScaling(factor=8.0).kind
        'llama3'
    """

    factor: float
    kind: str = "llama3"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear"):
            raise ValueError(f'kind must be "llama3" or "linear", not {self.kind!r}.')
        if not self.factor >= 1:
            raise ValueError(f"factor must be at least 1, not {self.factor!r}.")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError("expected 0 < low_freq_factor < high_freq_factor, not "
                             f"{self.low_freq_factor!r} and {self.high_freq_factor!r}.")
        if self.original_context_length < 1:
            raise ValueError("original_context_length must be at least 1, not "
                             f"{self.original_context_length!r}.")


# cell rope-frequencies of notebooks/08_llama.ipynb
def rope_frequencies(head_size: int, base: float = 10_000.0, scaling: RopeScaling | None = None,
                     device: torch.device | str = "cpu") -> Tensor:
    """The angles, in radians, by which one step of position turns each pair: (hs / 2,), float32.

    Example:
        >>> rope_frequencies(4, base=100.0)
        tensor([1.0000, 0.1000])
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    inv_freq = 1.0 / base**exponents                                         # (hs / 2,)
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_context_length * inv_freq / (2 * math.pi)      # over the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)                       # 0 slow, 1 fast pairs
    return keep * inv_freq + (1 - keep) * inv_freq / scaling.factor


# cell rope-tables of notebooks/08_llama.ipynb
def rope_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each angle, for `apply_rope`.

    Args:
        positions: (T,), or (B, T) where each row counts for itself.

    Returns:
        Two tensors (T, hs / 2), or (B, 1, T, hs / 2), in float32.

    Example:
        >>> cos, sin = rope_tables(torch.arange(3), rope_frequencies(4))
        >>> cos.shape, cos[0], sin[0]
        (torch.Size([3, 2]), tensor([1., 1.]), tensor([0., 0.]))
    """
    angles = positions[..., None].float() * inv_freq                         # (..., T, hs / 2)
    if positions.dim() == 2:
        angles = angles[:, None]                                             # for all heads
    return angles.cos(), angles.sin()


# cell apply-rope of notebooks/08_llama.ipynb
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (B, nh, T, hs) by their positions, in the half-split layout.

    Component i and component i + hs/2 are a pair, as in the Hugging Face hub's weights.

    Example:
        >>> cos, sin = torch.tensor([[0.8]]), torch.tensor([[0.6]])
        >>> apply_rope(torch.tensor([[[[1.0, 0.0]]]]), cos, sin)
        tensor([[[[0.8000, 0.6000]]]])
    """
    first, second = x.chunk(2, dim=-1)                                       # (B, nh, T, hs / 2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# cell apply-rope-interleaved of notebooks/08_llama.ipynb
def apply_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same rotation in the interleaved layout: components 2i and 2i + 1 are a pair.

    The layout of the paper (Su et al. 2021, arXiv:2104.09864) and of Meta's own weights.

    Example:
        >>> cos, sin = torch.tensor([[0.8, 1.0]]), torch.tensor([[0.6, 0.0]])
        >>> apply_rope_interleaved(torch.tensor([[[[1.0, 0.0, 5.0, 7.0]]]]), cos, sin)
        tensor([[[[0.8000, 0.6000, 5.0000, 7.0000]]]])
    """
    even, odd = x[..., 0::2], x[..., 1::2]                                   # (B, nh, T, hs / 2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin],
                       dim=-1).flatten(-2).to(x.dtype)


# cell interleaved-to-half-split of notebooks/08_llama.ipynb
def interleaved_to_half_split(weight: Tensor, n_head: int) -> Tensor:
    """Reorder the rows of a query or key weight (n_head * hs, C) made for the interleaved layout.

    With the result `apply_rope` gives the attention scores that `apply_rope_interleaved` gave.

    Example:
        >>> interleaved_to_half_split(torch.arange(8.0)[:, None], n_head=2).flatten()
        tensor([0., 2., 1., 3., 4., 6., 5., 7.])
    """
    rows, *rest = weight.shape
    return weight.view(n_head, rows // n_head // 2, 2, *rest).transpose(1, 2).reshape(weight.shape)


# cell repeat-kv of notebooks/08_llama.ipynb
def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each key or value head n_rep times: (B, n_kv_head, T, hs) to (B, nh, T, hs).

    Example:
        >>> repeat_kv(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), 2).flatten()
        tensor([1., 1., 2., 2.])
    """
    B, n_kv_head, T, hs = x.shape
    return x[:, :, None].expand(B, n_kv_head, n_rep, T, hs).reshape(B, n_kv_head * n_rep, T, hs)


# cell grouped-attention of notebooks/08_llama.ipynb
def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                      dropout: float = 0.0) -> Tensor:
    """Attention (B, nh, T, hs) of queries whose keys and values (B, nkv, S, hs) have fewer heads.

    Args:
        mask: bool, broadcastable to (B, 1, T, S); None for the causal mask, with S = T or T = 1.

    Example:
        >>> q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
        >>> grouped_attention(q, k, k).shape
        torch.Size([1, 4, 3, 8])
    """
    n_rep, T = q.shape[1] // k.shape[1], q.shape[2]
    if mask is None and not dropout and k.shape[2] == T and prefer_naive_attention(q):
        return naive_attention(q, repeat_kv(k, n_rep), repeat_kv(v, n_rep))
    if T == 1:                                # the queries of a group are the rows of one matrix
        rows = q.reshape(*k.shape[:2], n_rep, q.shape[-1])                    # (B, nkv, n_rep, hs)
        return F.scaled_dot_product_attention(rows, k, v, mask, dropout).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None,
                                          enable_gqa=n_rep > 1)


# cell sliding-window-mask of notebooks/08_llama.ipynb
def sliding_window_mask(T: int, S: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of S keys the last T queries may attend to: the `window` last ones, their own included.

    Later keys are not excluded: `causal_mask` does that.

    Example:
        >>> sliding_window_mask(2, 4, 2).int()
        tensor([[0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T - window + 1)


# cell check-sizes of notebooks/08_llama.ipynb
def _check_sizes(config: object, names: list[str]) -> None:
    """Refuse a field that is no whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")


# cell check-values of notebooks/08_llama.ipynb
def _check_values(config: "LlamaConfig") -> None:
    """Refuse values that do not fit each other, or are out of range."""
    c = config
    if c.n_head % c.n_kv_head:
        raise ValueError(f"n_head ({c.n_head}) must be a multiple of n_kv_head ({c.n_kv_head}).")
    if c.head_size % 2:
        raise ValueError(f"head_size must be even, as RoPE rotates pairs: got {c.head_size}.")
    if not 0 <= c.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {c.dropout}.")
    if not c.rope_base > 0:
        raise ValueError(f"rope_base must be positive, not {c.rope_base}.")
    if c.sliding_window is not None:
        _check_sizes(c, ["sliding_window"])
    ends = c.eos_token_id if isinstance(c.eos_token_id, tuple) else (c.eos_token_id,)
    for name, value in [("bos_token_id", c.bos_token_id), *(("eos_token_id", i) for i in ends)]:
        if value is not None and (not isinstance(value, int) or not 0 <= value < c.vocab_size):
            raise ValueError(f"{name} must be an id of the vocabulary of {c.vocab_size}, "
                             f"not {value!r}.")


# cell llama-config of notebooks/08_llama.ipynb
@dataclass(frozen=True)
class LlamaConfig:
    """The hyperparameters of a Llama. What is None at first is filled in when it is made.

    Raises:
        ValueError: a size below 1, heads that do not divide, an odd head size, dropout outside
            [0, 1), or a begin or end id that is no id of the vocabulary.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=96, n_head=4, n_layer=1)
        >>> config.head_size, config.n_kv_head, config.intermediate_size
        (24, 4, 256)
    """

    vocab_size: int                            # V, the number of tokens
    context_length: int                        # the most tokens that the model can attend to
    n_embd: int                                # C, the embedding dimension
    n_head: int                                # nh, query heads of each attention layer
    n_layer: int                               # L, the number of blocks
    n_kv_head: int | None = None               # key and value heads; n_head, unless given
    intermediate_size: int | None = None       # of SwiGLU; 8/3 C, up to a multiple of 32
    rope_base: float = 10_000.0                # the slowest pair turns by about 1 / base
    rope_scaling: RopeScaling | None = None    # for contexts longer than those of pretraining
    head_size: int | None = None               # hs; n_embd / n_head, unless given
    dropout: float = 0.0                       # of embeddings, attention weights and sublayers
    norm_eps: float = 1e-5                     # keeps RMSNorm from dividing by zero
    tie_word_embeddings: bool = True           # output layer and token embedding are one tensor
    bos_token_id: int | None = None            # the token that begins a document
    eos_token_id: int | tuple[int, ...] | None = None    # the token, or tokens, that end it
    qk_norm: bool = False                      # RMSNorm on queries and keys, as Qwen 3 has it
    sliding_window: int | None = None          # a query attends to so many positions, its own too

    def __post_init__(self) -> None:
        _check_sizes(self, ["vocab_size", "context_length", "n_embd", "n_head", "n_layer"])
        if self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head "
                             f"({self.n_head}), unless head_size is given.")
        defaults = {"n_kv_head": self.n_head, "head_size": self.n_embd // self.n_head,
                    "intermediate_size": math.ceil(8 * self.n_embd / 3 / 32) * 32}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)       # the class is frozen
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_sizes(self, list(defaults))
        _check_values(self)


# cell grouped-query-attention of notebooks/08_llama.ipynb
class GroupedQueryAttention(nn.Module):
    """Causal attention with rotary positions, whose query heads have key and value heads in common.

    Ainslie et al. 2023 (arXiv:2305.13245). With one key-value head it is multi-query attention
    (Shazeer 2019, arXiv:1911.02150), with as many as query heads multi-head attention.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=8, n_embd=8, n_head=4, n_layer=1,
        ...                      n_kv_head=2)
        >>> rope = rope_tables(torch.arange(5), rope_frequencies(config.head_size))
        >>> GroupedQueryAttention(config)(torch.zeros(1, 5, 8), rope).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, nh, nkv, hs = config.n_embd, config.n_head, config.n_kv_head, config.head_size
        self.n_head, self.n_kv_head, self.dropout = nh, nkv, config.dropout
        self.q_projection = nn.Linear(C, nh * hs, bias=False)
        self.k_projection = nn.Linear(C, nkv * hs, bias=False)
        self.v_projection = nn.Linear(C, nkv * hs, bias=False)
        self.output_projection = nn.Linear(nh * hs, C, bias=False)
        self.q_norm = RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hs, config.norm_eps) if config.qk_norm else nn.Identity()
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache | None = None,
                attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C), the new tokens if there is a cache.
            rope: cosines and sines of their positions, from `rope_tables`.
            kv_cache: rotated keys, and values, of earlier tokens; those of `x` are appended.
            attn_mask: bool, see `causal_mask`; combined with the causal mask.
        """
        B, T, _ = x.shape
        q = self.q_projection(x).view(B, T, self.n_head, -1).transpose(1, 2)       # (B, nh, T, hs)
        k = self.k_projection(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)    # (B, nkv, T, hs)
        v = self.v_projection(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
        past, mask = 0 if kv_cache is None else kv_cache.seq_len, None
        if attn_mask is not None or (past and T > 1):
            mask = causal_mask(T, past + T, attn_mask, x.device)
        if kv_cache is not None:
            if torch.is_autocast_enabled(x.device.type):           # k and v are in autocast's dtype
                k, v = k.to(kv_cache.keys.dtype), v.to(kv_cache.keys.dtype)
            k, v = kv_cache.update(k, v)                           # (B, nkv, S, hs), S = past + T
        y = grouped_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.residual_dropout(self.output_projection(y.transpose(1, 2).reshape(B, T, -1)))


# cell llama-block of notebooks/08_llama.ipynb
class LlamaBlock(nn.Module):
    """One block of a Llama: attention, then SwiGLU, pre-norm, with residual connections.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> rope = rope_tables(torch.arange(3), rope_frequencies(config.head_size))
        >>> LlamaBlock(config)(torch.zeros(1, 3, 8), rope).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = GroupedQueryAttention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.feed_forward = SwiGLU(config.n_embd, config.intermediate_size, config.dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache | None = None,
                attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); the other arguments are for the attention."""
        x = x + self.attention(self.norm_1(x), rope, kv_cache, attn_mask)
        return x + self.feed_forward(self.norm_2(x))


# cell rope-and-mask of notebooks/08_llama.ipynb
def rope_and_mask(config: LlamaConfig, past: int, end: int, n_pad: Tensor | None = None,
                  device: torch.device | str = "cpu"
                  ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """What all blocks need to know of the columns past to end: rotary tables, and a mask if any.

    The mask, for padding at the left and for a sliding window, leaves the causal mask to attention.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> (cos, sin), attn_mask = rope_and_mask(config, 0, 3)
        >>> cos.shape, attn_mask
        (torch.Size([3, 2]), None)
    """
    c = config
    positions, attn_mask = position_ids_and_mask(past, end, n_pad, device)
    inv_freq = rope_frequencies(c.head_size, c.rope_base, c.rope_scaling, device)
    if c.sliding_window is not None and end > c.sliding_window:
        near = sliding_window_mask(end - past, end, c.sliding_window, device)
        attn_mask = near if attn_mask is None else near & attn_mask
    return rope_tables(positions, inv_freq), attn_mask


# cell llama of notebooks/08_llama.ipynb
class Llama(nn.Module):
    """Llama (Touvron et al. 2023, arXiv:2302.13971), with the interface of `GPT`.

    The weights start as those of `GPT` do.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> Llama(config)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 9])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.apply(init_weights)
        for name, weight in self.named_parameters():
            if name.endswith(("output_projection.weight", "down_projection.weight")):
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def tie_weights(self) -> None:
        """Make output layer and token embedding one tensor, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    @property
    def n_params(self) -> int:
        """The number of parameters; a tied one counts once."""
        return sum(p.numel() for p in self.parameters())

    def make_kv_cache(self, batch_size: int) -> list[KVCache]:
        """An empty cache for each block, of n_kv_head heads."""
        c, weight = self.config, self.token_embedding.weight
        return [KVCache(batch_size, c.n_kv_head, c.context_length, c.head_size, weight.dtype,
                        weight.device) for _ in self.blocks]

    def hidden_states(self, tokens: Tensor, kv_cache: list[KVCache] | None = None,
                      n_pad: Tensor | None = None) -> Tensor:
        """The vectors above the last block and the final norm; see `GPT.hidden_states`."""
        validate_token_ids(tokens, self.config.vocab_size)
        past = check_context_length(self.config, tokens.shape[1], kv_cache)
        rope, attn_mask = rope_and_mask(self.config, past, past + tokens.shape[1], n_pad,
                                        tokens.device)
        x = self.dropout(self.token_embedding(tokens))                           # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, kv_cache[i] if kv_cache else None, attn_mask)     # (B, T, C)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, kv_cache: list[KVCache] | None = None,
                n_pad: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each position; arguments as in `hidden_states`."""
        return self.lm_head(self.hidden_states(tokens, kv_cache, n_pad))


# cell llama-linear-layers of notebooks/08_llama.ipynb
LLAMA_LINEAR_LAYERS = ("q_projection", "k_projection", "v_projection", "output_projection",
                       "gate_projection", "up_projection", "down_projection")


# cell moe-class of notebooks/08_llama.ipynb
class MixtureOfExperts(nn.Module):
    """SwiGLU networks of which a router picks top_k for each token (Mixtral, arXiv:2401.04088).

    It takes the place of a block's feed-forward network. See `load_balancing_loss`.

    Raises:
        ValueError: top_k is not between 1 and n_experts.

    Example:
        >>> MixtureOfExperts(8, 16, n_experts=4, top_k=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, n_embd: int, intermediate_size: int, n_experts: int, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k must be between 1 and n_experts ({n_experts}), not {top_k}.")
        self.top_k = top_k
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(n_embd, intermediate_size) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C); each expert computes only the tokens that chose it."""
        tokens = x.reshape(-1, x.shape[-1])                                 # (N, C)
        top, chosen = self.router(tokens).topk(self.top_k, dim=-1)          # (N, K) each
        routing = top.softmax(dim=-1)                                       # (N, K)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)              # (n,) each
            output = routing[rows, place, None] * expert(tokens[rows])      # (n, C)
            y = y.index_add(0, rows, output.to(y.dtype))
        return y.view(x.shape)


# cell moe-balance-code of notebooks/08_llama.ipynb
def expert_load(logits: Tensor, top_k: int) -> Tensor:
    """The fraction of all choices that falls on each expert, (E,), for router logits (..., E).

    Example:
        >>> expert_load(torch.tensor([[3.0, 2.0, 0.0], [0.0, 1.0, 2.0]]), top_k=1)
        tensor([0.5000, 0.0000, 0.5000])
    """
    chosen = logits.topk(top_k, dim=-1).indices.flatten()                   # (N K,)
    return torch.bincount(chosen, minlength=logits.shape[-1]) / chosen.numel()


# cell moe-balance-loss of notebooks/08_llama.ipynb
def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """E times the sum of load times mean probability, for the router logits (..., E) of a layer.

    Fedus et al. 2021 (arXiv:2101.03961), equation 4, without its factor; 1 for equal loads. The
    function of that name in `transformers` gives top_k times this, for the layers together.

    Example:
        >>> load_balancing_loss(torch.eye(4), top_k=1)
        tensor(1.)
    """
    probabilities = logits.float().softmax(dim=-1).flatten(0, -2)           # (N, E)
    return logits.shape[-1] * (expert_load(logits, top_k) * probabilities.mean(dim=0)).sum()
