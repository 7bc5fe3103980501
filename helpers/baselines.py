"""6 · Spam classification.

Made from notebooks/06_spam_classification.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.classification.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["best_threshold", "words_of", "spam_words", "Tfidf", "fit_logistic_regression"]


# cell best-threshold of notebooks/06_spam_classification.ipynb
def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The score from which on to predict class 1, so that as many labels (0, 1) as can be are met.

    Returns:
        A number between two neighbouring scores, or an infinity where one class is best for all.

    Example:
        >>> best_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]))
        2.5
    """
    values = scores.double().unique()                                            # ascending
    cuts = torch.cat([values.new_tensor([-torch.inf]), (values[1:] + values[:-1]) / 2,
                      values.new_tensor([torch.inf])])                           # (K,)
    right = ((scores.double() >= cuts[:, None]) == labels.bool()).sum(dim=1)     # (K,)
    return cuts[right.argmax()].item()


# cell words-of of notebooks/06_spam_classification.ipynb
def words_of(text: str) -> list[str]:
    """The words of a text, runs of two or more word characters, in lower case.

    Example:
        >>> words_of("Win a boat!")
        ['win', 'boat']
    """
    return re.findall(r"\b\w\w+\b", text.lower())


# cell spam-words of notebooks/06_spam_classification.ipynb
def spam_words(texts: Sequence[str], labels: Sequence[int], n: int) -> list[str]:
    """The n words whose presence speaks most for class 1, by their log odds ratio, best first.

    A word's count is the number of texts that hold it, plus one half in each class, so that a
    word seen once does not come first.

    Example:
        >>> spam_words(["free boat", "free cat", "a cat sat"], [1, 1, 0], n=1)
        ['free']
    """
    totals = Counter(labels)
    counts = {1: Counter(), 0: Counter()}
    for text, label in zip(texts, labels, strict=True):
        counts[label].update(set(words_of(text)))

    def log_odds(word: str, label: int) -> float:
        k = counts[label][word] + 0.5
        return math.log(k / (totals[label] + 1 - k))

    words = sorted(counts[1] | counts[0])
    return sorted(words, key=lambda word: log_odds(word, 0) - log_odds(word, 1))[:n]


# cell tfidf of notebooks/06_spam_classification.ipynb
class Tfidf:
    """TF-IDF features of texts: fit on the training set, then a tensor (N, V) for any texts.

    Words are those of `words_of`. The features are those of scikit-learn's TfidfVectorizer: counts
    times log((1 + n) / (1 + df)) + 1, rows of length 1.

    Example:
        >>> tfidf = Tfidf(["free boat", "free cat"])
        >>> tfidf.vocabulary
        {'boat': 0, 'cat': 1, 'free': 2}
        >>> tfidf(["a free boat", "dog"]).round(decimals=2)
        tensor([[0.8100, 0.0000, 0.5800],
                [0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, texts: Sequence[str]) -> None:
        df = Counter(word for text in texts for word in set(words_of(text)))
        self.vocabulary = {word: i for i, word in enumerate(sorted(df))}
        counts = torch.tensor([df[word] for word in self.vocabulary], dtype=torch.float64)
        self.idf = ((1 + len(texts)) / (1 + counts)).log() + 1                        # (V,)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The features of texts, float64 (N, V); words that were not in the training set are 0."""
        tf = torch.zeros(len(texts), len(self.vocabulary), dtype=torch.float64)       # (N, V)
        for row, text in zip(tf, texts, strict=True):
            for word in words_of(text):
                if word in self.vocabulary:
                    row[self.vocabulary[word]] += 1
        return F.normalize(tf * self.idf, dim=-1)


# cell logistic-regression of notebooks/06_spam_classification.ipynb
def fit_logistic_regression(features: Tensor, labels: Tensor, C: float = 1.0,
                            sample_weight: Tensor | None = None) -> nn.Linear:
    """Two-class logistic regression: a linear layer whose sigmoid is the probability of class 1.

    Minimizes C times the summed cross-entropy plus half the squared norm of the weights, the bias
    not counted, as scikit-learn's LogisticRegression does, to convergence.

    Args:
        features: (N, D), any float type.
        labels: (N,), 0 or 1.
        sample_weight: (N,), of each cross-entropy; 1 unless given.

    Example:
        >>> layer = fit_logistic_regression(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
        >>> (layer(torch.tensor([[2.0]])).sigmoid() > 0.5).item()
        True
    """
    x, y = features.double(), labels.double()
    weight = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-7,
                                  line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y, sample_weight,
                                                  reduction="sum")
        loss = C * loss + weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(objective)
    layer = nn.Linear(x.shape[1], 1).to(features)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.copy_(bias)
    return layer
