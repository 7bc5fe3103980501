"""Tests of helpers.classification and helpers.baselines, the modules of chapter 6."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from helpers.baselines import Tfidf, best_threshold, fit_logistic_regression, spam_words, words_of
from helpers.callbacks import Evaluate
from helpers.classification import (
    LABELS,
    GPTForSequenceClassification,
    SpamDataset,
    classification_loss,
    classification_metrics,
    collate_messages,
    confusion_matrix,
    dedup_key,
    drop_duplicates,
    encode_message,
    evaluate,
    load_classifier,
    predict,
    predict_logits,
    read_messages,
    save_classifier,
    stratified_split,
    undersample,
)
from helpers.common import data_path
from helpers.data import make_dataloader, pad_sequences
from helpers.gpt import GPT, GPTConfig
from helpers.pretrained import save_pretrained
from helpers.tokenizer import END_OF_TEXT, encode, eos_token_id, train_bpe
from helpers.training import TrainConfig, evaluate_loss, fit

EIGHT = pd.DataFrame(
    [("ham", "See you at six"), ("spam", "You won a boat, reply now"), ("ham", "Is the cat in?"),
     ("spam", "Free boat, free cat"), ("ham", "I won at cards, come and see"), ("spam", "Pay now"),
     ("ham", "now"), ("spam", "Your parcel waits at example.org, pay the fee of 2 pounds today")],
    columns=["label", "text"])
CONFIG = GPTConfig(vocab_size=300, context_length=48, n_embd=32, n_head=2, n_layer=2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([text * 2 for text in EIGHT["text"]], vocab_size=300)


@pytest.fixture(scope="module")
def gpt(tokenizer):
    """A GPT whose every weight is away from its start, so that no term is zero by accident."""
    torch.manual_seed(1)
    model = GPT(replace(CONFIG, eos_token_id=eos_token_id(tokenizer)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture
def model(gpt):
    torch.manual_seed(2)
    model = GPTForSequenceClassification(deepcopy(gpt))
    with torch.no_grad():
        model.head.weight.mul_(20)                # logits of about 1: differences would be seen
    return model.eval()


def loader_of(data, batch_size, **more):
    """Batches of a SpamDataset in its order, unless `more` says otherwise."""
    return make_dataloader(data, batch_size=batch_size, **{"shuffle": False, **more},
                           collate_fn=partial(collate_messages, pad_token_id=data.pad_token_id))


def write(tmp_path, data):
    path = tmp_path / "messages.tsv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


# Reading


def test_reads_what_is_there_and_nothing_else(tmp_path):
    content = 'ham\tSaid "six"\tor seven\r\n\nspam\t "Win\u2028a\x85boat £5 \n'
    frame = read_messages(write(tmp_path, "\ufeff" + content))
    assert frame.columns.tolist() == ["label", "text"]
    assert frame["label"].tolist() == ["ham", "spam"]
    assert frame["text"].tolist() == ['Said "six"\tor seven', ' "Win\u2028a\x85boat £5 ']


@pytest.mark.parametrize(("data", "line", "says"), [
    ("ham\tHi\nspam Win a boat\n", 2, "no tab.*'spam Win a boat'"),
    ("ham\tHi\n \n", 2, "no tab"),
    ("label\ttext\nham\tHi\n", 1, "label 'label', expected one of 'ham', 'spam'.*header"),
    ("ham\tHi\n\nSpam\tWin\n", 3, "label 'Spam', expected one of 'ham', 'spam'.$"),
    ("ham\tHi\n\tWin\n", 2, "label ''"),
    ("ham\tHi\nspam\t \n", 2, "no message"),
    ("ham\tHi\nham\n", 2, "no tab"),
    (b"ham\tHi\nham\tcaf\xe9\nham\tHo\n", 2, "not UTF-8: byte 0xe9"),
    (b"\xef\xbb\xbfham\tHi\nham\t\xff\n", 2, "not UTF-8: byte 0xff"),
    ("ham\tHi\n".encode("utf-16"), 1, "not UTF-8"),
])
def test_bad_lines_are_named(tmp_path, data, line, says):
    with pytest.raises(ValueError, match=rf"messages\.tsv, line {line}\b.*{says}"):
        read_messages(write(tmp_path, data))


@pytest.mark.parametrize("data", ["", "\n\r\n\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="holds no message"):
        read_messages(write(tmp_path, data))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_messages(tmp_path / "nowhere.tsv")


def test_other_labels_on_request(tmp_path):
    frame = read_messages(write(tmp_path, "yes\tA\nno\tB\n"), labels=("no", "yes"))
    assert frame["label"].tolist() == ["yes", "no"]


def test_the_shipped_messages_can_be_read():
    frame = read_messages(data_path("sms.tsv"))
    counts = frame["label"].value_counts()
    assert set(counts.index) == set(LABELS) and counts.min() >= 100
    train, val, test = stratified_split(undersample(drop_duplicates(frame)))
    assert len(train) > len(test) > len(val) >= 20


# Duplicates, undersampling, split


@pytest.mark.parametrize(("a", "b", "same"), [
    ("WIN £500! Call 07700 900111", "win £9,  call 07700900222 !!", True),
    ("Straße", "STRASSE", True),
    ("Café at 6", "Cafe at 6", False),
    (":-)", ":-(", False),
    ("123", "124", False),
    ("see you", "seeyou", False),
    ("привет, мир", "Привет мир 5", True),
])
def test_dedup_key(a, b, same):
    assert (dedup_key(a) == dedup_key(b)) == same


def test_drop_duplicates_keeps_the_first_and_drops_disputed_ones():
    frame = pd.DataFrame([("ham", "Ok"), ("ham", "ok!"), ("spam", "Call 5"), ("ham", "call 6"),
                          ("spam", "Win"), ("spam", "WIN 7")], columns=["label", "text"])
    kept = drop_duplicates(frame)
    assert kept["text"].tolist() == ["Ok", "Win"] and kept.index.tolist() == [0, 1]
    assert len(frame) == 6                                   # the table given is left alone


def many(n_ham, n_spam):
    """A table of distinct messages: letters only, so that each is its own key."""
    def name(i):
        return "".join(chr(97 + int(digit)) for digit in str(i))
    return pd.DataFrame([("ham", f"ham {name(i)}") for i in range(n_ham)]
                        + [("spam", f"spam {name(i)}") for i in range(n_spam)],
                        columns=["label", "text"])


def test_undersample():
    frame = many(30, 10)
    even = undersample(frame, seed=3)
    assert even["label"].value_counts().to_dict() == {"ham": 10, "spam": 10}
    assert not even["text"].duplicated().any() and set(even["text"]) <= set(frame["text"])
    assert even.equals(undersample(frame, seed=3)) and not even.equals(undersample(frame, seed=4))
    shuffled = undersample(frame.sample(frac=1, random_state=0), seed=3)
    assert set(shuffled["text"]) == set(even["text"])        # the texts decide, not their order
    with pytest.raises(ValueError, match=r"two labels or more, found \['ham'\]"):
        undersample(many(3, 0))


@settings(max_examples=30, deadline=None)
@given(n_ham=st.integers(12, 60), n_spam=st.integers(12, 60), seed=st.integers(0, 5))
def test_split_gives_every_message_to_one_part(n_ham, n_spam, seed):
    frame = many(n_ham, n_spam)
    parts = stratified_split(frame, (0.7, 0.1, 0.2), seed)
    assert sorted(pd.concat(parts)["text"]) == sorted(frame["text"])
    for part, fraction in zip(parts, (0.7, 0.1, 0.2), strict=True):
        for label, n in (("ham", n_ham), ("spam", n_spam)):
            assert abs((part["label"] == label).sum() - fraction * n) <= 1
    keys = [set(part["text"].map(dedup_key)) for part in parts]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])


def test_split_depends_on_texts_and_seed_alone():
    frame = many(20, 20)
    torch.manual_seed(0)
    first = stratified_split(frame, seed=1)
    torch.manual_seed(1)
    shuffled = stratified_split(frame.sample(frac=1, random_state=0), seed=1)
    other = stratified_split(frame, seed=2)
    assert all(a.equals(b) for a, b in zip(first, stratified_split(frame, seed=1), strict=True))
    assert all(set(a["text"]) == set(b["text"]) for a, b in zip(first, shuffled, strict=True))
    assert not all(a.equals(b) for a, b in zip(first, other, strict=True))


def test_the_split_never_changes():
    """Known answers: another hash, or another order of the parts, would mix training and test."""
    train, val, test = stratified_split(many(10, 10))
    assert val["text"].tolist() == ["ham g", "spam i"]
    assert test["text"].tolist() == ["ham a", "ham f", "spam c", "spam g"]
    assert len(train) == 14


@settings(max_examples=20, deadline=None)
@given(n_more=st.integers(1, 8), seed=st.integers(0, 5))
def test_new_messages_move_few_others(n_more, seed):
    """Each message that is added moves at most one other across each of the two borders."""
    before = stratified_split(many(40, 40), seed=seed)
    after = stratified_split(many(40 + n_more, 40), seed=seed)
    moved = sum(len(set(a["text"]) - set(b["text"])) for a, b in zip(before, after, strict=True))
    assert moved <= 2 * n_more


def test_split_refuses_what_would_leak():
    frame = pd.concat([many(20, 20), pd.DataFrame({"label": ["ham"], "text": ["HAM  b! 5"]})])
    with pytest.raises(ValueError, match=r"1 messages repeat another.*drop_duplicates"):
        stratified_split(frame)
    assert len(stratified_split(drop_duplicates(frame))) == 3


@pytest.mark.parametrize(("fractions", "says"), [
    ((0.7, 0.2), "add up to 1"), ((1.2, -0.2), "positive"), ((1.0, 0.0), "positive"),
    ((0.98, 0.01, 0.01), "too few")])
def test_split_refuses_bad_fractions(fractions, says):
    with pytest.raises(ValueError, match=says):
        stratified_split(many(20, 20), fractions)


# Messages as ids, batches


def test_encode_message(tokenizer):
    assert encode_message(tokenizer, "See you").tolist() == encode(tokenizer, "See you")
    assert encode_message(tokenizer, "now " * 99, 7).shape == (7,)
    empty = encode_message(tokenizer, "")
    assert empty.tolist() == [eos_token_id(tokenizer)] and empty.dtype == torch.int64
    assert eos_token_id(tokenizer) not in encode_message(tokenizer, f"a {END_OF_TEXT} b")
    for length in (0, -1):
        with pytest.raises(ValueError, match="max_length must be at least 1"):
            encode_message(tokenizer, "now", length)
    with pytest.raises(ValueError, match="surrogate"):
        encode_message(tokenizer, "half a \ud83d")


def test_dataset_cuts_on_the_right_and_counts(tokenizer):
    whole, cut = SpamDataset(EIGHT, tokenizer), SpamDataset(EIGHT, tokenizer, max_length=5)
    assert whole.truncated == 0 and len(cut) == 8
    for (long, label), (short, same) in zip(whole, cut, strict=True):
        assert short.tolist() == long.tolist()[:5] and label == same
        assert long.dtype == torch.int64 and isinstance(label, int)
    assert cut.truncated == sum(len(ids) > 5 for ids, _ in whole) > 0
    assert [label for _, label in whole] == [0, 1] * 4
    assert whole.pad_token_id == eos_token_id(tokenizer)


@pytest.mark.parametrize(("frame", "says"), [
    (EIGHT.rename(columns={"text": "sms"}), "no column 'text', only.*'sms'"),
    (EIGHT.replace("spam", "junk"), "label 'junk', expected"),
    (pd.DataFrame([(1, "Hi")], columns=["label", "text"]), "label '1', expected"),
    (EIGHT[:0], "holds no message")])
def test_dataset_refuses_bad_tables(tokenizer, frame, says):
    with pytest.raises(ValueError, match=says):
        SpamDataset(frame, tokenizer)


def test_collate_counts_end_tokens_of_the_text():
    rows = [9, 9, 9], [9], [3, 9, 4, 9, 9]
    items = [(torch.tensor(row), label) for row, label in zip(rows, (1, 0, 1), strict=True)]
    tokens, lengths, labels = collate_messages(items, pad_token_id=9)
    assert tokens.tolist() == [[9] * 5, [9] * 5, [3, 9, 4, 9, 9]]
    assert lengths.tolist() == [3, 1, 5] and labels.tolist() == [1, 0, 1]
    assert tokens.dtype == lengths.dtype == labels.dtype == torch.int64


@pytest.mark.parametrize(("rows", "says"), [
    ([], "no rows"), ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], "row 1 is empty")])
def test_collate_refuses_rows_without_a_token(rows, says):
    with pytest.raises(ValueError, match=says):
        pad_sequences(rows, 0)
    with pytest.raises(ValueError, match=says):
        collate_messages([(row, 0) for row in rows], 0)


def test_loader_covers_everything_in_a_seeded_order(tokenizer):
    data = SpamDataset(EIGHT, tokenizer)
    plain = torch.cat([labels for *_, labels in loader_of(data, 3)])
    assert plain.tolist() == [0, 1] * 4
    def order(seed):
        loader = loader_of(data, 3, shuffle=True, seed=seed)
        return torch.cat([lengths for _, lengths, _ in loader])
    torch.manual_seed(0)
    first = order(5)
    torch.manual_seed(1)
    assert torch.equal(first, order(5)) and not torch.equal(first, order(6))
    assert sorted(first.tolist()) == sorted(len(ids) for ids, _ in data)


# The classifier


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_padding_changes_no_logit(gpt, data):
    """Any rows, any amount of padding, any id as the filling: each row as if it were alone."""
    torch.manual_seed(2)
    model = GPTForSequenceClassification(gpt).eval()
    limit, ids = gpt.config.context_length, st.integers(0, gpt.config.vocab_size - 1)
    rows = data.draw(st.lists(st.lists(ids, min_size=1, max_size=limit), min_size=1, max_size=4))
    tokens, lengths = pad_sequences([torch.tensor(row) for row in rows], data.draw(ids))
    extra = data.draw(st.integers(0, limit - tokens.shape[1]))
    with torch.no_grad():
        together = model(F.pad(tokens, (0, extra), value=data.draw(ids)), lengths)
        alone = [model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_end_tokens_in_the_text_do_not_move_the_place_that_is_read(model, gpt):
    """The end token at every place of a row, and the same token as padding."""
    end = gpt.config.eos_token_id
    rows = [[end], [end, 5], [5, end], [end, end, end], [5, end, 6, end, 7], [5, end, 6, end, end]]
    tokens, lengths = pad_sequences([torch.tensor(row) for row in rows], end)
    with torch.no_grad():
        logits = model(F.pad(tokens, (0, 7), value=end), lengths)
        for row, out in zip(rows, logits, strict=True):
            expected = model.head(gpt.hidden_states(torch.tensor([row]))[0, len(row) - 1])
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert (logits[0] - logits[3]).abs().max() > 1e-2        # equal ids in the batch, other lengths


def test_reading_the_padding_would_be_seen(model):
    """The test above can fail: a wrong length gives clearly other logits."""
    tokens, lengths = pad_sequences([torch.tensor([5, 6, 7]), torch.tensor([8] * 12)], 0)
    with torch.no_grad():
        right, wrong = model(tokens, lengths), model(tokens, torch.tensor([12, 12]))
    assert (right - wrong)[0].abs().max() > 1e-2 and torch.equal(right[1], wrong[1])


@pytest.mark.parametrize(("lengths", "says"), [
    ([0, 1], "1 to 3"), ([4, 1], "1 to 3"), ([-1, 1], "1 to 3"), ([1], "2 lengths"),
    ([[1], [1]], "2 lengths")])
def test_bad_lengths_are_refused(model, lengths, says):
    with pytest.raises(ValueError, match=says):
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor(lengths))


def test_too_long_and_foreign_ids_are_refused(model):
    too_long = CONFIG.context_length + 1
    with pytest.raises(ValueError, match="context_length"):
        model(torch.ones(1, too_long, dtype=torch.long), torch.tensor([too_long]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([[CONFIG.vocab_size]]), torch.tensor([1]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trainable", ["head", "last", "all"])
def test_what_trains_is_what_was_asked_for(trainable, tied):
    gpt = GPT(replace(CONFIG, tie_word_embeddings=tied))
    model = GPTForSequenceClassification(gpt, trainable=trainable)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    head = {"head.weight"}
    last = {name for name in names if name.startswith(("gpt.blocks.1.", "gpt.final_norm."))}
    everything = names - {"gpt.lm_head.weight"}                 # its output layer has no use here
    assert moving == {"head": head, "last": head | last, "all": everything}[trainable]
    tokens, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([2])
    before = deepcopy(model.state_dict())
    batch = (tokens, lengths, torch.tensor([1]))
    fit(model, [batch], TrainConfig(max_steps=1, lr=0.1), loss_fn=classification_loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in moving), name


def test_set_trainable_can_be_changed_and_refuses_nonsense(model):
    model.set_trainable("all")
    model.set_trainable("head")
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    with pytest.raises(ValueError, match='"head", "last" or "all", not \'most\''):
        model.set_trainable("most")


@pytest.mark.parametrize(("n", "labels"), [(1, None), (2, ["a"]), (3, ["a", "b", "a"]), (0, [])])
def test_bad_classes_are_refused(gpt, n, labels):
    with pytest.raises(ValueError, match="two classes or more"):
        GPTForSequenceClassification(gpt, n, labels=labels)


def test_pooling_refuses_length_zero_on_every_device(model):
    """Indexing with -1 would silently read the last column."""
    with pytest.raises((IndexError, RuntimeError)):
        model.pool(torch.zeros(2, 3, 4), torch.tensor([0, 1]))


def test_names_of_the_classes(gpt):
    assert GPTForSequenceClassification(gpt).labels == ("ham", "spam")
    assert GPTForSequenceClassification(gpt, 3).labels == ("0", "1", "2")
    assert GPTForSequenceClassification(gpt, 3, labels=["a", "b", "c"]).labels == ("a", "b", "c")


def test_the_head_has_the_type_of_the_model(gpt):
    model = GPTForSequenceClassification(deepcopy(gpt).double()).eval()
    assert model(torch.tensor([[1, 2]]), torch.tensor([2])).dtype == torch.float64


# Loss and metrics


def test_loss_is_a_sum_and_a_count(model, tokenizer):
    data = SpamDataset(EIGHT, tokenizer)
    batch = next(iter(loader_of(data, 8)))
    with torch.no_grad():
        total, n = classification_loss(model, batch)
        logits = model(*batch[:2])
    by_hand = -sum(logits.log_softmax(-1)[i, label] for i, label in enumerate(batch[2].tolist()))
    torch.testing.assert_close(total, by_hand)
    assert n == 8 and isinstance(n, int)
    thirds = evaluate_loss(model, loader_of(data, 3), classification_loss)     # 3, 3 and 2
    assert math.isclose(thirds, total.item() / 8, rel_tol=1e-5)


def test_confusion_matrix():
    labels, verdicts = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 2])
    assert confusion_matrix(labels, verdicts, 3).tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]
    none = torch.tensor([], dtype=torch.long)
    assert confusion_matrix(none, none).tolist() == [[0, 0], [0, 0]]
    for bad in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="classes are 0 to 1"):
            confusion_matrix(bad, torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="classes are 0 to 1"):
            confusion_matrix(torch.tensor([0, 1]), bad)
    with pytest.raises(ValueError, match="as many predictions as labels"):
        confusion_matrix(labels, verdicts[:1], 3)


@pytest.mark.parametrize(("confusion", "positive", "expected"), [
    ([[50, 10], [5, 35]], 1, (0.85, 35 / 45, 35 / 40, 70 / 85)),
    ([[50, 10], [5, 35]], 0, (0.85, 50 / 55, 50 / 60, 100 / 115)),
    ([[4, 0], [3, 0]], 1, (4 / 7, 0.0, 0.0, 0.0)),           # nothing called spam
    ([[3, 1], [0, 0]], 1, (0.75, 0.0, 0.0, 0.0)),            # no spam there
    ([[4, 0], [0, 0]], 1, (1.0, 0.0, 0.0, 0.0)),             # neither
    ([[0, 0], [0, 0]], 1, (0.0, 0.0, 0.0, 0.0)),             # nothing at all
    ([[0, 0], [0, 4]], 1, (1.0, 1.0, 1.0, 1.0)),
    ([[2, 1, 0], [1, 3, 0], [1, 0, 2]], 2, (0.7, 1.0, 2 / 3, 0.8)),
])
def test_metrics_by_hand(confusion, positive, expected):
    found = classification_metrics(torch.tensor(confusion), positive)
    assert list(found) == ["accuracy", "precision", "recall", "f1"]
    assert list(found.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


class Fixed(torch.nn.Module):
    """Gives the logits that stand in the tokens, and notes the mode it was called in."""

    def __init__(self):
        super().__init__()
        self.weight, self.modes = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, tokens, lengths):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return tokens.float()


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_against_hand_computed_numbers(training):
    model = Fixed().train(training)
    logits, labels = [[3, 0], [0, 1], [0, 2], [1, 0], [5, 0]], [0, 0, 1, 1, 0]
    batches = [(torch.tensor(logits[a:b]), torch.ones(b - a, dtype=torch.long),
                torch.tensor(labels[a:b])) for a, b in ((0, 4), (4, 5))]
    found = evaluate(model, batches)
    gaps = [3, -1, 2, -1, 5]                                 # right logit less the wrong one
    assert found["loss"] == pytest.approx(sum(math.log(1 + math.exp(-g)) for g in gaps) / 5)
    assert found["confusion"].tolist() == [[2, 1], [1, 1]]
    assert (found["accuracy"], found["precision"]) == (0.6, 0.5)
    assert (found["recall"], found["f1"]) == (0.5, 0.5)
    assert model.modes == [(False, False)] * 2 and model.training == training


def test_predict_logits_keeps_the_order(model, tokenizer):
    data = SpamDataset(EIGHT, tokenizer)
    logits, labels = predict_logits(model, loader_of(data, 3))
    assert labels.tolist() == [0, 1] * 4 and logits.shape == (8, 2)
    whole, _ = predict_logits(model, loader_of(data, 8))
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
    assert not logits.requires_grad


def test_evaluate_of_nothing_and_of_an_error(model):
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(model.train(), [])
    assert model.training
    with pytest.raises(ValueError, match="lengths"):
        evaluate(model, [(torch.tensor([[1]]), torch.tensor([5]), torch.tensor([0]))])
    assert model.training


# Training, use, keeping


def test_a_random_model_learns_eight_messages(tokenizer):
    torch.manual_seed(0)
    model = GPTForSequenceClassification(GPT(CONFIG), trainable="all")
    data = SpamDataset(EIGHT, tokenizer, CONFIG.context_length)
    loader = loader_of(data, 3, shuffle=True)
    watch = Evaluate(loader_of(data, 8),
                     metrics=lambda m: {"accuracy": evaluate(m, loader)["accuracy"]})
    history = fit(model, loader, TrainConfig(epochs=30, lr=3e-3), loss_fn=classification_loss,
                  callbacks=[watch])
    assert history.last("accuracy") == 1.0 and history.last("val_loss") < 0.05
    assert history.records[1]["n_targets"] == 3              # a target for each message
    assert model.training
    found = predict(model, tokenizer, EIGHT["text"].tolist())
    assert [label for label, _ in found] == EIGHT["label"].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_predict(model, tokenizer, training):
    model.train(training)
    texts = ["", "Pay now", "now " * 200, f"Free {END_OF_TEXT} boat", "Is the cat in?"]
    found = predict(model, tokenizer, texts, batch_size=2)
    assert model.training == training
    with torch.no_grad():
        for text, (label, probability) in zip(texts, found, strict=True):
            ids = encode_message(tokenizer, text, CONFIG.context_length)[None]
            expected = model(ids, torch.tensor([ids.shape[1]])).softmax(-1)[0]
            assert label == LABELS[int(expected.argmax())]
            assert probability == pytest.approx(expected.max().item(), abs=1e-5)
    assert predict(model, tokenizer, []) == []


def test_predict_uses_the_names_of_the_model(gpt, tokenizer):
    model = GPTForSequenceClassification(gpt, 3, labels=["a", "b", "c"])
    ids = encode_message(tokenizer, "now")[None]
    with torch.no_grad():
        last = gpt.eval().hidden_states(ids)[0, -1]
        model.head.weight.copy_(torch.stack([-last, -last, last]) * 100)
    assert predict(model, tokenizer, ["now"]) == [("c", pytest.approx(1.0))]


def test_predict_refuses_what_is_no_list_of_texts(model, tokenizer):
    with pytest.raises(TypeError, match="list of texts"):
        predict(model, tokenizer, "now")
    with pytest.raises(TypeError, match="str"):
        predict(model, tokenizer, ["now", None])
    with pytest.raises(ValueError, match="surrogate"):
        predict(model.train(), tokenizer, ["\ud83d"])
    assert model.training


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_the_same(gpt, tokenizer, tmp_path, tied):
    gpt = GPT(replace(gpt.config, tie_word_embeddings=tied))
    model = GPTForSequenceClassification(gpt, 3, labels=["ham", "späm", "?"]).eval()
    save_classifier(model, tokenizer, tmp_path / "new" / "filter")
    again, its_tokenizer = load_classifier(tmp_path / "new" / "filter")
    assert again.labels == model.labels and not again.training and again.config == model.config
    assert its_tokenizer.encode_ordinary("Pay now") == tokenizer.encode_ordinary("Pay now")
    batch = pad_sequences([torch.tensor([5, 6, 7]), torch.tensor([8])], 0)
    with torch.no_grad():
        assert torch.equal(again(*batch), model(*batch))
    assert (again.gpt.lm_head.weight is again.gpt.token_embedding.weight) == tied
    assert not list((tmp_path / "new" / "filter").glob("*.part"))


@pytest.mark.parametrize("trainable", ["head", "last", "all"])
def test_a_loaded_classifier_trains_what_is_asked_for(model, tokenizer, tmp_path, trainable):
    """Nothing is frozen unless asked for: a model that was trained whole stays one."""
    save_classifier(model, tokenizer, tmp_path)
    asked = {} if trainable == "all" else {"trainable": trainable}
    again, _ = load_classifier(tmp_path, **asked)
    fresh = GPTForSequenceClassification(GPT(again.config), trainable=trainable)
    assert ([p.requires_grad for p in again.parameters()]
            == [p.requires_grad for p in fresh.parameters()])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_transformers_opens_the_folder_with_equal_logits(gpt, tokenizer, tmp_path, n_classes):
    model = GPTForSequenceClassification(deepcopy(gpt), n_classes).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    save_classifier(model, tokenizer, tmp_path)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [[5, 6, 7, 8], [9], [10, 11]]
    tokens, lengths = pad_sequences(rows, gpt.config.eos_token_id)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens, lengths),
                                   atol=1e-4, rtol=1e-4)
        for row in rows:
            torch.testing.assert_close(theirs(torch.tensor([row])).logits[0],
                                       model(torch.tensor([row]), torch.tensor([len(row)]))[0],
                                       atol=1e-4, rtol=1e-4)
    assert theirs.config.id2label == dict(enumerate(model.labels))


def test_a_classifier_of_transformers_can_be_loaded(gpt, tokenizer, tmp_path):
    """Their folder, their writer: their head, their labels, our tokenizer beside them."""
    save_pretrained(gpt, tokenizer, tmp_path)
    c = gpt.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_head=c.n_head,
        n_layer=c.n_layer, pad_token_id=c.eos_token_id, id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2}, eos_token_id=c.eos_token_id, bos_token_id=None)
    torch.manual_seed(3)
    theirs = transformers.GPT2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_classifier(tmp_path)
    assert ours.labels == ("a", "b", "c")
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([[5, 6, 7]])).logits,
                                   ours(torch.tensor([[5, 6, 7]]), torch.tensor([3])),
                                   atol=1e-5, rtol=1e-4)


def test_loading_refuses_what_was_not_saved_here(model, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_classifier(tmp_path / "nowhere")
    save_pretrained(model.gpt, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="not that of a classifier.*load_pretrained"):
        load_classifier(tmp_path)
    save_classifier(model, tokenizer, tmp_path)
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    text = config.read_text(encoding="utf-8")
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for names in ({"0": "ham", "2": "spam"}, ["ham", "spam"], "ham"):
        config.write_text(json.dumps({**json.loads(text), "id2label": names}), encoding="utf-8")
        with pytest.raises(ValueError, match="not that of a classifier"):
            load_classifier(tmp_path)
    config.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="not that of a classifier"):
        load_classifier(tmp_path)
    config.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not a config.json"):
        load_classifier(tmp_path)
    config.write_text(text, encoding="utf-8")
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_classifier(tmp_path)
    less = {name: tensor for name, tensor in weights.items() if name != "score.weight"}
    wrong_norm = {**weights, "transformer.ln_f.weight": torch.zeros(5)}
    for wrong, says in ((less, "head.weight"), (wrong_norm, "final_norm"),
                        ({**weights, "score.weight": torch.zeros(3, 32)}, "head.weight")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=f"(?s)does not fit its config.json.*{says}"):
            load_classifier(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_classifier(tmp_path)


def test_a_truncated_file_is_refused(model, tokenizer, tmp_path):
    save_classifier(model, tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_classifier(tmp_path)


def test_a_failed_save_does_not_pass_for_a_classifier(model, tokenizer, tmp_path, monkeypatch):
    save_classifier(model, tokenizer, tmp_path)

    def full_disk(*args, **more):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("helpers.classification.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_classifier(model, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="not that of a classifier"):
        load_classifier(tmp_path)


# Baselines


TEXTS = ["Free boat, FREE cat", "the cat in the boat", "Is the cat in?", "", "a b c £5",
         "win win win"]


def test_tfidf_equals_scikit_learn():
    theirs = TfidfVectorizer()
    expected = theirs.fit_transform(TEXTS).toarray()
    ours = Tfidf(TEXTS)
    assert list(ours.vocabulary) == theirs.get_feature_names_out().tolist()
    torch.testing.assert_close(ours(TEXTS), torch.tensor(expected))
    new = ["a new boat", "cat cat CAT in", "unknown"]
    torch.testing.assert_close(ours(new), torch.tensor(theirs.transform(new).toarray()))


@pytest.mark.parametrize("C", [0.3, 1.0, 30.0])
def test_logistic_regression_equals_scikit_learn(C):
    """On the shipped messages: the same probabilities, whatever the penalty."""
    train, _, test = stratified_split(drop_duplicates(read_messages(data_path("sms.tsv"))))
    train = train.iloc[::4]
    tfidf = Tfidf(train["text"].tolist())
    x, new = tfidf(train["text"].tolist()), tfidf(test["text"].tolist())
    y = torch.tensor([LABELS.index(label) for label in train["label"]])
    layer = fit_logistic_regression(x, y, C)
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=2000).fit(x.numpy(), y.numpy())
    expected = torch.tensor(theirs.predict_proba(new.numpy())[:, 1])
    torch.testing.assert_close(layer(new)[:, 0].sigmoid(), expected, atol=1e-3, rtol=1e-3)
    assert layer.weight.dtype == torch.float64


def test_sample_weights_equal_scikit_learns():
    x, y = Tfidf(TEXTS)(TEXTS), torch.tensor([1, 0, 0, 1, 0, 1])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.0]).double()
    layer = fit_logistic_regression(x, y, 5.0, weights)
    theirs = LogisticRegression(C=5.0, tol=1e-8, max_iter=2000)
    theirs.fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close(layer(x)[:, 0].sigmoid(),
                               torch.tensor(theirs.predict_proba(x.numpy())[:, 1]),
                               atol=1e-4, rtol=1e-3)


def test_logistic_regression_keeps_the_dtype_and_learns():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) > 0.3).long()
    layer = fit_logistic_regression(x, y, C=100.0)
    assert layer.weight.dtype == torch.float32
    assert ((layer(x)[:, 0] > 0).long() == y).float().mean() > 0.97


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
def test_best_threshold_is_as_good_as_any(pairs):
    """Among all thresholds between and beyond the scores, none meets more labels."""
    scores, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))

    def right(cut):
        return int(((scores >= cut) == labels).sum())

    assert right(best_threshold(scores, labels.long())) == max(
        right(cut) for cut in (-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5))


def test_words_are_those_of_scikit_learn():
    text = "Win a £500 boat!! don't reply, l8r: naïve_x ÄB"
    analyze = TfidfVectorizer().build_analyzer()
    assert words_of(text) == analyze(text) and "a" not in words_of(text)


def test_spam_words_are_ordered_by_their_log_odds_ratio():
    texts = ["free boat", "free cat now", "free win", "a cat sat now", "the cat", "now the boat"]
    labels = [1, 1, 1, 0, 0, 0]

    def ratio(word):
        odds = []
        for label in (1, 0):
            k = sum(word in text.split() for text, y in zip(texts, labels, strict=True)
                    if y == label) + 0.5
            odds.append(k / (4 - k))
        return odds[0] / odds[1]

    ranked = spam_words(texts, labels, 4)
    assert ranked[:2] == ["free", "win"] and len(ranked) == 4
    assert [ratio(word) for word in ranked] == sorted(map(ratio, ranked), reverse=True)
    assert spam_words(texts, [1 - y for y in labels], 1) == ["the"]
