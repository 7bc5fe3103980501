"""Chapter 5: temperature, top-k and top-p against a plain reference."""

import math

import pytest
import torch
from fitting import make_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.generation import generate, greedy
from helpers.sampling import make_sampler, next_token_probs


def test_probabilities_by_hand():
    scores = torch.tensor([[math.log(4), math.log(3), math.log(2), math.log(1)]])

    def is_close(probabilities, *expected):
        torch.testing.assert_close(probabilities, torch.tensor([expected]))

    is_close(next_token_probs(scores), 0.4, 0.3, 0.2, 0.1)
    is_close(next_token_probs(scores, temperature=0.5), 16 / 30, 9 / 30, 4 / 30, 1 / 30)
    is_close(next_token_probs(scores, top_k=2), 4 / 7, 3 / 7, 0.0, 0.0)
    is_close(next_token_probs(scores, top_p=0.65), 4 / 7, 3 / 7, 0.0, 0.0)
    is_close(next_token_probs(scores, top_p=0.75), 4 / 9, 3 / 9, 2 / 9, 0.0)
    is_close(next_token_probs(scores, top_k=3, top_p=0.5), 4 / 7, 3 / 7, 0.0, 0.0)  # 4/9 < p
    is_close(next_token_probs(scores, top_p=1e-9), 1.0, 0.0, 0.0, 0.0)
    is_close(next_token_probs(scores.flip(1), top_k=1), 0.0, 0.0, 0.0, 1.0)


def reference(row: list[float], temperature: float, top_k: int | None, top_p: float | None):
    """What it should give, in plain Python, and how near top_p comes to a boundary."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    weights = {i: math.exp((row[i] - row[order[0]]) / temperature) for i in order}
    total, kept, reached, distance = sum(weights.values()), [], 0.0, 1.0
    for i in order:
        if top_p is not None:
            distance = min(distance, abs(reached - top_p))
        if top_p is None or top_p == 1 or reached < top_p:
            kept.append(i)
        reached += weights[i] / total
    whole = sum(weights[i] for i in kept)
    return [weights[i] / whole if i in kept else 0.0 for i in range(len(row))], kept, distance


one_logit = st.floats(-20, 20, width=16) | st.sampled_from([0.0, 1.0, -math.inf])
logit_rows = st.lists(one_logit, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
methods = {"temperature": st.floats(0.05, 20), "top_k": st.none() | st.integers(1, 15),
         "top_p": st.none() | st.floats(1e-6, 1.0)}


@settings(deadline=None, max_examples=150)
@given(row=logit_rows, **methods)
def test_top_k_and_top_p_keep_the_smallest_set_and_sums_to_one(row, temperature, top_k, top_p):
    expected, kept, distance = reference(row, temperature, top_k, top_p)
    assume(distance > 1e-5 or top_p == 1)
    found = next_token_probs(torch.tensor([row]), temperature, top_k, top_p)[0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert {i for i, p in enumerate(found.tolist()) if p > 0} <= set(kept)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(logit_rows, min_size=1, max_size=4), temperature=st.floats(0.05, 20),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_top_k_of_one_is_greedy_even_among_equals(rows, temperature, dtype):
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows], dtype=dtype)
    torch.manual_seed(0)
    assert torch.equal(make_sampler(temperature, top_k=1)(logits), greedy(logits))
    assert torch.equal(make_sampler(0, top_k=3)(logits), greedy(logits))


def test_equals_at_the_border_are_kept_by_their_ids():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert (next_token_probs(scores, top_k=3) > 0).tolist() == [[True, True, False, True, False],
                                                    [True, True, True, False, False]]
    kept = (next_token_probs(scores[1:], top_p=0.39) > 0).tolist()
    assert kept == [[True, True, False, False, False]]


def test_top_p_of_one_and_top_k_above_the_vocabulary_keep_all():
    torch.manual_seed(0)
    scores = torch.randn(4, 50_000) * 2                 # their sum passes 1 by rounding
    for how in ({"top_p": 1.0}, {"top_k": 60_000}, {"top_k": 50_000}):
        kept = next_token_probs(scores, **how)
        assert torch.equal(kept, next_token_probs(scores)) and (kept > 0).all()


def test_low_temperatures_do_not_overflow():
    scores = torch.tensor([[5.0, -3.0, 80.0]])
    for temperature in (1e-3, 1e-30, 1e-37):
        assert next_token_probs(scores, temperature).tolist() == [[0.0, 0.0, 1.0]]
        assert make_sampler(temperature, seed=0)(scores).tolist() == [2]


def test_half_precision_logits_are_computed_in_float32():
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert next_token_probs(scores, 0.7, 20, 0.9).dtype == torch.float32
    assert torch.equal(next_token_probs(scores, 0.7, 20, 0.9),
                       next_token_probs(scores.float(), 0.7, 20, 0.9))


def test_sampler_draws_by_the_probabilities():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    drawn = torch.bincount(make_sampler(seed=1)(scores), minlength=3) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.02)


def test_seeds():
    scores = torch.zeros(64, 50)
    sample, again, other = make_sampler(seed=1), make_sampler(seed=1), make_sampler(seed=2)
    state = torch.get_rng_state()
    first = sample(scores)
    assert torch.equal(first, again(scores)) and not torch.equal(first, other(scores))
    assert not torch.equal(first, sample(scores))         # it goes on, and does not start anew
    assert torch.equal(state, torch.get_rng_state())    # the global one has not moved
    torch.manual_seed(3)
    drawn = make_sampler()(scores)
    torch.manual_seed(3)
    assert torch.equal(drawn, make_sampler()(scores))


@pytest.mark.parametrize("how", [
    {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0},
    {"top_k": -5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan},
    {"temperature": 0, "top_k": 0}])
def test_sampler_refuses(how):
    name = "top_k" if "top_k" in how else next(iter(how))
    with pytest.raises(ValueError, match=f"{name}.*not {how[name]}"):
        make_sampler(**how)


def test_generate_with_a_sampler_beyond_the_vocabulary_in_a_batch():
    rows = generate(make_model(), [[1, 2], [3]], 12, make_sampler(0.9, top_k=99, top_p=0.9, seed=0),
                    eos_token_id=4)
    assert all(row[-1] == 4 or len(row) == n + 12 for row, n in zip(rows, (2, 1), strict=True))
