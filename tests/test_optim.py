"""Tests of helpers.optim: Newton-Schulz, AdamW's update, Muon, and the WSD schedule."""

import copy

import pytest
import torch
from fitting import train
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import TEXTS, Stopped, tiny
from torch import nn
from torch.nn import functional as F

from helpers.gpt import GPT
from helpers.optim import Muon, adamw_update, newton_schulz, wsd_lr
from helpers.tokenizer import train_bpe
from helpers.training import lm_loss, train_step


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


# ---- Muon


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 24), n=st.integers(1, 24), seed=st.integers(0, 999),
       size=st.sampled_from([1e-4, 1.0, 1e4]), copies=st.integers(1, 3))
def test_orthogonalized_matrices_have_singular_values_near_one(m, n, seed, size, copies):
    generator = torch.Generator().manual_seed(seed)
    low = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(copies, k, low, generator=generator)).Q
                   for k in (m, n))
    values = 0.05 + 0.95 * torch.rand(copies, low, generator=generator)
    matrices = size * (left * values[:, None]) @ right.mT                      # (copies, m, n)
    found = newton_schulz(matrices)
    assert found.shape == matrices.shape and found.dtype == torch.float32
    rotated = left.mT @ found @ right                    # diagonal: the directions were kept
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.35
    assert (rotated - diagonal.diag_embed()).abs().max() < 0.1
    torch.testing.assert_close(newton_schulz(matrices[0]), found[0], rtol=0.05, atol=0.05)


def test_newton_schulz_of_nothing_is_nothing():
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))


def parts(model: GPT) -> tuple[list[str], list[str], list[str]]:
    """Names of the matrices of the blocks, of the tables, and of norms and biases."""
    names = [name for name, _ in model.named_parameters()]
    tables = [n for n in names if "embedding" in n or n.startswith("lm_head")]
    rest = [n for n in names if model.get_parameter(n).dim() == 1]
    return [n for n in names if n not in tables + rest], tables, rest


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it from 2.9 on")
@pytest.mark.parametrize("tied", [True, False])
def test_muon_agrees_with_pytorchs(tied, tokenizer):
    model = tiny(tokenizer, tie_word_embeddings=tied, n_layer=2)
    other = copy.deepcopy(model)
    ours = Muon(model, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    matrices, tables, rest = parts(model)
    assert len(tables) == (2 if tied else 3) and len(matrices) == 8
    sample = other.get_parameter
    theirs = [torch.optim.Muon([sample(n) for n in matrices], lr=0.01, weight_decay=0.1,
                               adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW([{"params": [sample(n) for n in tables], "weight_decay": 0.1},
                                 {"params": [sample(n) for n in rest], "weight_decay": 0.0}],
                                lr=0.01, betas=(0.9, 0.98))]
    for step in range(5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            sample(name).grad = p.grad.clone()
            sample(name).data.copy_(p.data)
        for optimizer in (ours, *theirs):
            optimizer.step()
        for name in matrices:                            # in bfloat16, hence not to the last digit
            moves = [(m.get_parameter(name).detach() - before[name]).flatten()
                     for m in (model, other)]
            assert F.cosine_similarity(*moves, dim=0) > 0.99
            assert moves[0].norm() == pytest.approx(moves[1].norm().item(), rel=0.02)
        for name in tables + rest:
            torch.testing.assert_close(model.get_parameter(name), sample(name), rtol=1e-6,
                                       atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_decays_matrices_and_tables_only(tied, tokenizer):
    model = tiny(tokenizer, tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    wrapped = nn.Module()
    wrapped.module = model                               # as data-parallel training wraps it
    optimizer = Muon(wrapped, lr=0.5, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    _, _, rest = parts(model)
    for name, p in model.named_parameters():
        expected = before.get_parameter(name) * (1 if name in rest else 0.95)
        torch.testing.assert_close(p, expected)
    assert [g["muon"] for g in optimizer.param_groups] == [True, False, False]
    moved = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(moved) == sorted(id(p) for p in model.parameters())


def test_muon_leaves_what_does_not_train(tokenizer):
    model = tiny(tokenizer)
    model.token_embedding.requires_grad_(False)
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.arange(16).view(2, 8)
    train_step(model, [(inputs, inputs)], lm_loss, Muon(model, lr=0.1))
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"token_embedding.weight", "lm_head.weight",
                                     "blocks.0.attention.qkv.weight"}


def test_muon_resumes_exactly(tokenizer, tmp_path):
    batches = [(t[:, :-1], t[:, 1:]) for t in
               torch.randint(300, (6, 4, 9), generator=torch.Generator().manual_seed(0))]

    def run(checkpoint, **more):
        model = tiny(tokenizer, dropout=0.1)
        train(model, batches, max_steps=8, optimizer=Muon(model), checkpoint=checkpoint,
              checkpoint_every=3, **more)
        return model.state_dict()

    def stop(record):
        if record["step"] == 5:
            raise Stopped

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        run(tmp_path / "half.pt", log=stop)
    resumed = run(tmp_path / "half.pt", resume=tmp_path / "half.pt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- updates and schedules


def test_our_updates_are_adamws():
    """Two parameters, the second of which joins two steps later."""
    torch.manual_seed(0)
    ours = [torch.randn(3, 4), torch.randn(5)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    states: list[dict] = [{}, {}]
    adamw = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0, betas=(0.8, 0.95))
    for step in range(7):
        n = 1 if step < 2 else 2
        for p, other in list(zip(ours, theirs, strict=True))[:n]:
            p.grad = other.grad = torch.randn(p.shape)
        for p, update in zip(ours, adamw_update(ours[:n], states[:n], (0.8, 0.95)), strict=False):
            p -= 0.1 * update
        adamw.step()
        torch.testing.assert_close(ours, [p.data for p in theirs])
    assert [state["step"].item() for state in states] == [7, 5]
    assert set(states[0]) == set(adamw.state[theirs[0]])     # PyTorch's names: exp_avg, exp_avg_sq


def test_warm_up_stable_decay():
    def rates(total, **changes):
        plan = {"lr": 2.0, "min_lr": 0.5, "warmup_steps": 4, "decay_steps": 9} | changes
        return [wsd_lr(step, total_steps=total, **plan) for step in range(1, total + 1)]

    found = rates(30)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0] and set(found[4:21]) == {2.0}
    assert found[21] == pytest.approx(2.0 - 1.5 / 3) and found[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(found[20:], found[21:], strict=False))
    assert rates(50)[:21] == found[:21]                  # a longer run begins the same
    assert rates(10, decay_steps=0) == [0.5, 1.0, 1.5] + [2.0] * 7
    assert rates(10, warmup_steps=0)[0] == 2.0
