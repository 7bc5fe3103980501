"""6 · Spam classification.

Made from notebooks/06_spam_classification.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.baselines.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiktoken import Encoding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from helpers.common import atomic_write
from helpers.data import pad_sequences
from helpers.gpt import GPT, GPTConfig, init_weights
from helpers.pretrained import hf_key_map, load_config, save_pretrained
from helpers.tokenizer import encode, eos_token_id, load_tokenizer
from helpers.training import eval_mode, to_device

__all__ = [
    "LABELS",
    "read_messages",
    "dedup_key",
    "drop_duplicates",
    "undersample",
    "stratified_split",
    "encode_message",
    "SpamDataset",
    "collate_messages",
    "GPTForSequenceClassification",
    "predict_logits",
    "classification_loss",
    "confusion_matrix",
    "classification_metrics",
    "evaluate",
    "auxiliary_loss",
    "predict",
    "save_classifier",
    "load_classifier",
]


# cell labels of notebooks/06_spam_classification.ipynb
LABELS = ("ham", "spam")    # the position of a label is its class: ham 0, spam 1


# cell read-messages of notebooks/06_spam_classification.ipynb
def read_messages(path: str | Path, labels: Sequence[str] = LABELS) -> pd.DataFrame:
    """Read labelled messages, one a line: a label, a tab, the text, without a header.

    Only a line feed ends a line (or a carriage return and a line feed). Further tabs and quotation
    marks belong to the text. Blank lines are passed over.

    Returns:
        A table with the columns `label` and `text`, both strings, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no message in the file, or, with the number of the line: not UTF-8, no tab,
            another label, no text after the tab.

    Example:
        >>> read_messages("data/sms.tsv").columns.tolist()
        ['label', 'text']
    """
    data = Path(path).read_bytes()
    try:
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line, byte = error.object[:error.start].count(b"\n") + 1, error.object[error.start]
        raise ValueError(f"{path}, line {line} is not UTF-8: byte {byte:#04x}. Save the file as "
                         "UTF-8, or decode it with its own encoding first.") from None
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line:
            continue
        label, tab, text = line.partition("\t")
        where = f"{path}, line {number}"
        if not tab:
            raise ValueError(f"{where} has no tab: expected a label, a tab and the message, "
                             f"found {line[:40]!r}.")
        if label not in labels:
            header = " Is it a header? Then remove it." if not rows else ""
            raise ValueError(f"{where} has the label {label!r}, expected one of "
                             f"{', '.join(map(repr, labels))}.{header}")
        if not text.strip():
            raise ValueError(f"{where} has a label and no message.")
        rows.append((label, text))
    if not rows:
        raise ValueError(f"{path} holds no message: expected lines of a label, a tab and the text.")
    return pd.DataFrame(rows, columns=["label", "text"])


# cell dedup-key of notebooks/06_spam_classification.ipynb
def dedup_key(text: str) -> str:
    """What two messages have in common that differ in case, digits, spaces and punctuation only.

    A message without any letter is its own key.

    Example:
        >>> dedup_key("WIN £500! Call 07700 900111") == dedup_key("win £900, call 07700 900222")
        True
    """
    letters = re.findall(r"[^\W\d_]+", text.casefold())
    return " ".join(letters) or text.strip()


# cell drop-duplicates of notebooks/06_spam_classification.ipynb
def drop_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the first of the messages that have one `dedup_key`; none of those with two labels.

    Where copies of one message carry different labels, one of them is wrong, and nobody knows
    which: all copies go.

    Example:
        >>> frame = pd.DataFrame({"label": ["ham", "ham"], "text": ["Ok.", "OK"]})
        >>> len(drop_duplicates(frame))
        1
    """
    keys = frame["text"].map(dedup_key)
    disputed = frame["label"].groupby(keys).transform("nunique") > 1
    return frame[~disputed & ~keys.duplicated()].reset_index(drop=True)


# cell hash-order of notebooks/06_spam_classification.ipynb
def _hash_order(frame: pd.DataFrame, label: str, seed: int) -> list[int]:
    """The rows of one label, ordered by a hash of the seed and the `dedup_key` of the text."""
    def digest(row: int) -> str:
        key = f"{seed} {dedup_key(frame['text'].iloc[row])}"
        return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()

    return sorted((frame["label"] == label).to_numpy().nonzero()[0].tolist(), key=digest)


# cell undersample of notebooks/06_spam_classification.ipynb
def undersample(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """As many messages of each label as the rarest has, chosen by hash, in their old order.

    Raises:
        ValueError: there are fewer than two labels.

    Example:
        >>> frame = pd.DataFrame({"label": ["ham", "ham", "spam"], "text": ["a", "b", "c"]})
        >>> undersample(frame)["label"].tolist()
        ['ham', 'spam']
    """
    counts = frame["label"].value_counts()
    if len(counts) < 2:
        raise ValueError(f"Balancing needs two labels or more, found {sorted(counts.index)}.")
    kept = [row for label in counts.index
            for row in _hash_order(frame, label, seed)[:counts.min()]]
    return frame.iloc[sorted(kept)].reset_index(drop=True)


# cell stratified-split of notebooks/06_spam_classification.ipynb
def stratified_split(frame: pd.DataFrame, fractions: Sequence[float] = (0.7, 0.1, 0.2),
                     seed: int = 0) -> list[pd.DataFrame]:
    """Split a table into parts with equal fractions of each label, by a hash of the texts.

    Which part a message gets depends on the messages and the seed alone: not on the order of the
    rows, the machine, or a random number generator. Each part keeps the order of the table.

    Args:
        fractions: of each part; they add up to 1.

    Raises:
        ValueError: fractions that do not add up, repeated messages, or a part that would get no
            message of some label.

    Example:
        >>> frame = pd.DataFrame({"label": ["ham", "spam"] * 2, "text": ["a", "b", "c", "d"]})
        >>> [part["label"].tolist() for part in stratified_split(frame, (0.5, 0.5))]
        [['ham', 'spam'], ['ham', 'spam']]
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"The fractions must be positive and add up to 1, got {tuple(fractions)}.")
    repeats = int(frame["text"].map(dedup_key).duplicated().sum())
    if repeats:
        raise ValueError(f"{repeats} messages repeat another and could land in two parts; "
                         "call drop_duplicates first.")
    parts: list[list[int]] = [[] for _ in fractions]
    for label in sorted(set(frame["label"])):
        rows = _hash_order(frame, label, seed)
        cuts = [round(sum(fractions[:i]) * len(rows)) for i in range(len(fractions) + 1)]
        for part, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            if start == stop:
                raise ValueError(f"{len(rows)} messages labelled {label!r} are too few for parts "
                                 f"of {tuple(fractions)}.")
            part += rows[start:stop]
    return [frame.iloc[sorted(part)].reset_index(drop=True) for part in parts]


# cell encode-message of notebooks/06_spam_classification.ipynb
def encode_message(tokenizer: Encoding, text: str, max_length: int | None = None) -> Tensor:
    """The ids of a message, int64 (T,), T at least 1: cut on the right, one end token if empty.

    Raises:
        TypeError, ValueError: see `encode`; also a max_length below 1.

    Example:
        >>> encode_message(tokenizer, "").tolist() == [eos_token_id(tokenizer)]
        True
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}.")
    ids = encode(tokenizer, text)[:max_length]
    return torch.tensor(ids or [eos_token_id(tokenizer)])


# cell spam-dataset of notebooks/06_spam_classification.ipynb
class SpamDataset(Dataset):
    """Labelled messages as ids; item `i` is `(ids, label)`, an int64 tensor (T,) and an int.

    Args:
        frame: a table with the columns `label` and `text`.
        tokenizer: that of the model.
        max_length: the most tokens of a message that are kept, usually the context_length.
        labels: their names; the position of a name is its class.

    Attributes:
        truncated: how many messages were cut.
        pad_token_id: the id for `collate_messages` to pad with.

    Raises:
        ValueError: no messages, a column missing, or a label that is not among `labels`.

    Example:
        >>> frame = pd.DataFrame({"label": ["spam"], "text": [""]})
        >>> SpamDataset(frame, tokenizer)[0][1]
        1
    """

    def __init__(self, frame: pd.DataFrame, tokenizer: Encoding, max_length: int | None = None,
                 labels: Sequence[str] = LABELS) -> None:
        for name in ("label", "text"):
            if name not in frame.columns:
                raise ValueError(f"the table has no column {name!r}, only {list(frame.columns)}")
        if frame.empty:
            raise ValueError("the table holds no message")
        unknown = sorted(set(frame["label"].map(str)) - set(labels))
        if unknown:
            raise ValueError(f"the table has the label {unknown[0]!r}, expected one of {labels}")
        self.pad_token_id, self.truncated = eos_token_id(tokenizer), 0
        self.items: list[tuple[Tensor, int]] = []
        for name, text in zip(frame["label"], frame["text"], strict=True):
            whole = encode_message(tokenizer, text)
            ids = encode_message(tokenizer, text, max_length)
            self.truncated += len(ids) < len(whole)
            self.items.append((ids, list(labels).index(name)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


# cell collate-messages of notebooks/06_spam_classification.ipynb
def collate_messages(items: Sequence[tuple[Tensor, int]],
                     pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items of a `SpamDataset` as one batch: tokens (B, T), lengths (B,), labels (B,), all int64.

    Raises:
        ValueError: see `pad_sequences`.

    Example:
        >>> items = [(torch.tensor([5, 6]), 1), (torch.tensor([7]), 0)]
        >>> collate_messages(items, pad_token_id=0)
        (tensor([[5, 6],
                [7, 0]]), tensor([2, 1]), tensor([1, 0]))
    """
    rows, labels = zip(*items, strict=True) if items else ((), ())
    return (*pad_sequences(rows, pad_token_id), torch.tensor(labels))


# cell classifier of notebooks/06_spam_classification.ipynb
class GPTForSequenceClassification(nn.Module):
    """A GPT that classifies a text by the hidden state of its last real token.

    Args:
        gpt: the model to start from; it is not copied, and training changes it.
        n_classes: how many classes there are.
        trainable: "head" trains the new layer alone, "last" also the last block and the final
            norm, "all" everything.
        labels: the names of the classes; `LABELS` where there are two, else their numbers.

    Raises:
        ValueError: fewer than two classes, another `trainable`, or labels that do not fit.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> model = GPTForSequenceClassification(GPT(config))
        >>> model(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])).shape
        torch.Size([2, 2])
    """

    def __init__(self, gpt: GPT, n_classes: int = 2, trainable: str = "last",
                 labels: Sequence[str] | None = None) -> None:
        super().__init__()
        if labels is None:
            labels = LABELS if n_classes == 2 else [str(i) for i in range(n_classes)]
        if n_classes < 2 or len(set(labels)) != n_classes or len(labels) != n_classes:
            raise ValueError(f"{n_classes} classes with the labels {list(labels)}: expected two "
                             "classes or more, and a different label for each.")
        self.gpt, self.labels = gpt, tuple(labels)
        self.head = nn.Linear(gpt.config.n_embd, n_classes, bias=False)
        init_weights(self.head)
        self.head.to(gpt.token_embedding.weight)           # device and dtype of the model
        self.set_trainable(trainable)

    @property
    def config(self) -> GPTConfig:
        """The hyperparameters of the GPT inside."""
        return self.gpt.config

    def set_trainable(self, which: str) -> None:
        """Choose which parameters train, "head", "last" or "all"; the others are frozen."""
        parts = {"head": [], "last": [self.gpt.blocks[-1], self.gpt.final_norm], "all": [self.gpt]}
        if which not in parts:
            raise ValueError(f'trainable must be "head", "last" or "all", not {which!r}.')
        self.gpt.requires_grad_(False)
        for part in (self.head, *parts[which]):
            part.requires_grad_(True)
        if not self.config.tie_word_embeddings:
            self.gpt.lm_head.requires_grad_(False)          # the output layer takes no part

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """One vector a row, (B, T, C) to (B, C): that of the last real token."""
        index = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])     # (B, 1, C)
        return hidden.gather(1, index)[:, 0]       # refuses index -1, which [] would take

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, n_classes) for ids (B, T), padded on the right, and true lengths (B,).

        Raises:
            TypeError, ValueError: see `GPT.hidden_states`; also lengths that are not B numbers
                from 1 to T. (On a GPU, where a look at them would make each step wait, a wrong
                number ends in an error of the device.)
        """
        B, T = tokens.shape
        if lengths.shape != (B,):
            raise ValueError(f"expected {B} lengths, one a row, got shape {tuple(lengths.shape)}")
        if lengths.device.type == "cpu" and (lengths.min() < 1 or lengths.max() > T):
            raise ValueError(f"lengths must be 1 to {T}, the batch's width, got {lengths.tolist()}")
        hidden = self.gpt.hidden_states(tokens)                              # (B, T, C)
        return self.head(self.pool(hidden, lengths))                         # (B, n_classes)


# cell predict-logits of notebooks/06_spam_classification.ipynb
def predict_logits(model: nn.Module, loader: Iterable) -> tuple[Tensor, Tensor]:
    """Logits (N, n_classes), float32, and labels (N,) of a loader, on the CPU, in its order.

    The model is in eval mode meanwhile; its mode is restored.

    Raises:
        ValueError: the loader gave no batch.
    """
    device, logits, labels = next(model.parameters()).device, [], []
    with eval_mode(model, loader):
        for tokens, lengths, targets in loader:
            logits.append(model(*to_device((tokens, lengths), device)).float().cpu())
            labels.append(targets.cpu())
    if not logits:
        raise ValueError("There is nothing to predict: the loader is empty.")
    return torch.cat(logits), torch.cat(labels)


# cell classification-loss of notebooks/06_spam_classification.ipynb
def classification_loss(model: nn.Module,
                        batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    """Cross-entropy of the labels for `fit`: the sum over the batch in nats, and its size.

    Args:
        model: maps ids (B, T) and lengths (B,) to logits (B, n_classes).
        batch: tokens (B, T), lengths (B,), labels (B,), int64 each, as from `collate_messages`.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> batch = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([0, 1])
        >>> loss, n = classification_loss(GPTForSequenceClassification(GPT(config)), batch)
        >>> n, 1 < loss.item() < 2
        (2, True)
    """
    tokens, lengths, labels = batch
    logits = model(tokens, lengths)                                   # (B, n_classes)
    return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


# cell confusion-matrix of notebooks/06_spam_classification.ipynb
def confusion_matrix(labels: Tensor, predictions: Tensor, n_classes: int = 2) -> Tensor:
    """How often each label (row) got each prediction (column): int64 (n_classes, n_classes).

    Args:
        labels, predictions: classes, int64 (N,) each.

    Raises:
        ValueError: unequal shapes, or a number that is no class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
        tensor([[1, 1],
                [0, 1]])
    """
    if labels.shape != predictions.shape or labels.dim() != 1:
        raise ValueError(f"expected as many predictions as labels, both of shape (N,), got "
                         f"{tuple(predictions.shape)} and {tuple(labels.shape)}")
    both = torch.stack([labels, predictions])                                   # (2, N)
    if both.numel() and not 0 <= int(both.min()) <= int(both.max()) < n_classes:
        raise ValueError(f"classes are 0 to {n_classes - 1}, found {int(both.min())} to "
                         f"{int(both.max())}")
    cells = labels * n_classes + predictions                                    # (N,)
    return cells.bincount(minlength=n_classes**2).view(n_classes, n_classes)


# cell classification-metrics of notebooks/06_spam_classification.ipynb
def classification_metrics(confusion: Tensor, positive: int = 1) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of one class; a ratio of 0/0 counts as 0.

    Args:
        confusion: from `confusion_matrix`, (n_classes, n_classes).
        positive: the class to find; 1 is spam.

    Example:
        >>> classification_metrics(torch.tensor([[3, 1], [1, 3]]))
        {'accuracy': 0.75, 'precision': 0.75, 'recall': 0.75, 'f1': 0.75}
    """
    def ratio(part: Tensor, whole: Tensor) -> float:
        return part.item() / whole.item() if whole else 0.0

    true_positive = confusion[positive, positive]
    predicted, actual = confusion[:, positive].sum(), confusion[positive].sum()
    return {"accuracy": ratio(confusion.trace(), confusion.sum()),
            "precision": ratio(true_positive, predicted), "recall": ratio(true_positive, actual),
            "f1": ratio(2 * true_positive, predicted + actual)}


# cell evaluate of notebooks/06_spam_classification.ipynb
def evaluate(model: nn.Module, loader: Iterable, positive: int = 1) -> dict:
    """Loss, metrics and confusion matrix of a classifier over a loader, in eval mode.

    Returns:
        loss (mean, in nats), accuracy, precision, recall and f1 of the class `positive`, all
        floats, and confusion, int64 (n_classes, n_classes), a row for each true label.

    Raises:
        ValueError: the loader gave no batch.
    """
    logits, labels = predict_logits(model, loader)                    # (N, n_classes), (N,)
    confusion = confusion_matrix(labels, logits.argmax(dim=-1), logits.shape[-1])
    return {"loss": F.cross_entropy(logits, labels).item(),
            **classification_metrics(confusion, positive), "confusion": confusion}


# cell auxiliary-loss of notebooks/06_spam_classification.ipynb
def auxiliary_loss(model: GPTForSequenceClassification, batch: tuple[Tensor, Tensor, Tensor],
                   lm_weight: float = 0.5) -> tuple[Tensor, int]:
    """`classification_loss` plus `lm_weight` times the language model's loss on the same messages.

    As in Radford et al. 2018, Improving Language Understanding by Generative Pre-Training. Both are
    means, over messages and over tokens, times the number of messages, by which `fit` divides.
    """
    tokens, lengths, labels = batch
    hidden = model.gpt.hidden_states(tokens)                                     # (B, T, C)
    total = F.cross_entropy(model.head(model.pool(hidden, lengths)).float(), labels,
                            reduction="sum")
    real = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]
    logits = model.gpt.lm_head(hidden[:, :-1][real])              # (n, V), at no padding position
    lm = F.cross_entropy(logits.float(), tokens[:, 1:][real], reduction="sum")
    return total + lm_weight * len(labels) * lm / max(1, len(logits)), len(labels)


# cell predict of notebooks/06_spam_classification.ipynb
def predict(model: GPTForSequenceClassification, tokenizer: Encoding, texts: Sequence[str],
            batch_size: int = 32) -> list[tuple[str, float]]:
    """The most probable label of each text, and its probability.

    Texts longer than the model's context are classified by their beginning. The model is in eval
    mode meanwhile; its mode is restored.

    Raises:
        TypeError: `texts` is a single string, or holds something that is no string.
        ValueError: a text holds a lone surrogate.

    Example:
        >>> [(label, probability)] = predict(model, tokenizer, ["You won a boat"])
        >>> label in model.labels and 0.5 <= probability <= 1
        True
    """
    if isinstance(texts, str):
        raise TypeError("predict wants a list of texts; put a single text into a list.")
    device, pad_token_id = model.head.weight.device, eos_token_id(tokenizer)
    rows = [encode_message(tokenizer, text, model.config.context_length) for text in texts]
    results = []
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = pad_sequences(rows[start:start + batch_size], pad_token_id)
            probs = model(*to_device(batch, device)).float().softmax(dim=-1)     # (B, n_classes)
            best = probs.max(dim=-1)
            results += [(model.labels[i], p)
                        for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return results


# cell save-classifier of notebooks/06_spam_classification.ipynb
def save_classifier(model: GPTForSequenceClassification, tokenizer: Encoding,
                    folder: str | Path) -> None:
    """Write a folder that `load_classifier` opens, and `transformers`, with equal logits.

    It is the folder of `GPT2ForSequenceClassification`: that of `save_pretrained`, with the head
    in model.safetensors as `score.weight`, and the labels in config.json.

    Raises:
        ValueError: see `save_pretrained`.
        OSError: a file cannot be written; a file is replaced as a whole or not at all.

    Example:
        >>> save_classifier(model, tokenizer, "my-filter")  # doctest: +SKIP
    """
    folder = Path(folder)
    save_pretrained(model.gpt, tokenizer, folder)
    mapped = load_file(folder / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in mapped.items()}
    del mapped                                  # lets go of the file, which is replaced
    weights["score.weight"] = model.head.weight.detach().cpu().contiguous()
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description |= {"architectures": ["GPT2ForSequenceClassification"],
                    "id2label": dict(enumerate(model.labels)),
                    "label2id": {label: i for i, label in enumerate(model.labels)},
                    "pad_token_id": eos_token_id(tokenizer)}
    with atomic_write(folder / "config.json") as temporary:
        text = json.dumps(description, indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")


# cell load-labels of notebooks/06_spam_classification.ipynb
def _load_labels(path: Path) -> list[str]:
    """The labels that a config.json of a classifier names, in the order of the classes."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: expected a folder of save_classifier.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = raw.get("id2label") if isinstance(raw, dict) else None
    except ValueError as error:
        raise ValueError(f"{path} is not a config.json: {error}") from None
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(f"{path} is not that of a classifier: id2label is {names!r}, expected a "
                         "name for each class. load_pretrained opens a language model.")
    return [names[str(i)] for i in range(len(names))]


# cell load-classifier of notebooks/06_spam_classification.ipynb
def load_classifier(folder: str | Path,
                    trainable: str = "all") -> tuple[GPTForSequenceClassification, Encoding]:
    """Open what `save_classifier` wrote: the classifier in eval mode on the CPU, its tokenizer.

    Args:
        trainable: what trains if it is trained further, see `GPTForSequenceClassification`.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a file that is damaged, foreign, or does not fit the others.

    Example:
        >>> model, tokenizer = load_classifier("my-filter")  # doctest: +SKIP
    """
    folder = Path(folder)
    path, labels = folder / "model.safetensors", _load_labels(folder / "config.json")
    config, tokenizer = load_config(folder / "config.json"), load_tokenizer(folder)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: the folder is not whole.")
    try:
        found = {k.removeprefix("transformer."): v.float() for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    state = {"head.weight": found.get("score.weight")}
    for ours, (theirs, transposed) in hf_key_map(config).items():
        tensor = found.get(theirs)
        state[f"gpt.{ours}"] = tensor.t() if transposed and tensor is not None else tensor
    if config.tie_word_embeddings:
        state["gpt.lm_head.weight"] = state["gpt.token_embedding.weight"]
    model = GPTForSequenceClassification(GPT(config), len(labels), trainable, labels)
    try:
        model.load_state_dict({name: t for name, t in state.items() if t is not None})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from None
    return model.eval(), tokenizer
