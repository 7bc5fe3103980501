"""D · Scaling: data, optimizers, and many processes.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.pretrain, helpers.corpus, helpers.optim, helpers.distributed.
"""

import torch
from torch import Tensor, nn
from helpers.gpt import GPT

__all__ = ["GemvLinear", "optimize_for_inference"]


# cell gemv-linear of notebooks/D_scaling.ipynb
class GemvLinear(nn.Linear):
    """`nn.Linear`, which a compiled model computes as dot products where a single row comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if not torch.compiler.is_compiling() or x.numel() != x.shape[-1]:
            return super().forward(x)
        y = (self.weight * x.reshape(-1)).sum(dim=-1)             # (outputs,)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


# cell optimize-for-inference of notebooks/D_scaling.ipynb
def optimize_for_inference(model: GPT, *, compile: bool = False) -> GPT:
    """Rearrange a model, in place, so that `generate` is faster for a single prompt on the CPU.

    What it computes stays the same, but for rounding. Float32 weights are stored by inputs; with
    `compile`, which helps bfloat16 too, blocks and output layer are compiled at their first use.
    The weights no longer take gradients: prepare a copy of a model that is to be trained on.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> optimize_for_inference(GPT(config)).blocks[0].attention.qkv.weight.stride()
        (1, 24)
    """
    for layer in (m for m in model.modules() if type(m) in (nn.Linear, GemvLinear)):
        if compile:
            layer.__class__ = GemvLinear            # the same parameters, another forward
        elif layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()
    for part in (*model.blocks, model.lm_head) if compile else ():
        part.compile()
    return model.requires_grad_(False)             # for generation, not for training: see above
