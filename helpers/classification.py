"""6 · From the next token to a verdict.

Made from notebooks/06_spam_classification.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiktoken import Encoding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from helpers.common import atomic_write
from helpers.gpt import GPT, GPTConfig, init_weights
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import encode, eos_token_id
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
    "pad_batch",
    "collate_messages",
    "message_dataloader",
    "GPTForSequenceClassification",
    "classification_loss",
    "confusion_matrix",
    "classification_metrics",
    "evaluate",
    "predict",
    "save_classifier",
    "load_classifier",
]


# cell labels of notebooks/06_spam_classification.ipynb
LABELS = ("ham", "spam")    # the place of a label is its number: ham 0, spam 1


# cell read-messages of notebooks/06_spam_classification.ipynb
def read_messages(path: str | Path, labels: Sequence[str] = LABELS) -> pd.DataFrame:
    """Read labelled messages, one a line: a label, a tab, the text, without a header.

    Only a line feed ends a line (or a carriage return and a line feed). Further tabs belong to the
    text, and so do quotation marks: this is not a spreadsheet's CSV. Blank lines are passed over.

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


# cell message-key of notebooks/06_spam_classification.ipynb
def dedup_key(text: str) -> str:
    """What two messages share that are the same but for case, digits, spaces and punctuation.

    A message without any letter is its own key.

    Example:
        >>> dedup_key("WIN £500! Call 07700 900111") == dedup_key("win £900, call 07700 900222")
        True
    """
    letters = re.findall(r"[^\W\d_]+", text.casefold())
    return " ".join(letters) or text.strip()


# cell remove-repeats of notebooks/06_spam_classification.ipynb
def drop_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the first of the messages that share a `dedup_key`; none of those with two labels.

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


# cell balance of notebooks/06_spam_classification.ipynb
def undersample(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """As many messages of each label as the rarest has, drawn at random, in their old order.

    Raises:
        ValueError: there are fewer than two labels.

    Example:
        >>> frame = pd.DataFrame({"label": ["ham", "ham", "spam"], "text": ["a", "b", "c"]})
        >>> undersample(frame)["label"].tolist()
        ['ham', 'spam']
    """
    labels = frame["label"].to_numpy()
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"To balance takes two labels or more, found {names}.")
    n = min((labels == name).sum() for name in names)
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for name in names:
        rows = (labels == name).nonzero()[0]
        kept += rows[torch.randperm(len(rows), generator=generator)[:n].numpy()].tolist()
    return frame.iloc[sorted(kept)].reset_index(drop=True)


# cell split of notebooks/06_spam_classification.ipynb
def stratified_split(frame: pd.DataFrame, fractions: Sequence[float] = (0.7, 0.1, 0.2),
          seed: int = 0) -> list[pd.DataFrame]:
    """Draw parts at random, each with the same mixture of labels, and no message in two of them.

    Args:
        fractions: the share of each part; they add up to 1.

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
    labels, ends = frame["label"].to_numpy(), torch.tensor(fractions).double().cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[int]] = [[] for _ in fractions]
    for name in sorted(set(labels)):
        rows = (labels == name).nonzero()[0]
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        cuts = [0, *(ends * len(rows)).round().long().tolist()]
        for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
            if start == stop:
                raise ValueError(f"{len(rows)} messages labelled {name!r} are too few for parts of "
                                 f"{tuple(fractions)}.")
            part += rows[start:stop].tolist()
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
        labels: their names; the place of a name is its number.

    Attributes:
        truncated: how many messages were cut.
        pad_token_id: the id that fills up the rows of a batch.

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


# cell pad-batch of notebooks/06_spam_classification.ipynb
def pad_batch(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """One rectangle from rows of unequal length: ids (B, T), padded on the right, and lengths (B,).

    Raises:
        ValueError: no rows, or a row without a token.

    Example:
        >>> pad_batch([torch.tensor([5, 6]), torch.tensor([7])], pad_id=0)
        (tensor([[5, 6],
                [7, 0]]), tensor([2, 1]))
    """
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        what = f"row {lengths.index(0)} is empty" if lengths else "there are no rows"
        raise ValueError(f"A batch needs at least one token in each row, but {what}.")
    tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)  # (B, T)
    return tokens, torch.tensor(lengths)


# cell collate of notebooks/06_spam_classification.ipynb
def collate_messages(items: Sequence[tuple[Tensor, int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items of a `SpamDataset` as one batch: tokens (B, T), lengths (B,), labels (B,), all int64.

    Raises:
        ValueError: see `pad_batch`.

    Example:
        >>> collate_messages([(torch.tensor([5, 6]), 1), (torch.tensor([7]), 0)], pad_id=0)[2]
        tensor([1, 0])
    """
    rows, labels = zip(*items, strict=True) if items else ((), ())
    return (*pad_batch(rows, pad_id), torch.tensor(labels))


# cell message-loader of notebooks/06_spam_classification.ipynb
def message_dataloader(data: SpamDataset, batch_size: int, *, shuffle: bool = False,
                   seed: int = 0) -> DataLoader:
    """A loader of batches `(tokens, lengths, labels)` of a `SpamDataset`.

    Args:
        seed: of the loader's own generator; the order depends on nothing else.

    Example:
        >>> tokens, lengths, labels = next(iter(message_dataloader(train, batch_size=8)))
        >>> tokens.shape == (8, lengths.max())
        True
    """
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, num_workers=0,
                      collate_fn=partial(collate_messages, pad_id=data.pad_token_id),
                      generator=torch.Generator().manual_seed(seed))


# cell classifier of notebooks/06_spam_classification.ipynb
class GPTForSequenceClassification(nn.Module):
    """A GPT that judges a whole text by the vector of its last real token.

    Args:
        gpt: the model to start from; it is not copied, and training changes it.
        n_classes: how many verdicts there are.
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
        weight = gpt.token_embedding.weight
        self.gpt, self.labels = gpt, tuple(labels)
        self.head = nn.Linear(gpt.config.n_embd, n_classes).to(weight.device, weight.dtype)
        init_weights(self.head)
        self.set_trainable(trainable)

    @property
    def config(self) -> GPTConfig:
        """The shape of the GPT inside; `fit` writes it into checkpoints."""
        return self.gpt.config

    def set_trainable(self, which: str) -> None:
        """Choose what trains: "head", "last" or "all"."""
        parts = {"head": [], "last": [self.gpt.blocks[-1], self.gpt.final_norm], "all": [self.gpt]}
        if which not in parts:
            raise ValueError(f'trainable must be "head", "last" or "all", not {which!r}.')
        self.gpt.requires_grad_(False)
        for part in parts[which]:
            part.requires_grad_(True)
        if not self.config.tie_word_embeddings:
            self.gpt.lm_head.requires_grad_(False)          # the output layer takes no part
        self.head.requires_grad_(True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, n_classes) for ids (B, T), padded on the right, and true lengths (B,).

        Raises:
            TypeError, ValueError: see `GPT.hidden_states`; also lengths that are not B numbers from 1 to
                T (their range is looked at on the CPU only, where it makes no step wait).
        """
        B, T = tokens.shape
        if lengths.shape != (B,):
            raise ValueError(f"expected {B} lengths, one a row, got shape {tuple(lengths.shape)}")
        if lengths.device.type == "cpu" and (lengths.min() < 1 or lengths.max() > T):
            raise ValueError(f"lengths must be 1 to {T}, the batch's width, got {lengths.tolist()}")
        hidden = self.gpt.hidden_states(tokens)                                     # (B, T, C)
        last = hidden[torch.arange(B, device=tokens.device), lengths - 1]    # (B, C)
        return self.head(last)                                               # (B, n_classes)


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
    """How often each label (row) got each verdict (column): int64 (n_classes, n_classes).

    Args:
        labels, predictions: class numbers, int64 (N,) each.

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


# cell scores of notebooks/06_spam_classification.ipynb
def classification_metrics(confusion: Tensor, positive: int = 1) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of one class; a score of 0/0 counts as 0.

    Args:
        confusion: from `confusion_matrix`, (n_classes, n_classes).
        positive: the class to find; 1 is spam.

    Example:
        >>> classification_metrics(torch.tensor([[3, 1], [1, 3]]))
        {'accuracy': 0.75, 'precision': 0.75, 'recall': 0.75, 'f1': 0.75}
    """
    def ratio(part: Tensor, whole: Tensor) -> float:
        return part.item() / whole.item() if whole else 0.0

    hits = confusion[positive, positive]
    called, there = confusion[:, positive].sum(), confusion[positive].sum()
    return {"accuracy": ratio(confusion.trace(), confusion.sum()), "precision": ratio(hits, called),
            "recall": ratio(hits, there), "f1": ratio(2 * hits, called + there)}


# cell evaluate of notebooks/06_spam_classification.ipynb
def evaluate(model: nn.Module, loader: Iterable, positive: int = 1) -> dict:
    """Judge every message of a loader, in eval mode; the mode is restored.

    Returns:
        loss (mean, in nats), accuracy, precision, recall and f1 of the class `positive`, all
        floats, and confusion, int64 (n_classes, n_classes) on the CPU, a row for each true label.

    Raises:
        ValueError: the loader gave no batch.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> batch = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([0, 1])
        >>> sorted(evaluate(GPTForSequenceClassification(GPT(config)), [batch]))
        ['accuracy', 'confusion', 'f1', 'loss', 'precision', 'recall']
    """
    device = next(model.parameters()).device
    total, confusion = 0.0, None
    with eval_mode(model):
        for batch in loader:
            tokens, lengths, labels = to_device(batch, device)
            logits = model(tokens, lengths).float()                       # (B, n_classes)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            counts = confusion_matrix(labels.cpu(), logits.argmax(dim=-1).cpu(), logits.shape[-1])
            confusion = counts if confusion is None else confusion + counts
    if confusion is None:
        raise ValueError("There is nothing to evaluate: the loader is empty.")
    return {"loss": total / int(confusion.sum()), **classification_metrics(confusion, positive),
            "confusion": confusion}


# cell classify of notebooks/06_spam_classification.ipynb
def predict(model: GPTForSequenceClassification, tokenizer: Encoding, texts: Sequence[str],
             batch_size: int = 32) -> list[tuple[str, float]]:
    """The verdict on each text: the likeliest label, and the probability the model gives it.

    Texts longer than the model's context are judged by their beginning. The model is in eval mode
    meanwhile; its mode is restored.

    Raises:
        TypeError: `texts` is a single string, or holds something that is no string.
        ValueError: a text holds a lone surrogate.

    Example:
        >>> [(label, probability)] = predict(model, tokenizer, ["You won a boat"])
        >>> label in model.labels and 0.5 <= probability <= 1
        True
    """
    if isinstance(texts, str):
        raise TypeError("classify wants a list of texts; put a single text into a list.")
    device, end = model.head.weight.device, eos_token_id(tokenizer)
    rows = [encode_message(tokenizer, text, model.config.context_length) for text in texts]
    results = []
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = to_device(pad_batch(rows[start:start + batch_size], end), device)
            best = model(*batch).float().softmax(dim=-1).max(dim=-1)         # over (B, n_classes)
            results += [(model.labels[i], p)
                        for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return results


# cell save-classifier of notebooks/06_spam_classification.ipynb
def save_classifier(model: GPTForSequenceClassification, tokenizer: Encoding, folder: str | Path) -> None:
    """Write a model folder as `save_pretrained` does, and the head as classifier.safetensors.

    Raises:
        ValueError: see `save_pretrained`.
        OSError: the folder cannot be written; without its last file it does not pass as whole.

    Example:
        >>> save_classifier(model, tokenizer, "my-filter")  # doctest: +SKIP
    """
    head_file = Path(folder) / "classifier.safetensors"
    head_file.unlink(missing_ok=True)        # it would belong to the weights that are replaced
    save_pretrained(model.gpt, tokenizer, folder)
    head = {name: tensor.detach().cpu().contiguous()
            for name, tensor in model.head.state_dict().items()}
    about = {"kind": "classifier", "labels": json.dumps(model.labels)}
    with atomic_write(head_file) as temporary:
        save_file(head, temporary, metadata=about)


# cell load-classifier of notebooks/06_spam_classification.ipynb
def load_classifier(folder: str | Path) -> tuple[GPTForSequenceClassification, Encoding]:
    """Open what `save_classifier` wrote: the classifier in eval mode on the CPU, its tokenizer.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: a file that is damaged, foreign, or does not fit the others.

    Example:
        >>> model, tokenizer = load_classifier("my-filter")  # doctest: +SKIP
    """
    path = Path(folder) / "classifier.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no classifier.safetensors: expected a folder that "
                                "save_classifier wrote. load_pretrained opens one without it.")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    if about.get("kind") != "classifier" or "labels" not in about:
        raise ValueError(f"{path} was not written by save_classifier: its header says {about}, "
                         "expected kind 'classifier' and the names of the labels.")
    labels = json.loads(about["labels"])
    gpt, tokenizer = load_pretrained(folder)
    n = len(labels)
    expected = {"weight": (n, gpt.config.n_embd), "bias": (n,)}
    found = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if found != expected:
        raise ValueError(f"{path} does not fit its model: it holds {found}, expected {expected}.")
    model = GPTForSequenceClassification(gpt, n, labels=labels)
    model.head.load_state_dict(head)
    return model.eval(), tokenizer
