"""4 · The GPT: transformer blocks, the model, generation.

Made from notebooks/04_gpt.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.generation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.attention import CausalSelfAttention, KVCache

__all__ = [
    "GPTConfig",
    "GPT2_CONFIGS",
    "LayerNorm",
    "GELU",
    "FeedForward",
    "TransformerBlock",
    "init_weights",
    "validate_token_ids",
    "check_context_length",
    "position_ids_and_mask",
    "GPT",
    "flops_per_token",
]


# cell gpt-config of notebooks/04_gpt.ipynb
@dataclass(frozen=True)
class GPTConfig:
    """The hyperparameters of a GPT.

    Raises:
        ValueError: a size below 1, n_embd not a multiple of n_head, dropout outside [0, 1), or a
            begin or end id that is no id of the vocabulary.

    Example:
        >>> GPTConfig(vocab_size=9, context_length=4, n_embd=256, n_head=8, n_layer=1).head_size
        32
    """

    vocab_size: int                      # V, the number of tokens
    context_length: int                  # the most tokens that the model can attend to
    n_embd: int                          # C, the embedding dimension
    n_head: int                          # nh, heads of each attention layer
    n_layer: int                         # L, the number of blocks
    dropout: float = 0.0                 # of embeddings, attention weights and sublayers
    qkv_bias: bool = True                # GPT-2 has one
    tie_word_embeddings: bool = True     # output layer and token embedding are one tensor
    norm_eps: float = 1e-5               # keeps layer norm from dividing by zero
    bos_token_id: int | None = None      # the token that begins a document
    eos_token_id: int | None = None      # the token that ends it

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_embd", "n_head", "n_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head "
                             f"({self.n_head}).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}.")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name} must be one id, a whole number, not {value!r}.")
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary of {self.vocab_size}.")

    @property
    def head_size(self) -> int:
        """hs, the dimension of a head's queries, keys and values."""
        return self.n_embd // self.n_head


# cell gpt2-configs of notebooks/04_gpt.ipynb
GPT2_CONFIGS: dict[str, GPTConfig] = {
    name: GPTConfig(vocab_size=50257, context_length=1024, n_embd=n_embd, n_head=n_head,
                    n_layer=n_layer, dropout=0.1, bos_token_id=50256, eos_token_id=50256)
    for name, n_layer, n_head, n_embd in [("gpt2", 12, 12, 768), ("gpt2-medium", 24, 16, 1024),
                                          ("gpt2-large", 36, 20, 1280), ("gpt2-xl", 48, 25, 1600)]
}


# cell layer-norm of notebooks/04_gpt.ipynb
class LayerNorm(nn.Module):
    """Layer normalization with learned weight and bias (Ba et al. 2016, arXiv:1607.06450).

    Example:
        >>> LayerNorm(4)(torch.tensor([1.0, 2.0, 3.0, 4.0])).mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(self, n_embd: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x, (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


# cell gelu of notebooks/04_gpt.ipynb
class GELU(nn.Module):
    """GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) in the tanh form of GPT-2's weights.

    Example:
        >>> GELU()(torch.tensor([-1.0, 0.0, 1.0])).round(decimals=3)
        tensor([-0.1590,  0.0000,  0.8410])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) to each component."""
        return F.gelu(x, approximate="tanh")


# cell feed-forward of notebooks/04_gpt.ipynb
class FeedForward(nn.Module):
    """Two linear layers with GELU between them, applied to each position alone.

    Example:
        >>> FeedForward(8)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, n_embd: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up_projection = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = GELU()
        self.down_projection = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C) by way of (..., 4C)."""
        return self.dropout(self.down_projection(self.gelu(self.up_projection(x))))


# cell transformer-block of notebooks/04_gpt.ipynb
class TransformerBlock(nn.Module):
    """One block of a GPT: attention, then feed-forward, pre-norm, with residual connections.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> TransformerBlock(config)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(config.n_embd, config.norm_eps)
        self.attention = CausalSelfAttention(config.n_embd, config.n_head, config.dropout,
                                             config.qkv_bias)
        self.norm_2 = LayerNorm(config.n_embd, config.norm_eps)
        self.feed_forward = FeedForward(config.n_embd, config.dropout)

    def forward(self, x: Tensor, kv_cache: KVCache | None = None,
                attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); kv_cache and attn_mask are for the attention."""
        x = x + self.attention(self.norm_1(x), kv_cache, attn_mask)
        return x + self.feed_forward(self.norm_2(x))


# cell init-weights of notebooks/04_gpt.ipynb
def init_weights(module: nn.Module) -> None:
    """Initialize a linear layer or an embedding as GPT-2 does; leave other modules alone.

    Example:
        >>> layer = nn.Linear(1000, 100)
        >>> init_weights(layer)
        >>> layer.bias.abs().max().item(), round(layer.weight.std().item(), 3)
        (0.0, 0.02)
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# cell validate-token-ids of notebooks/04_gpt.ipynb
def validate_token_ids(tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is not a batch of token ids.

    The range is checked on the CPU only: on a GPU it would make every step wait.

    Raises:
        TypeError: not a tensor, or not of integers.
        ValueError: not of shape (B, T) with T at least 1, or an id outside the vocabulary.

    Example:
        >>> validate_token_ids(torch.tensor([[0, 1, 2]]), vocab_size=3)
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"Token ids must be a tensor (B, T), not a {type(tokens).__name__}.")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"Token ids must be int64 or int32, not {tokens.dtype}.")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"Tokens must have the shape (B, T), both at least 1, "
                         f"not {tuple(tokens.shape)}.")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"Token id {low if low < 0 else high} is outside the vocabulary: "
                             f"ids go from 0 to {vocab_size - 1}. Was the text encoded with the "
                             "tokenizer of this model?")


# cell check-context-length of notebooks/04_gpt.ipynb
def check_context_length(config: GPTConfig, n_new: int, kv_cache: list[KVCache] | None) -> int:
    """Check that n_new more tokens fit the context; return how many the cache holds, 0 without one.

    Raises:
        ValueError: they do not fit, or the cache was made for another number of blocks.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> check_context_length(config, 4, None)
        0
    """
    if kv_cache and len(kv_cache) != config.n_layer:
        raise ValueError(f"The cache was made for a model of {len(kv_cache)} layers; "
                         f"this one has {config.n_layer}.")
    past = kv_cache[0].seq_len if kv_cache else 0
    if past + n_new > config.context_length:
        raise ValueError(f"{past + n_new} tokens are more than the context_length of "
                         f"{config.context_length}. Cut the text, or slide over it.")
    return past


# cell position-ids of notebooks/04_gpt.ipynb
def position_ids_and_mask(past: int, end: int, n_pad: Tensor | None,
                          device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Positions of the columns past to end, and which columns hold real tokens.

    Args:
        n_pad: (B,), how many columns at the left of each row are padding.

    Returns:
        Positions (T,) and no mask where there is no padding; else positions (B, T), counted from
        where a row begins, and a bool mask (B, 1, 1, S), False for padding, for the attention.

    Example:
        >>> position_ids_and_mask(0, 4, torch.tensor([0, 2]))[0]
        tensor([[0, 1, 2, 3],
                [0, 0, 0, 1]])
    """
    positions = torch.arange(past, end, device=device)                       # (T,)
    if n_pad is None:
        return positions, None
    is_token = torch.arange(end, device=device) >= n_pad[:, None]            # (B, S)
    return (positions - n_pad[:, None]).clamp(min=0), is_token[:, None, None]


# cell gpt of notebooks/04_gpt.ipynb
class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): token ids in, logits for the next token at each position out.

    Weights start as GPT-2's did: normal with a standard deviation of 0.02, that of the layers that
    add to the residual stream divided by sqrt(2 n_layer); biases zero.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> GPT(config)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 9])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config.n_embd, config.norm_eps)
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
        """An empty cache for each block."""
        c, weight = self.config, self.token_embedding.weight
        return [KVCache(batch_size, c.n_head, c.context_length, c.head_size, weight.dtype,
                        weight.device) for _ in self.blocks]

    def hidden_states(self, tokens: Tensor, kv_cache: list[KVCache] | None = None,
                      n_pad: Tensor | None = None) -> Tensor:
        """The vectors above the last block and the final norm: ids (B, T) to (B, T, C).

        Args:
            tokens: integer ids (B, T); with a kv_cache, only those not yet in it.
            kv_cache: from `make_kv_cache`; grows by T.
            n_pad: (B,), how many columns at the left of each row are padding, cached ones included.

        Raises:
            TypeError, ValueError: see `validate_token_ids` and `check_context_length`.
        """
        validate_token_ids(tokens, self.config.vocab_size)
        past = check_context_length(self.config, tokens.shape[1], kv_cache)
        end = past + tokens.shape[1]
        positions, attn_mask = position_ids_and_mask(past, end, n_pad, tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)    # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, kv_cache[i] if kv_cache else None, attn_mask)           # (B, T, C)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, kv_cache: list[KVCache] | None = None,
                n_pad: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each position; arguments as in `hidden_states`."""
        return self.lm_head(self.hidden_states(tokens, kv_cache, n_pad))


# cell flops-per-token of notebooks/04_gpt.ipynb
def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations that a forward pass over a full context takes for each token.

    Kaplan et al. 2020 (arXiv:2001.08361), section 2.1 and table 1:
    2 N + 2 n_layer context_length n_embd, where N = 12 n_layer n_embd^2 are the weights of the
    blocks' matrices. The second term is attention's scores and weighted sums, 4 n_embd for each
    key position, of which a causal model has half the context on average. To this comes the
    output layer, 2 n_embd vocab_size, a row of their table that their N leaves out; here it is
    counted, tied or not. Biases, norms, softmax and GELU are left out. Training takes three times
    as much: the backward pass is twice the forward pass.

    Example:
        >>> flops_per_token(GPT2_CONFIGS["gpt2"])
        265938432
    """
    matrices = 12 * config.n_layer * config.n_embd**2
    attention = config.n_layer * config.context_length * config.n_embd
    return 2 * (matrices + attention + config.vocab_size * config.n_embd)
