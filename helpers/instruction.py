"""7 · Instruction tuning.

Made from notebooks/07_instruction_tuning.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.chat, helpers.judge, helpers.gguf_export.
"""

import hashlib
import json
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from tiktoken import Encoding
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from helpers.data import pad_sequences, read_text
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
    "masked_lm_loss",
    "length_grouped_batches",
    "group_key",
    "train_val_test_split",
    "generate_responses",
    "exact_match",
    "chrf",
    "compute_metrics",
    "wilson_interval",
    "bootstrap_interval",
    "paired_bootstrap",
    "score_by_kind",
]


# cell validate-example of notebooks/07_instruction_tuning.ipynb
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


# cell load-examples of notebooks/07_instruction_tuning.ipynb
def load_examples(path: str | Path) -> list[dict[str, str]]:
    """Read a JSON file in Alpaca's format: a list of objects, see `validate_example`.

    Examples whose output is empty are left out, with one warning that gives their number.
    Each example has an `input` afterwards; other fields are kept as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not UTF-8, empty, not JSON, not a list, a bad example (named by its place,
            counted from 1), or nothing left.

    Example:
        >>> sorted(load_examples("data/instructions.json")[0])
        ['input', 'instruction', 'kind', 'output']
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
    """The prompt of an example: the text before the response, in Alpaca's template.

    An input of nothing but white space counts as none. The output is not part of the prompt, so an
    example without one can be asked.

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
    """Examples as token ids and labels: the prompt, the response, one end token.

    Args:
        examples: dictionaries as from `load_examples`.
        tokenizer: from `load_tokenizer` or `load_pretrained`.
        max_length: how many tokens the model may be shown, usually its `context_length`. The
            end token is only ever predicted, never shown, so prompt and response may fill it.
            Longer examples are left out whole: a truncated one would have no end token.
        mask_prompt: False lets the tokens of the prompt count as well.

    Items are `(ids, labels)`, int64 tensors (n,) each, with n <= max_length + 1. A label is the id
    at its own place, or `IGNORE_INDEX` where it does not count; `collate` shifts them.

    Attributes:
        examples: the examples kept, in the order of the items.
        dropped: how many were too long.

    Raises:
        ValueError: a broken example, an empty output, or no example that fits.

    Example:
        >>> ids, labels = InstructionDataset([{"instruction": "Name a colour.",
        ...                                    "output": "Red."}], tokenizer, 256)[0]
        >>> tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())
        'Red.<|endoftext|>'
    """

    def __init__(self, examples: Sequence[Mapping[str, str]], tokenizer: Encoding,
                 max_length: int, *, mask_prompt: bool = True) -> None:
        self.examples: list[Mapping[str, str]] = []
        self.items: list[tuple[Tensor, Tensor]] = []
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
                ids = torch.tensor(prompt + response)                                    # (n,)
                labels = ids.clone()
                labels[:len(prompt) if mask_prompt else 0] = IGNORE_INDEX
                self.items.append((ids, labels))
        self.dropped = len(lengths) - len(self.items)
        if not self.items:
            raise ValueError(f"no example fits: {len(lengths)} given, max_length is {max_length}"
                             + (f", the shortest needs {min(lengths)}" if lengths else ""))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


# cell collate of notebooks/07_instruction_tuning.ipynb
def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Items `(ids, labels)` as one batch `(inputs, targets)` for a loss: shifted and padded.

    What counts is decided by the labels, never by the value of an id.

    Args:
        items: B pairs of ids (n,) and labels (n,), of any lengths.

    Returns:
        Two int64 tensors (B, T), T the longest n less one. Inputs are padded with 0, which causal
        attention never lets a real token see; targets with `IGNORE_INDEX`.

    Raises:
        ValueError: no items, or a row in which nothing counts.

    Example:
        >>> ids = torch.tensor([5, 6, 7])
        >>> collate([(ids, torch.tensor([-100, 6, 7])), (ids[1:], torch.tensor([-100, 7]))])[1]
        tensor([[   6,    7],
                [   7, -100]])
    """
    inputs, _ = pad_sequences([ids[:-1] for ids, _ in items], 0)                          # (B, T)
    targets, _ = pad_sequences([labels[1:] for _, labels in items], IGNORE_INDEX)         # (B, T)
    empty = (targets == IGNORE_INDEX).all(dim=1)                                          # (B,)
    if empty.any():
        raise ValueError(f"row {int(empty.nonzero()[0])}: no label after the first token counts, "
                         "so the row teaches nothing")
    return inputs, targets


# cell masked-lm-loss of notebooks/07_instruction_tuning.ipynb
def masked_lm_loss(model: GPT, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """`lm_loss` with logits only where a target counts: the same number in less time and memory.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> inputs, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, -100, 4]])
        >>> masked_lm_loss(GPT(config), (inputs, targets))[1]
        1
    """
    inputs, targets = batch
    counted = targets != IGNORE_INDEX                                                     # (B, T)
    hidden = model.hidden_states(inputs)[counted]                                         # (N, C)
    logits = model.lm_head(hidden)                                                        # (N, V)
    return F.cross_entropy(logits.float(), targets[counted], reduction="sum"), len(hidden)


# cell length-grouped-batches of notebooks/07_instruction_tuning.ipynb
def length_grouped_batches(items: Sequence[tuple[Tensor, Tensor]], batch_size: int,
                           seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of items of like length, so that little is padded; the batches in random order.

    Example:
        >>> items = [(torch.arange(n), torch.arange(n)) for n in (9, 3, 8, 3)]
        >>> sorted(inputs.shape for inputs, _ in length_grouped_batches(items, 2))
        [torch.Size([2, 2]), torch.Size([2, 8])]
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))
    batches = [collate([items[i] for i in order[start:start + batch_size]])
               for start in range(0, len(order), batch_size)]
    generator = torch.Generator().manual_seed(seed)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# cell group-key of notebooks/07_instruction_tuning.ipynb
def group_key(example: Mapping[str, str]) -> str:
    """What examples share that must stay on one side of a split: the input, else the instruction.

    Example:
        >>> group_key({"instruction": "Write the plural.", "input": "Mouse "})
        'mouse'
    """
    return " ".join((example.get("input", "").strip() or example["instruction"]).casefold().split())


# cell split of notebooks/07_instruction_tuning.ipynb
def train_val_test_split(examples: Sequence[Mapping[str, str]],
                         fractions: Sequence[float] = (0.85, 0.05, 0.10)
                         ) -> tuple[list[Mapping[str, str]], ...]:
    """Split by a hash of `group_key`: which part an example is in depends on nothing else.

    So examples with the same input stay together, and examples that are added later move no others.
    The sizes come close to the fractions, not exactly.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1.

    Example:
        >>> train, validation, test = train_val_test_split(examples)
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"the fractions must be positive and add up to 1, got {tuple(fractions)}")
    ends = [sum(fractions[:i + 1]) for i in range(len(fractions) - 1)]
    parts: tuple[list, ...] = tuple([] for _ in fractions)
    for example in examples:
        digest = hashlib.sha256(group_key(example).encode("utf-8", "surrogatepass")).digest()
        parts[bisect_right(ends, int.from_bytes(digest[:8]) / 2**64)].append(example)
    return parts


# cell generate-responses of notebooks/07_instruction_tuning.ipynb
def generate_responses(model: GPT, tokenizer: Encoding,
                       examples: Mapping[str, str] | Sequence[Mapping[str, str]],
                       max_new_tokens: int = 100, sample: Callable[[Tensor], Tensor] = greedy, *,
                       batch_size: int = 16, return_ended: bool = False):
    """The model's response to one example, or its responses to a list of examples.

    Args:
        examples: what to ask; an `output` in it is not used.
        max_new_tokens: where to stop if the end token does not come.
        sample: chooses the next token from logits (B, V), as in `generate`.
        batch_size: how many examples go through the model together.
        return_ended: also say of each response whether it ended with the end token.

    Returns:
        The text of the response alone, without the end token and without white space around it; a
        list of them, in the order given, for a list. With `return_ended` a pair: this, and the
        same of bool.

    Raises:
        ValueError: not an example, see `format_prompt`.

    Example:
        >>> generate_responses(model, tokenizer, {"instruction": "What is the opposite of hot?"})
        'The opposite of hot is cold.'
    """
    single = isinstance(examples, Mapping | str)
    prompts = [encode(tokenizer, format_prompt(e)) for e in ([examples] if single else examples)]
    end, responses, ended = eos_token_id(tokenizer), [], []
    for first in range(0, len(prompts), batch_size):
        asked = prompts[first:first + batch_size]
        made = generate(model, asked, max_new_tokens, sample, eos_token_id=end)
        for prompt, ids in zip(asked, made, strict=True):
            new = ids[len(prompt):]
            ended.append(new[-1:] == [end])
            # "ignore": the limit may fall inside a character of several tokens
            text = tokenizer.decode(new[:-1] if ended[-1] else new, errors="ignore")
            responses.append(text.strip())
    found = (responses[0], ended[0]) if single else (responses, ended)
    return found if return_ended else found[0]


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
    """The fraction of predictions that equal their reference once both are normalized.

    Normalized: case folded, white space runs made one space, one final full stop left out.

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
    """chrF2 from 0 to 100: common character n-grams, n = 1..6, white space left out.

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
        common = n_predicted = n_reference = 0
        for texts in pairs:
            p, r = (Counter(t[i:i + n] for i in range(len(t) - n + 1)) for t in texts)
            common += (p & r).total()
            n_predicted += p.total() if r else 0       # as sacrebleu: nothing to compare with
            n_reference += r.total()
        if n_predicted and n_reference:
            precisions.append(common / n_predicted)
            recalls.append(common / n_reference)
    if not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


# cell compute-metrics of notebooks/07_instruction_tuning.ipynb
def compute_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match (0 to 1) and chrF (0 to 100) of responses and their references.

    Example:
        >>> compute_metrics(["Red.", "Blue."], ["red", "Blue."])
        {'exact_match': 1.0, 'chrf': 87.59852396649075}
    """
    return {"exact_match": exact_match(predictions, references),
            "chrf": chrf(predictions, references)}


# cell wilson-interval of notebooks/07_instruction_tuning.ipynb
def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% confidence interval of a fraction after Wilson (1927), for any n and fraction.

    Example:
        >>> [round(limit, 2) for limit in wilson_interval(8, 65)]
        [0.06, 0.22]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 to n, and n at least 1")
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2))**0.5 / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


# cell bootstrap-interval of notebooks/07_instruction_tuning.ipynb
def bootstrap_interval(values: Sequence[float], *, n_resamples: int = 2000,
                       seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of the values (Efron 1979, percentiles).

    Example:
        >>> bootstrap_interval([5.0] * 10)
        (5.0, 5.0)
    """
    drawn = torch.randint(len(values), (n_resamples, len(values)),
                          generator=torch.Generator().manual_seed(seed))
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1)      # (n_resamples,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# cell paired-bootstrap of notebooks/07_instruction_tuning.ipynb
def paired_bootstrap(first: Sequence[float], second: Sequence[float], *, n_resamples: int = 2000,
                     seed: int = 0) -> tuple[float, float, float]:
    """The mean of second - first, score by score, and its 95% bootstrap interval.

    Raises:
        ValueError: not as many scores of the one as of the other.

    Example:
        >>> paired_bootstrap([0, 1, 0, 1], [1, 2, 1, 2])
        (1.0, 1.0, 1.0)
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(differences, n_resamples=n_resamples, seed=seed)
    return sum(differences) / len(differences), low, high


# cell score-by-kind of notebooks/07_instruction_tuning.ipynb
def score_by_kind(examples: Sequence[Mapping[str, str]], responses: Sequence[str],
                  closed_kinds: Collection[str]) -> pd.DataFrame:
    """A score for each kind of task, from 0 to 100, with its 95% confidence interval.

    Closed kinds have one right answer and are scored by exact match, with Wilson's interval. All
    others are open and are scored by the mean chrF of their responses, with a bootstrap interval.

    Returns:
        A table with a row for each kind, closed ones first, and n, metric, score, low, high.

    Example:
        >>> examples = [{"instruction": "1 + 1", "output": "2", "kind": "sum"}]
        >>> score_by_kind(examples, ["2"], {"sum"}).loc["sum", "score"]
        100.0
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for example, response in zip(examples, responses, strict=True):
        groups.setdefault(example.get("kind", "all"), []).append((response, example["output"]))
    rows = []
    for kind in sorted(groups, key=lambda kind: (kind not in closed_kinds, kind)):
        measure = exact_match if kind in closed_kinds else chrf
        scores = [measure(p, r) for p, r in groups[kind]]
        if kind in closed_kinds:
            low, high = wilson_interval(int(sum(scores)), len(scores))
            mean = 100 * sum(scores) / len(scores)
            row = (len(scores), "exact match", mean, 100 * low, 100 * high)
        else:
            row = (len(scores), "chrF", sum(scores) / len(scores), *bootstrap_interval(scores))
        rows.append((kind, *row))
    columns = ["kind", "n", "metric", "score", "low", "high"]
    return pd.DataFrame(rows, columns=columns).set_index("kind")
