"""B · LoRA: fine-tuning with few parameters.

Made from notebooks/B_lora.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.lora, helpers.adapters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.training import unwrap_model
from helpers.lora import GPT_LINEAR_LAYERS, find_linear_layers, replace_module

__all__ = [
    "quantize",
    "dequantize",
    "uniform_codebook",
    "nf4_codebook",
    "QuantizedLinear",
    "quantize_linear_layers",
]


# cell quantize of notebooks/B_lora.ipynb
def quantize(weight: Tensor, codebook: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Round each weight to the nearest value of a codebook, scaled to each block's largest weight.

    Args:
        weight: any shape; its number of elements is a multiple of block_size.
        codebook: sorted, from -1 to 1, at most 256 values.

    Returns:
        Codes, uint8 (n_blocks, block_size), and the scale of each block, (n_blocks, 1).

    Raises:
        ValueError: the weight cannot be divided into blocks.

    Example:
        >>> quantize(torch.tensor([2.0, -1.0, 0.1, 0.0]), torch.tensor([-1.0, 0.0, 1.0]), 4)
        (tensor([[2, 0, 1, 1]], dtype=torch.uint8), tensor([[2.]]))
    """
    if weight.numel() % block_size:
        raise ValueError(f"{weight.numel()} weights are not a multiple of the block size "
                         f"{block_size}.")
    blocks = weight.detach().reshape(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)                       # (n_blocks, 1)
    codebook = codebook.to(blocks)
    borders = (codebook[1:] + codebook[:-1]) / 2                          # half-way between values
    tiny = torch.finfo(blocks.dtype).tiny                                 # a block may be all zero
    return torch.bucketize(blocks / scales.clamp(min=tiny), borders).to(torch.uint8), scales


# cell dequantize of notebooks/B_lora.ipynb
def dequantize(codes: Tensor, scales: Tensor, codebook: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight that `codes` stand for: the value of each code times the scale of its block.

    Example:
        >>> codebook = torch.tensor([-1.0, 0.0, 1.0])
        >>> dequantize(torch.tensor([[2, 0]]), torch.tensor([[3.0]]), codebook, (2,))
        tensor([ 3., -3.])
    """
    return (codebook.to(scales)[codes.long()] * scales).view(shape)


# cell uniform-codebook of notebooks/B_lora.ipynb
def uniform_codebook(bits: int) -> Tensor:
    """Evenly spaced values from -1 to 1, zero among them: 2^bits - 1 of them.

    Example:
        >>> uniform_codebook(2)
        tensor([-1.,  0.,  1.])
    """
    top = 2 ** (bits - 1) - 1
    return torch.arange(-top, top + 1) / top


# cell nf4-codebook of notebooks/B_lora.ipynb
def nf4_codebook() -> Tensor:
    """The 16 values of the 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E).

    Quantiles of the normal distribution, eight above zero, seven below, and zero.

    Example:
        >>> nf4_codebook()[[0, 7, 8, 15]]
        tensor([-1.0000,  0.0000,  0.0796,  1.0000])
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2                                      # 0.9677
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (values / values[-1]).float()


# cell dequantized-linear of notebooks/B_lora.ipynb
class _DequantizedLinear(torch.autograd.Function):
    """x W^T + b, where W is restored in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        ctx.layer = layer                                    # and not its weight
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.layer.weight.to(gradient.dtype), of_bias, None


# cell quantized-linear of notebooks/B_lora.ipynb
class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored as codes, and restored at each forward pass.

    With a codebook of at most 16 values, two codes lie in one byte.

    Raises:
        ValueError: see `quantize`; also a layer that is quantized already.

    Example:
        >>> layer = QuantizedLinear(nn.Linear(64, 2), nf4_codebook())
        >>> layer.codes.shape, layer.weight.shape
        (torch.Size([2, 32]), torch.Size([2, 64]))
    """

    def __init__(self, base: nn.Linear, codebook: Tensor, block_size: int = 64) -> None:
        super().__init__()
        if isinstance(base, QuantizedLinear):
            raise ValueError("The layer is quantized already.")
        self.in_features, self.out_features = base.in_features, base.out_features
        codes, scales = quantize(base.weight, codebook, block_size)
        self.packed = len(codebook) <= 16
        if self.packed:
            codes = codes[:, ::2] * 16 + codes[:, 1::2]
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("codebook", codebook.to(scales))
        self.bias = base.bias
        self.requires_grad_(False).train(base.training)

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features), restored."""
        codes = self.codes
        if self.packed:
            codes = torch.stack([codes // 16, codes % 16], dim=-1).flatten(1)
        return dequantize(codes, self.scales, self.codebook, (self.out_features, self.in_features))

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored weight, its scales included."""
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return _DequantizedLinear.apply(x, self.bias, self)


# cell quantize-model of notebooks/B_lora.ipynb
def quantize_linear_layers(model: nn.Module, codebook: Tensor,
                           target_modules: Sequence[str] = GPT_LINEAR_LAYERS) -> nn.Module:
    """Replace linear layers by quantized ones, in place; `apply_lora` takes them afterwards.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(64, 1)})
        >>> quantize_linear_layers(model, nf4_codebook(), ["a"])["a"].n_bytes
        36
    """
    layers = find_linear_layers(unwrap_model(model), target_modules)
    new = {name: QuantizedLinear(layer, codebook) for name, layer in layers.items()}
    for name, layer in new.items():
        replace_module(unwrap_model(model), name, layer)
    return model
