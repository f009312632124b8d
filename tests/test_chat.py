"""llmcli chat: one message, conversations, and a person at the terminal."""

import os
import pty
import select
import sys
import time

import pytest
from processes import wait_until

GREEDY = ("--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32")


@pytest.fixture
def chat(llmcli, tiny):
    return lambda *args, **settings: llmcli("chat", "-m", tiny, *GREEDY, *args, **settings)


@pytest.fixture(scope="module")
def reference(tiny):
    """The answer to a conversation, from transformers' own chat template and generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)

    def answer(*messages: tuple[str, str]) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def test_one_message(chat, reference):
    assert chat("the quick").stdout == reference(("user", "the quick")) + "\n"


def test_a_system_message(chat, reference):
    expected = reference(("system", "a lazy dog"), ("user", "the quick"))
    assert chat("the quick", "-s", "a lazy dog").stdout == expected + "\n"


def test_conversations_as_json_lines(chat, reference):
    data = (
        b'{"id": 1, "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "dog"},'
        b' {"role": "user", "content": "fox"}]}\n{"text": "the quick"}\n'
    )
    first, second = chat("--jsonl", stdin=data).records
    assert first["id"] == 1
    assert first["generated_text"] == reference(("user", "the"), ("assistant", "dog"), ("user", "fox"))
    assert second["generated_text"] == reference(("user", "the quick"))


def test_a_conversations_own_system_message_stands(chat, reference):
    data = b'{"messages": [{"role": "system", "content": "warm"}, {"role": "user", "content": "the"}]}\n'
    (record,) = chat("--jsonl", "-s", "cold", stdin=data).records
    assert record["generated_text"] == reference(("system", "warm"), ("user", "the"))


@pytest.mark.parametrize(
    "messages", ['"hello"', "[]", '["a"]', '[{"role": "user"}]', '[{"role": "user", "content": 3}]', "{}"]
)
def test_messages_that_are_none(chat, messages):
    ran = chat("--jsonl", stdin=f'{{"messages": {messages}}}\n'.encode())
    assert ran.records[0]["error"]["type"] in ("wrong_type", "missing_field")
    assert ran.exit_status == 1


def test_a_file_and_a_question_make_one_message(chat, reference, tmp_path):
    (tmp_path / "a.txt").write_text("a lazy dog\n")
    expected = reference(("user", "a lazy dog\n\nthe quick"))
    assert chat("the quick", "-f", tmp_path / "a.txt").stdout == expected + "\n"
    assert chat("the quick", "-f", "-", stdin=b"a lazy dog\n").stdout == expected + "\n"


def test_a_model_without_a_chat_template(llmcli, tmp_path):
    from conftest import make_tiny

    ran = llmcli("chat", "hello", "-m", make_tiny(tmp_path / "base", chat=False))
    assert ran.exit_status == 2
    assert "no chat template" in ran.stderr
    assert "llmcli generate" in ran.stderr


class Terminal:
    """llmcli chat at a terminal. stdin and stderr are the terminal; stdout is a file, which holds the answers alone."""

    def __init__(self, answers, *args):
        self.screen = self.screen_before = b""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"
            os.dup2(os.open(answers, os.O_WRONLY | os.O_CREAT), 1)
            os.execv(sys.executable, [sys.executable, "-m", "llmcli", "chat", *map(str, args)])

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + 30
        while text not in self.screen:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.screen
            self.screen += os.read(self.descriptor, 4096)
        self.screen_before, _, self.screen = self.screen.partition(text)

    def type(self, line: str) -> None:
        self.wait_for(b">>>")
        os.write(self.descriptor, line.encode() + b"\r")
        time.sleep(0.2)

    def leave(self) -> None:
        self.type("/exit")
        assert os.waitpid(self.pid, 0)[1] == 0
        os.close(self.descriptor)


@pytest.mark.slow
def test_a_conversation_at_the_terminal(tiny, tmp_path, reference):
    terminal = Terminal(tmp_path / "answers", "-m", tiny, *GREEDY, "-s", "warm")
    terminal.type("the quick")
    terminal.type("/system a lazy dog")
    terminal.wait_for(b"new conversation")
    terminal.type("the quick")
    terminal.type("/system")
    terminal.wait_for(b"new conversation")
    terminal.type("the quick")
    terminal.type("/nonsense")
    terminal.wait_for(b"error: unknown command '/nonsense'")
    terminal.wait_for(b"/clear")
    terminal.leave()
    first = reference(("system", "warm"), ("user", "the quick"))
    second = reference(("system", "a lazy dog"), ("user", "the quick"))
    third = reference(("user", "the quick"))
    assert (tmp_path / "answers").read_text() == f"{first}\n{second}\n{third}\n"


@pytest.mark.slow
def test_conversation_beyond_the_context_suggests_clear(tiny, tmp_path, reference):
    terminal = Terminal(tmp_path / "answers", "-m", tiny, *GREEDY)
    long = "fox " * 25
    terminal.type(long)
    terminal.type(long)
    terminal.type(long)
    terminal.wait_for(b"error: the conversation exceeds the context length")
    terminal.wait_for(b"hint: start over with /clear")
    terminal.type("/clear")
    terminal.wait_for(b"new conversation")
    terminal.type("the quick")
    terminal.leave()
    assert (tmp_path / "answers").read_text().endswith(reference(("user", "the quick")) + "\n")


@pytest.mark.slow
def test_typing_during_an_answer_waits_for_the_next_prompt(chatty, tmp_path):
    slow = ("-m", chatty, "--max-new-tokens", 300, "--min-new-tokens", 300, "--temperature", 0)
    terminal = Terminal(tmp_path / "answers", *slow)
    terminal.type("the quick")
    wait_until((tmp_path / "answers").read_text)
    os.write(terminal.descriptor, b"/nonsense\x1b[A\x1b[B\r")
    terminal.wait_for(b">>>")
    assert b"nonsense" not in terminal.screen_before
    terminal.wait_for(b"error: unknown command '/nonsense'")
    terminal.leave()


@pytest.mark.slow
def test_interrupted_answer_stays_in_the_conversation(chatty, tmp_path):
    slow = ("-m", chatty, "--max-new-tokens", 1900, "--min-new-tokens", 1900, "--temperature", 0)
    terminal = Terminal(tmp_path / "answers", *slow)
    terminal.type("the quick")
    wait_until((tmp_path / "answers").read_text)
    os.write(terminal.descriptor, b"\x03")
    terminal.wait_for(b"note: stopped; the conversation keeps this part of the answer (/clear starts over)")
    terminal.leave()
    assert (tmp_path / "answers").read_text().endswith("\n")


@pytest.mark.slow
def test_interrupted_answer_ends_its_line(chatty):
    terminal = Terminal("/dev/tty", "-m", chatty, "--max-new-tokens", 1900, "--min-new-tokens", 1900)
    terminal.type("the quick")
    terminal.wait_for(b"\x1b[?2004l")  # The prompt has ended.
    while len(terminal.screen) < 300:  # The answer has begun.
        terminal.screen += os.read(terminal.descriptor, 4096)
    os.write(terminal.descriptor, b"\x03")
    terminal.wait_for(b"\r\nnote: stopped; ")
    terminal.leave()


@pytest.mark.slow
def test_history_that_cannot_be_saved_is_a_warning(tiny, tmp_path, monkeypatch, reference):
    monkeypatch.setenv("LLMCLI_CACHE", "/dev/null/cache")
    terminal = Terminal(tmp_path / "answers", "-m", tiny, *GREEDY)
    terminal.wait_for(b"warning: cannot save messages to /dev/null/cache/chat_history: not a directory")
    terminal.type("the quick")
    terminal.leave()
    assert (tmp_path / "answers").read_text() == reference(("user", "the quick")) + "\n"
