"""Appendix D: a model optimized for inference stays the same model."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from helpers.generation import generate
from helpers.gpt import GPT, GPTConfig
from helpers.inference import GemvLinear, optimize_for_inference
from helpers.training import configure_optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_optimized_for_inference_is_the_same_model(tied: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, context_length=12, n_embd=16, n_head=2, n_layer=2,
                       tie_word_embeddings=tied)
    model = GPT(config).eval()
    quick = optimize_for_inference(copy.deepcopy(model))
    assert quick.blocks[1].feed_forward.down_projection.weight.stride() == (1, 16)
    assert (quick.lm_head.weight is quick.token_embedding.weight) == tied
    assert [n for n, _ in quick.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (name, ours), theirs in zip(quick.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(quick(tokens), model(tokens))
    assert not isinstance(quick.lm_head, GemvLinear)


def test_an_optimized_model_takes_no_gradients() -> None:
    """A fused optimizer with moments in another memory order would silently ruin its weights."""
    config = GPTConfig(vocab_size=50, context_length=12, n_embd=16, n_head=2, n_layer=1)
    quick = optimize_for_inference(GPT(config))
    assert not any(p.requires_grad for p in quick.parameters())
    with pytest.raises(ValueError, match="no parameter to train"):
        configure_optimizer(quick, lr=0.1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_model_generates_the_same() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, context_length=16, n_embd=16, n_head=2, n_layer=1)
    model = GPT(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    expected = generate(model, [1, 2, 3], 9)
    quick = optimize_for_inference(copy.deepcopy(model), compile=True)
    assert isinstance(quick.lm_head, GemvLinear)
    assert set(quick.state_dict()) == set(model.state_dict())
    assert generate(quick, [1, 2, 3], 9) == expected
