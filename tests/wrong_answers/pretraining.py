"""Typical wrong answers to the exercises of chapter 5."""

import math

import torch
from torch.nn import functional as F

from helpers.training import IGNORE_INDEX, evaluate_loss, lm_loss, train_step

# Perplexity


def nats(model, text, *, shift=1):
    """The loss of each token of a text (B, T + 1)."""
    logits = model(text[:, :-1])
    targets = text[:, 1:] if shift else text[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def perplexity(model, texts, *, shift=1, unit=1.0, base=math.e, evaluate=True, restore=True):
    """The perplexity, with one mistake."""
    was_training = model.training
    if evaluate:
        model.eval()
    with torch.no_grad():
        loss = torch.cat([nats(model, text, shift=shift) for text in texts]).mean().item()
    if restore:
        model.train(was_training)
    return base ** (loss / unit)


def always_trains(model, texts):
    value = perplexity(model, texts)
    model.train()
    return value


def with_evaluate_loss(model, texts):
    """Right, in the chapter's own words."""
    return math.exp(evaluate_loss(model, [(t[:, :-1], t[:, 1:]) for t in texts]))


def loss_only(model, texts):
    return math.log(perplexity(model, texts))


def of_means(model, texts):
    with torch.no_grad():
        return math.exp(sum(nats(model, t).mean().item() for t in texts) / len(texts))


def mean_of_perplexities(model, texts):
    with torch.no_grad():
        return sum(nats(model, t).mean().exp().item() for t in texts) / len(texts)


def feeds_all(model, texts):
    """Right but for a row that is longer than the context."""
    with torch.no_grad():
        losses = [F.cross_entropy(model(t)[:, :-1].flatten(0, 1), t[:, 1:].flatten(),
                                  reduction="none") for t in texts]
    return torch.cat(losses).mean().exp().item()


# Schedules


def schedule(step, lr, warm, decay, total, *, start=0, rise=0, late=0, early=0):
    """Up, level, down, with one mistake."""
    if step < warm + rise:
        return lr * (step - start) / (warm + rise)
    if step > total - decay - early:
        return lr * (total - step + late) / (decay + early)
    return lr


def no_rise(step, lr, warm, decay, total):
    return schedule(step, lr, 0, decay, total)


def divides(step, lr, warm, decay, total):
    return min(lr, lr * step / warm, lr * (total - step) / decay)


def cosine_down(step, lr, warm, decay, total):
    if step < warm:
        return lr * step / warm
    if step <= total - decay:
        return lr
    return lr * (1 + math.cos(math.pi * (step - total + decay) / decay)) / 2


def never_down(step, lr, warm, decay, total):
    return lr * step / warm if step < warm else lr


def as_a_tensor(step, lr, warm, decay, total):
    return torch.tensor(schedule(step, lr, warm, decay, total))


def one_formula(step, lr, warm, decay, total):
    """Right: the least of three lines."""
    return min(lr, lr * step / max(1, warm), lr * (total - step) / decay)


# Top-p


def top_p(logits, temperature, p, *, crossing=True, norm=True, order_back=True):
    """Top-p with one mistake."""
    ordered, order = (logits / temperature).softmax(-1).sort(descending=True)
    reached = ordered.cumsum(-1)
    ordered = ordered * ((reached - ordered < p) if crossing else (reached <= p))
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered) if order_back else ordered
    return kept / kept.sum() if norm else kept


def late_temperature(logits, temperature, p):
    probs = logits.softmax(-1) / temperature
    return top_p((probs / probs.sum()).log(), 1.0, p)


def cut_then_temperature(logits, temperature, p):
    return (top_p(logits, 1.0, p).log() / temperature).softmax(-1)


def crossing_dropped_but_one(logits, temperature, p):
    kept = top_p(logits, temperature, p, crossing=False, norm=False)
    if kept.sum() == 0:
        return top_p(logits, temperature, p)
    return kept / kept.sum()


def in_place(logits, temperature, p):
    logits /= temperature
    return top_p(logits, 1.0, p)


def one_too_many(logits, temperature, p):
    """Keeps a token while the sum before it is at most p."""
    ordered, order = (logits / temperature).softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered * (before <= p))
    return kept / kept.sum()


def overflows(logits, temperature, p):
    powers = (logits / temperature).exp()
    return top_p((powers / powers.sum()).log(), 1.0, p)


def in_double(logits, temperature, p):
    """Right, in float64 and with a loop."""
    probs = (logits.double() / temperature).softmax(-1)
    kept, reached = torch.zeros_like(probs), 0.0
    for i in probs.argsort(descending=True).tolist():
        if reached >= p:
            break
        kept[i] = probs[i]
        reached += probs[i].item()
    return kept / kept.sum()


# Steps


def step(model, batches, optimizer, *, zero=True, between=False, each=False, divide="all",
         returns="mean"):
    """One step with one mistake."""
    counts = [int((y != -100).sum()) for _, y in batches]
    sizes = sum(y.numel() for _, y in batches)
    losses = []
    if zero:
        optimizer.zero_grad()
    for (x, y), n in zip(batches, counts, strict=True):
        if between:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100,
                               reduction="sum")
        factor = {"all": sum(counts), "own": n, "means": n * len(batches), "none": 1,
                  "sizes": sizes}[divide]
        (loss / factor).backward()
        losses.append(loss.item())
        if each:
            optimizer.step()
            optimizer.zero_grad()
    if not each:
        optimizer.step()
    mean = sum(losses) / sum(counts)
    of_means = sum(s / n for s, n in zip(losses, counts, strict=True)) / len(counts)
    return {"mean": mean, "sum": sum(losses), "of means": of_means,
            "tensor": torch.tensor(mean), "nothing": None}[returns]


def clips(model, batches, optimizer):
    return train_step(model, batches, lm_loss, optimizer)["train_loss"]


def with_train_step(model, batches, optimizer):
    """Right, in the chapter's own words."""
    return train_step(model, batches, lm_loss, optimizer, max_grad_norm=None)["train_loss"]


def divides_the_loss(model, batches, optimizer):
    """Right: counts the targets first."""
    optimizer.zero_grad(set_to_none=False)
    count = sum(int((y != IGNORE_INDEX).sum()) for _, y in batches)
    total = sum(lm_loss(model, batch)[0] for batch in batches) / count
    total.backward()
    optimizer.step()
    return total.item()


def only_looks(model, batches, optimizer):
    optimizer.zero_grad()
    with torch.no_grad():
        return F.cross_entropy(model(batches[0][0]).flatten(0, 1), batches[0][1].flatten()).item()


# Groups


def groups(model, decay, *, spared=("embedding",), vectors=0.0, skip=""):
    """Parameter groups with one mistake."""
    found = {"matrices": [], "vectors": [], "tables": []}
    for name, p in model.named_parameters():
        if skip and skip in name:
            continue
        kind = "tables" if any(s in name for s in spared) else "matrices"
        found["vectors" if p.dim() < 2 else kind].append(p)
    decays = {"matrices": decay, "vectors": vectors, "tables": 0.0}
    return [{"params": p, "weight_decay": decays[kind]} for kind, p in found.items()]


def tables_with_vectors(model, decay):
    matrices, vectors, tables = groups(model, decay)
    vectors["params"] += tables["params"]
    return [matrices, vectors]


def as_generators(model, decay):
    """Right: what torch.optim takes as well."""
    named = list(model.named_parameters())
    return [
        {"params": (p for n, p in named if "embedding" in n), "weight_decay": 0.0},
        {"params": (p for n, p in named if p.dim() < 2), "weight_decay": 0},
        {"params": (p for n, p in named if p.dim() > 1 and "embedding" not in n),
         "weight_decay": decay},
    ]


def as_a_tuple(model, decay):
    return tuple(groups(model, decay))


def as_one_dict(model, decay):
    return groups(model, decay)[0]


def none_as_params(model, decay):
    return [{"params": None, "weight_decay": decay}]


def decay_forgotten(model, decay):
    return [{"params": list(model.parameters())}]


def decay_none(model, decay):
    return groups(model, decay, vectors=None)


def head_twice(model, decay):
    found = groups(model, decay)
    found[0]["params"].append(model.lm_head.weight)
    return found


def by_name(model, decay):
    return [{"params": [n for n, _ in model.named_parameters()], "weight_decay": decay}]


def fixed_decay(model, decay):
    return groups(model, 0.1)


WRONG = [
    ("check_perplexity", loss_only, "in nats. The perplexity is its exponential"),
    ("check_perplexity", lambda m, t: math.log2(perplexity(m, t)), "in bits"),
    ("check_perplexity", lambda m, t: perplexity(m, t, unit=math.log(2)), "power of bits"),
    ("check_perplexity", lambda m, t: perplexity(m, t, base=2), "two to the power of nats"),
    ("check_perplexity", lambda m, t: perplexity(m, t, shift=0), "not shifted"),
    ("check_perplexity", of_means, "mean of the texts' means"),
    ("check_perplexity", mean_of_perplexities, "texts' perplexities"),
    ("check_perplexity", feeds_all, "raised ValueError"),
    ("check_perplexity", lambda m, t: torch.tensor(perplexity(m, t)), "expected a number"),
    ("check_perplexity", lambda m, t: perplexity(m, t, evaluate=False), "dropout was on"),
    ("check_perplexity", lambda m, t: perplexity(m, t, restore=False), "eval mode afterwards"),
    ("check_perplexity", always_trains, "train mode afterwards"),
    ("check_schedule", lambda *a: schedule(*a, start=1), "counted from 1"),
    ("check_schedule", lambda *a: schedule(*a, rise=1), "ends a step late"),
    ("check_schedule", lambda *a: schedule(*a, late=1), "decay is a step late"),
    ("check_schedule", lambda *a: schedule(*a, early=2), "last decay_steps"),
    ("check_schedule", no_rise, "does not rise"),
    ("check_schedule", divides, "divides by zero"),
    ("check_schedule", cosine_down, "here the decay is linear"),
    ("check_schedule", never_down, "does not fall"),
    ("check_schedule", as_a_tensor, "expected a number"),
    ("check_schedule", lambda *a: None if a[0] > 5 else schedule(*a), "at step 6 returned None"),
    ("check_top_p", crossing_dropped_but_one, "is left out"),
    ("check_top_p", lambda *a: top_p(*a, crossing=False), "is left out"),
    ("check_top_p", lambda z, t, p: top_p(z, t, p, crossing=p > 0.5), "no token is left"),
    ("check_top_p", lambda *a: top_p(*a, norm=False), "sum to 1"),
    ("check_top_p", lambda *a: top_p(*a, order_back=False), "order of size"),
    ("check_top_p", late_temperature, "after softmax it cancels"),
    ("check_top_p", cut_then_temperature, "comes after top-p"),
    ("check_top_p", lambda z, t, p: top_p(z, 1 / t, p), "wrong way round"),
    ("check_top_p", in_place, "were changed"),
    ("check_top_p", lambda z, t, p: top_p(z, t, p)[None], "expected shape"),
    ("check_top_p", lambda z, t, p: top_p(z, t, p).tolist(), "expected a tensor"),
    ("check_top_p", lambda z, t, p: (z > 0), "expected probabilities"),
    ("check_top_p", one_too_many, "two of them reach 0.5"),
    ("check_top_p", overflows, "exp overflows"),
    ("check_step", lambda *a: step(*a, zero=False), "zero_grad() first"),
    ("check_step", lambda *a: step(*a, divide="means"), "mean of the batches' means"),
    ("check_step", lambda *a: step(*a, divide="own"), "are added up"),
    ("check_step", lambda *a: step(*a, divide="none"), "that of the sum"),
    ("check_step", lambda *a: step(*a, divide="sizes"), "IGNORE_INDEX are counted"),
    ("check_step", lambda *a: step(*a, between=True), "only the last batch"),
    ("check_step", lambda *a: step(*a, divide="own", each=True), "a step for each batch"),
    ("check_step", lambda *a: step(*a, returns="of means"), "weights are right"),
    ("check_step", lambda *a: step(*a, returns="sum"), "sum of the losses"),
    ("check_step", lambda *a: step(*a, returns="tensor"), ".item()"),
    ("check_step", lambda *a: step(*a, returns="nothing"), "returned None"),
    ("check_step", only_looks, "no weight has moved"),
    ("check_step", clips, "was clipped"),
    ("check_step", lambda m, b, o: step(m, b[:1], o), "otherwise than"),
    ("check_groups", lambda m, d: groups(m, d, vectors=d), "Norms and biases have none"),
    ("check_groups", lambda m, d: groups(m, d, spared=()), "the tables have none"),
    ("check_groups", lambda m, d: groups(m, d, skip="position"), "in no group"),
    ("check_groups", tables_with_vectors, "a group by themselves"),
    ("check_groups", head_twice, "twice in one"),
    ("check_groups", by_name, "no parameter of the model"),
    ("check_groups", fixed_decay, "the weight_decay given"),
    ("check_groups", lambda m, d: m.parameters(), "list of dicts"),
    ("check_groups", as_one_dict, "list of dicts, got dict"),
    ("check_groups", none_as_params, "holds the parameters"),
    ("check_groups", decay_forgotten, 'needs "params" and "weight_decay"'),
    ("check_groups", decay_none, "weight_decay"),
]

RIGHT = [
    ("check_perplexity", perplexity),
    ("check_perplexity", with_evaluate_loss),
    ("check_schedule", schedule),
    ("check_schedule", one_formula),
    ("check_top_p", top_p),
    ("check_top_p", in_double),
    ("check_step", step),
    ("check_step", with_train_step),
    ("check_step", divides_the_loss),
    ("check_groups", groups),
    ("check_groups", as_generators),
    ("check_groups", as_a_tuple),
]
