"""Structured output from the command line, and records that bring a schema or settings of their own."""

import csv
import io
import json
import time

import jsonschema
import pytest

from llmcli.engines import record_settings
from llmcli.engines.batch_runner import BatchRunner
from llmcli.job import Job
from llmcli.text import constraints

CAT = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog 🦊"]}, "age": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
DAY = {"type": "object", "properties": {"day": {"type": "string", "pattern": "^[a-z]{3}$"}}, "required": ["day"],
       "additionalProperties": False}  # fmt: skip
SLOW = {"type": "integer", "multipleOf": 99999989}  # minutes and gigabytes to compile
GREEDY = ("--temperature", 0, "--dtype", "float32")


@pytest.fixture
def run(llmcli, chatty):
    return lambda command, *args, **settings: llmcli(command, "-m", chatty, *GREEDY, *args, **settings)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def errors(ran):
    return [record.get("error", {}).get("type") for record in ran.records]


def test_schema_text_is_compact_json(run, tmp_path):
    ran = run("generate", "--schema", json.dumps(CAT), "the quick", "the\nlazy dog")
    assert ran.exit_status == 0
    first, second = ran.stdout.splitlines()
    for line in (first, second):
        jsonschema.validate(json.loads(line), CAT)
        assert json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")) == line
    (tmp_path / "cat.json").write_text(json.dumps(CAT))
    assert run("generate", "--schema", tmp_path / "cat.json", "the quick").stdout == first + "\n"
    assert run("generate", "--schema", json.dumps(CAT), "--lines", stdin=b"the quick\n").stdout == first + "\n"


@pytest.mark.parametrize("command", ["generate", "chat", "summarize", "qa", "translate"])
def test_schema_adds_data(run, command):
    args = {"qa": ["--field", "question=text", "--field", "context=text"], "translate": ["--to", "fr", "--from", "en"]}
    record = {"text": "the dog.\n\n- 12 *sleeps*", "n": 1}
    ran = run(command, "--jsonl", "--schema", json.dumps(CAT), *args.get(command, ()), stdin=lines(record))
    (result,) = ran.records
    answer = next(result[name] for name in result if name.endswith("_text") or name == "answer")
    assert result["data"] == json.loads(answer)
    jsonschema.validate(result["data"], CAT)


def test_csv_data_is_json_text(run):
    stdin = b'text,s\nthe quick,"{""type"": ""boolean""}"\nthe dog,\n'
    ran = run("generate", "--csv", "--schema-field", "s", "--max-new-tokens", 9, stdin=stdin)
    first, second = csv.DictReader(io.StringIO(ran.stdout))
    assert first["data"] in ("true", "false")
    assert (second["data"], second["generated_text"] != "") == ("", True)
    ran = run("generate", "--csv", "--schema-field", "t", stdin=stdin)
    assert ran.exit_status == 2
    assert ran.stderr.startswith("error: missing field 't' in all records")


def test_several_sequences_have_data_of_the_first(run):
    sampled = ("--schema", json.dumps(CAT), "-n", 2, "--temperature", 1, "--seed", 1)
    (record,) = run("generate", "--json", *sampled, "the").records
    assert record["data"] == json.loads(record["generated_texts"][0])
    assert len(run("generate", *sampled, "the").stdout.splitlines()) == 2


def test_regex_choice_and_grammar_are_kept(run, tmp_path):
    (tmp_path / "list.lark").write_text('start: WORD ("," WORD)~2\nWORD: /[a-z]{2}/\n')
    assert run("generate", "--no-full-text", "--regex", "^[A-C]{2}-\\d$", "the").stdout[2] == "-"
    assert run("chat", "--choice", "the cat", "--choice", "é", "the").stdout in ("the cat\n", "é\n")
    assert run("chat", "--grammar", tmp_path / "list.lark", "the").stdout.count(",") == 2


def test_cut_answer_fails_and_is_not_printed(run):
    ran = run("generate", "--schema", json.dumps(CAT), "--max-new-tokens", 2, "the")
    assert (ran.stdout, ran.exit_status) == ("", 1)
    assert "--max-new-tokens" in ran.stderr


def test_long_text_in_parts_is_constrained_at_last(llmcli, tmp_path):
    from conftest import make_tiny

    small = make_tiny(tmp_path / "small", context=300)
    text = "the quick brown fox sleeps. " * 60
    args = ("summarize", "-m", small, *GREEDY, "--max-new-tokens", 40, "--jsonl", "--prompt", "{text}")
    (record,) = llmcli(*args, "--schema", json.dumps(CAT), stdin=lines({"text": text})).records
    assert record.get("data") or record["error"]["type"] == "context_length_exceeded"
    assert "answer in one call" in record.get("error", {}).get("message", "answer in one call")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--schema", '{"type": "objekt"}'], "--schema: invalid type: objekt"),
        (["--schema", '{"properties": []}'], "--schema: properties must be an object"),
        (["--schema", '{"type": "object", "required": "a"}'], "--schema: expected array for 'required', got \"a\""),
        (["--schema", '{"not": {}}'], '--schema: unsupported keywords: ["not"]'),
        (["--schema", '{"oneOf": [{"type": "string"}, {}]}'], "--schema: oneOf constraints are not supported"),
        (["--schema", '{"$ref": "https://example.org/x.json"}'], "is not present in a registry"),
        (["--schema", '{"$ref": "#"}'], "--schema: matches no text"),
        (["--schema", '{"enum": [9007199254740993]}'], "--schema: numbers beyond 2**53 are not supported"),
        (["--schema", '{"pattern": "(?=a)", "type": "string"}'], "--schema: look-around"),
        (["--schema", '{"a'], "--schema: invalid: Unterminated string"),
        (["--schema", '{"type": "null", "type": "string"}'], "--schema: invalid: repeated key 'type'"),
        (["--schema", "false"], "--schema: expected a JSON object"),
        (["--schema", "nofile.json"], "--schema: nofile.json: no such file or directory"),
        (["--schema", ""], "--schema must not be empty"),
        (["--regex", "("], "--regex: unclosed group"),
        (["--regex", r"(a)\1"], "--regex: backreferences are not supported"),
        (["--regex", "((a{100}){100}){100}"], "--regex: lexer error: too many expressions constructed"),
        (["--choice", "a", "--choice", ""], "--choice must not be empty"),
        (["--choice", "a", "--choice", "a"], "--choice: the same text is given twice"),
        (["--grammar", "/dev/null"], "--grammar: empty grammar"),
        (["--regex", "a", "--choice", "a"], "--regex cannot be used with --choice"),
        (["--schema", "true", "--stop", "x"], "--stop cannot be used with --schema"),
        (["--schema-field", "s", "--jsonl", "-o", 'stop_strings="x"'], "--stop cannot be used with --schema-field"),
        (["--schema-field", "s"], "--schema-field requires records with fields"),
        (["--logprobs", "--num-beams", 2], "--logprobs cannot be used with --num-beams"),
    ],
)
def test_invalid_structure_is_usage_error(llmcli, args, message):
    ran = llmcli("generate", "-m", "/no/such/model", *args, *([] if "--jsonl" in args else ["the"]), stdin=b"")
    assert ran.exit_status == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) <= 2


@pytest.mark.parametrize(("command", "model"), [("summarize", "t5"), ("translate", "marian"), ("qa", "bert-qa")])
def test_structure_without_causal_model_is_refused(llmcli, command, model):
    from test_own_fields import GOLDEN

    args = {"qa": ["who?", "-c", "the dog"], "translate": ["--to", "fr", "the dog"]}.get(command, ["the dog"])
    ran = llmcli(command, "-m", GOLDEN / model, "--regex", "a", *args)
    assert ran.exit_status == 2
    assert "--regex cannot be used with" in ran.stderr


def test_records_with_own_schemas_share_a_batch(run, monkeypatch):
    batches = []
    add_rows = BatchRunner._add_rows

    def spy(self, rows):
        batches.append(len(rows))
        return add_rows(self, rows)

    monkeypatch.setattr(BatchRunner, "_add_rows", spy)
    records = [
        {"text": "the", "s": CAT},
        {"text": "fox", "s": json.dumps(DAY)},
        {"text": "dog"},
        {"text": "a", "s": None},
    ]
    ran = run("generate", "--jsonl", "--schema-field", "s", "--max-new-tokens", 40, stdin=lines(*records))
    jsonschema.validate(ran.records[0]["data"], CAT)
    jsonschema.validate(ran.records[1]["data"], DAY)
    assert ["data" in record for record in ran.records] == [True, True, False, False]
    assert batches == [4]
    alone = [run("generate", "--jsonl", "--schema-field", "s", "--max-new-tokens", 40, stdin=lines(r)).records[0]
             for r in records]  # fmt: skip
    assert alone == ran.records


def test_invalid_own_schema_fails_its_record(run, monkeypatch):
    monkeypatch.setattr(record_settings, "CHECK_TIMEOUT_S", 1.0)
    schemas = [CAT, {"type": "objekt"}, "{", 5, {"$ref": "http://x/y"}, {"enum": ["x" * 70_000]}, SLOW, [CAT]]
    start = time.monotonic()
    ran = run("generate", "--jsonl", "--schema-field", "s", stdin=lines(*({"text": "the", "s": s} for s in schemas)))
    assert errors(ran) == [None, *["invalid_schema"] * 7]
    assert ran.exit_status == 3
    assert time.monotonic() - start < 20
    assert "field 's': requires more than 1 s to compile" in ran.stderr


def test_settings_apply_to_their_record(run):
    settings = [
        {"max_new_tokens": 3}, {"max_tokens": 3}, {}, None, "", {"stop": " "}, {"temperature": None},
        {"choice": ["yes", "no"]}, {"regex": "x{3}"}, {"schema": DAY}, {"repetition_penalty": 3.0},
    ]  # fmt: skip
    records = [{"text": "the quick", "o": each} for each in settings]
    args = ("generate", "--jsonl", "--settings-field", "o", "--max-new-tokens", 20)
    ran = run(*args, stdin=lines(*records))
    assert ran.exit_status == 0
    texts = [record["generated_text"] for record in ran.records]
    assert [record["usage"]["completion_tokens"] for record in ran.records[:5]] == [3, 3, 20, 20, 20]
    assert texts[0] == texts[1] != texts[2] == texts[3] == texts[4] == texts[6]
    assert texts[2].startswith(texts[0])
    assert " " not in texts[5]
    assert texts[7] in ("yes", "no")
    assert texts[8] == "xxx"
    assert texts[10] != texts[2]
    jsonschema.validate(ran.records[9]["data"], DAY)
    alone = [run(*args, stdin=lines(record)).records[0]["generated_text"] for record in records]
    assert alone == texts


def test_settings_of_a_record_are_over_those_of_the_job(run):
    settings = [
        {}, {"temperature": 0}, {"temperature": 1e-40}, {"do_sample": False}, {"seed": 9}, {"seed": 3}, {"top_k": 1},
        {"no_repeat_ngram_size": 0}, {"schema": {"const": 1}}, {"regex": "x"}, {"max_new_tokens": 2},
    ]  # fmt: skip
    records = [{"text": "the quick", "o": each, "s": {"const": 2}} for each in settings]
    job = ("generate", "--jsonl", "--settings-field", "o", "--temperature", 1.5, "--seed", 3, "--max-new-tokens", 8)
    ran = run(*job, "-o", "no_repeat_ngram_size=1", stdin=lines(*records))
    assert ran.exit_status == 0
    texts = [record["generated_text"] for record in ran.records]
    assert texts[1] == texts[2] == texts[3] == texts[6]
    assert len({texts[0], texts[1], texts[4], texts[5], texts[7]}) > 3
    assert (texts[9], ran.records[8]["data"]) == ("x", 1)
    assert ran.records[10]["usage"]["completion_tokens"] == 2
    ran = run(*job[:4], "--schema-field", "s", "--choice", "y", stdin=lines(*records[7:10], {"text": "the"}))
    assert [record.get("data", record["generated_text"]) for record in ran.records] == [2, 1, "x", "y"]


def test_empty_schema_of_a_record_means_any_json(run):
    records = [{"text": "the", "s": {}}, {"text": "the", "o": {"schema": {}}}, {"text": "the", "s": "{}"}]
    fields = "--schema-field", "s", "--settings-field", "o"
    ran = run("generate", "--jsonl", *fields, "--max-new-tokens", 9, stdin=lines(*records))
    for record in ran.records:
        assert "data" in record or record["error"]["type"] == "incomplete"


def test_own_seed_repeats_its_record(run):
    records = [{"text": "the", "o": {"temperature": 1.5, "seed": seed, "max_new_tokens": 10}} for seed in (1, 2, 1)]
    args = ("generate", "--jsonl", "--settings-field", "o")
    texts = [record["generated_text"] for record in run(*args, stdin=lines(*records, {"text": "dog"})).records]
    assert texts[0] == texts[2] != texts[1]
    assert run(*args, stdin=lines(records[1])).records[0]["generated_text"] == texts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1}, "unknown setting 'temprature'; did you mean 'temperature'?"),
        ({"num_beams": 2}, "unknown setting 'num_beams'"),
        ({"eos_token_id": 2}, "unknown setting 'eos_token_id'"),
        ({"grammar": 'start: "a"'}, "unknown setting 'grammar'"),
        ({"temperature": "1"}, "invalid temperature '1': expected a number from 0 to"),
        ({"temperature": -1}, "invalid temperature -1"),
        ({"top_p": 1.5}, "invalid top_p 1.5: expected a number from 0 to 1"),
        ({"top_h": 0}, "invalid top_h 0: expected a number from 1e-06 to 1"),
        ({"epsilon_cutoff": 5}, "invalid epsilon_cutoff 5"),
        ({"top_k": True}, "invalid top_k True: expected an integer"),
        ({"max_tokens": 1.5}, "invalid max_tokens 1.5: expected an integer from 1"),
        ({"max_new_tokens": 10**400}, "invalid max_new_tokens"),
        ({"seed": -1}, "invalid seed -1"),
        ({"stop": [""]}, "invalid stop ['']: expected texts that are not empty"),
        ({"do_sample": 1}, "invalid do_sample 1: expected true or false"),
        ({"choice": []}, "invalid choice []"),
        ({"stop": "\ud800"}, "'utf-8' codec can't encode"),
        ({"regex": 5}, "invalid regex 5: expected a pattern"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice cannot be used together"),
        ({"regex": "a", "stop": "b"}, "stop cannot be used with regex"),
        ("{x", "Expecting property name"),
        ('{"top_k": 1, "top_k": 2}', "repeated key 'top_k'"),
        ([1], "expected a JSON object"),
        (False, "expected a JSON object"),
    ],
)
def test_invalid_settings_fail_their_record(run, settings, message):
    records = [{"text": "the", "o": settings}, {"text": "the"}]
    ran = run("generate", "--jsonl", "--settings-field", "o", "--max-new-tokens", 1, stdin=lines(*records))
    assert errors(ran) == ["invalid_settings", None]
    assert f"error: line 1: field 'o': {message}" in ran.stderr


def test_resume_refuses_another_schema(run, tmp_path):
    args = ("generate", "--jsonl", "--output", tmp_path / "out.jsonl", "--resume", "--max-new-tokens", 40)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(CAT))
    assert run(*args, "--schema", schema, stdin=lines({"text": "the"})).exit_status == 0
    schema.write_text(json.dumps(DAY))
    ran = run(*args, "--schema", schema, stdin=lines({"text": "the"}))
    assert ran.exit_status == 2
    assert "the command has changed" in ran.stderr


@pytest.mark.parametrize("args", [["--logprobs", "the"], ["the", "--logprobs"], ["--logprobs", "--", "the"]])
def test_logprobs_without_number_keeps_the_text(run, args):
    (record,) = run("generate", "--json", "--max-new-tokens", 2, *args).records
    assert record["text"] == "the"
    assert [token["top_logprobs"] for token in record["logprobs"]["content"]] == [[], []]


@pytest.mark.parametrize("args", [["--logprobs", 2], ["--logprobs=2"]])
def test_logprobs_number_counts_alternatives(run, args):
    (record,) = run("chat", "--json", "--max-new-tokens", 2, *args, "the").records
    assert [len(token["top_logprobs"]) for token in record["logprobs"]["content"]] == [2, 2]


def test_new_fields_survive_json():
    from dataclasses import asdict

    job = Job("chat", "m", constraint={"schema": CAT}, schema_field="s", settings_field="o", logprobs=0, think=False)
    assert Job.from_json(json.loads(json.dumps(asdict(job)))) == job


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "repeated key 'a'"),
        ("1e400", "float"),
        ("[NaN]", "float"),
        ("[" * 9999, "deep"),
        ("{", "Expecting"),
    ],
)
def test_parse_json_refuses_ambiguous_values(text, reason):
    with pytest.raises(ValueError, match=reason):
        constraints.parse_json(text)


def test_accepts_is_about_the_whole_answer():
    assert constraints.accepts({"schema": CAT}, '\n{"kind": "cat",\n "age": 3}')
    assert not constraints.accepts({"schema": CAT}, '{"kind": "cat", "age": 300}')
    assert not constraints.accepts({"schema": CAT}, '{"kind": "cat"}')
    assert constraints.accepts({"choice": ["a", "ab"]}, "ab")
    assert not constraints.accepts({"regex": "a+"}, "aab")


def test_checker_goes_on_after_a_timeout():
    with pytest.raises(ValueError, match="requires more than"):
        constraints.check_constraint({"schema": {**SLOW, "title": "again"}}, 0.3)
    constraints.check_constraint({"schema": {**CAT, "title": "again"}}, 5)
