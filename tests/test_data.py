"""Chapter 2, module data: reading, windows that lose nothing, batches in a fixed order, padding."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.data import TokenDataset, make_dataloader, pad_sequences, read_text

# ---------------------------------------------------------------------------------------------
# Reading


def test_read_text_joins_line_ends_and_drops_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\0".encode())
    assert read_text(path) == "one\ntwo\nthree\0"


@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_read_text_refuses_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(("content", "offset"),
                         [(b"ab\xff", 2), (b"\xed\xa0\x80", 0), (b"a\xc3", 1)])
def test_read_text_refuses_what_is_not_utf8(tmp_path: Path, content: bytes, offset: int) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8: byte 0x.. at offset {offset}\b"):
        read_text(tmp_path / "a.txt")


def test_read_text_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none.txt")


# ---------------------------------------------------------------------------------------------
# Windows and batches


@settings(deadline=None, max_examples=150)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 15))
def test_windows(n_tokens: int, T: int, stride: int) -> None:
    tokens = list(range(100, 100 + n_tokens))
    if n_tokens < T + 1:
        with pytest.raises(ValueError, match=f"has {n_tokens} tokens; .* need {T + 1}"):
            TokenDataset(tokens, T, stride)
        return
    windows = TokenDataset(tokens, T, stride)
    assert len(windows) == len(range(0, n_tokens - T, stride)) == len(list(windows))
    for i, (inputs, targets) in enumerate(windows):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == tokens[i * stride:i * stride + T]
        assert torch.equal(targets, inputs + 1)                # shifted by one place
    assert torch.equal(windows[-1][0], windows[len(windows) - 1][0])
    for beyond in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError):
            windows[beyond]


@given(st.integers(2, 60), st.integers(1, 12))
def test_each_token_is_a_target_once_where_the_stride_is_the_length(n_tokens: int, T: int) -> None:
    if n_tokens > T:
        windows = TokenDataset(list(range(n_tokens)), T)
        seen = [i for _, targets in windows for i in targets.tolist()]
        assert seen == list(range(1, len(seen) + 1))
        assert n_tokens - 1 - len(seen) < T                    # what is left fills no window


@pytest.mark.parametrize(("T", "stride"), [(0, None), (-3, 1), (4, 0), (4, -1)])
def test_windows_refuse_sizes_below_one(T: int, stride: int | None) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        TokenDataset(list(range(20)), T, stride)


@pytest.mark.parametrize("tokens", [torch.zeros(9, 2), np.zeros((9, 2), np.uint16)])
def test_windows_refuse_a_table(tokens: torch.Tensor | np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"flat sequence of ids, not of shape \(9, 2\)"):
        TokenDataset(tokens, 4)


def test_windows_of_an_empty_text() -> None:
    with pytest.raises(ValueError, match="has 0 tokens"):
        TokenDataset([], 4)


def test_windows_of_every_kind_of_tokens(tmp_path: Path) -> None:
    tokens = [5, 65_535, 8_000, 0, 40_000, 1, 2]               # beyond int16
    array = np.array(tokens, dtype=np.uint16)
    array.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    for kind in (tokens, tuple(tokens), array, mapped, torch.tensor(tokens),
                 torch.tensor(tokens, dtype=torch.int32)):
        inputs, targets = TokenDataset(kind, 3)[1]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == [0, 40_000, 1] and targets.tolist() == [40_000, 1, 2]
    inputs, _ = next(iter(make_dataloader(TokenDataset(mapped, 3), batch_size=2, shuffle=False)))
    inputs.add_(1)                                             # a batch is the reader's to change
    assert mapped.tolist() == tokens


def epoch(loader: DataLoader) -> list[list[int]]:
    return [window for inputs, _ in loader for window in inputs.tolist()]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.integers(1, 7))
def test_the_order_depends_on_the_seed_only(seed: int, batch_size: int) -> None:
    def two_epochs() -> list[list[list[int]]]:
        loader = make_dataloader(TokenDataset(range(300), 5), batch_size=batch_size, seed=seed)
        orders = []
        for _ in range(2):
            torch.rand(random.randrange(1, 9))                 # others draw numbers too
            orders.append(epoch(loader))
        return orders

    torch.manual_seed(1)
    first, second = two_epochs()
    torch.manual_seed(2)
    assert two_epochs() == [first, second]
    assert first != second and sorted(first) == sorted(second)
    before = torch.get_rng_state()
    epoch(make_dataloader(TokenDataset(range(300), 5), batch_size=batch_size, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)          # and it disturbs nobody


def test_seeds_differ_and_order_can_be_kept() -> None:
    orders = [epoch(make_dataloader(TokenDataset(range(300), 5), batch_size=4, seed=seed))
              for seed in (0, 1)]
    assert orders[0] != orders[1]
    kept = make_dataloader(TokenDataset(range(300), 5), batch_size=4, shuffle=False)
    assert epoch(kept) == sorted(orders[0])


def test_batches() -> None:
    loader = make_dataloader(TokenDataset(range(51), 5), batch_size=4)
    assert [tuple(inputs.shape) for inputs, _ in loader] == [(4, 5), (4, 5), (2, 5)]
    whole = make_dataloader(TokenDataset(range(51), 5), batch_size=4, drop_last=True)
    assert [tuple(targets.shape) for _, targets in whole] == [(4, 5), (4, 5)]
    overlapping = make_dataloader(TokenDataset(range(51), 5, stride=1), batch_size=4)
    assert sum(len(inputs) for inputs, _ in overlapping) == 46


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": -2}, "batch_size"),
    ({"batch_size": 4, "drop_last": True}, "3 items, less than one batch of 4"),
])
def test_make_dataloader_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataloader(TokenDataset(range(20), 6), **options)


def test_make_dataloader_takes_any_data_set_and_collate_function() -> None:
    sequences = [[5], [6, 7, 8], [9, 1]]
    loader = make_dataloader(sequences, batch_size=2, shuffle=False,
                             collate_fn=lambda items: pad_sequences(items, padding_value=0))
    batches = [(padded.tolist(), lengths.tolist()) for padded, lengths in loader]
    assert batches == [([[5, 0, 0], [6, 7, 8]], [1, 3]), ([[9, 1]], [2])]
    pairs = list(make_dataloader([(1, 2.0), (3, 4.0)], batch_size=2, shuffle=False))
    assert pairs[0][0].tolist() == [1, 3] and pairs[0][1].tolist() == [2.0, 4.0]


# ---------------------------------------------------------------------------------------------
# Padding


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=5),
       st.integers(-100, 9))
def test_pad_sequences(rows: list[list[int]], padding_value: int) -> None:
    padded, lengths = pad_sequences(rows, padding_value)
    assert padded.dtype == lengths.dtype == torch.int64
    assert padded.shape == (len(rows), max(map(len, rows)))
    for row, filled, length in zip(rows, padded.tolist(), lengths.tolist(), strict=True):
        assert filled[:length] == row                          # ids equal to the padding id stay
        assert filled[length:] == [padding_value] * (padded.shape[1] - length)
    again, _ = pad_sequences([torch.tensor(row) for row in rows], padding_value)
    assert torch.equal(again, padded)


@pytest.mark.parametrize(("rows", "message"), [
    ([], "there are no rows"),
    ([[1, 2], []], "row 1 is empty"),
    ([torch.tensor([], dtype=torch.int64)], "row 0 is empty"),
])
def test_pad_sequences_refuses_rows_without_a_token(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_sequences(rows, 0)
