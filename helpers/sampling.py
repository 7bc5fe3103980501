"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.training, helpers.callbacks, helpers.pretrained.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from helpers.generation import greedy

__all__ = ["next_token_probs", "make_sampler"]


# cell next-token-probs of notebooks/05_pretraining.ipynb
def next_token_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                     top_p: float | None = None) -> Tensor:
    """Probabilities (B, V) from logits (B, V) after temperature, then top-k, then top-p.

    Of equal logits those with smaller ids are kept first, so that top_k=1 is `greedy`.

    Example:
        >>> next_token_probs(torch.tensor([[2.0, 1.0, 0.0]]), top_k=2).round(decimals=2)
        tensor([[0.7300, 0.2700, 0.0000]])
    """
    logits = logits.float()
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k).values[..., -1:]         # (B, 1), the smallest that is kept
        above, equal = logits > last, logits == last
        room = top_k - above.sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(~(above | equal & (equal.cumsum(dim=-1) <= room)), -math.inf)
    highest = logits.max(dim=-1, keepdim=True).values      # subtracted first: nothing overflows
    probs = ((logits - highest) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        ordered = probs.gather(-1, order)                  # (B, V)
        # The mass from each token to the end, summed from the small end, where rounding is small.
        tail = ordered.flip(-1).cumsum(dim=-1).flip(-1)    # (B, V)
        dropped = tail <= 1 - top_p                        # top_p is reached without these
        dropped[..., 0] = False
        ordered = ordered.masked_fill(dropped, 0.0)
        probs = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probs /= probs.sum(dim=-1, keepdim=True)
    return probs


# cell make-sampler of notebooks/05_pretraining.ipynb
def make_sampler(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 seed: int | None = None) -> Callable[[Tensor], Tensor]:
    """A `sample` for `generate` that draws with `next_token_probs`.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens; more than there are keeps all.
        top_p: keep the most probable tokens whose probabilities sum to at least this (nucleus
            sampling, Holtzman et al. 2020, arXiv:1904.09751).
        seed: of the sampler's own generator; without it PyTorch's global one is used.

    Raises:
        ValueError: temperature below 0 or infinite, top_k below 1, or top_p outside (0, 1].

    Example:
        >>> make_sampler(temperature=0)(torch.tensor([[0.1, 0.9]]))
        tensor([1])
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if temperature == 0:
        return greedy
    generators: dict[torch.device, torch.Generator] = {}

    def sample(logits: Tensor) -> Tensor:
        if seed is not None and logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device).manual_seed(seed)
        kept = next_token_probs(logits, temperature, top_k, top_p)
        return torch.multinomial(kept, 1, generator=generators.get(logits.device))[:, 0]

    return sample
