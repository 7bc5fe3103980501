"""Tests of helpers.judge: prompts, parsing, the client against servers that misbehave, grades."""

import html
import json
import re
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from helpers.judge import (
    ChatClient,
    Grade,
    LLMJudge,
    comparison_prompt,
    judge_prompt,
    mean_score,
    parse_score,
    parse_winner,
)

FOUR = [
    {"instruction": "What is the opposite of hot?", "input": "", "output": "Cold."},
    {"instruction": "Name a colour.", "input": "", "output": "Red, like a rose."},
    {"instruction": "Write the plural.", "input": "mouse", "output": "mice"},
    {"instruction": "Write the plural.", "input": "house", "output": "houses"},
]


# --- the judge ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, expected", [
    ("85", 85), ("0", 0), ("100", 100), (" 85.\n", 85), ("Score: 85", 85), ("**Score:** 85", 85),
    ("The score is 85.", 85), ("85/100", 85), ("I say 85 out of 100, not more.", 85),
    ('{"score": 85}', 85), ("Rating: 85\n\n2 of 3 words are right.", 85), ("85%", 85),
    ("<think>Maybe 20?\nNo.</think>\n85", 85), ("Score: 85/100", 85), ("85 and again 85", 85),
    ("Reason: 2 of 3 words, 1/2 of the sense.\nScore: 85", 85)])
def test_parse_score(reply, expected):
    assert parse_score(reply) == expected


@pytest.mark.parametrize("reply", [
    "", "good", "8.5", "85.5/100", "0.85", "-5", "101", "1,000", "7/10", "10/10", "8 out of 10",
    "60 or 70", "Score: high", "Score: 7/10", "Score: 20\nScore: 90",
    "<think>85</think>", "99999999999999999999"])
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
            if status == 1:                       # say nothing for longer than anybody waits
                time.sleep(0.6)
                status = 0
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
        assert judge_at(url + ending, api_key="sk-secret").grade(FOUR[0], "cold").score == 85
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
        assert judge_at(url).grade(FOUR[0], "cold").score == 7
    assert len(seen) == 3


def test_judge_gives_up_in_the_end():
    gave_up = pytest.raises(RuntimeError, match="answered 503: 'loading'")
    with server((503, "loading")) as (url, seen), gave_up:
        judge_at(url, retries=2).grade(FOUR[0], "cold")
    assert len(seen) == 3


def test_judge_waits_longer_each_time_or_as_told(monkeypatch):
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    with server((500, "")) as (url, _), pytest.raises(RuntimeError):
        judge_at(url, backoff=0.5, retries=4).complete("hello")
    assert [w for w in waits if w] == [0.5, 1.0, 2.0]
    for asked, wait in (("7", 7), ("100000", 60)):            # a minute is the most
        waits.clear()
        with (server((429, ""), headers=[("Retry-After", asked)]) as (url, _),
              pytest.raises(RuntimeError)):
            judge_at(url, retries=1).complete("hello")
        assert [w for w in waits if w] == [wait]


@pytest.mark.parametrize("reply, error, message", [
    ((200, "<html>hi</html>"), ValueError, "no chat completion: '<html>"),
    ((200, "[]"), ValueError, "no chat completion"),
    ((200, '{"choices": []}'), ValueError, "no chat completion"),
    ((200, '{"choices": [{"message": {"content": null}}]}'), ValueError, "no chat completion"),
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
    with slow as (url, seen), pytest.raises(TimeoutError, match=r"within 0.1 s \(2 tries\)"):
        judge_at(url, timeout=0.1, retries=1).grade(FOUR[0], "cold")


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


def test_grades_go_on_after_an_unreadable_reply():
    with server(completion("40"), completion("none"), completion("60")) as (url, _):
        grades = judge_at(url).grade_all(FOUR[:3], ["a", "b", "c"])
        assert [grade.score for grade in grades] == [40, None, 60]
        assert grades[1].reply == "none" and "no single whole number" in grades[1].error
        with pytest.raises(ValueError, match="1 answers for 3 examples"):
            judge_at(url).grade_all(FOUR[:3], ["a"])


@pytest.mark.parametrize("words", ["I cannot say.", "1000", ""])
def test_a_judge_that_never_gives_a_score_has_no_mean(words):
    with server(completion(words)) as (url, seen):
        grades = judge_at(url).grade_all(FOUR, ["a", "b", "c", "d"])
    assert len(seen) == 4 and [grade.score for grade in grades] == [None] * 4
    with pytest.raises(ValueError, match="none of 4 grades has a score"):
        mean_score(grades)


def test_mean_score():
    assert mean_score([Grade(40), Grade(60)]) == 50
    with pytest.warns(UserWarning, match="1 of 3 answers have no score"):
        assert mean_score([Grade(40), Grade(None, "words"), Grade(60)]) == 50
    with pytest.raises(ValueError, match="none of 0"):
        mean_score([])


def test_one_time_out_costs_one_grade(tmp_path):
    path = tmp_path / "grades.jsonl"
    with server(completion("40"), (1, ""), completion("60"), delay=0.0) as (url, _):
        grades = judge_at(url, timeout=0.2, retries=0).grade_all(FOUR[:3], ["a", "b", "c"], path)
        assert [grade.score for grade in grades] == [40, None, 60]
        assert "no answer within 0.2 s" in grades[1].error
        again = judge_at(url, timeout=0.2, retries=0).grade_all(FOUR[:3], ["a", "b", "c"], path)
    assert [grade.score for grade in again] == [40, 60, 60]            # only the second was asked


def test_a_server_that_is_gone_is_not_asked_for_ever():
    with server(completion("40"), (503, ""), (503, "")) as (url, seen):
        grades = judge_at(url, retries=0).grade_all(FOUR * 3, list("abcdefghijkl"), max_failures=2)
    assert len(seen) == 3 and [g.score for g in grades] == [40] + [None] * 11
    assert "answered 503" in grades[1].error and "not asked" in grades[3].error


def test_an_interrupted_judge_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, answers = tmp_path / "deep" / "grades.jsonl", ["a", "b", "c", "d"]
    whole = LLMJudge.grade

    def interrupted(self, example, answer):
        if answer == "c":
            raise KeyboardInterrupt
        return whole(self, example, answer)

    with server(*(completion(score) for score in ("10", "20", "30", "40"))) as (url, seen):
        monkeypatch.setattr(LLMJudge, "grade", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge_at(url).grade_all(FOUR, answers, path)
        monkeypatch.undo()
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"key": "half a li')                        # cut off in the middle
        grades = judge_at(url).grade_all(FOUR, answers, path)
        assert [grade.score for grade in grades] == [10, 20, 30, 40] and len(seen) == 4
        assert judge_at(url).grade_all(FOUR, answers, path) == grades and len(seen) == 4
        assert judge_at(url).grade_all(FOUR, ["other", *answers[1:]], path)[0].score == 40
        judge_at(url, rubric="Another.").grade_all(FOUR[:1], answers[:1], path)
    assert len(seen) == 6                      # another answer or rubric is another question
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('{"key": "half') for line in lines) == 1


def test_further_fields_go_into_the_request_and_tell_grades_apart(tmp_path):
    path, more = tmp_path / "grades.jsonl", {"grammar": "root ::= [0-9]", "temperature": 1}
    with server(completion("40"), completion("60")) as (url, seen):
        judge_at(url).grade_all(FOUR[:1], ["a"], path)
        judge_at(url, extra_body=more).grade_all(FOUR[:1], ["a"], path)
        assert judge_at(url, extra_body=more).grade_all(FOUR[:1], ["a"], path)[0].score == 60
    plain, asked = (body for _, _, body in seen)
    assert asked == plain | more and "grammar" not in plain


@pytest.mark.parametrize("there, back, winner", [
    ("A", "B", "first"), ("B", "A", "second"), ("tie", "tie", "tie"), ("A", "A", "inconsistent"),
    ("B", "B", "inconsistent"), ("A", "tie", "inconsistent")])
def test_compare_asks_in_both_orders(there, back, winner):
    with server(completion(f"Winner: {there}"), completion(f"Winner: {back}")) as (url, seen):
        assert judge_at(url).compare(FOUR[0], "cold", "warm") == winner
    bodies = [body["messages"][0]["content"] for _, _, body in seen]
    assert bodies == [comparison_prompt(FOUR[0], "cold", "warm"),
                      comparison_prompt(FOUR[0], "warm", "cold")]


@pytest.mark.parametrize("reply, winner", [
    ("Winner: A", "A"), ("Reason: A is long.\n**Winner:** B", "B"), ("winner: tie.", "tie"),
    ("<think>Winner: A</think>Winner: Answer B", "B"), ('{"winner": "a"}', "A")])
def test_parse_winner(reply, winner):
    assert parse_winner(reply) == winner


@pytest.mark.parametrize("reply", ["", "A", "Winner: both", "Winner: A\nWinner: B", "Winner: C"])
def test_parse_winner_refuses(reply):
    with pytest.raises(ValueError, match="no single winner"):
        parse_winner(reply)


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
    assert "<answer>\n\n</answer>" in judge_prompt(FOUR[0], "")        # an empty one is sent too


@given(st.text(alphabet="<>/&answerscoe: 100\n") | st.text())
def test_no_answer_leaves_its_tags(answer):
    for text, tag in ((judge_prompt(FOUR[0], answer), "answer"),
                      (comparison_prompt(FOUR[0], "x", answer), "answer_b")):
        inside = re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", text, flags=re.DOTALL)
        assert [html.unescape(part) for part in inside] == [html.unescape(html.escape(answer))]
        assert text.count("<") == 8 and text.count(">") == 8              # four pairs of tags
