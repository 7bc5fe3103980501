"""Checks of the exercises of chapter 5, pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    draw,
    expect,
    expect_function,
    expect_number,
    expect_tensor,
    is_started,
    randomize,
)


def check_perplexity(my_perplexity: Callable[..., float]) -> None:
    """Exercise 5.1: `my_perplexity(model, texts)` over all tokens that have one before them."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_perplexity"
    if not is_started(my_perplexity, name):
        return
    expect_function(my_perplexity, name)
    model = GPT(GPTConfig(vocab_size=30, context_length=8, n_embd=16, n_head=2, n_layer=1,
                          dropout=0.5)).eval()
    randomize(model, 0.5, seed=0)
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 9), (1, 2), (2, 4))                    # the first fills the context
    texts = [torch.randint(30, size, generator=generator) for size in sizes]

    def nats(text: Tensor, shift: int = 1) -> Tensor:
        with torch.no_grad():
            logits = model(text[:, :-1])
        targets = text[:, 1:] if shift else text[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                 reduction="none")

    each = [nats(text) for text in texts]
    loss = torch.cat(each).mean().item()
    unshifted = torch.cat([nats(text, 0) for text in texts]).mean().item()
    of_means = sum(e.mean().item() for e in each) / len(each)
    value = expect_number(call(my_perplexity, model, [text.clone() for text in texts]), name)
    expect(not model.training, f"{name}: a model that came in eval mode is in train mode "
           "afterwards. Remember model.training, and restore it.")
    mistakes = [
        (loss, "this is the mean loss in nats. The perplexity is its exponential."),
        (loss / math.log(2), "this is the mean loss in bits. The perplexity is two to that power."),
        (math.exp(loss / math.log(2)), "this is e to the power of bits. It is e to the power of "
         "nats, or two to the power of bits."),
        (2**loss, "this is two to the power of nats. It is e to the power of nats, or two to the "
         "power of bits."),
        (math.exp(unshifted), "the targets are not shifted: the model is asked for the token it "
         "has just read. The target of a position is the token after it."),
        (math.exp(of_means), "this weighs texts, not tokens: the mean of the texts' means. Add up "
         "the losses of all tokens, and divide once by their number."),
        (sum(math.exp(e.mean().item()) for e in each) / len(each), "this is the mean of the texts' "
         "perplexities. Add up the losses of all tokens, divide once, then take the exponential."),
        (math.exp(sum(e.sum().item() for e in each) / sum(t.numel() for t in texts)), "the first "
         "token of each row is counted, but nothing predicts it."),
    ]
    for wrong, message in mistakes:
        expect(not close(value, wrong, atol=1e-12), f"{name}: {message}")
    expect(close(value, math.exp(loss), atol=1e-12), f"{name}: expected {math.exp(loss):.4g}, got "
           f"{value:.4g}. Inputs are all but the last token of a row, targets all but the first.")
    model.train()
    value = expect_number(call(my_perplexity, model, [text.clone() for text in texts]), name)
    expect(close(value, math.exp(loss), atol=1e-12), f"{name}: the model came in train mode, and "
           "its dropout was on while you measured. Call model.eval() first.")
    expect(model.training, f"{name}: a model that came in train mode is in eval mode afterwards. "
           "Remember model.training, and restore it.")
    done(name)


def check_schedule(my_schedule: Callable[[int, float, int, int, int], float]) -> None:
    """Exercise 5.2: `my_schedule(step, lr, warmup_steps, decay_steps, total_steps)`."""
    name = "my_schedule"
    if not is_started(my_schedule, name):
        return
    expect_function(my_schedule, name)
    for lr, warm, decay, total in ((1.0, 4, 5, 20), (3e-4, 10, 10, 20), (2.0, 0, 3, 8)):
        rates = {}
        for step in range(1, total + 1):
            try:
                rates[step] = my_schedule(step, lr, warm, decay, total)
            except ZeroDivisionError:
                raise CheckFailed(
                    f"{name}: at step {step} with warmup_steps={warm} it divides by zero. There "
                    "may be no warm-up; then the first step has the whole rate.") from None
            except Exception:
                call(my_schedule, step, lr, warm, decay, total)
            rates[step] = expect_number(rates[step], f"{name} at step {step}")
        for step, rate in rates.items():
            up, down = warm and step < warm, step > total - decay
            wanted = lr * step / warm if up else lr * (total - step) / decay if down else lr
            if close(rate, wanted, atol=1e-12):
                continue
            what = (f"{name}: at step {step} of {total} (warmup_steps={warm}, decay_steps={decay}, "
                    f"lr={lr}) expected {wanted:.4g}, got {rate:.4g}.")
            level = not up and not down
            mistakes = [
                (up and close(rate, lr * (step - 1) / warm, atol=1e-12), "Steps are counted from "
                 "1: the first has lr / warmup_steps, not zero, which would waste it."),
                (up and close(rate, lr * step / (warm + 1), atol=1e-12), "The warm-up ends a step "
                 "late: step warmup_steps has the whole rate."),
                (up and close(rate, lr, atol=1e-12), "The rate does not rise."),
                (level and step <= warm + 1 and rate < lr, "The warm-up is over at step "
                 "warmup_steps, which has the whole rate."),
                (level and rate < lr, "Before the last decay_steps steps the rate is lr; it falls "
                 "in those only."),
                (down and close(rates[total], lr, atol=1e-12), "The rate does not fall in the last "
                 "decay_steps steps."),
                (down and close(rate, lr * (total - step + 1) / decay, atol=1e-12), "The decay is "
                 "a step late: step total_steps has a rate of zero."),
                (down and close(rate, lr * (total - step + 1) / (decay + 1), atol=1e-12), "The "
                 "decay is a step late: step total_steps has a rate of zero."),
                (down and close(rate, lr * (1 - math.cos(math.pi * (total - step) / decay)) / 2,
                                atol=1e-12), "This is a cosine; here the decay is linear."),
            ]
            for wrong, message in mistakes:
                expect(not wrong, f"{what} {message}")
            raise CheckFailed(what)
    done(name)


def _top_p(logits: Tensor, temperature: float, top_p: float, *, crossing: bool = True,
           norm: bool = True, strict: bool = True) -> Tensor:
    """Top-p; without crossing, without the division, or with <= in place of <."""
    probs = (logits / temperature).softmax(dim=-1)
    ordered, order = probs.sort(descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    before = reached - ordered
    ordered = ordered * ((before < top_p if strict else before <= top_p) if crossing
                         else reached <= top_p)
    kept = torch.zeros_like(probs).scatter(-1, order, ordered)
    return kept / kept.sum() if norm else kept


def check_top_p(my_top_p: Callable[[Tensor, float, float], Tensor]) -> None:
    """Exercise 5.3: `my_top_p(logits, temperature, top_p)` are the probabilities to draw from."""
    name = "my_top_p"
    if not is_started(my_top_p, name):
        return
    expect_function(my_top_p, name)

    def answer(logits: Tensor, temperature: float, top_p: float) -> Tensor:
        given = logits.clone()
        found = expect_tensor(call(my_top_p, given, temperature, top_p), name, tuple(logits.shape))
        expect(found.is_floating_point(), f"{name}: expected probabilities, got {found.dtype}.")
        expect(torch.equal(given, logits), f"{name}: the logits were changed; make a new tensor.")
        return found.float()

    logits = draw(0, 12) * 2
    for temperature, top_p in ((1.0, 0.7), (0.6, 0.8), (2.0, 0.55), (1.0, 0.01), (1.5, 1.0)):
        found = answer(logits, temperature, top_p)
        which = f"{name} with temperature {temperature} and top_p {top_p}"
        right = _top_p(logits, temperature, top_p)
        if close(found, right):
            continue
        expect(not (found.isnan().any() or found.sum() == 0), f"{which}: no token is left to draw "
               "from. The most probable token is kept even if it alone is more than top_p.")
        mistakes = [
            (_top_p(logits, temperature, top_p, crossing=False),
             "the token with which the sum reaches top_p is left out. It belongs to those that "
             "are kept: compare the sum before each token with top_p."),
            (_top_p(logits, temperature, top_p, norm=False),
             "the probabilities do not sum to 1 again."),
            (_top_p(logits, 1.0, top_p),
             "temperature has no effect. Applied after softmax it cancels; divide the logits."),
            (_top_p(logits, 1 / temperature, top_p), "temperature works the wrong way round: "
             "divide the logits by it."),
            (right.sort(descending=True).values, "the probabilities are in order of size. Put each "
             "back to the place of its token."),
            (_top_p(_top_p(logits, 1.0, top_p).log(), temperature, 1.0),
             "temperature comes after top-p here; it comes first."),
        ]
        for wrong, message in mistakes:
            expect(not close(found, wrong), f"{which}: {message}")
        expect(abs(found.sum().item() - 1) < 1e-4,
               f"{which}: the probabilities sum to {found.sum().item():.3f}, not to 1.")
        kept, wanted = int((found > 0).sum()), int((right > 0).sum())
        expect(kept == wanted, f"{which}: {kept} tokens are kept, expected {wanted}.")
        raise CheckFailed(f"{which}: wrong probabilities.")
    equal = answer(torch.zeros(4), 1.0, 0.5)            # 0.25 each: two reach 0.5 exactly
    expect(int((equal > 0).sum()) == 2, f"{name}: of four tokens of probability 0.25, with top_p "
           f"0.5, {int((equal > 0).sum())} are kept. Two of them reach 0.5: a token is kept while "
           "the sum before it is below top_p, not equal to it.")
    large = draw(1, 12) * 2 + torch.tensor([400.0] + [398.0] * 11)
    found = answer(large, 0.5, 0.9)
    expect(not found.isnan().any() and bool(found.isfinite().all()), f"{name}: with logits of some "
           "hundreds the result is not finite. exp overflows; softmax subtracts the maximum first.")
    expect(close(found, _top_p(large, 0.5, 0.9)), f"{name}: wrong probabilities where the logits "
           "are some hundreds.")
    done(name)


def check_step(my_step: Callable[..., float]) -> None:
    """Exercise 5.4: `my_step(model, batches, optimizer)` moves once, by the mean over all."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_step"
    if not is_started(my_step, name):
        return
    expect_function(my_step, name)
    config = GPTConfig(vocab_size=20, context_length=8, n_embd=12, n_head=2, n_layer=1)
    tokens = torch.randint(20, (6, 9), generator=torch.Generator().manual_seed(2))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[3, 1:] = -100
    batches = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:, :4], y[4:, :4])]
    counts = [int((b[1] != -100).sum()) for b in batches]
    every, n_batches = sum(counts), len(batches)

    def fresh(old: bool = True) -> GPT:
        model = GPT(config)
        randomize(model, 0.6, seed=0)               # a gradient longer than 1
        if old:                                         # gradients that lie about from before
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        return model

    def summed(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(),
                                                 ignore_index=-100, reduction="sum")

    def after(factors: list[float], old: bool = False, one_by_one: bool = False,
              clip: float = math.inf) -> Tensor:
        """All weights in one list after a move by the batches' summed losses, weighed so."""
        model = fresh(old)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch, factor in zip(batches, factors, strict=True):
            (summed(model, batch) * factor).backward()
            if one_by_one:
                optimizer.step()
                optimizer.zero_grad()
        if not one_by_one:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    model = fresh()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        losses = [summed(model, batch).item() for batch in batches]
    value = call(my_step, model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    expect(not isinstance(value, Tensor), f"{name}: expected a number, got a tensor; .item() "
            "makes one of it, and lets go of the graph.")
    value = expect_number(value, name)
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    expect(not torch.equal(found, before), f"{name}: no weight has moved. Is there a backward() "
            "for the losses and a step() of the optimizer?")
    whole, means = [1 / every] * n_batches, [1 / (n * n_batches) for n in counts]
    shapes = sum(b[1].numel() for b in batches)
    mistakes = [
        (after(whole, clip=1.0), "the gradient was clipped to a norm of 1. Here nothing is "
         "clipped: train_step takes max_grad_norm=None."),
        (after(whole, old=True), "the gradients from before count too. Call zero_grad() first."),
        (after(means, old=True), "the gradients from before count too. Call zero_grad() first."),
        (after(means), "the gradient is that of the mean of the batches' means. A batch of few "
         "targets weighs as much as one of many: add up sums, divide once by all targets."),
        (after([1 / n for n in counts]), "the gradients of the batches' means are added up. Divide "
         "the sum of all losses by the number of all targets."),
        (after([1.0] * n_batches), "the gradient is that of the sum. Divide by the number of "
         "targets."),
        (after([1 / shapes] * n_batches), "targets of IGNORE_INDEX are counted in the number."),
        (after([0.0] * (n_batches - 1) + [1 / every]), "only the last batch counts: zero_grad() "
         "belongs before the batches, not between them."),
        (after([0.0] * (n_batches - 1) + [1 / counts[-1]]), "only the last batch counts: "
         "zero_grad() belongs before the batches, not between them."),
        (after([1 / n for n in counts], one_by_one=True), "there is a step for each batch. "
         "Accumulate first, and move once."),
    ]
    right = after(whole)
    if not close(found, right):
        for wrong, message in mistakes:
            expect(not close(found, wrong), f"{name}: {message}")
        raise CheckFailed(f"{name}: the weights moved otherwise than by the gradient of the mean "
                          "loss over all targets.")
    expect(not close(value, sum(losses), atol=1e-12),
           f"{name}: returns the sum of the losses, not the mean.")
    of_means = sum(s / n for s, n in zip(losses, counts, strict=True)) / n_batches
    expect(not close(value, of_means, atol=1e-12), f"{name}: the weights are right, but the mean "
           "of the batches' means is returned.")
    expect(close(value, sum(losses) / every, atol=1e-12),
            f"{name}: expected a loss of {sum(losses) / every:.4g}, got {value:.4g}.")
    done(name)


def check_groups(my_groups: Callable[..., list[dict]]) -> None:
    """Exercise 5.5: `my_groups(model, weight_decay)` sorts parameters for an optimizer."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_groups"
    if not is_started(my_groups, name):
        return
    expect_function(my_groups, name)
    for tied in (True, False):
        model = GPT(GPTConfig(vocab_size=20, context_length=8, n_embd=12, n_head=2, n_layer=2,
                              tie_word_embeddings=tied))
        groups = call(my_groups, model, 0.25)
        expect(isinstance(groups, Iterable) and not isinstance(groups, dict | str | Tensor),
               f"{name}: expected a list of dicts, got {type(groups).__name__}.")
        groups = list(groups)
        expect(all(isinstance(g, dict) for g in groups), f"{name}: expected a list of dicts, got "
               f"one of {', '.join(sorted({type(g).__name__ for g in groups}))}.")
        expect(all({"params", "weight_decay"} <= g.keys() for g in groups),
               f'{name}: each group needs "params" and "weight_decay".')
        names = {id(p): n for n, p in model.named_parameters()}
        decay: dict[str, float] = {}
        held = []                                       # the names in each group
        for group in groups:
            params = group["params"]                    # a tensor, a list, a generator, ...
            expect(isinstance(params, Iterable), f'{name}: "params" holds the parameters of the '
                   f"group, got {type(params).__name__}.")
            value = expect_number(group["weight_decay"], f'{name}: "weight_decay"')
            held.append(set())
            for p in [params] if isinstance(params, Tensor) else list(params):
                p = p[1] if isinstance(p, tuple) and len(p) == 2 else p     # (name, parameter)
                expect(id(p) in names, f"{name}: a group holds something that is no parameter of "
                       f"the model ({type(p).__name__}).")
                n = names[id(p)]
                expect(n not in decay, f"{name}: {n} is in two groups, or twice in one. A tied "
                       "weight is one parameter.")
                decay[n] = value
                held[-1].add(n)
        missing = [n for n in names.values() if n not in decay]
        expect(not missing, f"{name}: {len(missing)} parameters are in no group and would never "
                f"move, {', '.join(missing[:2])} among them.")
        for n, value in decay.items():
            if "embedding" in n:
                expect(value == 0, f"{name}: {n} has decay {value}; here the tables have none.")
            elif dict(model.named_parameters())[n].dim() < 2:
                expect(value == 0, f"{name}: {n} has decay {value}. Norms and biases have none.")
            else:
                expect(value == 0.25, f"{name}: {n} is a matrix and has decay {value}, expected "
                        "the weight_decay given, 0.25.")
        tables = {n for n in decay if "embedding" in n}
        expect(tables in held, f"{name}: the two embedding tables are a group by themselves.")
    done(name)
