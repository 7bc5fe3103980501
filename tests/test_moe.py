"""Mixture of experts: equal to a dense sum, to Mixtral, and to the balancing loss of the papers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from helpers.generation import generate
from helpers.llama import (
    Llama,
    LlamaConfig,
    MixtureOfExperts,
    expert_load,
    load_balancing_loss,
)

SHAPES = [(4, 1), (4, 2), (3, 3), (1, 1)]


def make(n_experts: int, top_k: int, std: float = 0.3) -> MixtureOfExperts:
    """A layer whose gates are far from equal."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(8, 12, n_experts, top_k)
    for p in layer.parameters():
        nn.init.normal_(p, std=std)
    return layer


def dense(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """All experts on all tokens, weighted by hand."""
    logits = layer.router(x)
    kept = torch.zeros_like(logits).scatter(-1, logits.topk(layer.top_k).indices, 1.0)
    gates = logits.exp() * kept
    gates = gates / gates.sum(dim=-1, keepdim=True)                          # (..., E)
    outputs = torch.stack([e(x) for e in layer.experts], dim=-1)             # (..., C, E)
    return (outputs * gates[..., None, :]).sum(dim=-1)


@pytest.mark.parametrize(("n_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (7, 8)])
def test_equal_to_the_dense_sum_with_its_gradients(n_experts: int, top_k: int,
                                                   shape: tuple[int, ...]) -> None:
    layer, x = make(n_experts, top_k), torch.randn(shape)
    y, expected = layer(x), dense(layer, x)
    assert_close(y, expected)
    params = list(layer.parameters())
    found = torch.autograd.grad(y.square().sum(), params, materialize_grads=True)
    wanted = torch.autograd.grad(expected.square().sum(), params, materialize_grads=True)
    for gradient, want in zip(found, wanted, strict=True):
        assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 2), (8, 3), (4, 1)])
def test_equal_to_mixtral(n_experts: int, top_k: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    layer, x = make(n_experts, top_k), torch.randn(2, 6, 8)
    theirs = mixtral.MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=8, intermediate_size=12, num_local_experts=n_experts,
        num_experts_per_tok=top_k, experts_implementation="eager")).eval()
    state = {"gate.weight": layer.router.weight}
    for name, parts in (("gate_up_proj", ("gate_projection", "up_projection")),
                        ("down_proj", ("down_projection",))):
        state[f"experts.{name}"] = torch.stack([
            torch.cat([getattr(e, part).weight for part in parts]) for e in layer.experts])
    theirs.load_state_dict(state)
    with torch.no_grad():
        found = theirs(x)
        assert_close(layer(x), found[0] if isinstance(found, tuple) else found)
        logits = layer.router(x)
    loss = mixtral.load_balancing_loss_func((logits.flatten(0, 1),), n_experts, top_k)
    assert_close(top_k * load_balancing_loss(logits, top_k), torch.as_tensor(loss))


def test_each_expert_computes_only_the_tokens_that_chose_it() -> None:
    layer, x, seen = make(4, 2), torch.randn(3, 5, 8), []
    for expert in layer.experts:
        expert.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    layer(x)
    assert sum(seen) == 2 * 15
    assert_close(torch.tensor(seen) / 30, expert_load(layer.router(x), 2))


def test_no_memory_of_a_forward_pass_is_kept() -> None:
    layer = make(4, 2)
    layer(torch.randn(2, 3, 8))
    copy.deepcopy(layer)                        # fails where a tensor with a graph is kept
    experts = {f"experts.{i}.{part}_projection.weight" for i in range(4)
               for part in ("gate", "up", "down")}
    assert set(layer.state_dict()) == {"router.weight"} | experts


def test_the_balancing_loss_is_one_for_equal_loads_and_pulls_towards_them() -> None:
    assert_close(load_balancing_loss(torch.eye(4).repeat(3, 1), 1), torch.tensor(1.0))
    collapsed = torch.tensor([[30.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    assert_close(load_balancing_loss(collapsed, 1), torch.tensor(4.0))
    logits = (torch.randn(40, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    [gradient] = torch.autograd.grad(load_balancing_loss(logits, 1), logits)
    assert gradient.mean(dim=0).argmax() == 0                # the busy one is made less likely
    load = expert_load(logits, 2)
    assert_close(load.sum(), torch.tensor(1.0))
    assert load[0] > 0.25


def test_a_wrong_number_of_choices_is_refused() -> None:
    for top_k in (0, 5):
        with pytest.raises(ValueError, match="between 1 and n_experts"):
            MixtureOfExperts(8, 12, n_experts=4, top_k=top_k)


def test_autocast_and_generation_with_experts() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=11, context_length=16, n_embd=8, n_head=2, n_layer=2))
    for block in model.blocks:
        block.feed_forward = MixtureOfExperts(8, 12, n_experts=4, top_k=2)
    model = model.double().eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    cached = generate(model, prompts, 6)
    assert cached == generate(model, prompts, 6, use_cache=False)
    assert cached == [generate(model, p, 6) for p in prompts]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(torch.tensor([[1, 2, 3]])).shape == (1, 3, 11)
