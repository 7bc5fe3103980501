"""2 · From text to tensors: tokenization and embeddings.

Made from notebooks/02_text.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.tokenizer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

__all__ = ["TokenDataset", "make_dataloader", "read_text", "pad_sequences"]


# cell token-windows of notebooks/02_text.ipynb
class TokenDataset(Dataset):
    """Windows of a token sequence: item `i` is `(inputs, targets)`, int64 of shape (T,) each.

    Args:
        tokens: N token ids: a list, a tensor, or a (memory-mapped) array.
        context_length: T, the length of a window.
        stride: tokens from the start of one window to the next; `context_length` unless given.

    Raises:
        ValueError: context_length or stride below 1, too few tokens for one window, or tokens that
            are not one flat sequence.

    Example:
        >>> TokenDataset([5, 6, 7, 8, 9], context_length=2)[1]
        (tensor([7, 8]), tensor([8, 9]))
    """

    def __init__(self, tokens: Sequence[int] | Tensor | np.ndarray, context_length: int,
                 stride: int | None = None) -> None:
        stride = context_length if stride is None else stride
        if context_length < 1 or stride < 1:
            raise ValueError("context_length and stride must be at least 1, "
                             f"not {context_length} and {stride}.")
        if len(tokens) < context_length + 1:
            raise ValueError(f"The text has {len(tokens)} tokens; one window of context_length "
                             f"{context_length} and its targets need {context_length + 1}.")
        self.tokens = tokens if isinstance(tokens, np.ndarray) else torch.as_tensor(tokens)
        if self.tokens.ndim != 1:
            raise ValueError("tokens must be one flat sequence of ids, "
                             f"not of shape {tuple(self.tokens.shape)}.")
        self.context_length, self.stride = context_length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.context_length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.stride
        chunk = self.tokens[start:start + self.context_length + 1]
        if isinstance(chunk, np.ndarray):           # uint16 on disk, which embeddings do not take
            chunk = torch.from_numpy(chunk.astype(np.int64))
        chunk = chunk.long()
        return chunk[:-1], chunk[1:]


# cell make-loader of notebooks/02_text.ipynb
def make_dataloader(dataset: Dataset, *, batch_size: int, shuffle: bool = True,
                    drop_last: bool = False, seed: int = 0,
                    collate_fn: Callable | None = None) -> DataLoader:
    """A loader of batches over any data set, with a generator of its own.

    Args:
        dataset: for example a `TokenDataset`, whose batches are (inputs, targets), int64 (B, T).
        drop_last: leave out the last batch if it has fewer than `batch_size` items.
        seed: of the loader's own generator; the order depends on nothing else.
        collate_fn: makes a batch of a list of items; PyTorch's stacking unless given.

    Raises:
        ValueError: batch_size below 1, or no batch is left after `drop_last`.

    Example:
        >>> windows = TokenDataset(range(9), context_length=4)
        >>> inputs, targets = next(iter(make_dataloader(windows, batch_size=2)))
        >>> inputs.shape
        torch.Size([2, 4])
    """
    if drop_last and len(dataset) < batch_size:
        raise ValueError(f"The data set has {len(dataset)} items, less than one batch of "
                         f"{batch_size}, and drop_last leaves none. Give more text, or a smaller "
                         "batch_size.")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last,
                      generator=generator, num_workers=0, collate_fn=collate_fn)


# cell read-text of notebooks/02_text.ipynb
def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file whole, with line ends turned into `\\n`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, or holds nothing but white space.

    Example:
        >>> text = read_text("story.txt")  # doctest: +SKIP
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Save it as UTF-8, or decode it with its own encoding first."
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected some text to read.")
    return text


# cell pad-sequences of notebooks/02_text.ipynb
def pad_sequences(sequences: Sequence[Tensor | Sequence[int]],
                  padding_value: int) -> tuple[Tensor, Tensor]:
    """Sequences of unequal length as one tensor (B, T), padded on the right, and lengths (B,).

    Raises:
        ValueError: no sequence, or one without an element.

    Example:
        >>> pad_sequences([[5, 6], [7]], padding_value=0)
        (tensor([[5, 6],
                [7, 0]]), tensor([2, 1]))
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) < 1:
        what = f"row {lengths.index(0)} is empty" if lengths else "there are no rows"
        raise ValueError(f"A batch needs at least one token in each row, but {what}.")
    rows = [torch.as_tensor(sequence) for sequence in sequences]
    padded = pad_sequence(rows, batch_first=True, padding_value=padding_value)     # (B, T)
    return padded, torch.tensor(lengths)
