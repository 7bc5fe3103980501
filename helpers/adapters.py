"""B · LoRA: fine-tuning with few parameters.

Made from notebooks/B_lora.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.lora, helpers.quantization.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.lora import find_linear_layers, freeze, replace_module

__all__ = [
    "AdapterLayer",
    "apply_adapters",
    "apply_bitfit",
    "PromptEmbedding",
    "PromptTuning",
    "PrefixCache",
    "PrefixTuning",
]


# cell adapter-layer of notebooks/B_lora.ipynb
class AdapterLayer(nn.Module):
    """A linear layer followed by a bottleneck (Houlsby et al. 2019, arXiv:1902.00751).

    Computes h + up(GELU(down(h))) for the layer's output h. `up` starts at zero.

    Example:
        >>> AdapterLayer(nn.Linear(3, 8), bottleneck=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, base: nn.Linear, bottleneck: int = 8) -> None:
        super().__init__()
        self.base, like = base, {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.out_features, bottleneck, **like)
        self.up = nn.Linear(bottleneck, base.out_features, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))                  # by way of (..., bottleneck)


# cell apply-adapters of notebooks/B_lora.ipynb
def apply_adapters(model: nn.Module, bottleneck: int = 8, *, modules_to_save: Sequence[str] = (),
                   target_modules: Sequence[str] = ("output_projection", "down_projection")
                   ) -> nn.Module:
    """Put an adapter behind attention and feed-forward network of each block; only they train.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> count_parameters(apply_adapters(GPT(config), bottleneck=1))[0]
        50
    """
    layers = find_linear_layers(model, target_modules)
    freeze(model, modules_to_save)
    for name, layer in layers.items():
        replace_module(model, name, AdapterLayer(layer, bottleneck))
    return model


# cell apply-bitfit of notebooks/B_lora.ipynb
def apply_bitfit(model: nn.Module, *, modules_to_save: Sequence[str] = ()) -> nn.Module:
    """Let only the biases train (Ben Zaken et al. 2021, arXiv:2106.10199).

    Example:
        >>> count_parameters(apply_bitfit(nn.Linear(100, 3)))
        (3, 303)
    """
    freeze(model, modules_to_save)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad_(True)
    return model


# cell prompt-tuning of notebooks/B_lora.ipynb
class PromptEmbedding(nn.Module):
    """A token embedding whose first positions are learned vectors, whatever the ids there."""

    def __init__(self, base: nn.Embedding, prompt: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(base.weight[torch.as_tensor(prompt)].detach().clone())   # (P, C)

    @property
    def weight(self) -> Tensor:
        """The embedding table (V, C)."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (batch, T) to vectors (batch, T, C), the first P of them the prompt's."""
        own = self.base(tokens[:, len(self.prompt):])                        # (batch, T - P, C)
        return torch.cat([self.prompt.expand(len(tokens), -1, -1), own], dim=1)


# cell prompt-tuning-model of notebooks/B_lora.ipynb
class PromptTuning(nn.Module):
    """A classifier with a soft prompt before each text (Lester et al. 2021, arXiv:2104.08691).

    Args:
        classifier: is changed: its token embedding is replaced, all but prompt and head frozen.
        prompt: token ids (P,) whose embeddings the prompt starts from.
    """

    def __init__(self, classifier: nn.Module, prompt: Sequence[int]) -> None:
        super().__init__()
        freeze(classifier, ["head"])
        gpt, self.classifier, self.n_prompt = classifier.gpt, classifier, len(prompt)
        gpt.token_embedding = PromptEmbedding(gpt.token_embedding, prompt)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (batch, n_classes) for ids (batch, T) and lengths (batch,)."""
        tokens = F.pad(tokens, (self.n_prompt, 0))                           # (batch, P + T)
        return self.classifier(tokens, lengths + self.n_prompt)


# cell prefix-cache of notebooks/B_lora.ipynb
class PrefixCache:
    """Keys and values before a layer's own: what attention needs of a `KVCache`, with gradients."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.seq_len = keys, values, keys.shape[-2]      # (nh, P, hs)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, nh, T, hs), the prefix before them: (batch, nh, P + T, hs)."""
        batch = len(keys)
        return (torch.cat([self.keys.expand(batch, -1, -1, -1), keys], dim=2),
                torch.cat([self.values.expand(batch, -1, -1, -1), values], dim=2))


# cell prefix-tuning of notebooks/B_lora.ipynb
class PrefixTuning(nn.Module):
    """A classifier with learned keys and values in each layer (Li & Liang 2021, arXiv:2101.00190).

    Args:
        classifier: all but its head is frozen.
        prompt: token ids (P,) whose keys and values the prefix starts from.
    """

    def __init__(self, classifier: nn.Module, prompt: Sequence[int]) -> None:
        super().__init__()
        freeze(classifier, ["head"])
        self.classifier, gpt = classifier, classifier.gpt
        kv_cache, tokens = gpt.make_kv_cache(1), torch.as_tensor(prompt)[None]       # (1, P)
        with torch.no_grad():
            gpt.hidden_states(tokens.to(gpt.token_embedding.weight.device), kv_cache)
        layers = [torch.stack([c.keys[0, :, :c.seq_len], c.values[0, :, :c.seq_len]])
                  for c in kv_cache]
        self.prefix = nn.Parameter(torch.stack(layers))                      # (L, 2, nh, P, hs)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (batch, n_classes) for ids (batch, T) and lengths (batch,)."""
        kv_cache = [PrefixCache(keys, values) for keys, values in self.prefix]
        hidden = self.classifier.gpt.hidden_states(tokens, kv_cache)         # (batch, T, C)
        return self.classifier.head(self.classifier.pool(hidden, lengths))   # (batch, n_classes)
