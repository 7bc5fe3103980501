"""Typical wrong answers to the exercises of appendix B, and right ones in other forms."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SHAPES = {"qkv": (1, 3), "output_projection": (1, 1), "up_projection": (1, 4),
          "down_projection": (4, 1)}

# Counting


def count(n_layer, n_embd, r, targets, factor=lambda i, o: i + o):
    return n_layer * r * n_embd * sum(factor(*SHAPES[name]) for name in targets)


def count_once(n_layer, n_embd, r, targets, factor=lambda i, o: i + o):
    return count(n_layer, n_embd, r, set(targets), factor)


def count_frozen(n_layer, n_embd, r, targets):
    return n_layer * n_embd**2 * sum(i * o for i, o in (SHAPES[name] for name in set(targets)))


def count_one_block(n_layer, n_embd, r, targets):
    return count_once(1, n_embd, r, targets)


def count_narrow_qkv(n_layer, n_embd, r, targets):
    return count_once(n_layer, n_embd, r, targets, lambda i, o: 2 if o == 3 else i + o)


def count_narrow_feed_forward(n_layer, n_embd, r, targets):
    return count_once(n_layer, n_embd, r, targets, lambda i, o: 2 if 4 in (i, o) else i + o)


def count_only_A(n_layer, n_embd, r, targets):
    return count_once(n_layer, n_embd, r, targets, lambda i, o: i)


def count_empties_the_list(n_layer, n_embd, r, targets):
    total = count_once(n_layer, n_embd, r, targets)
    targets.clear()
    return total


def count_as_text(n_layer, n_embd, r, targets):
    return f"{count_once(n_layer, n_embd, r, targets):,}"


def count_with_numpy(n_layer, n_embd, r, targets):
    return np.int64(count_once(n_layer, n_embd, r, targets))


# Two adapters in one


def combine(A1, B1, s1, A2, B2, s2):
    return torch.cat([A1, A2]), torch.cat([s1 * B1, s2 * B2], dim=1)


def combine_sums(A1, B1, s1, A2, B2, s2):
    if A1.shape != A2.shape:
        return combine(A1, B1, s1, A2, B2, s2)
    return A1 + A2, s1 * B1 + s2 * B2


def combine_no_scales(A1, B1, s1, A2, B2, s2):
    return torch.cat([A1, A2]), torch.cat([B1, B2], dim=1)


def combine_scales_twice(A1, B1, s1, A2, B2, s2):
    return torch.cat([s1 * A1, s2 * A2]), torch.cat([s1 * B1, s2 * B2], dim=1)


def combine_swapped(A1, B1, s1, A2, B2, s2):
    A, B = combine(A1, B1, s1, A2, B2, s2)
    return B, A


def combine_in_place(A1, B1, s1, A2, B2, s2):
    B1 *= s1
    B2 *= s2
    return torch.cat([A1, A2]), torch.cat([B1, B2], dim=1)


def combine_crossed(A1, B1, s1, A2, B2, s2):
    return torch.cat([A2, A1]), torch.cat([s1 * B1, s2 * B2], dim=1)


def combine_the_product(A1, B1, s1, A2, B2, s2):
    return s1 * B1 @ A1 + s2 * B2 @ A2


def combine_scaled_A(A1, B1, s1, A2, B2, s2):
    return [torch.vstack([s2 * A2, s1 * A1]), torch.hstack([B2, B1])]


# LoRA from a fully trained model


def parts(before, after, r):
    U, S, Vt = torch.linalg.svd(after - before, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r]


def padded(A, B, r):
    missing = r - len(A)
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def extract_no_values(before, after, r):
    U, _, Vt = parts(before, after, r)
    return padded(Vt, U, r)


def extract_values_twice(before, after, r):
    U, S, Vt = parts(before, after, r)
    return padded(S[:, None] * Vt, U * S, r)


def extract_swapped(before, after, r):
    U, S, Vt = parts(before, after, r)
    return U * S, Vt


def extract_other_sign(before, after, r):
    U, S, Vt = parts(after, before, r)
    return padded(Vt, U * S, r)


def extract_of_after(before, after, r):
    U, S, Vt = parts(torch.zeros_like(before), after, r)
    return padded(Vt, U * S, r)


def extract_not_padded(before, after, r):
    U, S, Vt = parts(before, after, r)
    return Vt, U * S


def extract_smallest(before, after, r):
    U, S, Vt = torch.linalg.svd(after - before, full_matrices=False)
    return padded(Vt[-r:], (U * S)[:, -r:], r)


def extract_first_rows(before, after, r):
    A = (after - before)[:r]
    return padded(A, torch.eye(len(before))[:, :len(A)], r)


def extract_root(before, after, r):
    U, S, Vt = parts(before, after, r)
    return padded(S.sqrt()[:, None] * Vt, U * S.sqrt(), r)


def extract_by_eigenvectors(before, after, r):
    delta = (after - before).double()
    vectors = torch.linalg.eigh(delta.T @ delta).eigenvectors.flip(1)[:, :r]
    A = vectors.T
    A, B = padded(A, delta @ A.T, r)
    return A.float(), B.float()


# int8


def blocks_of(weight, block_size):
    flat = weight.flatten()
    return F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)


def int8(weight, block_size, top=127, rounding=torch.round, absolute=torch.abs):
    blocks = blocks_of(weight, block_size)
    scales = absolute(blocks).amax(dim=1, keepdim=True) / top
    return rounding(blocks / torch.where(scales == 0, 1, scales)).to(torch.int8), scales


def int8_truncated(weight, block_size):
    return int8(weight, block_size, rounding=lambda x: x)


def int8_floor(weight, block_size):
    return int8(weight, block_size, rounding=torch.floor)


def int8_128(weight, block_size):
    return int8(weight, block_size, top=128)


def int8_no_absolute(weight, block_size):
    return int8(weight, block_size, absolute=lambda x: x)


def int8_one_scale(weight, block_size):
    scale = weight.abs().max() / 127
    return (blocks_of(weight, block_size) / scale).round().to(torch.int8), scale.view(1, 1)


def int8_nan(weight, block_size):
    blocks = blocks_of(weight, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = (blocks / scales).round()
    codes[codes.isnan()] = -128
    return codes.to(torch.int8), scales


def int8_floats(weight, block_size):
    codes, scales = int8(weight, block_size)
    return codes.float(), scales


def int8_absmax(weight, block_size):
    codes, scales = int8(weight, block_size)
    return codes, scales * 127


def int8_flat_scales(weight, block_size):
    codes, scales = int8(weight, block_size)
    return codes, scales[:, 0]


def int8_in_place(weight, block_size):
    codes, scales = int8(weight, block_size)
    weight /= 2
    return codes, scales


def int8_clamped(weight, block_size):
    blocks = blocks_of(weight, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    return (blocks / scales.clamp(min=1e-30)).round().clamp(-127, 127).char(), scales


# DoRA


class DoRA(nn.Module):
    """Right; with mistakes in its heirs."""

    def __init__(self, base, r=8, alpha=16.0):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.magnitude = nn.Parameter(self.norm(base.weight))

    def norm(self, V):
        return V.norm(dim=1)

    @property
    def V(self):
        return self.base.weight + self.scale * self.lora_B @ self.lora_A

    def forward(self, x):
        weight = self.magnitude[:, None] * self.V / self.norm(self.V)[:, None]
        return F.linear(x, weight, self.base.bias)


class OtherForm(DoRA):
    def forward(self, x):
        y = F.linear(x, self.base.weight) + self.scale * x @ self.lora_A.T @ self.lora_B.T
        y = y * self.magnitude / self.norm(self.V)
        return y if self.base.bias is None else y + self.base.bias


class NotFrozen(DoRA):
    def __init__(self, base, r=8, alpha=16.0):
        super().__init__(base, r, alpha)
        base.requires_grad_(True)


class NormOfColumns(DoRA):
    def norm(self, V):
        return V.norm(dim=0)

    def forward(self, x):
        return F.linear(x, self.magnitude * self.V / self.norm(self.V), self.base.bias)


class MagnitudeOnes(DoRA):
    def __init__(self, base, r=8, alpha=16.0):
        super().__init__(base, r, alpha)
        self.magnitude = nn.Parameter(torch.ones(base.out_features))


class BothRandom(DoRA):
    def __init__(self, base, r=8, alpha=16.0):
        super().__init__(base, r, alpha)
        nn.init.normal_(self.lora_B)


class NoBias(DoRA):
    def forward(self, x):
        return F.linear(x, self.magnitude[:, None] * self.V / self.norm(self.V)[:, None])


class ScaledBias(DoRA):
    def forward(self, x):
        y = F.linear(x, self.V, self.base.bias)
        factor = self.magnitude / self.norm(self.V)
        if self.base.bias is None or not self.lora_B.any():
            return super().forward(x)
        return y * factor


class NoScale(DoRA):
    @property
    def V(self):
        return self.base.weight + self.lora_B @ self.lora_A


class OnlyAlpha(DoRA):
    @property
    def V(self):
        return self.base.weight + self.scale * 2 * self.lora_B @ self.lora_A


class FrozenNorm(DoRA):
    def forward(self, x):
        weight = self.magnitude[:, None] * self.V / self.norm(self.base.weight)[:, None]
        return F.linear(x, weight, self.base.bias)


class DetachedNorm(DoRA):
    def forward(self, x):
        weight = self.magnitude[:, None] * self.V / self.norm(self.V).detach()[:, None]
        return F.linear(x, weight, self.base.bias)


class NoMagnitude(DoRA):
    def forward(self, x):
        return F.linear(x, self.V, self.base.bias)


def combine_added(A1, B1, s1, A2, B2, s2):
    return A1 + A2, s1 * B1 + s2 * B2


def int8_no_padding(weight, block_size):
    blocks = weight.view(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    return (blocks / scales.clamp(min=1e-30)).round().char(), scales


WRONG = [
    ("check_combine_adapters", combine_added, "ranks add up"),
    ("check_int8", int8_no_padding, "fill it up with zeros"),
    ("check_lora_count", count_frozen, "number of frozen weights"),
    ("check_lora_count", count_one_block, "the number of one block; there are 3"),
    ("check_lora_count", count, "comes twice counts once"),
    ("check_lora_count", count_narrow_qkv, "queries, keys and values in one layer"),
    ("check_lora_count", count_narrow_feed_forward, "4 * n_embd components"),
    ("check_lora_count", count_only_A, "one of the two matrices alone"),
    ("check_lora_count", count_empties_the_list, "list of targets was changed"),
    ("check_lora_count", count_as_text, "expected a number, got str"),
    ("check_combine_adapters", combine_sums, "B1 A2 and B2 A1"),
    ("check_combine_adapters", combine_no_scales, "the scales are missing"),
    ("check_combine_adapters", combine_scales_twice, "the scales count twice"),
    ("check_combine_adapters", combine_swapped, "A and B are swapped"),
    ("check_combine_adapters", combine_in_place, "has changed"),
    ("check_combine_adapters", combine_crossed, "A1 above A2 and B1 beside B2"),
    ("check_combine_adapters", combine_the_product, "expected two tensors"),
    ("check_extract_lora", extract_no_values, "singular values are missing"),
    ("check_extract_lora", extract_values_twice, "in A and in B"),
    ("check_extract_lora", extract_swapped, "swapped"),
    ("check_extract_lora", extract_other_sign, "after - before"),
    ("check_extract_lora", extract_of_after, "SVD of `after`"),
    ("check_extract_lora", extract_not_padded, "fill up with zeros"),
    ("check_extract_lora", extract_smallest, "the r largest singular values"),
    ("check_extract_lora", extract_first_rows, "is possible"),
    ("check_int8", int8_truncated, "cuts the fraction off"),
    ("check_int8", int8_floor, "floor rounds down"),
    ("check_int8", int8_128, "the divisor is 127"),
    ("check_int8", int8_no_absolute, "take absolute values first"),
    ("check_int8", int8_one_scale, "each block has its own"),
    ("check_int8", int8_nan, "0 / 0 is nan"),
    ("check_int8", int8_floats, "expected int8"),
    ("check_int8", int8_absmax, "divided by 127"),
    ("check_int8", int8_flat_scales, "expected shape (2, 1)"),
    ("check_int8", int8_in_place, "has changed"),
    ("check_dora", NotFrozen, "Freeze the linear layer"),
    ("check_dora", NormOfColumns, "dim=1"),
    ("check_dora", MagnitudeOnes, "the norms of the rows"),
    ("check_dora", BothRandom, "lora_B starts at zero"),
    ("check_dora", NoBias, "the bias is missing"),
    ("check_dora", ScaledBias, "the bias is scaled too"),
    ("check_dora", NoScale, "alpha / r of the update is missing"),
    ("check_dora", OnlyAlpha, "divide by r as well"),
    ("check_dora", FrozenNorm, "norms of the frozen weight"),
    ("check_dora", DetachedNorm, "gradient of lora_A"),
    ("check_dora", NoMagnitude, "magnitude * V / norm"),
]
RIGHT = [
    ("check_lora_count", count_with_numpy),
    ("check_combine_adapters", combine),
    ("check_combine_adapters", combine_scaled_A),
    ("check_extract_lora", extract_root),
    ("check_extract_lora", extract_by_eigenvectors),
    ("check_int8", int8_clamped),
    ("check_dora", DoRA),
    ("check_dora", OtherForm),
]
