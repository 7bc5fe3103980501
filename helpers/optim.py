"""D · Scaling: data, optimizers, and many processes.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.pretrain, helpers.corpus, helpers.distributed, helpers.inference.
"""

import math

import torch
from torch import Tensor, nn
from helpers.training import has_fast_bfloat16, unwrap_model

__all__ = ["adamw_update", "newton_schulz", "by_shape", "Muon", "wsd_lr"]


# cell adamw-update of notebooks/D_scaling.ipynb
def adamw_update(params: list[Tensor], states: list[dict],
                 betas: tuple[float, float]) -> list[Tensor]:
    """AdamW's updates of parameters, before the learning rate; each state keeps two moments."""
    beta1, beta2 = betas
    for p, state in zip(params, states, strict=True):
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                         exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
    t = [state["step"].item() for state in states]
    m, v = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    g = [p.grad for p in params]
    torch._foreach_lerp_(m, g, 1 - beta1)              # each works on all tensors of a list
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    root = torch._foreach_sqrt(torch._foreach_div(v, [1 - beta2**n for n in t]))
    torch._foreach_add_(root, 1e-8)
    torch._foreach_mul_(root, [1 - beta1**n for n in t])
    return list(torch._foreach_div(m, root))


# cell newton-schulz of notebooks/D_scaling.ipynb
def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a matrix (r, q), or of each of a batch, to about one.

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
        square = x @ x.mT                                         # (..., r, r)
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


# cell by-shape of notebooks/D_scaling.ipynb
def by_shape(weights: list[Tensor]) -> list[list[Tensor]]:
    """The weights, those of one shape together."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in weights:
        shapes.setdefault(p.shape, []).append(p)
    return list(shapes.values())


# cell muon of notebooks/D_scaling.ipynb
class Muon(torch.optim.Optimizer):
    """Muon for the matrices of a GPT's blocks, AdamW for its tables, norms and biases.

    Jordan et al. 2024; the step size is that of Liu et al. 2025 (arXiv:2502.16982), section 2.2:
    0.2 sqrt(max(r, q)) for a matrix (r, q). Decay, decoupled, on matrices and tables only.

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
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for same in by_shape(params) if group["muon"] else [params]:
                states = [self.state[p] for p in same]
                new = self._muon(same, states, group["momentum"]) if group["muon"] else (
                    adamw_update(same, states, group["betas"]))
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(same, new, alpha=group["lr"])

    def _muon(self, weights: list[Tensor], states: list[dict], momentum: float) -> list[Tensor]:
        for p, state in zip(weights, states, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(p)
        averages, grads = [state["momentum"] for state in states], [p.grad for p in weights]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, averages, momentum)        # as Nesterov's looks ahead
        scale = 0.2 * max(weights[0].shape) ** 0.5
        return list((newton_schulz(torch.stack(ahead)) * scale).unbind())


# cell wsd of notebooks/D_scaling.ipynb
def wsd_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int,
           total_steps: int) -> float:
    """The learning rate of a step, counted from 1: linear warm-up, constant, decay at the end.

    The decay follows 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392) and reaches min_lr
    at the last step. Until it begins nothing depends on total_steps.

    Example:
        >>> [round(wsd_lr(s, lr=1.0, min_lr=0.0, warmup_steps=2, decay_steps=4, total_steps=8), 2)
        ...  for s in range(1, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.29, 0.13, 0.0]
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - (total_steps - decay_steps)) / max(1, decay_steps)
    return lr if progress <= 0 else min_lr + (lr - min_lr) * (1 - math.sqrt(min(1.0, progress)))
