"""7 · From a model that continues to one that answers.

Made from notebooks/07_instruction_tuning.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.judge.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tiktoken import Encoding
from torch import Tensor
from torch.utils.data import Dataset

from helpers.data import read_text
from helpers.generation import generate, greedy
from helpers.gpt import GPT
from helpers.tokenizer import encode, eos_token_id
from helpers.training import IGNORE_INDEX

__all__ = [
    "validate_example",
    "load_examples",
    "PROMPT_WITH_INPUT",
    "PROMPT_NO_INPUT",
    "format_prompt",
    "InstructionDataset",
    "collate",
    "train_test_split",
    "generate_responses",
    "exact_match",
    "chrf",
    "compute_metrics",
]


# cell check-entry of notebooks/07_instruction_tuning.ipynb
def validate_example(example: object, where: str = "this example") -> None:
    """Refuse what is not an example of Alpaca's format.

    Args:
        example: should be a mapping with the strings `instruction`, `output` and perhaps `input`.
        where: how the error names the example, for example `"tasks.json, example 3"`.

    Raises:
        ValueError: a field is missing, is not text, holds a lone surrogate, or the
            instruction is empty. An empty output is no error here.

    Example:
        >>> validate_example({"instruction": "Name a colour.", "input": "", "output": "Red."})
    """
    if not isinstance(example, Mapping):
        raise ValueError(f"{where} is a {type(example).__name__}, expected an object with fields")
    for field in ("instruction", "input", "output"):
        if field == "input" and field not in example:
            continue                       # many files leave an empty input out
        if field not in example:
            raise ValueError(f"{where} has no field {field!r}; it has {sorted(map(str, example))}")
        if not isinstance(example[field], str):
            kind = type(example[field]).__name__
            raise ValueError(f"{where}: {field!r} should be text, found {kind}")
        if any("\ud800" <= letter <= "\udfff" for letter in example[field]):
            raise ValueError(f"{where}: {field!r} holds half of a character (a lone surrogate)")
    if not example["instruction"].strip():
        raise ValueError(f"{where} has an empty instruction")


# cell read-entries of notebooks/07_instruction_tuning.ipynb
def load_examples(path: str | Path) -> list[dict[str, str]]:
    """Read a JSON file in Alpaca's format: a list of objects, see `validate_example`.

    Entries whose output is empty are left out, with one warning that gives their number.
    Each example has an `input` afterwards; other fields are kept as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not UTF-8, empty, not JSON, not a list, a bad example (named by its place,
            counted from 1), or nothing left.

    Example:
        >>> load_examples("data/instructions.json")[0].keys()
        dict_keys(['input', 'instruction', 'output'])
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column "
                         f"{error.colno}. Expected one list of examples.") from None
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a list of examples")
    for number, example in enumerate(found, start=1):
        validate_example(example, where=f"{path}, example {number}")
    kept = [{"input": "", **example} for example in found if example["output"].strip()]
    if not kept:
        raise ValueError(f"{path} has no example with an output ({len(found)} examples in all)")
    if len(kept) < len(found):
        warnings.warn(f"{len(found) - len(kept)} of {len(found)} examples in {Path(path).name} "
                      "have an empty output and are left out", stacklevel=2)
    return kept


# cell template-input of notebooks/07_instruction_tuning.ipynb
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


# cell template-no-input of notebooks/07_instruction_tuning.ipynb
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


# cell format-prompt of notebooks/07_instruction_tuning.ipynb
def format_prompt(example: Mapping[str, str]) -> str:
    """The text that stands before the answer, in Alpaca's format.

    An input of nothing but white space counts as none. The output is not part of the prompt,
    so an example without one is welcome: that is how you ask something new.

    Raises:
        ValueError: the example is not a mapping, or its instruction is missing or empty.

    Example:
        >>> format_prompt({"instruction": "Name a colour."})[-46:]
        '### Instruction:\\nName a colour.\\n\\n### Response:'
    """
    validate_example({"output": "", **example} if isinstance(example, Mapping) else example)
    if example.get("input", "").strip():
        return PROMPT_WITH_INPUT.format(instruction=example["instruction"], input=example["input"])
    return PROMPT_NO_INPUT.format(instruction=example["instruction"])


# cell instruction-dataset of notebooks/07_instruction_tuning.ipynb
class InstructionDataset(Dataset):
    """Entries as token ids: the prompt, the response, one end token.

    Args:
        examples: dictionaries as from `load_examples`.
        tokenizer: from `load_tokenizer` or `load_pretrained`.
        max_length: how many tokens the model may be shown, usually its `context_length`. The
            end token is only ever predicted, never shown, so prompt and response may fill it.
            Longer examples are left out whole: a cut answer teaches to stop in the middle.

    Items are `(ids, start)`: a LongTensor (n,) with n <= max_length + 1, and the int where the
    response begins, 0 < start < n - 1. So every item has a response to count.

    Attributes:
        examples: the examples kept, in the order of the items.
        dropped: how many were too long.

    Raises:
        ValueError: a broken example, an empty output, or no example that fits.

    Example:
        >>> ids, start = InstructionDataset([{"instruction": "Name a colour.",
        ...                                   "output": "Red."}], tokenizer, 256)[0]
        >>> tokenizer.decode(ids[start:].tolist())
        'Red.<|endoftext|>'
    """

    def __init__(self, examples: Sequence[Mapping[str, str]], tokenizer: Encoding,
                 max_length: int):
        self.examples: list[Mapping[str, str]] = []
        self.items: list[tuple[Tensor, int]] = []
        lengths = []
        for number, example in enumerate(examples, start=1):
            validate_example(example, where=f"example {number}")
            if not example["output"].strip():
                raise ValueError(f"example {number} has an empty output; load_examples drops those")
            prompt = encode(tokenizer, format_prompt(example))
            response = encode(tokenizer, example["output"], end=True)
            lengths.append(len(prompt) + len(response) - 1)
            if lengths[-1] <= max_length:
                self.examples.append(example)
                self.items.append((torch.tensor(prompt + response), len(prompt)))
        self.dropped = len(lengths) - len(self.items)
        if not self.items:
            raise ValueError(f"no example fits: {len(lengths)} given, max_length is {max_length}"
                             + (f", the shortest needs {min(lengths)}" if lengths else ""))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


# cell collate of notebooks/07_instruction_tuning.ipynb
def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Items of an `InstructionDataset` as one batch for `lm_loss`.

    What counts is decided by position, never by looking at an id: the padding carries the id
    of the end token, and masking that id would mask every real end token with it.

    Args:
        items: B pairs of ids (n,) and the place where the response begins.

    Returns:
        `(inputs, targets)`, LongTensors (B, T) with T the longest n less one. Targets are
        `IGNORE_INDEX` in the prompt and in the padding; the response and one end token count.

    Raises:
        ValueError: no items, or a row in which nothing would count.

    Example:
        >>> collate([(torch.tensor([5, 6, 7]), 1), (torch.tensor([5, 7]), 1)])[1]
        tensor([[   6,    7],
                [   7, -100]])
    """
    if not items:
        raise ValueError("collate got no items")
    length = max(len(ids) for ids, _ in items) - 1
    inputs = torch.zeros(len(items), length, dtype=torch.long)               # (B, T)
    targets = torch.full((len(items), length), IGNORE_INDEX, dtype=torch.long)     # (B, T)
    for row, (ids, start) in enumerate(items):
        if not 0 < start < len(ids):
            raise ValueError(f"row {row}: the response begins at {start} of {len(ids)} tokens, "
                             "so nothing in it would count")
        n = len(ids) - 1
        inputs[row, :n] = ids[:-1]
        inputs[row, n:] = ids[-1]            # padding: causal attention never looks at it
        targets[row, start - 1:n] = ids[start:]
    return inputs, targets


# cell split-entries of notebooks/07_instruction_tuning.ipynb
def train_test_split(examples: Sequence[Mapping[str, str]], held_out: float = 0.15,
                  seed: int = 0) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """Shuffle and split into `(train, held_out)`; equal questions stay on one side.

    Args:
        held_out: share of the distinct questions (instruction and input) that is held out.

    Raises:
        ValueError: `held_out` is not between 0 and 1, or one side would be empty.

    Example:
        >>> train, test = train_test_split(examples, held_out=0.2)
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, got {held_out}")
    def question(example: Mapping[str, str]) -> str:
        return " ".join(format_prompt(example).casefold().split())
    questions = sorted({question(example) for example in examples})
    if len(questions) < 2:
        raise ValueError(f"cannot split {len(questions)} distinct questions in two")
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    n = min(max(1, round(held_out * len(questions))), len(questions) - 1)
    chosen = {questions[i] for i in order[:n].tolist()}
    mixed = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    sides: tuple[list, list] = ([], [])
    for i in mixed:
        sides[question(examples[i]) in chosen].append(examples[i])
    return sides


# cell respond of notebooks/07_instruction_tuning.ipynb
def generate_responses(model: GPT, tokenizer: Encoding,
            examples: Mapping[str, str] | Sequence[Mapping[str, str]],
            max_new_tokens: int = 100, sample: Callable[[Tensor], Tensor] = greedy, *,
            batch_size: int = 16) -> str | list[str]:
    """The model's answer to one example, or its answers to a list of examples.

    Args:
        examples: what to ask; an `output` in it is not looked at.
        max_new_tokens: where to stop if the end token does not come.
        sample: chooses the next token from logits (B, V), as in `generate`.
        batch_size: how many examples go through the model together.

    Returns:
        The text of the answer alone, without the end token and without white space around it;
        a list of them, in the order given, for a list.

    Raises:
        ValueError: not an example, see `format_prompt`.

    Example:
        >>> generate_responses(model, tokenizer, {"instruction": "What is the opposite of hot?"})
        'The opposite of hot is cold.'
    """
    batch = [examples] if isinstance(examples, (Mapping, str)) else list(examples)
    prompts = [encode(tokenizer, format_prompt(example)) for example in batch]
    end, answers = eos_token_id(tokenizer), []
    for first in range(0, len(prompts), batch_size):
        asked = prompts[first:first + batch_size]
        made = generate(model, asked, max_new_tokens, sample, eos_token_id=end)
        for prompt, ids in zip(asked, made, strict=True):
            new = ids[len(prompt):]
            new = new[:-1] if new and new[-1] == end else new
            # "ignore": the limit may fall inside a character of several tokens
            answers.append(tokenizer.decode(new, errors="ignore").strip())
    return answers[0] if isinstance(examples, Mapping) else answers


# cell pairs of notebooks/07_instruction_tuning.ipynb
def _pairs(predictions: str | Sequence[str],
           references: str | Sequence[str]) -> list[tuple[str, str]]:
    """Two texts, or two lists of texts, as a list of pairs; refuses unequal and empty lists."""
    if isinstance(predictions, str) != isinstance(references, str):
        raise ValueError("give two texts or two lists of texts, not one of each")
    if isinstance(predictions, str):
        predictions, references = [predictions], [references]
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; "
                         "expected as many of each, and at least one")
    return list(zip(predictions, references, strict=True))


# cell exact-match of notebooks/07_instruction_tuning.ipynb
def exact_match(predictions: str | Sequence[str], references: str | Sequence[str]) -> float:
    """Share of predictions that equal their reference once both are normalised.

    Normalised: case folded, white space runs made one space, one final full stop left out.

    Args:
        predictions: one text, or a list of them.
        references: one text, or a list of equal length.

    Returns:
        A number from 0.0 to 1.0.

    Raises:
        ValueError: the lists differ in length, or are empty.

    Example:
        >>> exact_match(["It is  Red", "blue"], ["it is red.", "green"])
        0.5
    """
    def normal(text: str) -> str:
        return " ".join(text.casefold().split()).removesuffix(".").rstrip()
    pairs = _pairs(predictions, references)
    return sum(normal(p) == normal(r) for p, r in pairs) / len(pairs)


# cell chrf of notebooks/07_instruction_tuning.ipynb
def chrf(predictions: str | Sequence[str], references: str | Sequence[str],
         max_n: int = 6, beta: float = 2.0) -> float:
    """chrF2 from 0 to 100: shared character n-grams, n = 1..6, white space left out.

    For a list the counts of all texts are added up first (the corpus score), so long texts
    weigh more; it is not the mean of the single scores. Equal to sacrebleu's `CHRF()`.

    Raises:
        ValueError: the lists differ in length, or are empty.

    Example:
        >>> round(chrf("The mouses ran.", "The mice ran."), 1)
        33.8
    """
    pairs = [("".join(p.split()), "".join(r.split())) for p, r in _pairs(predictions, references)]
    precisions, recalls = [], []
    for n in range(1, max_n + 1):
        shared = n_predicted = n_reference = 0
        for texts in pairs:
            p, r = (Counter(t[i:i + n] for i in range(len(t) - n + 1)) for t in texts)
            shared += (p & r).total()
            n_predicted += p.total() if r else 0       # as sacrebleu: nothing to compare with
            n_reference += r.total()
        if n_predicted and n_reference:
            precisions.append(shared / n_predicted)
            recalls.append(shared / n_reference)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


# cell score of notebooks/07_instruction_tuning.ipynb
def compute_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match (0 to 1) and chrF (0 to 100) of answers and their references.

    Example:
        >>> compute_metrics(["Red.", "Blue."], ["red", "Blue."])
        {'exact_match': 1.0, 'chrf': 87.59852396649075}
    """
    return {"exact_match": exact_match(predictions, references),
            "chrf": chrf(predictions, references)}
