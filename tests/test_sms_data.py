"""The messages of chapter 6: their form, what keeps the task honest, and what its card says."""

import re
import unicodedata
from collections import Counter
from statistics import median

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline, make_union
from sklearn.tree import DecisionTreeClassifier

from helpers.classification import dedup_key
from helpers.common import data_path

PATH = data_path("sms.tsv")
ROWS = [line.split("\t") for line in PATH.read_bytes().decode("utf-8").split("\n")[:-1]]
TEXTS = [row[-1] for row in ROWS]
IS_SPAM = np.array([row[0] == "spam" for row in ROWS])
LENGTHS = np.array([len(text) for text in TEXTS])


def words(text: str) -> list[str]:
    """The words of a message in lower case; currency signs and a link's start count as words."""
    return re.findall(r"https?|[£$€]|[^\W_]+(?:'[^\W_]+)*", text.casefold().replace("’", "'"))


def accuracy(classifier, features) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return cross_val_score(classifier, features, IS_SPAM, cv=folds).mean()


def near_duplicates(texts: list[str], threshold: float = 0.8) -> list[tuple[str, str, float]]:
    """All pairs whose sets of character 5-grams have at least this Jaccard similarity."""
    # A message shorter than five characters is padded, so that it has a 5-gram too.
    padded = [" ".join(text.casefold().split()).ljust(5, "_") for text in texts]
    grams = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True).fit_transform(padded)
    sizes = np.asarray(grams.sum(axis=1)).ravel()
    shared = (grams @ grams.T).tocoo()                      # every pair that has a 5-gram in common
    similarity = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    found = (shared.row < shared.col) & (similarity >= threshold)
    return [(texts[i], texts[j], float(s)) for i, j, s
            in zip(shared.row[found], shared.col[found], similarity[found], strict=True)]


# Form


def test_the_file_is_utf8_with_line_feeds_and_without_a_header():
    data = PATH.read_bytes()
    assert not data.startswith(b"\xef\xbb\xbf") and b"\r" not in data
    assert data.endswith(b"\n") and not data.endswith(b"\n\n")
    assert all(len(row) == 2 and row[0] in ("ham", "spam") for row in ROWS)


def test_every_text_is_clean():
    for text in TEXTS:
        assert text == " ".join(text.split()), f"spaces: {text!r}"
        assert text == unicodedata.normalize("NFC", text), f"not NFC: {text!r}"
        assert not {unicodedata.category(char) for char in text} & {"Cc", "Co", "Cn"}, repr(text)
        assert len(text) <= 300


def test_counts_and_balance():
    assert len(ROWS) >= 1_600
    assert 0.45 <= IS_SPAM.mean() <= 0.55


# Repetition


def test_near_duplicates_are_found():
    one = "Your parcel is at the depot, collect it before six today"
    other = "Your parcel is at the depot, collect it before six today!"
    found = near_duplicates([one, "something else", other, "no"])
    assert [pair[:2] for pair in found] == [(one, other)]
    assert near_duplicates(["abcdefgh", "abcdefxy"], threshold=0.34) == []
    [(*_, similarity)] = near_duplicates(["abcdefgh", "abcdefxy"], threshold=0.33)
    assert similarity == pytest.approx(1 / 3)              # abcde and bcdef of six
    assert len(near_duplicates(["No", "no"])) == 1


def test_no_two_messages_are_near_duplicates():
    assert near_duplicates(TEXTS) == []


def test_no_two_messages_differ_only_in_digits_and_punctuation():
    repeated = [key for key, n in Counter(map(dedup_key, TEXTS)).items() if n > 1]
    assert repeated == []


@pytest.mark.parametrize(("n_words", "limit"), [(1, 0.15), (2, 0.02), (3, 0.01), (4, 0.005)])
def test_no_opening_fills_the_file(n_words, limit):
    opening, count = Counter(" ".join(words(text)[:n_words]) for text in TEXTS).most_common(1)[0]
    assert count <= limit * len(TEXTS), f"{count} messages begin with {opening!r}"


def test_no_phrase_fills_the_file():
    phrases = Counter(
        phrase for text in TEXTS for line in [words(re.sub(r"https?://\S+|\d+", "", text))]
        for phrase in {" ".join(line[i:i + 5]) for i in range(len(line) - 4)}
    )
    phrase, count = phrases.most_common(1)[0]
    assert count <= 0.005 * len(TEXTS), f"{count} messages contain {phrase!r}"


# Nothing outside the meaning gives the class away


def test_the_lengths_overlap():
    ham, spam = LENGTHS[~IS_SPAM], LENGTHS[IS_SPAM]
    assert 0.8 <= median(ham) / median(spam) <= 1.25
    for lengths in (ham, spam):
        assert (lengths < 30).sum() >= 10 and (lengths > 200).sum() >= 8


def test_length_alone_classifies_badly():
    tree = DecisionTreeClassifier(max_leaf_nodes=8, random_state=0)
    assert accuracy(tree, LENGTHS[:, None]) < 0.62


def test_no_word_gives_the_class_away():
    """No word is both frequent in a class (over a tenth) and precise (over 80%)."""
    in_ham = Counter(word for text in np.array(TEXTS)[~IS_SPAM] for word in set(words(text)))
    in_spam = Counter(word for text in np.array(TEXTS)[IS_SPAM] for word in set(words(text)))
    n_spam = int(IS_SPAM.sum())
    n_ham = len(TEXTS) - n_spam
    for mine, size, other in ((in_ham, n_ham, in_spam), (in_spam, n_spam, in_ham)):
        for word, count in mine.items():
            precision = count / (count + other[word])
            assert count <= 0.10 * size or precision <= 0.80, (word, count, precision)


@pytest.mark.parametrize("sign", [
    r"https?://", r"\d", r"[£$€]", "!", r"\?", r"\b[A-Z]{3,}\b", r"^[a-z]", r"[.!?]$",
    r"[^\x00-\x7f£€]", r"(?i)\byour?\b", r"\bI\b",
])
def test_no_sign_gives_the_class_away(sign):
    """Links, digits, amounts and capitals occur in both classes; alone they say little."""
    has_it = np.array([bool(re.search(sign, text)) for text in TEXTS])
    assert min(has_it[IS_SPAM].sum(), has_it[~IS_SPAM].sum()) >= 20
    right = (has_it == IS_SPAM).mean()
    assert max(right, 1 - right) < 0.70


def tfidf(*vectorizers):
    """Logistic regression on TF-IDF features, only lightly regularized (C = 10)."""
    return make_pipeline(make_union(*vectorizers), LogisticRegression(C=10, max_iter=1_000))


WORDS = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
CHARACTERS = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)


@pytest.mark.parametrize("vectorizers", [[WORDS], [WORDS, CHARACTERS]],
                         ids=["words", "words and characters"])
def test_tfidf_learns_the_task_and_does_not_solve_it(vectorizers):
    assert 0.80 < accuracy(tfidf(*vectorizers), TEXTS) < 0.95


def test_tfidf_learns_nothing_from_shuffled_labels():
    """The measurement itself: where there is nothing to be learned it stays near one half."""
    shuffled = np.random.default_rng(0).permutation(IS_SPAM)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    assert abs(cross_val_score(tfidf(WORDS), TEXTS, shuffled, cv=folds).mean() - 0.5) < 0.08


# Nobody can be reached


# Ranges that no subscriber has: Ofcom's numbers for drama (mobile, London, Leeds, no area) and the
# North American 555-0100 to 555-0199.
RESERVED_NUMBER = re.compile(
    r"07700 900\d{3}|020 7946 0\d{3}|0113 496 0\d{3}|01632 960\d{3}|555-01\d\d"
)
RESERVED_HOST = re.compile(r"(?:[a-z0-9-]+\.)*example\.(?:com|org|net)")
TOP_LEVEL = (
    "com|org|net|edu|gov|int|info|biz|io|co|app|dev|ai|me|ly|gl|uk|us|in|ng|sg|ie|au|nz|ca|eu|de|fr"
    "|xyz|top|shop|site|online|link|click"
)


def live_numbers(text: str) -> list[str]:
    """Strings of seven digits or more, grouped or not, outside the reserved ranges.

    Links are looked at by `live_hosts`; an amount has commas or a decimal point between its digits.
    """
    text = re.sub(r"https?://\S+", " ", text)
    found = re.findall(r"(?<![\w.,])\+?\(?\d(?:[ ()/-]{0,2}\d){6,}(?!\w)", text)
    return [number for number in found if not RESERVED_NUMBER.fullmatch(number)]


def live_hosts(text: str) -> list[str]:
    """Host names outside the reserved domains, with or without a scheme, and mail addresses."""
    found = re.findall(r"https?://([^\s/?#,]+)", text)
    found += re.findall(rf"(?i)(?<![\w.-])((?:[\w-]+\.)+(?:{TOP_LEVEL}))(?![\w-])", text)
    found = [host.rstrip(".") for host in found]
    addresses = re.findall(r"\S+@\S+", text)
    return [host for host in found if not RESERVED_HOST.fullmatch(host.casefold())] + addresses


@pytest.mark.parametrize("text, numbers", [
    ("ring 07700 900123 or 555-0188", []),
    ("ring 07700 901123", ["07700 901123"]),
    ("ring 07911 123456 now", ["07911 123456"]),
    ("on +44 20 7123 4567.", ["+44 20 7123 4567"]),
    ("call (212) 555-7788", ["(212) 555-7788"]),
    ("call 555-0200", ["555-0200"]),
    ("at 5550188!", ["5550188"]),
    ("your code is 209 881, worth £1,200,000.00", []),
])
def test_live_numbers_are_found(text, numbers):
    assert live_numbers(text) == numbers


@pytest.mark.parametrize("text, hosts", [
    ("see https://example.com/a.b and example.org, or http://pay.example.net.", []),
    ("see https://examples.com/a", ["examples.com", "examples.com"]),
    ("see example.com.evil.net/x", ["example.com.evil.net"]),
    ("see bit.ly/x", ["bit.ly"]),
    ("see https://192.0.2.1/x", ["192.0.2.1"]),
    ("write to a@b", ["a@b"]),
    ("ok.see you at 7.30", []),
])
def test_live_hosts_are_found(text, hosts):
    assert live_hosts(text) == hosts


def test_no_number_or_link_is_live():
    assert [text for text in TEXTS if live_numbers(text) or live_hosts(text)] == []


# The card


def test_the_card_counts_right():
    card = data_path("sms.md").read_text(encoding="utf-8")
    for label, chosen in (("ham", ~IS_SPAM), ("spam", IS_SPAM)):
        texts = [text for text, kept in zip(TEXTS, chosen, strict=True) if kept]
        row = [f"{len(texts):,}", str(int(median(map(len, texts)))), str(min(map(len, texts))),
               str(max(map(len, texts)))]
        row += [str(sum(bool(re.search(sign, text)) for text in texts))
                for sign in (r"https?://|example\.", RESERVED_NUMBER, r"[£$€]")]
        assert f"| {label} | {' | '.join(row)} |" in card, row
