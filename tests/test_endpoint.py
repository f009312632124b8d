"""--endpoint: records sent to a server that speaks the OpenAI protocol, be it well or ill."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "sleeps"]


class Server(ThreadingHTTPServer):
    """Answers `TEXT!` to TEXT, or as badly as the text's first word says. What it was asked is in `bodies`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models, self.owner = ["tiny"], "x"
        self.choice = None  # what each answer is
        self.body = None  # what each response is, as JSON or as events
        self.mangle = None  # what an answer makes of its text
        self.bodies, self.paths, self.keys, self.tries = [], [], [], Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, address):
        """Clients may go when they please."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": self.server.owner} for name in self.server.models
        ]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path.endswith("/chat/completions")
        text = body["messages"][-1]["content"] if is_chat else body["prompt"]
        with server.lock:
            server.bodies.append(body)
            server.paths.append(self.path)
            server.keys.append(self.headers["Authorization"])
            server.tries[text] += 1
            tries = server.tries[text]
            server.at_once += 1
            server.most_at_once = max(server.at_once, server.most_at_once)
        try:
            self.behave(text, tries, body, is_chat)
        finally:
            with server.lock:
                server.at_once -= 1

    def behave(self, text, tries, body, is_chat):
        kind = text.split()[0]
        if isinstance(self.server.body, list):
            return self.stream_events(self.server.body)
        if self.server.body is not None:
            return self.reply(200, self.server.body)
        if self.server.mangle:
            return self.reply(200, {"choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": self.server.mangle(text)}}]})  # fmt: skip
        if kind == "slow":
            time.sleep(0.5)
        elif kind == "late" and tries < 3:
            time.sleep(1)
        elif kind == "busy" and tries < 4:
            return self.reply(429, {"error": {"message": "too many requests"}})
        elif kind == "flaky" and tries < 4:
            return self.reply(500, {"error": {"message": "oh"}})
        elif kind == "broken":
            return self.reply(503, {"detail": "out of order"})
        elif kind == "long":
            return self.reply(400, {"error": {"message": "the prompt is too long", "code": 400}})
        elif kind == "secret":
            return self.reply(401, {"error": {"message": "who are you"}})
        elif kind == "unknown":
            return self.reply(404, {"detail": "Not Found"})
        elif kind == "gibberish":
            return self.reply(200, b"{what?")
        elif kind == "none":
            return self.reply(200, {"id": "1", "object": "x", "created": 0, "model": "tiny", "choices": []})
        elif kind in ("cut", "gone") and (tries < 4 or kind == "gone"):
            return self.close()
        elif kind == "half" and tries < 4:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return self.close()
        answers = [f"{text}! {i}" if i else f"{text}!" for i in range(body.get("n", 1))]
        if body.get("stream"):
            return self.stream(answers[0], is_chat)
        choices = [
            {"index": i, "finish_reason": "length", **({"message": {"role": "assistant", "content": each}} if is_chat
             else {"text": each})} for i, each in enumerate(answers)
        ]  # fmt: skip
        if self.server.choice:
            choices = [self.server.choice]
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        about = {"id": "1", "object": "x", "created": 0, "model": body["model"]}
        return self.reply(200, {**about, "choices": choices, "usage": usage})

    def reply(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def stream_events(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events:
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {data}\n\n".encode())

    def stream(self, text, is_chat):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for i, word in enumerate(re.findall(r"\S+\s*", text)):
            piece = {"delta": {"content": word}} if is_chat else {"text": word}
            chunk = {"id": "1", "object": "x", "created": 0, "model": "tiny", "choices": [{"index": 0, **piece}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            if text.startswith("torn") and i == 1:
                return self.close()
        piece = {"delta": {}} if is_chat else {"text": ""}
        chunk["choices"] = [{"index": 0, **piece, "finish_reason": "stop"}]
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        end = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
        self.wfile.write(f"data: {json.dumps({**chunk, **end})}\n\ndata: [DONE]\n\n".encode())
        return None

    def close(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(llmcli, server):
    return lambda command, *args, **settings: llmcli(command, "--endpoint", server.url, *args, **settings)


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def test_endpoint_failures_stay_with_their_record(served, server):
    kinds = ["fine", "busy", "flaky", "cut", "half", "slow", "broken", "long", "gibberish", "none", "gone"]
    texts = [f"{kind} {i}" for i in range(6) for kind in kinds]
    random.Random(1).shuffle(texts)
    ran = served("generate", "--lines", "--json", stdin=lines(*texts))
    assert ran.exit_status == 3
    assert [record["text"] for record in ran.records] == texts
    messages = {
        "broken": ("server_error", "server returned HTTP 503: out of order"),
        "long": ("request_rejected", "server returned HTTP 400: the prompt is too long"),
        "gibberish": ("invalid_response", "invalid response from server"),
        "none": ("invalid_response", "server returned 0 answers"),
        "gone": ("server_unreachable", "server closed the connection after 11 attempts"),
    }
    for record in ran.records:
        kind = record["text"].split()[0]
        if kind in messages:
            name, message = messages[kind]
            assert record["error"]["type"] == name
            assert record["error"]["message"].startswith(message)
        else:
            assert record["generated_text"] == record["text"] + "!"
            assert (record["finish_reason"], record["model"]) == ("length", "tiny")
            assert record["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    assert {server.tries[text] for text in texts if text.split()[0] in ("busy", "flaky", "cut", "half")} == {4}
    assert {server.tries[text] for text in texts if text.split()[0] == "broken"} == {11}
    # A try on a connection that the server has just closed does not reach it.
    assert {server.tries[text] for text in texts if text.split()[0] == "gone"} <= {10, 11}
    assert {server.tries[text] for text in texts if text.split()[0] in ("fine", "slow", "long")} == {1}


@pytest.mark.parametrize(
    ("message", "reason", "error"),
    [
        ({"content": None}, "length", "server returned no answer (finish_reason: length): increase --max-new-tokens"),
        ({"content": None, "reasoning_content": "Hm, Rome"}, "stop", "server returned no answer (finish_reason: stop)"),
        ({"content": ""}, "length", "server returned no answer (finish_reason: length): increase --max-new-tokens"),
        ({"content": "Ro"}, "content_filter", "server returned no answer (finish_reason: content_filter)"),
        ({"content": None, "tool_calls": []}, "tool_calls", "server returned no answer (finish_reason: tool_calls)"),
        ({"content": None, "refusal": "No."}, "stop", "server refused to answer: No."),
        ({"content": "<think>\nRo"}, "length", "model did not finish its thoughts, so there is no answer: "),
    ],
)
def test_endpoint_response_without_answer_fails(served, server, message, reason, error):
    server.choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    ran = served("qa", "Where?", "-c", "It is in Rome.", "--json")
    assert (ran.exit_status, ran.records[0]["error"]["type"]) == (1, "missing_answer")
    assert ran.records[0]["error"]["message"].startswith(error)


ODD_BODIES = [
    {"error": {"message": "model is loading"}},
    {"object": "error", "message": "model is loading"},
    {"choices": None},
    {"choices": [None]},
    {"choices": [{}]},
    {"choices": ["x"]},
    {"choices": {"message": "x"}},
    {"choices": [{"message": None, "finish_reason": "stop"}]},
    {"choices": [{"message": "x", "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": ["x"]}, "finish_reason": "stop"}]},
    [],
    None,
    "x",
    3,
]


@pytest.mark.parametrize("body", ODD_BODIES)
def test_endpoint_odd_body_fails_record(served, server, body):
    server.body = json.dumps(body).encode()
    for command in ("chat", "generate"):
        ran = served(command, "Where?", "--json")
        error = ran.records[0]["error"]
        assert ran.exit_status == 1
        assert error["type"] in ("invalid_response", "missing_answer"), error
        if "loading" in str(body):
            assert "model is loading" in error["message"]


@pytest.mark.parametrize("body", [body for body in ODD_BODIES if isinstance(body, dict)])
def test_endpoint_odd_stream_fails_record(served, server, body):
    server.body = [body, "[DONE]"]
    for command in ("chat", "generate"):
        ran = served(command, "Where?", is_terminal=True)
        assert ran.exit_status == 1
        assert "error: " in ran.stderr
        assert "Error" not in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Ro"}, {"type": "text", "text": "me"}],
        "<think>\nParis?\n</think>\n\nRome\nItaly",
        "Paris?\n</think>\nRome",
    ],
)
def test_endpoint_answer_is_text_after_thought(served, server, content):
    server.choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    ran = served("qa", "Where?", "-c", "It is in Rome.", "--json")
    assert ran.records[0]["answer"] == "Rome"
    assert "stop" not in server.bodies[0]


@pytest.mark.parametrize(("owner", "is_sent"), [("vllm", True), ("openai", False)])
def test_endpoint_switches_thinking_off_where_known(served, server, owner, is_sent):
    server.owner = owner
    for command in ("summarize", "chat"):
        served(command, "It is in Rome.")
    assert ["chat_template_kwargs" in body for body in server.bodies] == [is_sent, False]


@pytest.mark.parametrize(("option", "value"), [("--think", True), ("--no-think", False)])
def test_endpoint_sends_variables_of_chat_template(served, server, option, value):
    for command in ("summarize", "chat"):
        assert served(command, "It is in Rome.", option, "--template-option", "date=today").exit_status == 0
        expected = {"enable_thinking": value, "thinking": value, "date": "today"}
        assert server.bodies[-1]["chat_template_kwargs"] == expected
    served("chat", "It is in Rome.", option, "--template-option", "thinking=1")
    assert server.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": value, "thinking": 1}


THOUGHTS = [
    {"content": "\n\nRome", "reasoning_content": "Paris?\n"},
    {"content": "Rome", "reasoning": "Paris?", "reasoning_content": None},
    {"content": "Rome", "reasoning": "Paris?", "reasoning_content": "Paris?"},
    {"content": "<think>\nParis?\n</think>\n\nRome"},
    {"content": "<|channel|>analysis<|message|>Paris?<|end|><|start|>assistant<|channel|>final<|message|>Rome"},
]


@pytest.mark.parametrize("message", THOUGHTS)
def test_endpoint_reasoning_is_field_of_its_own(served, server, message):
    server.choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    for command, name in (("chat", "generated_text"), ("summarize", "summary_text")):
        record = served(command, "Where?", "--json").records[0]
        assert (record[name], record["reasoning"]) == ("Rome", "Paris?")
        assert served(command, "Where?").stdout == "Rome\n"


@pytest.mark.parametrize("message", THOUGHTS)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_endpoint_streamed_reasoning_goes_to_stderr(served, server, message, size):
    pieces = [(name, text[i : i + size]) for name, text in message.items() if text for i in range(0, len(text), size)]
    pieces.sort(key=lambda piece: piece[0] == "content")
    events = [{"choices": [{"index": 0, "delta": {name: piece}, "finish_reason": None}]} for name, piece in pieces]
    server.body = [*events, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, "[DONE]"]
    ran = served("chat", "Where?", is_terminal=True)
    assert (ran.stdout, ran.exit_status) == ("Rome\n", 0)
    assert "Paris?" in re.sub(r"\x1b\[[02]m", "", ran.stderr)


def test_endpoint_split_answer_about_marks_stays(served, server):
    text = "<think>hi</think> is a thought."
    for message in (
        {"content": text, "reasoning": "Hm"},
        {"content": "<think>hi</think>"},
        {"content": "<think> opens"},
    ):
        server.choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
        record = served("chat", "Where?", "--json").records[0]
        assert (record["generated_text"], record.get("reasoning")) == (message["content"], message.get("reasoning"))


@pytest.mark.parametrize(
    "message",
    [{"content": None, "reasoning": "Hm"}, {"content": "", "reasoning_content": "Hm"}, {"content": "<think>\nHm"}],
)
def test_endpoint_unfinished_thought_of_chat_is_empty(served, server, message):
    server.choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "length"}
    ran = served("chat", "Where?", "--json")
    record = ran.records[0]
    assert (record["generated_text"], record["reasoning"], record["finish_reason"]) == ("", "Hm", "length")
    assert ran.stderr.count("warning: model did not finish its thoughts") == 1


@pytest.mark.parametrize("count", [1, 5])
def test_endpoint_limits_concurrency(served, server, count):
    texts = [f"slow {i}" for i in range(10)]
    ran = served("generate", "--lines", "--concurrency", count, stdin=lines(*texts[: 2 * count]))
    assert ran.stdout.splitlines() == [f"{text}{text}!" for text in texts[: 2 * count]]
    assert server.most_at_once == count


def test_endpoint_retries_after_timeout(served, server, monkeypatch):
    monkeypatch.setattr("llmcli.engines.servers.TIMEOUT_S", 0.2)
    ran = served("generate", "--lines", "--json", stdin=lines("late 0", "fine 0", "slow 0", "late 1"))
    assert [record.get("generated_text") for record in ran.records] == ["late 0!", "fine 0!", None, "late 1!"]
    assert ran.records[2]["error"]["message"] == "server timed out after 11 attempts"
    assert server.tries["late 0"] == 3


def test_endpoint_slow_answer_delays_no_request(served, server):
    texts = ["slow first", *[f"fine {i}" for i in range(100)]]
    ran = served("generate", "--lines", "--concurrency", 2, stdin=lines(*texts))
    assert ran.stdout.splitlines() == [f"{text}{text}!" for text in texts]
    assert len(server.bodies) == 101


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("secret", "server returned HTTP 401: who are you", "LLMCLI_API_KEY"),
        ("unknown", "server returned HTTP 404: Not Found", "check -m NAME"),
    ],
)
def test_endpoint_ends_run_on_fatal_status(served, text, message, hint):
    ran = served("generate", "--lines", stdin=lines("fine", text, "fine"))
    said = ran.stderr.splitlines()
    assert (ran.exit_status, said[0]) == (4, f"error: {message}")
    assert hint in said[1]


def test_endpoint_unreachable_server_exits_4(llmcli):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for name in ((), ("-m", "tiny")):
        ran = llmcli("generate", "the fox", "--endpoint", url, *name)
        assert ran.exit_status == 4
        assert ran.stderr == f"error: cannot reach {url}/\nhint: check that the server is running\n"


def test_endpoint_resumes_after_server_restart(served, server, llmcli, tmp_path):
    path = tmp_path / "out.jsonl"
    (tmp_path / "in").write_bytes(lines(*[f"fine {i}" for i in range(40)], *[f"slow {i}" for i in range(40)]))
    args = ("--lines", "--json", "-f", tmp_path / "in", "-m", "tiny", "--output", path, "--resume", "--concurrency", 4)

    def leave():
        while server.tries["slow 5"] == 0:
            time.sleep(0.01)
        server.shutdown()
        server.server_close()

    leaving = threading.Thread(target=leave)
    leaving.start()
    ran = served("generate", *args)
    leaving.join()
    assert (ran.exit_status, "cannot reach" in ran.stderr) == (4, True)
    done = path.read_bytes().count(b"\n")
    assert 40 <= done < 80
    back = Server()
    ran = llmcli("generate", "--endpoint", back.url, *args)
    assert ran.exit_status == 0
    answers = [json.loads(line)["generated_text"] for line in path.read_text().splitlines()]
    assert answers == [f"fine {i}!" for i in range(40)] + [f"slow {i}!" for i in range(40)]
    assert len(back.bodies) == 80 - done
    back.shutdown()
    back.server_close()


def test_endpoint_uses_only_model_of_server(served, server):
    assert served("generate", "the fox", "--json").records[0]["model"] == "tiny"
    server.models = ["one", "two"]
    ran = served("generate", "the fox")
    assert (ran.exit_status, ran.stderr) == (
        2, "error: the server has 2 models: one, two\nhint: choose one with -m NAME\n"
    )  # fmt: skip
    assert served("generate", "the fox", "-m", "two", "--json").records[0]["model"] == "two"
    server.models = []
    assert "the server lists no model" in served("generate", "the fox").stderr


def test_endpoint_translates_option_names(served, server):
    options = ("--max-new-tokens", 7, "--temperature", 0.5, "--top-p", 0.9, "-n", 2, "--top-k", 5, "--seed", 3)
    ran = served("generate", "the fox", *options, "--stop", "x! 1", "-o", "guided_regex=a+", "--json")
    assert ran.records[0]["generated_texts"] == ["the fox!", "the fo"]
    assert server.paths == ["/v1/completions"]
    assert server.bodies == [
        {"model": "tiny", "prompt": "the fox", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 3,
         "stop": ["x! 1"], "top_k": 5, "guided_regex": "a+"}
    ]  # fmt: skip


def test_endpoint_leaves_sampling_to_server(served, server):
    for command in (("generate",), ("chat", "--system", "be brief"), ("generate", "--temperature", 0)):
        served(*command, "the fox")
    assert server.bodies == [
        {"model": "tiny", "prompt": "the fox", "max_tokens": 128},
        {"model": "tiny", "max_tokens": 512, "messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]},
        {"model": "tiny", "prompt": "the fox", "max_tokens": 128, "temperature": 0},
    ]  # fmt: skip
    assert server.paths == ["/v1/completions", "/v1/chat/completions", "/v1/completions"]


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (("translate", "--to", "fr", "The fox is quick."), "translation_text"),
        (("summarize", "The fox is quick. " * 500), "summary_text"),
        (("qa", "Who is quick?", "-c", "The fox is quick."), "answer"),
    ],
)
def test_endpoint_runs_prompted_tasks(served, server, args, field):
    ran = served(*args, "--json")
    assert ran.exit_status == 0
    asked = server.bodies[0]["messages"][-1]["content"]
    assert "The fox is quick." in asked
    assert ran.records[0][field]
    assert f"{asked}!".startswith(ran.records[0][field])
    assert server.bodies[0]["temperature"] == 0
    assert len(server.bodies) == 1


@pytest.mark.parametrize("args", [("--num-beams", 2), ("--truncate",)])
def test_endpoint_rejects_unsupported_options(served, server, args):
    ran = served("generate", "the fox", *args)
    assert (ran.exit_status, f"{args[0]} is not supported with --endpoint" in ran.stderr) == (2, True)
    assert server.bodies == []


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_endpoint_streams_to_terminal(served, server, command, monkeypatch):
    pieces = []
    monkeypatch.setattr("llmcli.io.output.Output.stream", lambda self, text: pieces.append(text))
    served(command, "the quick fox", is_terminal=True)
    assert [piece for piece in pieces if piece][-3:] == ["the ", "quick ", "fox!"]
    assert server.bodies[0]["stream"] is True


def test_endpoint_reports_broken_stream(served):
    ran = served("chat", "torn in two", is_terminal=True)
    assert (ran.exit_status, ran.stdout) == (1, "torn in \n")
    assert "server stopped in the middle of an answer" in ran.stderr


def test_endpoint_sends_own_key_only(served, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    served("generate", "the fox")
    monkeypatch.setenv("LLMCLI_API_KEY", "mine")
    served("generate", "the fox")
    assert server.keys == ["Bearer none", "Bearer mine"]


INVALID_URLS = ["localhost:8000", "ftp://x/y", "http://", "http://[x]/v1", "server", "http://x:nope", "http://x/v1\n"]


@pytest.mark.parametrize("url", INVALID_URLS)
def test_endpoint_rejects_invalid_url(llmcli, url):
    ran = llmcli("generate", "the fox", "--endpoint", url)
    assert (ran.exit_status, "invalid --endpoint" in ran.stderr) == (2, True)


def test_endpoint_reports_missing_package(llmcli, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    ran = llmcli("generate", "the fox", "--endpoint", "http://localhost:1")
    assert ran.exit_status == 2
    assert ran.stderr.endswith("hint: run `pip install 'llmcli[openai]'`\n")


@pytest.mark.slow
def test_endpoint_imports_nothing_heavy(server):
    args = ["chat", "the fox", "--endpoint", server.url]
    heavy = "{'torch', 'transformers', 'rich'} & set(sys.modules)"
    code = f"import sys; from llmcli.cli import main; main({args}); sys.exit(str({heavy} or 0))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("the fox!\n", "0\n")


@pytest.mark.slow
def test_endpoint_ctrl_c_exits_at_once(server, tmp_path):
    (tmp_path / "in").write_bytes(lines(*[f"slow {i}" for i in range(1000)]))
    args = ["generate", "--lines", "-f", tmp_path / "in", "--endpoint", server.url, "--concurrency", "2"]
    running = subprocess.Popen([sys.executable, "-m", "llmcli", *args], stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"slow 0slow 0!\n"
    running.send_signal(signal.SIGINT)
    assert running.wait(5) == 130


@pytest.fixture(scope="module")
def serve(chatty, tmp_path_factory):
    """The URL of a real `transformers serve`, with a tiny model in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(chatty), "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as file:
        serving = subprocess.Popen([*command, "--dtype", "float32", "--device", "cpu"], stdout=file, stderr=file)
    url = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health"):
                    break
            except (urllib.error.URLError, ConnectionError):
                assert serving.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield url
    finally:
        os.kill(serving.pid, signal.SIGTERM)
        serving.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_transformers_serve_gives_equal_text(llmcli, serve, chatty, command):
    choose = random.Random(1)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(1, 20))) for _ in range(40)]
    args = (command, "--lines", "--json", "-m", chatty, "--temperature", 0, "--max-new-tokens", 8)
    ours = llmcli(*args, "--dtype", "float32", stdin=lines(*texts))
    theirs = llmcli(*args, "--endpoint", serve, "--concurrency", 8, stdin=lines(*texts))
    assert (theirs.exit_status, theirs.stderr) == (0, "")
    assert [record["text"] for record in theirs.records] == texts
    assert [record["generated_text"] for record in theirs.records] == [
        record["generated_text"] for record in ours.records
    ]


@pytest.mark.slow
def test_transformers_serve_translates(llmcli, serve, chatty):
    args = ("translate", "--from", "en", "--to", "fr", "The fox.", "--json", "-m", chatty, "--max-new-tokens", 8)
    ours = llmcli(*args, "--dtype", "float32").records[0]
    theirs = llmcli(*args, "--endpoint", serve).records[0]
    assert theirs["translation_text"] == ours["translation_text"] != ""


DOCUMENT = """---
title: The pump
---

# The `pump --stop` guide

See [the manual](http://x.org/a_b) and <b>stop</b> it with `pump --stop`, or ask me@x.org.

| name | use |
|---|---|
| `--start` | Start `a\\|b` now |

```sh
pump --start
```

> A note[^1] on $x^2$ and ![a clock](clock.png).

[^1]: The end of it.
"""
KEPT = (
    "---\ntitle: The pump\n---\n", "# ", "`pump --stop`", "](http://x.org/a_b)", "<b>", "</b>", "me@x.org", "[^1]",
    "|---|---|\n| `--start` | ", "`a\\|b`", "```sh\npump --start\n```", "$x^2$", "![a clock](clock.png)", "\n[^1]: ",
)  # fmt: skip
MANGLES = {
    "upper": str.upper,
    "drop": lambda text: re.sub(r"[^\w\s]", "", text),
    "quotes": lambda text: text.replace("`", "'").replace("[", "("),
    "reverse": lambda text: " ".join(reversed(text.split())),
    "lines": lambda text: " ".join(text.split()),
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("mangle", MANGLES)
@pytest.mark.parametrize("text", [DOCUMENT, "Run `pump --stop` and <b>wait</b>, please."])
def test_translate_any_model_keeps_code_and_links(served, server, mangle, text):
    server.mangle = MANGLES[mangle]
    ran = served("translate", "--from", "en", "--to", "fr", "--json", stdin=text.encode())
    translation = ran.records[0]["translation_text"]
    for part in KEPT:
        assert translation.count(part) == text.count(part), part
    if mangle == "upper":
        assert "PLEASE" in translation or "| START `a\\|b` NOW |" in translation
    assert "untranslated" not in ran.records[0]


def test_translate_model_that_joins_lines_keeps_lines(served, server):
    server.mangle = lambda text: " ".join(text.split()).upper()
    ran = served("translate", "--from", "en", "--to", "fr", stdin=b"The fox.\n\n  The dog. A cat.\n")
    assert ran.stdout == "THE FOX.\n\n  THE DOG. A CAT.\n"


def test_translate_reports_parts_that_came_back(served, server):
    server.mangle = str
    ran = served("translate", "--from", "en", "--to", "fr", stdin=DOCUMENT.encode())
    assert (ran.stdout, ran.stderr) == (DOCUMENT, "warning: 7 of 7 parts came back untranslated\n")
    server.mangle = lambda text: text if "fox" in text else text.upper()
    ran = served("translate", "--from", "en", "--to", "fr", "--lines", stdin=lines("The fox.", "The dog.", "`x`", "7"))
    assert ran.stdout.splitlines() == ["The fox.", "THE DOG.", "`x`", "7"]
    assert ran.stderr == "warning: 1 of 2 parts came back untranslated\n"


DAY = {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"]}


def as_choice(text, reason="stop", command="chat", **more):
    answer = {"text": text} if command == "generate" else {"message": {"role": "assistant", "content": text}}
    return {"index": 0, "finish_reason": reason, **answer, **more}


@pytest.mark.parametrize(
    ("owner", "args", "expected"),
    [
        ("vllm", ["--regex", "a|b"], {"structured_outputs": {"regex": "a|b"}}),
        ("x", ["--choice", "a", "--choice", "c"], {"structured_outputs": {"choice": ["a", "c"]}}),
        ("sglang", ["--choice", "a", "--choice", "c.d"], {"regex": r"a|c\.d"}),
        ("llamacpp", ["--choice", "a", "--choice", "c"], {"grammar": 'root ::= "a" | "c"'}),
    ],
)
def test_endpoint_constraint_has_the_name_of_the_server(served, server, owner, args, expected):
    server.owner, server.choice = owner, as_choice("a")
    ran = served("chat", *args, "hello")
    assert (ran.stdout, ran.exit_status) == ("a\n", 0)
    assert expected.items() <= server.bodies[0].items()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_endpoint_schema_gives_data(served, server, command):
    server.choice = as_choice('\n{"day": 12}\n', command=command)
    ran = served(command, "--schema", json.dumps(DAY), "--jsonl", stdin=b'{"text": "hello"}\n')
    assert ran.records[0]["data"] == {"day": 12}
    sent = server.bodies[0]["response_format"]
    assert sent == {"type": "json_schema", "json_schema": {"name": "answer", "schema": DAY, "strict": True}}
    assert served(command, "--schema", json.dumps(DAY), "hello").stdout == '{"day":12}\n'


@pytest.mark.parametrize(
    ("text", "reason", "error"),
    [
        ('{"day": "x"}', "stop", "invalid_response"),
        ("Sure! Here it is.", "stop", "invalid_response"),
        ('{"day": 1', "length", "incomplete"),
        ('{"day": 1, "day": 2}', "stop", "invalid_response"),
    ],
)
def test_endpoint_answer_is_checked(served, server, text, reason, error):
    server.choice = as_choice(text, reason)
    ran = served("chat", "--schema", json.dumps(DAY), "--json", "hello")
    assert ran.records[0]["error"]["type"] == error
    assert ran.exit_status == 1


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"more": 1, "b": ["x", 2], "day": 3}', True),
        ('{"b": [2], "day": 3.5}', False),
        ('{"b": ["x"]}', False),
        ('{"b": ["xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"], "day": 3}', False),
        ('{"b": [{"next": {"when": "2026-11-26"}, "when": "2026-01-01"}], "day": 3}', True),
        ('{"b": [{"next": {"when": "2026-13-01"}, "when": "2026-01-01"}], "day": 3}', False),
    ],
)
def test_endpoint_answer_has_properties_in_any_order(served, server, text, is_valid):
    node = {"type": "object", "properties": {"when": {"format": "date"}, "next": {"$ref": "#/$defs/node"}}}
    item = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "integer"}, {"type": "string", "pattern": "^((x|a)+)+$"}]}
    schema = {**DAY, "properties": {**DAY["properties"], "b": {"items": item}}, "$defs": {"node": node}}
    server.choice = as_choice(text)
    (record,) = served("chat", "--schema", json.dumps(schema), "--json", "hello").records
    assert record.get("data") == (json.loads(text) if is_valid else None)
    assert record.get("error", {}).get("type") == (None if is_valid else "invalid_response")


def test_endpoint_records_have_their_own_settings(served, server):
    records = [
        {"text": "a", "o": {"max_tokens": 3, "temperature": 0, "seed": 5}},
        {"text": "b", "o": {"stop": ["x"], "top_k": 4}, "s": None},
        {"text": "c", "o": {"max_tokens": 0}},
        {"text": "d"},
    ]
    stdin = "".join(json.dumps(record) + "\n" for record in records).encode()
    ran = served("chat", "--jsonl", "--settings-field", "o", "--schema-field", "s", "--temperature", 0.5, stdin=stdin)
    assert [record.get("error", {}).get("type") for record in ran.records] == [None, None, "invalid_settings", None]
    a, b, d = sorted(server.bodies, key=lambda body: body["messages"][-1]["content"])
    assert (a["max_tokens"], a["temperature"], a["seed"]) == (3, 0, 5)
    assert (b["stop"], b["top_k"], b["temperature"]) == (["x"], 4, 0.5)
    assert (d["temperature"], "seed" in d, "stop" in d) == (0.5, False, False)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_endpoint_logprobs_have_one_shape(served, server, command):
    token = {"token": "hé", "logprob": -0.5, "bytes": [104, 195, 169]}
    old = {"tokens": ["hé"], "token_logprobs": [-0.5], "top_logprobs": [{"hé": -0.5}], "text_offset": [0]}
    logprobs = old if command == "generate" else {"content": [{**token, "top_logprobs": [token]}]}
    server.choice = as_choice("hé", command=command, logprobs=logprobs)
    (record,) = served(command, "--json", "--logprobs", 1, "hello").records
    assert record["logprobs"] == {"content": [{**token, "top_logprobs": [token]}]}
    assert record["mean_logprob"] == -0.5
    expected = {"logprobs": 1} if command == "generate" else {"logprobs": True, "top_logprobs": 1}
    assert expected.items() <= server.bodies[0].items()


def test_endpoint_form_that_the_server_lacks_is_refused(served, server):
    server.owner = "llamacpp"
    ran = served("chat", "--regex", "a", "hello")
    assert (ran.exit_status, ran.stderr) == (2, "error: llama-server does not support regex\nhint: use a schema\n")
    stdin = b'{"text": "a", "o": {"regex": "a"}}\n{"text": "b"}\n'
    ran = served("chat", "--jsonl", "--settings-field", "o", stdin=stdin)
    assert [record.get("error", {}).get("type") for record in ran.records] == ["request_rejected", None]


def batch_line(name, url="/v1/chat/completions", **body):
    body = {"messages": [{"role": "user", "content": "the fox"}]} | body if url.endswith("chat/completions") else body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"model": "x", **body}}) + "\n"


def test_endpoint_gets_requests_of_batch_file_unchanged(served, server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    texts = [batch_line("a", tools=tools, n=2), batch_line("b", "/v1/completions", prompt="long", temperature=0),
             batch_line("c", "/v1/completions", prompt="unknown"), batch_line("d", "/v1/x", prompt="the"),
             batch_line("e", "/v1/completions", prompt="broken")]  # fmt: skip
    ran = served("chat", "--openai-batch", "--top-p", 0.5, "--temperature", 1, stdin="".join(texts).encode())
    assert [record["response"]["status_code"] for record in ran.records] == [200, 400, 404, 404, 503]
    body = ran.records[0]["response"]["body"]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["the fox!", "the fox! 1"]
    assert ran.records[1]["error"] == {
        "code": "request_rejected", "message": "server returned HTTP 400: the prompt is too long"}  # fmt: skip
    sent = {json.dumps(each.get("prompt")): each for each in server.bodies}
    assert sent["null"].items() >= {"tools": tools, "n": 2, "top_p": 0.5, "model": "tiny", "stream": False}.items()
    assert "max_tokens" not in sent["null"]
    assert (sent['"long"']["temperature"], sent["null"]["temperature"]) == (0, 1)


@pytest.mark.slow
def test_transformers_serve_answers_batch_file(llmcli, serve, chatty):
    kinds = [{}, {"url": "/v1/completions", "prompt": "the dog"}, {"no_such_field": 1}]
    asked = {"max_tokens": 5, "temperature": 0}
    texts = "".join(batch_line(str(i), **kinds[i % 3], **asked) for i in range(30)).encode()
    args = ("chat", "--openai-batch", "-m", chatty)
    here = llmcli(*args, "--dtype", "float32", stdin=texts)
    there = llmcli(*args, "--endpoint", serve, stdin=texts)
    for ours, theirs in zip(here.records, there.records, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["error"] is None) == (theirs["error"] is None)
        if ours["error"] is None:
            ours, theirs = ours["response"]["body"], theirs["response"]["body"]
            assert ours["object"] == theirs["object"]
            assert {*ours} <= {*theirs}
            (choice,), (other,) = ours["choices"], theirs["choices"]
            assert choice.get("text") == other.get("text")
            assert choice.get("message", {}).get("content") == other.get("message", {}).get("content")
