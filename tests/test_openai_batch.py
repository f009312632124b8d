"""--openai-batch: requests of the OpenAI API in, responses that its own package reads out, line by line."""

import json
import random
import subprocess
import sys

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from llmcli.pipelines.embedding import EmbeddingPipeline

GREEDY = {"temperature": 0, "max_tokens": 6}
TYPES = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/embeddings": CreateEmbeddingResponse,
}
CHAT, TEXT, EMBED = TYPES
WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "sleeps"]
BAD = [  # lines, and the status of their responses
    (b'{"custom_id": "x", "method"', 400),
    (b"", 400),
    (b"[1]", 400),
    ({"custom_id": "c1", "method": "POST", "url": TEXT, "body": {"prompt": "the"}}, 400),  # the ID of another line
    ({"custom_id": "u", "method": "POST", "url": "/v1/responses", "body": {"input": "the"}}, 404),
    ({"custom_id": "b", "method": "POST", "url": CHAT, "body": []}, 400),
    ({"custom_id": "m", "method": "POST", "url": CHAT, "body": {"messages": [{"role": "user"}]}}, 400),
    ({"custom_id": "t", "method": "POST", "url": TEXT, "body": {"prompt": "the", "temperature": "hot"}}, 400),
    ({"custom_id": "l", "method": "POST", "url": TEXT, "body": {"prompt": "the " * 3000}}, 400),
    ({"custom_id": "e", "method": "POST", "url": EMBED, "body": {"input": [[1, 2]]}}, 400),
]


def line(custom_id, url, **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", **body}}


def lines(*requests):
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in requests)


def bodies(ran):
    return [record["response"]["body"] for record in ran.records]


def without_times(data):
    """Responses without what differs from run to run: IDs, times and the last digits of vectors."""
    records = [json.loads(each, parse_float=lambda digits: round(float(digits), 4)) for each in data.splitlines()]
    for record in records:
        del record["id"], record["response"]["request_id"]
        for name in ("id", "created"):
            record["response"]["body"].pop(name, None)
    return records


@pytest.fixture(scope="module")
def mixed():
    """200 lines of all kinds, ten of them bad, and the status of each."""
    choose = random.Random(1)
    made = []
    for i in range(190):
        text = " ".join(choose.choices(WORDS, k=choose.randint(1, 12)))
        made.append(([
            line(f"c{i}", CHAT, messages=[{"role": "user", "content": text}], **GREEDY),
            line(f"c{i}", TEXT, prompt=text, **GREEDY),
            line(f"c{i}", EMBED, input=[text, "dog"]),
        ][i % 3], 200))  # fmt: skip
    for i, bad in enumerate(BAD):
        made.insert(19 * i + 7, bad)
    return lines(*(request for request, _ in made)), [status for _, status in made]


@pytest.fixture
def batch(llmcli):
    return lambda model, *args, **settings: llmcli(
        "chat", "--openai-batch", "-m", model, "--dtype", "float32", *args, **settings
    )


def test_batch_file_gives_a_typed_response_per_line(batch, chatty, mixed):
    stdin, statuses = mixed
    ran = batch(chatty, stdin=stdin)
    assert ran.exit_status == 3
    assert [record["response"]["status_code"] for record in ran.records] == statuses
    asked = [json.loads(each) if each.endswith(b"}") else {} for each in stdin.splitlines()]
    assert [record["custom_id"] for record in ran.records] == [each.get("custom_id") for each in asked]
    assert len({record["id"] for record in ran.records}) == 200
    for record, request in zip(ran.records, asked, strict=True):
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["response"].keys() == {"status_code", "request_id", "body"}
        body = record["response"]["body"]
        if record["response"]["status_code"] == 200:
            assert record["error"] is None
            assert TYPES[request["url"]].model_validate(body).to_dict(exclude_unset=False)["model"] == str(chatty)
        else:
            assert body["error"]["message"] == record["error"]["message"] != ""


def test_batch_answers_are_those_of_the_commands(batch, llmcli, chatty):
    texts = ["the lazy dog", "once upon", "a fox"]
    requests = [line(str(i), TEXT, prompt=text, **GREEDY) for i, text in enumerate(texts)]
    requests += [line(f"c{i}", CHAT, messages=[{"role": "user", "content": text}], **GREEDY)
                 for i, text in enumerate(texts)]  # fmt: skip
    answers = bodies(batch(chatty, stdin=lines(*requests)))
    args = ("-m", chatty, "--dtype", "float32", "--temperature", 0, "--max-tokens", 6, "--lines", "--json")
    for command, made in (("generate", answers[:3]), ("chat", answers[3:])):
        expected = llmcli(command, *args, stdin="\n".join(texts).encode()).records
        for body, record in zip(made, expected, strict=True):
            (choice,) = body["choices"]
            text = choice["message"]["content"] if command == "chat" else choice["text"]
            assert (text, choice["finish_reason"]) == (record["generated_text"], record["finish_reason"])
            assert body["usage"].items() >= record["usage"].items()


def test_batch_settings_apply_to_their_request(batch, chatty):
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    chat = {"messages": [{"role": "user", "content": "the fox"}], "max_completion_tokens": 5}
    ran = batch(
        chatty, "--temperature", 0,
        stdin=lines(
            line("form", CHAT, **chat | {"max_completion_tokens": 20}, response_format=form),
            line("json", CHAT, **chat | {"max_completion_tokens": 1}, response_format={"type": "json_object"}),
            line("top", CHAT, **chat, logprobs=True, top_logprobs=2),
            line("n", CHAT, **chat, n=3, temperature=2, seed=-5),
            line("same", CHAT, **chat, n=3, temperature=2, seed=-5, user="me", tools=[], frequency_penalty=0.0),
            line("greedy", CHAT, **chat, n=2),
            line("old", TEXT, prompt=["the", "a dog"], max_tokens=4, logprobs=2, n=2),
            line("stop", TEXT, prompt="the", max_tokens=40, stop=[" "]),
            line("null", TEXT, prompt="the", max_tokens=3, stop=None, seed=None, n=None, logit_bias={}),
        ),
    )  # fmt: skip
    form, cut, top, several, same, greedy, old, stop, null = ran.records
    for record in ran.records:
        if record["error"] is None:
            kind = Completion if record["custom_id"] in ("old", "stop", "null") else ChatCompletion
            kind.model_validate(record["response"]["body"])
    assert json.loads(form["response"]["body"]["choices"][0]["message"]["content"]) == {"a": 7}
    assert (cut["response"]["status_code"], cut["error"]["code"]) == (400, "incomplete")
    content = top["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2] * 5
    texts = [[choice["message"]["content"] for choice in each["response"]["body"]["choices"]]
             for each in (several, same, greedy)]  # fmt: skip
    assert texts[0] == texts[1]
    assert len({*texts[0]}) == 3
    assert texts[2][0] == texts[2][1]
    assert several["response"]["body"]["usage"]["completion_tokens"] == 15
    assert several["response"]["body"]["usage"]["prompt_tokens"] == greedy["response"]["body"]["usage"]["prompt_tokens"]
    choices = old["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"] != choices[2]["text"]
    logprobs = choices[0]["logprobs"]
    assert {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {4}
    assert logprobs["text_offset"][0] == 0
    assert stop["response"]["body"]["choices"][0]["finish_reason"] in ("stop", "length")
    assert " " not in stop["response"]["body"]["choices"][0]["text"]
    assert null["response"]["body"]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools [{'type': 'function'}] is not supported"),
        (CHAT, {"presence_penalty": 1}, "presence_penalty 1 is not supported"),
        (CHAT, {"stream": True}, "stream True is not supported"),
        (CHAT, {"n": 0}, "invalid n 0: expected an integer from 1 to 128"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid top_logprobs 21"),
        (CHAT, {"response_format": {"type": "xml"}}, "invalid response_format"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "invalid type"),
        (CHAT, {"messages": []}, "must be a list of messages"),
        (CHAT, {"messages": [{"role": "user", "content": " "}]}, "the last message is empty"),
        (TEXT, {"prompt": None}, "prompt must be a string"),
        (TEXT, {"prompt": [1, 2]}, "must be a string"),
        (TEXT, {"prompt": "the", "logprobs": True}, "invalid logprobs True"),
        (TEXT, {"prompt": "the", "stop": [""]}, "invalid stop"),
        (TEXT, {"prompt": "the", "max_tokens": 0}, "invalid max_tokens 0"),
        (EMBED, {"input": ""}, "input has an empty text"),
        (EMBED, {"input": "the", "encoding_format": "base64"}, "encoding_format 'base64' is not supported"),
        (EMBED, {"input": "the", "temperature": 1}, "temperature 1 is not supported"),
    ],
)
def test_batch_invalid_body_gives_400(batch, chatty, url, body, message):
    given = {"messages": [{"role": "user", "content": "the"}]} if url == CHAT else {}
    ran = batch(chatty, stdin=lines(line("a", url, **{**given, **body}), line("b", TEXT, prompt="the", max_tokens=1)))
    bad, good = ran.records
    assert (bad["response"]["status_code"], good["response"]["status_code"]) == (400, 200)
    assert message in bad["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"custom_id": None}, 400, "custom_id must be a string"),
        ({"custom_id": 5}, 400, "custom_id must be a string"),
        ({"method": "GET"}, 400, "method must be POST"),
        ({"url": None}, 400, "url must be a string"),
        ({"url": "/v1/chat"}, 404, "unknown url '/v1/chat'"),
        ({"body": None}, 400, "body must be a JSON object"),
        ({"error": {"type": "x", "message": "y"}}, 200, ""),  # no error of an earlier run
    ],
)
def test_batch_invalid_line_gives_response(batch, chatty, fields, status, message):
    ran = batch(chatty, stdin=lines({**line("a", TEXT, prompt="the", max_tokens=1), **fields}))
    (record,) = ran.records
    assert (record["response"]["status_code"], ran.exit_status) == (status, int(status != 200))
    assert message in (record["error"] or {"message": ""})["message"]


def test_batch_model_does_what_it_can(llmcli, batch, base, encoder):
    requests = [
        line("c", CHAT, messages=[{"role": "user", "content": "the"}]),
        line("t", TEXT, prompt="the dog", max_tokens=2),
        line("e", EMBED, input=["the dog", "a fox"]),
    ]
    for model, statuses in ((base, [400, 200, 200]), (encoder, [400, 400, 200])):
        for command in ("embed", "generate"):
            ran = llmcli(command, "--openai-batch", "-m", model, stdin=lines(*requests))
            assert [record["response"]["status_code"] for record in ran.records] == statuses
            assert "cannot" in ran.stderr or "has no chat template" in ran.stderr or "is not a causal" in ran.stderr
        vectors = [each["embedding"] for each in ran.records[2]["response"]["body"]["data"]]
        expected = llmcli("embed", "--lines", "-m", model, stdin=b"the dog\na fox\n").records
        assert vectors == [pytest.approx(record["embedding"], abs=1e-5) for record in expected]


@pytest.mark.parametrize("model", ["chatty", "encoder"])
def test_batch_embeddings_of_lines_share_batches(batch, request, model, monkeypatch):
    sizes, forward = [], EmbeddingPipeline._forward
    monkeypatch.setattr(
        EmbeddingPipeline, "_forward", lambda self, inputs: sizes.append(len(inputs["cut"])) or forward(self, inputs)
    )
    requests = [line(str(i), EMBED, input=f"{i} dogs") for i in range(64)]
    ran = batch(request.getfixturevalue(model), "--batch-size", 16, stdin=lines(*requests))
    assert ran.exit_status == 0
    assert (max(sizes), min(sizes[:-1])) == (16, 16)
    norms = [sum(x * x for x in body["data"][0]["embedding"]) for body in bodies(ran)]
    assert norms == [pytest.approx(1, abs=1e-4)] * 64


def test_batch_says_which_model_answers(batch, chatty):
    ran = batch(chatty, stdin=lines(*(line(str(i), TEXT, prompt="the", max_tokens=1) for i in range(3))))
    assert ran.stderr == f"note: requests name the model 'tiny'; {chatty} answers all of them\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chat", "--prompt", "{text}!"], "--prompt or --preset cannot be used with --openai-batch"),
        (["generate", "--preset", "poem"], "--prompt or --preset cannot be used with --openai-batch"),
        (["chat", "-n", 2], "-n cannot be used with --openai-batch"),
        (["chat", "--num-beams", 2], "--num-beams cannot be used with --openai-batch"),
        (["chat", "--field", "x"], "--field cannot be used with --openai-batch"),
        (["chat", "--regex", "a"], "--regex cannot be used with --openai-batch"),
        (["chat", "--settings-field", "x"], "--settings-field requires records with fields"),
        (["chat", "--select", "x"], "--select requires --json, --jsonl, --csv or --parquet"),
        (["embed", "--jsonl"], "--jsonl cannot be used with --openai-batch"),
    ],
)
def test_batch_refuses_options_of_other_inputs(llmcli, chatty, args, message):
    command, *options = args
    ran = llmcli(command, "--openai-batch", "-m", chatty, *options, stdin=b"")
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert f"error: {message}" in ran.stderr


def test_batch_resumes_and_retries(batch, chatty, mixed, tmp_path):
    source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(mixed[0])
    args = ("-f", source, "--output", path, "--resume")
    assert batch(chatty, *args).exit_status == 3
    whole = path.read_bytes()
    for kept in (0.2, 0.7):
        path.write_bytes(path.read_bytes()[: int(len(whole) * kept)])
        assert batch(chatty, *args).exit_status == 3
        assert without_times(path.read_bytes()) == without_times(whole)
    assert batch(chatty, *args, "--retry-errors").exit_status == 3
    assert without_times(path.read_bytes()) == without_times(whole)
    assert batch(chatty, *args, "--temperature", 1).exit_status == 2


def test_batch_shards_merge_to_one_run(batch, llmcli, chatty, mixed, tmp_path):
    source, paths = tmp_path / "in.jsonl", [tmp_path / f"{number}.jsonl" for number in range(3)]
    source.write_bytes(mixed[0])
    for number, path in enumerate(paths):
        batch(chatty, "-f", source, "--shard", f"{number}/3", "--output", path, "--resume")
    merged = llmcli("merge", *paths).stdout.encode()
    assert without_times(merged) == without_times(batch(chatty, "-f", source).stdout.encode())


@pytest.mark.slow
def test_batch_is_the_same_in_worker_and_ranks(process, chatty, mixed, place):
    args = ["chat", "--openai-batch", "-m", str(chatty), "--dtype", "float32"]
    here = without_times(process(*args, input=mixed[0]).stdout)
    warm = process(*args, "--keep-alive", "1m", input=mixed[0])
    assert without_times(warm.stdout) == here
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmcli"]
    (place / "in.jsonl").write_bytes(mixed[0])
    ran = subprocess.run([*torchrun, *args, "-f", place / "in.jsonl"], capture_output=True, timeout=120)
    assert without_times(ran.stdout) == here
