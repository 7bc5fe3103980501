"""8 · From GPT-2 to Llama: the modern decoder.

Made from notebooks/08_llama.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.llama, helpers.llama_pretrained, helpers.llama_gguf.
"""

import functools
import json
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import jinja2
import regex
import tiktoken
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from helpers.common import atomic_write
from helpers.download import find_files
from helpers.tokenizer import SPLIT_PATTERN, bpe, bytes_to_unicode, encode

__all__ = [
    "SPLIT_PATTERNS",
    "pre_tokenizer_json",
    "NO_TOKEN",
    "HFEncoding",
    "load_hf_tokenizer",
    "encode_prompt",
    "token_table",
    "split_name",
    "save_hf_tokenizer",
    "render_chat",
    "encode_messages",
]


# cell split-patterns of notebooks/08_llama.ipynb
SPLIT_PATTERNS = {                      # by the names that llama.cpp has for them
    "gpt-2": SPLIT_PATTERN,
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


# cell pre-tokenizer-json of notebooks/08_llama.ipynb
def pre_tokenizer_json(name: str) -> dict:
    """What `tokenizer.json` says for one of SPLIT_PATTERNS.

    Example:
        >>> pre_tokenizer_json("gpt-2")["type"]
        'ByteLevel'
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": name != "llama-bpe"}
    before = {"smollm": {"type": "Digits", "individual_digits": True},
              "llama-bpe": {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS["llama-bpe"]},
                            "behavior": "Isolated", "invert": False}}
    if name == "gpt-2":
        return byte_level
    return {"type": "Sequence", "pretokenizers": [before[name], byte_level]}


# cell split-name-of-json of notebooks/08_llama.ipynb
def _split_name(pre_tokenizer: dict | None) -> str | None:
    """The name in SPLIT_PATTERNS of what `tokenizer.json` says, None where there is none."""
    def steps(part: dict) -> list[dict]:
        if part.get("type") == "Sequence":
            return [step for inner in part["pretokenizers"] for step in steps(inner)]
        part = {k: v for k, v in part.items() if k != "trim_offsets"}      # changes no ids
        return [{"use_regex": True} | part if part.get("type") == "ByteLevel" else part]

    said = steps(pre_tokenizer or {})
    return next((n for n in SPLIT_PATTERNS if said == steps(pre_tokenizer_json(n))), None)


# cell no-token of notebooks/08_llama.ipynb
NO_TOKEN = 2**31                      # where ids begin that stand for bytes without a token


# cell hf-encoding of notebooks/08_llama.ipynb
class HFEncoding(tiktoken.Encoding):
    """A `tiktoken.Encoding` opened from a `tokenizer.json`, and what its folder says besides.

    A byte for which the vocabulary has no token is left out of the text, as the package
    `tokenizers` does: SmolLM2's vocabulary, for example, is without some.

    Args:
        begin, end: ids that go before and after a text that stands alone.
        names: the special tokens by their role: "bos_token", "eos_token", ...
        chat_template: the Jinja template of a conversation.
    """

    def __init__(self, name: str, *, pat_str: str, mergeable_ranks: dict[bytes, int],
                 special_tokens: dict[str, int], begin: Sequence[int] = (),
                 end: Sequence[int] = (), names: Mapping[str, str] | None = None,
                 chat_template: str | None = None) -> None:
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in mergeable_ranks]
        hidden = {byte: NO_TOKEN + i for i, byte in enumerate(absent)}    # tiktoken wants them all
        super().__init__(name, pat_str=pat_str, mergeable_ranks=mergeable_ranks | hidden,
                         special_tokens=special_tokens)
        self.max_token_value = max([*mergeable_ranks.values(), *special_tokens.values()])
        self._mergeable_ranks, self.absent_bytes = mergeable_ranks, frozenset(b"".join(absent))
        self.begin, self.end, self.names = tuple(begin), tuple(end), dict(names or {})
        self.chat_template = chat_template

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"begin": self.begin, "end": self.end,
                                         "names": self.names, "chat_template": self.chat_template}

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which nothing is special."""
        ids = super().encode_ordinary(text)
        if not self.absent_bytes or max(ids, default=0) < NO_TOKEN:
            return ids
        ids, ranks = [], self._mergeable_ranks
        for piece in regex.findall(self._pat_str, text):
            data = piece.encode("utf-8")
            present = bytes(b for b in data if b not in self.absent_bytes)
            ids += [ranks[data]] if data in ranks else bpe(present, ranks, below=NO_TOKEN)
        return ids

    def encode(self, text: str, **options: object) -> list[int]:
        """As `tiktoken.Encoding.encode`, which takes the same options."""
        ids = super().encode(text, **options)
        if not self.absent_bytes or max(ids, default=0) < NO_TOKEN:
            return ids
        allowed = options.get("allowed_special", ())
        special = sorted(self.special_tokens_set if allowed == "all" else allowed)
        marks = "|".join(map(regex.escape, special))
        parts = regex.split(f"({marks})", text) if special else [text]
        return [i for part in parts for i in ([self._special_tokens[part]] if part in special
                                              else self.encode_ordinary(part))]


# cell check-supported of notebooks/08_llama.ipynb
def _check_supported(raw: dict, path: Path) -> str:
    """Refuse what is not byte-level BPE, or splits text otherwise; return the pattern's name."""
    model, name = raw["model"], _split_name(raw.get("pre_tokenizer"))
    kind = model.get("type", "BPE")
    refused = {
        f"a model of type {kind!r}": kind != "BPE",
        "byte fallback, as SentencePiece has it": model.get("byte_fallback"),
        f"a normalizer ({(raw.get('normalizer') or {}).get('type')})": raw.get("normalizer"),
        "marks inside words": model.get("continuing_subword_prefix")
                              or model.get("end_of_word_suffix"),
        "dropout of merges": model.get("dropout"),
        f"the pre-tokenizer {json.dumps(raw.get('pre_tokenizer'))[:200]}": name is None,
    }
    for what, is_there in refused.items():
        if is_there:
            raise ValueError(f"{path} has {what}. Here byte-level BPE is read that splits text as "
                             "GPT-2, SmolLM2 or Llama 3 do, without a normalizer.")
    return name


# cell added-tokens of notebooks/08_llama.ipynb
def _added_tokens(raw: dict, pattern: str, path: Path) -> dict[str, int]:
    """The added tokens and their ids, in the order of the ids."""
    added = sorted(raw.get("added_tokens") or [], key=lambda token: token["id"])
    for token in added:
        flags = [f for f in ("single_word", "lstrip", "rstrip") if token.get(f)]
        if not token.get("special") and len(regex.findall(pattern, token["content"])) <= 1:
            flags = ["the form of an ordinary word"]
        if flags or not token["content"]:
            raise ValueError(f"{path}: the added token {token['content']!r} has "
                             f"{' and '.join(flags) or 'no text'}, which is not supported here.")
    names = sorted(token["content"] for token in added)
    for shorter, longer in zip(names, names[1:], strict=False):
        if longer.startswith(shorter):
            raise ValueError(f"{path}: the added token {shorter!r} is the beginning of {longer!r}.")
    return {token["content"]: token["id"] for token in added}


# cell byte-ranks of notebooks/08_llama.ipynb
def _byte_ranks(vocab: dict[str, int], added: dict[str, int], path: Path) -> dict[bytes, int]:
    """The bytes of each ordinary token and its id, in the order of the ids."""
    byte_of = {symbol: b for b, symbol in bytes_to_unicode().items()}
    ranks = {}
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):
        if token in added:
            if added[token] != i:
                raise ValueError(f"{path}: {token!r} has the ids {i} and {added[token]}.")
        elif token and set(token) <= byte_of.keys():
            ranks[bytes(byte_of[c] for c in token)] = i
        else:
            raise ValueError(f"{path}: the token {token!r} is not written in GPT-2's symbols for "
                             "bytes. Tokenizers of SentencePiece, such as Llama 2's, are not read "
                             "here.")
    ids = [*ranks.values(), *added.values()]
    if len(set(ids)) < len(ids) or not ranks or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: the ids are not whole numbers, each used once.")
    return ranks


# cell never-merged of notebooks/08_llama.ipynb
def _never_merged(token: bytes, ranks: dict[bytes, int]) -> bool:
    """Whether merges make a token in no text, so that only a piece that equals it becomes it."""
    return len(bpe(token, ChainMap({token: NO_TOKEN}, ranks), below=NO_TOKEN)) > 2


# cell check-merges of notebooks/08_llama.ipynb
def _check_merges(merges: Iterable[str | list[str]], ranks: dict[bytes, int],
                  ignore_merges: bool, path: Path) -> None:
    """Refuse merges whose order is not that of the ids, by which tiktoken merges.

    Where each token is what the merges before it leave of its bytes, both ways of merging give the
    same ids. A token may have several merges, as in files made from tiktoken's: one must do. With
    `ignore_merges` a token may have none that does, if it comes about in no text.
    """
    byte_of = {symbol: b for b, symbol in bytes_to_unicode().items()}
    halves: dict[int, set] = {}
    latest = -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            first, second = (bytes(byte_of[c] for c in half) for half in pair)
            new, ids = ranks[first + second], [ranks[first], ranks[second]]
        except (KeyError, ValueError):
            raise ValueError(f"{path}: the merge {merge!r} is not one of two tokens to a "
                             "third.") from None
        if new < latest and new not in halves:
            raise ValueError(f"{path}: the ids break the order of the merges at {merge!r}.")
        if new >= latest:
            latest = new
            halves.setdefault(new, set()).add(tuple(ids))
    for token, i in ranks.items():
        if len(token) == 1 or tuple(bpe(token, ranks, below=i)) in halves.get(i, ()):
            continue
        if not (ignore_merges and _never_merged(token, ranks)):
            raise ValueError(f"{path}: no merge makes the token {token!r} out of what the merges "
                             "before it leave of its bytes.")


# cell template-ids of notebooks/08_llama.ipynb
def _template_ids(processor: dict | None, path: Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    parts = processor["processors"] if (processor or {}).get("type") == "Sequence" else [processor]
    parts = [p for p in parts if p and p["type"] != "ByteLevel"]     # that one moves offsets only
    if not parts:
        return [], []
    if len(parts) > 1 or parts[0]["type"] != "TemplateProcessing":
        raise ValueError(f"{path}: the post-processor {' and '.join(p['type'] for p in parts)} is "
                         "not supported here; a TemplateProcessing is.")
    around: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for step in parts[0]["single"]:
        if "Sequence" in step:
            texts += 1
        else:
            around[texts > 0].extend(parts[0]["special_tokens"][step["SpecialToken"]["id"]]["ids"])
    if texts != 1:
        raise ValueError(f"{path}: the post-processor takes the text {texts} times.")
    return around


# cell folder-settings of notebooks/08_llama.ipynb
def _folder_settings(folder_or_name: str | Path) -> tuple[dict, str | None]:
    """What `tokenizer_config.json` says, and the chat template; both may be missing."""
    files = {}
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        try:
            files[name] = find_files(folder_or_name, [name])[0].read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
    try:
        config = json.loads(files.get("tokenizer_config.json", "{}"))
        config.get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder_or_name}: tokenizer_config.json is damaged: {error}") from None
    template = files.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(template, list):                       # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return config, template


# cell load-hf-tokenizer of notebooks/08_llama.ipynb
def load_hf_tokenizer(folder_or_name: str | Path) -> HFEncoding:
    """Open the `tokenizer.json` of a folder, or of the Hugging Face hub, as a `tiktoken.Encoding`.

    It gives the ids that `transformers` gives. All added tokens are special here: ordinary text
    never becomes one (`encode_ordinary`), the text of a chat template does (`encode_chat`).

    Raises:
        FileNotFoundError: no such folder or name, or no tokenizer.json in it.
        ValueError: the file is damaged, or not byte-level BPE with a known split pattern.

    Example:
        >>> load_hf_tokenizer("smollm2-135m").n_vocab                         # doctest: +SKIP
        49152
    """
    path = find_files(folder_or_name, ["tokenizer.json"])[0]
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        name = _check_supported(raw, path)
        special = _added_tokens(raw, SPLIT_PATTERNS[name], path)
        ranks = _byte_ranks(raw["model"]["vocab"], special, path)
        _check_merges(raw["model"]["merges"], ranks, bool(raw["model"].get("ignore_merges")), path)
        begin, end = _template_ids(raw.get("post_processor"), path)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {type(error).__name__}: "
                         f"{error}") from None
    config, template = _folder_settings(folder_or_name)
    said = {role: t.get("content") if isinstance(t, dict) else t for role, t in config.items()}
    names = {role: token for role, token in said.items()
             if role.endswith("_token") and isinstance(token, str)}
    return HFEncoding(path.parent.name, pat_str=SPLIT_PATTERNS[name], mergeable_ranks=ranks,
                      special_tokens=special, begin=begin, end=end, names=names,
                      chat_template=template)


# cell encode-prompt of notebooks/08_llama.ipynb
def encode_prompt(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text that stands alone: with the begin token, where the tokenizer wants one.

    In the text itself nothing is special.

    Example:
        >>> encode_prompt(tokenizer, "Hello")[0] == tokenizer.begin[0]        # doctest: +SKIP
        True
    """
    begin, end = getattr(tokenizer, "begin", ()), getattr(tokenizer, "end", ())
    return [*begin, *encode(tokenizer, text), *end]


# cell token-table of notebooks/08_llama.ipynb
def token_table(tokenizer: tiktoken.Encoding) -> tuple[dict[str, int], list[str]]:
    """All tokens as `tokenizer.json` writes them, by id, and the merges, each "first second".

    A token that comes about as a whole piece only, as some of Llama 3's, has no merge.

    Raises:
        ValueError: a token is made of two others, of which one has a higher id.
    """
    symbols = bytes_to_unicode()
    ranks = {token: i for token, i in tokenizer._mergeable_ranks.items() if i < tokenizer.n_vocab}
    written = {i: "".join(symbols[b] for b in token) for token, i in ranks.items()}
    merges = []
    for token, i in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = bpe(token, ranks, below=i)
            if len(halves) == 2:
                merges.append(" ".join(written[half] for half in halves))
            elif not _never_merged(token, ranks):
                raise ValueError(f"The tokenizer {tokenizer.name!r} has the token {token!r}, which "
                                 "is merged of a token with a higher id.")
    vocab = {token: i for i, token in written.items()}
    vocab |= {token: tokenizer.encode_single_token(token) for token in tokenizer.special_tokens_set}
    return dict(sorted(vocab.items(), key=lambda item: item[1])), merges


# cell split-name of notebooks/08_llama.ipynb
def split_name(tokenizer: tiktoken.Encoding) -> str:
    """The name in SPLIT_PATTERNS of a tokenizer's pattern.

    Raises:
        ValueError: it has another one.
    """
    for name, pattern in SPLIT_PATTERNS.items():
        if tokenizer._pat_str == pattern:
            return name
    raise ValueError(f"The tokenizer {tokenizer.name!r} splits text by a pattern that is none of "
                     f"{', '.join(SPLIT_PATTERNS)}.")


# cell save-hf-tokenizer of notebooks/08_llama.ipynb
def save_hf_tokenizer(tokenizer: tiktoken.Encoding, folder: str | Path,
                      names: Mapping[str, str] | None = None) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, and `chat_template.jinja` if there is one.

    Args:
        names: special tokens by their role, as "eos_token"; those of the tokenizer by default.

    Raises:
        ValueError: the tokenizer has another split pattern, or merges in another order than ids.
    """
    vocab, merges = token_table(tokenizer)
    names = dict(getattr(tokenizer, "names", {}) if names is None else names)
    around = [[tokenizer.decode([i]) for i in getattr(tokenizer, side, ())]
              for side in ("begin", "end")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    special = sorted(tokenizer.special_tokens_set, key=vocab.get)
    steps = [[{"SpecialToken": {"id": t, "type_id": 0}} for t in side] for side in around]
    single = [*steps[0], {"Sequence": {"id": "A", "type_id": 0}}, *steps[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    used = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in sum(around, [])}
    description = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocab[t], "content": t} | flags for t in special],
        "normalizer": None, "pre_tokenizer": pre_tokenizer_json(split_name(tokenizer)),
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair,
                           "special_tokens": used},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    files = {"tokenizer.json": json.dumps(description, ensure_ascii=False),
             "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False)}
    if template := getattr(tokenizer, "chat_template", None):
        files["chat_template.jinja"] = template
    with ExitStack() as stack:                      # no old file is replaced before all are written
        for name, content in files.items():
            temporary = stack.enter_context(atomic_write(Path(folder) / name))
            temporary.write_text(content, encoding="utf-8", newline="")


# cell generation-block of notebooks/08_llama.ipynb
class _GenerationBlock(Extension):
    """`{% generation %}`, which marks answers for training: what stands in it is kept."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# cell compile-template of notebooks/08_llama.ipynb
@functools.cache
def _compile_template(template: str) -> jinja2.Template:
    """Compile a chat template in Jinja's sandbox, with what `transformers` offers to it."""
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


# cell render-chat of notebooks/08_llama.ipynb
def render_chat(tokenizer: HFEncoding, messages: Sequence[Mapping[str, str]],
                add_generation_prompt: bool = False, **variables: object) -> str:
    """The text that the tokenizer's chat template makes of a conversation.

    Args:
        messages: dicts with `role` and `content`.
        add_generation_prompt: end with the opening of an assistant's message.
        variables: what else the template reads, such as `tools` or a date.

    Raises:
        ValueError: there is no template, or it refuses these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"The tokenizer {tokenizer.name!r} has no chat template: is it that of a "
                         "base model? Instruct models have one.")
    given = tokenizer.names | {"tools": None, "documents": None} | variables
    try:
        return _compile_template(tokenizer.chat_template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
    except jinja2.TemplateError as error:
        raise ValueError(f"The chat template of {tokenizer.name!r} failed: {error}") from error


# cell encode-messages of notebooks/08_llama.ipynb
def encode_messages(tokenizer: HFEncoding, messages: Sequence[Mapping[str, str]],
                    add_generation_prompt: bool = True, **variables: object) -> list[int]:
    """The ids of a conversation, for the model to answer; see `render_chat`.

    Raises:
        ValueError: a message holds the text of a special token, by which it could pass for one
            of another speaker; or as in `render_chat`.
    """
    for message in messages:
        for token in tokenizer.special_tokens_set:
            if token in str(message.get("content")):
                raise ValueError(f"a message holds {token!r}, which would become a special token")
    text = render_chat(tokenizer, messages, add_generation_prompt, **variables)
    return tokenizer.encode(text, allowed_special="all")
