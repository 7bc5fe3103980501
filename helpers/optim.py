"""C · Scaling up.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import torch
from torch import Tensor, nn

from helpers.training import has_fast_bfloat16, unwrap_model

__all__ = ["newton_schulz", "by_shape", "adamw_update", "Muon"]


# cell orthogonalize of notebooks/D_scaling.ipynb
def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a matrix (m, n), or of each of a batch, to about one.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024 (the Muon optimizer), which
    stop near one, between 0.7 and 1.2, instead of converging slowly; small singular values
    take more steps. Computed in bfloat16 where that is fast; returned in the dtype that came in.

    Example:
        >>> values = torch.linalg.svdvals(newton_schulz(torch.tensor([[2.0, 0.0], [0.0, 0.5]])))
        >>> bool((values > 0.5).all() and (values < 1.5).all())
        True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if has_fast_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                       # the small square is cheaper
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)    # no singular value above one
    for _ in range(steps):
        square = x @ x.mT                                         # (..., m, m)
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


# cell by-shape of notebooks/D_scaling.ipynb
def by_shape(weights: list[Tensor]) -> list[list[Tensor]]:
    """The weights that have a gradient, those of one shape together."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in weights:
        if p.grad is not None:
            shapes.setdefault(p.shape, []).append(p)
    return list(shapes.values())


# cell adam-update of notebooks/D_scaling.ipynb
def adamw_update(p: Tensor, state: dict, betas: tuple[float, float]) -> Tensor:
    """AdamW's step for one weight, before the learning rate; its moments are kept in `state`."""
    beta1, beta2 = betas
    if not state:
        state.update(step=torch.tensor(0.0), mean=torch.zeros_like(p), square=torch.zeros_like(p))
    state["step"] += 1
    n = state["step"].item()
    mean = state["mean"].lerp_(p.grad, 1 - beta1)
    square = state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
    return mean / ((square / (1 - beta2**n)).sqrt_().add_(1e-8) * (1 - beta1**n))


# cell muon of notebooks/D_scaling.ipynb
class Muon(torch.optim.Optimizer):
    """Muon for the matrices of a GPT's blocks, AdamW for its tables, norms and biases.

    Jordan et al. 2024; the step size is that of Liu et al. 2025 (arXiv:2502.16982), section 2.2:
    0.2 sqrt(max(m, n)) for a matrix (m, n). Decay, decoupled, on matrices and tables only.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> [len(group["params"]) for group in Muon(GPT(config)).param_groups]
        [4, 2, 10]
    """

    def __init__(self, model: nn.Module, lr: float = 3e-3, weight_decay: float = 0.1,
                 momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        weights = [p for p in model.parameters() if p.requires_grad]
        head = getattr(unwrap_model(model), "lm_head", None)
        tables |= {id(head.weight)} if head is not None else set()
        matrices = [p for p in weights if p.dim() == 2 and id(p) not in tables]
        rest = [p for p in weights if p.dim() != 2]
        super().__init__([
            {"params": matrices, "muon": True},
            {"params": [p for p in weights if id(p) in tables], "muon": False},
            {"params": rest, "muon": False, "weight_decay": 0.0},
        ], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            for same in by_shape(group["params"]):
                new = self._muon(same, group) if group["muon"] else [
                    adamw_update(p, self.state[p], group["betas"]) for p in same]
                for p, update in zip(same, new, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _muon(self, weights: list[Tensor], group: dict) -> Tensor:
        ahead = []
        for p in weights:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead.append(p.grad.lerp(average, group["momentum"]))     # as Nesterov's looks ahead
        scale = 0.2 * max(weights[0].shape) ** 0.5
        return newton_schulz(torch.stack(ahead)) * scale              # all of a shape at once
