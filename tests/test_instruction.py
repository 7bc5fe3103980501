"""Tests of helpers.instruction: format, masks, batches, answers, scores and the judge."""

import json
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF
from torch.utils.data import DataLoader

from helpers.generation import generate
from helpers.gpt import GPT, GPTConfig
from helpers.instruction import (PROMPT_NO_INPUT, PROMPT_WITH_INPUT, InstructionDataset, chrf,
                                 collate, compute_metrics, exact_match, format_prompt,
                                 generate_responses, load_examples, train_test_split,
                                 validate_example)
from helpers.judge import ChatClient, LLMJudge, judge_prompt, parse_score
from helpers.training import IGNORE_INDEX, TrainConfig, fit, lm_loss
from helpers.tokenizer import encode, eos_token_id, train_bpe

FOUR = [
    {"instruction": "What is the opposite of hot?", "input": "", "output": "Cold."},
    {"instruction": "Name a colour.", "input": "", "output": "Red, like a rose."},
    {"instruction": "Write the plural.", "input": "mouse", "output": "mice"},
    {"instruction": "Write the plural.", "input": "house", "output": "houses"},
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [format_prompt(e) + e["output"] + " ### Response: <|endoftext|>" for e in FOUR] * 4
    return train_bpe(texts, vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=160, n_embd=32, n_head=2,
                       n_layer=2, eos_token_id=eos_token_id(tokenizer))
    return GPT(config).eval()


# --- the format ---------------------------------------------------------------------------------


def test_templates_are_the_published_ones():
    assert format_prompt({"instruction": "Add.", "input": "1 2", "output": "3"}) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert format_prompt({"instruction": "Name a colour."}) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
    )


def test_white_space_is_no_input():
    plain = format_prompt({"instruction": "Go."})
    assert format_prompt({"instruction": "Go.", "input": " \n\t"}) == plain
    assert format_prompt({"instruction": "Go.", "input": "now"}) != plain


@given(st.text(min_size=1).filter(str.strip), st.text())
def test_fields_stand_in_the_prompt_letter_for_letter(instruction, text):
    prompt = format_prompt({"instruction": instruction, "input": text})
    template = PROMPT_WITH_INPUT if text.strip() else PROMPT_NO_INPUT
    head, rest = template.split("{instruction}")
    assert prompt.startswith(head + instruction) and prompt.endswith("\n\n### Response:")
    if text.strip():
        assert f"\n\n### Input:\n{text}\n\n### Response:" in prompt
    else:
        assert prompt == head + instruction + rest


@pytest.mark.parametrize("example", ["What is it?", None, {}, {"input": "x"}, {"instruction": " "},
                                   {"instruction": 3}, {"instruction": "x", "input": None}])
def test_format_prompt_refuses(example):
    with pytest.raises(ValueError, match="example"):
        format_prompt(example)


# --- reading ------------------------------------------------------------------------------------


def write(folder, content):
    path = folder / "tasks.json"
    path.write_bytes(content if isinstance(content, bytes)
                     else json.dumps(content, ensure_ascii=False).encode("utf-8"))
    return path


def test_read_entries_fills_in_the_input_and_keeps_the_rest(tmp_path):
    path = write(tmp_path, [{"instruction": "Grüße.", "output": "Hallo 🙂", "topic": "greeting"}])
    assert load_examples(path) == [
        {"instruction": "Grüße.", "input": "", "output": "Hallo 🙂", "topic": "greeting"}]
    assert load_examples(str(path)) == load_examples(path)


def test_empty_outputs_are_dropped_and_counted(tmp_path):
    empty = [{"instruction": "a", "input": "", "output": text} for text in ("", " \n")]
    with pytest.warns(UserWarning, match="2 of 6 examples in tasks.json have an empty output"):
        assert load_examples(write(tmp_path, FOUR + empty)) == FOUR
    with pytest.raises(ValueError, match="no example with an output"):
        load_examples(write(tmp_path, empty))


@pytest.mark.parametrize("content, message", [
    ({"instruction": "a"}, "holds a dict, expected a list"),
    ([FOUR[0], "text"], r"example 2 is a str"),
    ([FOUR[0], {"instruction": "a"}], r"example 2 has no field 'output'; it has \['instruction'\]"),
    ([{"output": "a", "input": ""}], r"example 1 has no field 'instruction'"),
    ([FOUR[0] | {"output": None}], r"example 1: 'output' should be text, found NoneType"),
    ([FOUR[0] | {"input": ["a"]}], r"example 1: 'input' should be text, found list"),
    ([FOUR[0] | {"instruction": " "}], r"example 1 has an empty instruction"),
    (b'[{"instruction": "a", "output": "\\ud83d"}]', r"example 1: 'output' holds half of a"),
    (b'[{"instruction": "a",]', r"not JSON: .* line 1, column"),
    (b'{"instruction": "a"}\n{"instruction": "b"}', r"not JSON: Extra data at line 2"),
    (b'[{"instruction": "gr\xfc\xdfe", "output": "a"}]', r"UTF-8"),
    (b"", r"empty"),
    ([], r"no example with an output"),
])
def test_bad_files_get_one_clear_error(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path, content))
    with pytest.raises(FileNotFoundError):
        load_examples(tmp_path / "nowhere.json")


def test_check_entry_names_the_place():
    validate_example(FOUR[0])
    with pytest.raises(ValueError, match="^tasks.json, example 3 has no field 'output'"):
        validate_example({"instruction": "a"}, where="tasks.json, example 3")


# --- the data set -------------------------------------------------------------------------------


def test_items_are_prompt_response_and_one_end_token(tokenizer):
    data = InstructionDataset(FOUR, tokenizer, 160)
    assert len(data) == 4 and data.dropped == 0 and data.examples == FOUR
    for example, (ids, start) in zip(FOUR, data, strict=True):
        assert ids.dtype == torch.long and ids.ndim == 1 and isinstance(start, int)
        assert ids[:start].tolist() == encode(tokenizer, format_prompt(example))
        assert ids[start:].tolist() == [*encode(tokenizer, example["output"]), eos_token_id(tokenizer)]


@pytest.mark.parametrize("output", [
    "### Response: yes", "<|endoftext|>", "a<|endoftext|>", "### Response:\n### Response:",
    "  spaced  ", "\n", "Ünï 🙂", "{instruction}"])
def test_answers_that_look_like_the_format(tokenizer, output):
    example = {"instruction": output if output.strip() else "x", "input": "<|endoftext|>",
             "output": output if output.strip() else "x" + output}
    ids, start = InstructionDataset([example], tokenizer, 400)[0]
    assert (ids == eos_token_id(tokenizer)).sum() == 1 and ids[-1] == eos_token_id(tokenizer)
    assert tokenizer.decode(ids[start:-1].tolist()) == example["output"]
    assert tokenizer.decode(ids[:start].tolist()) == format_prompt(example)
    _, targets = collate([(ids, start)])
    assert (targets == eos_token_id(tokenizer)).sum() == 1


def test_entries_too_long_are_left_out_whole(tokenizer):
    lengths = [len(ids) - 1 for ids, _ in InstructionDataset(FOUR, tokenizer, 160)]
    for limit in range(min(lengths), max(lengths) + 1):
        data = InstructionDataset(FOUR, tokenizer, limit)
        kept = [example for example, n in zip(FOUR, lengths, strict=True) if n <= limit]
        assert data.examples == kept and data.dropped == 4 - len(kept)
        inputs, targets = collate(list(data))
        assert inputs.shape[1] <= limit
        assert ((targets == eos_token_id(tokenizer)).sum(dim=1) == 1).all()
    with pytest.raises(ValueError, match=f"no example fits: 4 given, .* needs {min(lengths)}"):
        InstructionDataset(FOUR, tokenizer, min(lengths) - 1)


def test_dataset_refuses(tokenizer):
    with pytest.raises(ValueError, match="example 2 has an empty output"):
        InstructionDataset([FOUR[0], FOUR[1] | {"output": " "}], tokenizer, 160)
    with pytest.raises(ValueError, match="example 1 has no field 'output'"):
        InstructionDataset([{"instruction": "a"}], tokenizer, 160)
    with pytest.raises(ValueError, match="no example fits: 0 given"):
        InstructionDataset([], tokenizer, 160)


# --- batches ------------------------------------------------------------------------------------

END = 7
rows = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=6)


@given(rows, st.randoms(use_true_random=False))
def test_masks_exactly(parts, random):
    """Prompts of n ids, responses of m ids, some of which are the end token's id as well."""
    items = [(torch.tensor([random.choice([3, 4, END]) for _ in range(n + m)] + [END]), n)
             for n, m in parts]
    inputs, targets = collate(items)
    longest = max(n + m for n, m in parts)
    assert inputs.shape == targets.shape == (len(parts), longest)
    assert inputs.dtype == targets.dtype == torch.long
    for row, (n, m) in enumerate(parts):
        ids = items[row][0].tolist()
        assert inputs[row, :n + m].tolist() == ids[:-1]
        expected = [IGNORE_INDEX] * (n - 1) + ids[n:] + [IGNORE_INDEX] * (longest - n - m)
        assert targets[row].tolist() == expected
        assert (targets[row] != IGNORE_INDEX).sum() == m + 1          # never an all-masked row


def test_collate_refuses():
    with pytest.raises(ValueError, match="no items"):
        collate([])
    for start in (0, 3, 4):
        with pytest.raises(ValueError, match="row 1: .* nothing in it would count"):
            collate([(torch.tensor([1, 2, END]), 1), (torch.tensor([1, 2, END]), start)])


def test_collate_leaves_the_items_alone(tokenizer):
    data = InstructionDataset(FOUR, tokenizer, 160)
    before = [ids.clone() for ids, _ in data]
    inputs, targets = collate(list(data))
    inputs.zero_(), targets.zero_()
    assert all(torch.equal(a, ids) for a, (ids, _) in zip(before, data, strict=True))


def test_a_batch_costs_what_its_rows_cost(tokenizer, model):
    data = list(InstructionDataset(FOUR, tokenizer, 160))
    assert len({len(ids) for ids, _ in data}) > 1
    double = GPT(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        total, count = lm_loss(double, collate(data))
        alone = [lm_loss(double, collate([item])) for item in data]
        by_hand = [-double(ids[None, :-1]).log_softmax(-1)[0, range(len(ids) - 1), ids[1:]]
                   [start - 1:].sum() for ids, start in data]
    assert count == sum(n for _, n in alone) == sum(len(ids) - start for ids, start in data)
    torch.testing.assert_close(total, sum(loss for loss, _ in alone), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.double(), sum(by_hand), rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(tokenizer, model):
    data = list(InstructionDataset(FOUR, tokenizer, 160))
    inputs, targets = collate(data)
    other = inputs.clone()
    for row, (ids, _) in enumerate(data):
        other[row, len(ids) - 1:] = 3
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(model, (inputs, targets))[0],
                                   lm_loss(model, (other, targets))[0], rtol=1e-5, atol=1e-4)


# --- splitting ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.floats(0.05, 0.95),
       st.integers(0, 3))
@settings(max_examples=40)
def test_split_keeps_equal_questions_on_one_side(numbers, held_out, seed):
    examples = [{"instruction": f"Count to {n}.", "output": str(i)} for i, n in enumerate(numbers)]
    if len(set(numbers)) < 2:
        with pytest.raises(ValueError, match="cannot split 1"):
            train_test_split(examples, held_out, seed)
        return
    train, test = train_test_split(examples, held_out, seed)
    assert train and test
    assert sorted(int(e["output"]) for e in train + test) == list(range(len(numbers)))
    assert not {e["instruction"] for e in train} & {e["instruction"] for e in test}
    assert train_test_split(examples, held_out, seed) == (train, test)


def test_split_refuses_and_draws_from_its_own_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_test_split(FOUR, 0.5)
    assert torch.equal(torch.rand(3), expected)
    for share in (0, 1, -0.1, 15):
        with pytest.raises(ValueError, match="between 0 and 1"):
            train_test_split(FOUR, share)


# --- scores -------------------------------------------------------------------------------------

SMALL = st.text(alphabet="ab \n", max_size=12)


@given(SMALL, SMALL)
@settings(max_examples=300)
def test_sentence_chrf_is_sacrebleus(prediction, reference):
    theirs = CHRF().sentence_score(prediction, [reference]).score
    assert chrf(prediction, reference) == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert chrf([prediction], [reference]) == chrf(prediction, reference)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=5))
@settings(max_examples=150)
def test_corpus_chrf_is_sacrebleus(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    theirs = CHRF().corpus_score(predictions, [references]).score
    assert chrf(predictions, references) == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("prediction, reference", [
    ("The opposite of hot is cold.", "The opposite of hot is cold."),
    ("The mouses ran away.", "The mice ran away."), ("Größe", "große"), ("日本語", "日本"),
    ("x", "The opposite"), ("a b c d e f g", "abcdefg"), ("", "a"), ("a", ""), ("", "")])
def test_chrf_on_real_sentences(prediction, reference):
    theirs = CHRF().sentence_score(prediction, [reference]).score
    assert chrf(prediction, reference) == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_chrf_known_answers():
    assert chrf("abc", "abc") == 100 and chrf("abc", "xyz") == 0
    # one character n-gram: precision 1, recall 1/2, F2 = 5 * 0.5 / (4 + 0.5)
    assert chrf("a", "aa", max_n=1) == pytest.approx(100 * 2.5 / 4.5)
    assert chrf("aa", "a", max_n=1) == pytest.approx(100 * 2.5 / 3)      # recall counts more
    assert chrf("a", "aa", max_n=1, beta=1) == chrf("aa", "a", max_n=1, beta=1)


@pytest.mark.parametrize("prediction, reference, equal", [
    ("Cold", "cold.", True), ("  It  is\nred ", "it is red", True), ("STRASSE", "straße", True),
    ("", "", True), ("red .", "red", True), ("Red?", "Red.", False), ("Red..", "Red", False),
    ("red", "reds", False), ("", "a", False), ("a, b", "a b", False)])
def test_exact_match(prediction, reference, equal):
    assert exact_match(prediction, reference) == float(equal)


@pytest.mark.parametrize("measure", [exact_match, chrf, compute_metrics])
@pytest.mark.parametrize("predictions, references", [
    ([], []), (["a"], []), (["a"], ["a", "b"]), ("a", ["a"]), (["a"], "a")])
def test_scores_refuse_unequal_lists(measure, predictions, references):
    with pytest.raises(ValueError, match="two lists|as many of each"):
        measure(predictions, references)


def test_score():
    assert compute_metrics(["Cold", "warm"], ["cold.", "hot"]) == {
        "exact_match": 0.5, "chrf": chrf(["Cold", "warm"], ["cold.", "hot"])}


# --- answers ------------------------------------------------------------------------------------


def scripted(model, tokenizer, script):
    """A `sample` that plays the script, so that `respond` can be tested without any training."""
    step = iter(script)

    def sample(logits):
        return torch.full((len(logits),), next(step), device=logits.device)
    return sample


def test_respond_returns_the_answer_alone(tokenizer, model):
    end = eos_token_id(tokenizer)
    script = [*encode(tokenizer, " Cold, says ### Response: he.\n"), end, *[3] * 40]
    sample = scripted(model, tokenizer, script)
    assert generate_responses(model, tokenizer, FOUR[0], 40, sample) == "Cold, says ### Response: he."
    sample = scripted(model, tokenizer, script)
    assert generate_responses(model, tokenizer, FOUR[:3], 40, sample) == ["Cold, says ### Response: he."] * 3


def test_respond_ends_cleanly(tokenizer, model):
    end = eos_token_id(tokenizer)
    smile = encode(tokenizer, "ok 🙂")
    for cut in range(1, len(smile) + 1):                     # the limit falls inside a character
        answer = generate_responses(model, tokenizer, FOUR[0], cut, scripted(model, tokenizer, smile))
        assert "ok 🙂".startswith(answer) and "\ufffd" not in answer
    assert generate_responses(model, tokenizer, FOUR[0], 9, scripted(model, tokenizer, [end])) == ""
    assert generate_responses(model, tokenizer, [], 9) == []
    assert generate_responses(model, tokenizer, FOUR[0] | {"output": ""}, 3) is not None


def test_respond_in_batches_of_any_size(tokenizer, model):
    alone = [generate_responses(model, tokenizer, example, 8) for example in FOUR]
    for size in (1, 3, 16):
        assert generate_responses(model, tokenizer, FOUR, 8, batch_size=size) == alone
    assert generate_responses(model, tokenizer, tuple(reversed(FOUR)), 8) == alone[::-1]


def test_respond_restores_the_mode_and_the_gradients(tokenizer, model):
    for training in (True, False):
        model.train(training)
        generate_responses(model, tokenizer, FOUR[:2], 3)
        assert model.training is training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="example"):
        generate_responses(model, tokenizer, "What is the opposite of hot?", 3)


def test_a_small_gpt_learns_four_entries_by_heart(tokenizer, model):
    data = InstructionDataset(FOUR, tokenizer, 160)
    loader = DataLoader(data, batch_size=4, collate_fn=collate)
    torch.manual_seed(0)
    small = GPT(model.config)
    history = fit(small, loader, TrainConfig(max_steps=80, lr=1e-2, warmup_steps=5,
                                             weight_decay=0.0))
    assert history.last("train_loss") < 0.1
    answers = generate_responses(small, tokenizer, FOUR, 30)
    assert answers == [example["output"] for example in FOUR]
    assert compute_metrics(answers, [example["output"] for example in FOUR]) == {"exact_match": 1, "chrf": 100}
    ids = generate(small, encode(tokenizer, format_prompt(FOUR[0])), 30, eos_token_id=eos_token_id(tokenizer))
    assert ids[-1] == eos_token_id(tokenizer)                      # it stops by itself


def test_with_end_tokens_masked_it_does_not_stop(tokenizer, model):
    end = eos_token_id(tokenizer)

    def collate_wrong(items):
        inputs, targets = collate(items)
        return inputs, targets.masked_fill(targets == end, IGNORE_INDEX)

    loader = DataLoader(InstructionDataset(FOUR, tokenizer, 160), batch_size=4,
                        collate_fn=collate_wrong)
    torch.manual_seed(0)
    small = GPT(model.config)
    fit(small, loader, TrainConfig(max_steps=40, lr=1e-2, warmup_steps=5))
    prompts = [encode(tokenizer, format_prompt(example)) for example in FOUR]
    assert not any(end in ids for ids in generate(small, prompts, 20, eos_token_id=end))


# --- the judge ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, expected", [
    ("85", 85), ("0", 0), ("100", 100), (" 85.\n", 85), ("Score: 85", 85), ("**Score:** 85", 85),
    ("The score is 85.", 85), ("85/100", 85), ("I say 85 out of 100, not more.", 85),
    ('{"score": 85}', 85), ("Rating: 85\n\n2 of 3 words are right.", 85), ("85%", 85),
    ("<think>Maybe 20?\nNo.</think>\n85", 85), ("Score: 85/100", 85), ("85 and again 85", 85)])
def test_parse_score(reply, expected):
    assert parse_score(reply) == expected


@pytest.mark.parametrize("reply", [
    "", "good", "8.5", "85.5/100", "0.85", "-5", "101", "1,000", "7/10", "10/10", "8 out of 10",
    "60 or 70", "Score: high", "<think>85</think>", "99999999999999999999"])
def test_parse_score_refuses(reply):
    with pytest.raises(ValueError, match="no single whole number"):
        parse_score(reply)


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def server(*replies, delay=0.0, headers=()):
    """A server on this machine that gives these (status, body) replies, the last one forever."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), json.loads(body)))
            time.sleep(delay)
            status, text = replies[min(len(seen), len(replies)) - 1]
            if status == 0:                       # hang up without a word
                self.connection.close()
                return
            text = text.encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except (OSError, ValueError):
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", seen
        finally:
            running.shutdown()


def judge_at(url, **more):
    return LLMJudge(url, "tiny-judge", **({"backoff": 0.0, "timeout": 5.0} | more))


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_judge_asks_and_reads(ending):
    with server(completion("85")) as (url, seen):
        assert judge_at(url + ending, api_key="sk-secret").grade(FOUR[0], "cold") == 85
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert body["model"] == "tiny-judge" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": judge_prompt(FOUR[0], "cold")}]


def test_judge_without_a_key_sends_none(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n", encoding="utf-8")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with server(completion("85")) as (url, seen):
        judge_at(url).grade(FOUR[0], "cold")
        judge_at(url, api_key="k").grade(FOUR[0], "cold")
    assert "Authorization" not in seen[0][1]
    assert seen[1][1]["Authorization"] == "Bearer k"


@pytest.mark.parametrize("first", [(500, "oops"), (503, ""), (429, "slow down"), (0, "")])
def test_judge_tries_again(first):
    with server(first, first, completion("Score: 7")) as (url, seen):
        assert judge_at(url).grade(FOUR[0], "cold") == 7
    assert len(seen) == 3


def test_judge_gives_up_in_the_end():
    gave_up = pytest.raises(RuntimeError, match=r"answered 503 \(3 tries\)")
    with server((503, "loading")) as (url, seen), gave_up:
        judge_at(url, retries=2).grade(FOUR[0], "cold")
    assert len(seen) == 3


def test_judge_waits_longer_each_time_or_as_told(monkeypatch):
    waits = []
    monkeypatch.setattr("helpers.judge.time.sleep", waits.append)
    with server((500, "")) as (url, _), pytest.raises(RuntimeError):
        judge_at(url, backoff=0.5).complete("hello")
    with server((429, ""), headers=[("Retry-After", "7")]) as (url, _), pytest.raises(RuntimeError):
        judge_at(url, retries=1).complete("hello")
    assert [w for w in waits if w] == [0.5, 1.0, 2.0, 7.0]


@pytest.mark.parametrize("reply, error, message", [
    ((200, "<html>hi</html>"), ValueError, "no chat completion: '<html>"),
    ((200, "[]"), ValueError, "no chat completion"),
    ((200, '{"choices": []}'), ValueError, "no chat completion"),
    ((200, '{"choices": [{"message": {"content": null}}]}'), ValueError, "no chat completion"),
    (completion("I cannot say."), ValueError, "no single whole number .* 'I cannot say.'"),
    ((401, "wrong key"), RuntimeError, "answered 401: 'wrong key'"),
    ((404, "no such model"), RuntimeError, "answered 404: 'no such model'"),
    ((302, ""), RuntimeError, "answered 302")])
def test_judge_says_what_came_back(reply, error, message):
    with server(reply) as (url, seen), pytest.raises(error, match=message):
        judge_at(url).grade(FOUR[0], "cold")
    assert len(seen) == 1                                    # trying again would not help


def test_no_server():
    with server(completion("1")) as (url, _):
        pass                                                 # this port is free again
    with pytest.raises(ConnectionError, match=r"no server answers at http://127.* ollama serve"):
        judge_at(url, retries=1).grade(FOUR[0], "cold")


def test_slow_server():
    slow = server(completion("1"), delay=0.5)
    with slow as (url, _), pytest.raises(TimeoutError, match=r"within 0.1 s"):
        judge_at(url, timeout=0.1).grade(FOUR[0], "cold")


KEY = "sk-very-secret-123"


@pytest.mark.parametrize("reply", [(401, f"Incorrect API key: {KEY}"), (503, KEY), (0, ""),
                                   (200, f'{{"error": "{KEY}"}}'), (401, "x" * 290 + KEY)])
def test_the_key_is_in_no_error(reply):
    with server(reply) as (url, _):
        judge = judge_at(url, api_key=KEY, retries=1)
        with pytest.raises((ValueError, RuntimeError, ConnectionError)) as caught:
            judge.grade(FOUR[0], "cold")
    text = "".join(traceback.format_exception(caught.value)) + repr(judge) + str(judge)
    assert KEY not in text and KEY[:10] not in text


@pytest.mark.parametrize("key", ["sk-secret\nX-Other: 1", "sk-secret-ключ", "sk-secret\x00"])
def test_keys_that_no_header_can_carry(key):
    with pytest.raises(ValueError, match="no header can carry") as caught:
        judge_at("http://localhost", api_key=key)
    assert "secret" not in str(caught.value)
    assert judge_at("http://localhost", api_key=" sk-secret\n")._key == "sk-secret"


@pytest.mark.parametrize("url", ["", "localhost:11434", "ftp://localhost", "http://",
                                 "http://me:secret@localhost", "http://localhost/v1?key=secret"])
def test_addresses_that_are_refused(url):
    with pytest.raises(ValueError, match="base_url should look like") as caught:
        LLMJudge(url, "m")
    assert "secret" not in str(caught.value)


def test_scores_go_on_after_an_unreadable_reply():
    with server(completion("40"), completion("none"), completion("60")) as (url, _):
        with pytest.warns(UserWarning, match="answer 2: no single whole number"):
            assert judge_at(url).grade_all(FOUR[:3], ["a", "b", "c"]) == [40, None, 60]
        with pytest.raises(ValueError):
            judge_at(url).grade_all(FOUR[:3], ["a"])


def test_judge_from_the_environment(monkeypatch):
    for name in ("LLM_JUDGE_URL", "LLM_JUDGE_MODEL", "LLM_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert LLMJudge.from_environment() is None
    monkeypatch.setenv("LLM_JUDGE_URL", "http://localhost:11434")
    with pytest.raises(ValueError, match="LLM_JUDGE_MODEL"):
        LLMJudge.from_environment()
    monkeypatch.setenv("LLM_JUDGE_MODEL", "llama3.2")
    judge = LLMJudge.from_environment()
    assert isinstance(judge, ChatClient) and judge.model == "llama3.2"
    assert judge.url == "http://localhost:11434/v1/chat/completions"


def test_certificates_are_verified(monkeypatch):
    seen = []

    def send(self, request, *, verify, **more):
        seen.append(verify)
        raise requests.exceptions.SSLError("self-signed certificate")

    monkeypatch.setattr("requests.adapters.HTTPAdapter.send", send)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):    # the only other thing to verify with
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConnectionError, match="certificate") as caught:
        judge_at("https://localhost", api_key=KEY).complete("hello")
    assert seen == [True] and KEY not in str(caught.value)   # verified, and not tried again


def test_judge_prompt_holds_every_part():
    text = judge_prompt(FOUR[2], "mouses")
    for part in ("Write the plural.", "mouse", "mice", "mouses", "0", "100"):
        assert part in text
    assert "<input>" not in judge_prompt(FOUR[0], "x")
