"""llmcli generate on a tiny model: every form in and out, one contract."""

import csv
import io
import json

import pytest

GREEDY = ("--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32")


@pytest.fixture
def generate(llmcli, tiny):
    return lambda *args, **settings: llmcli("generate", "-m", tiny, *GREEDY, *args, **settings)


@pytest.fixture(scope="module")
def reference(tiny):
    """What transformers itself says, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)

    def answer(text: str, **options) -> str:
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, **({"do_sample": False, "max_new_tokens": 6} | options))
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    return answer


def test_the_prompt_and_its_continuation(generate, reference):
    ran = generate("the quick brown")
    assert (ran.stdout, ran.stderr, ran.exit_status) == (reference("the quick brown") + "\n", "", 0)


def test_only_new_text(generate, reference):
    expected = reference("the quick").removeprefix("the quick")
    assert generate("the quick", "--no-full-text").stdout == expected + "\n"


def test_json_carries_fields_and_adds_the_answer(generate, reference, tiny):
    (record,) = generate("--jsonl", stdin=b'{"id": 7, "text": "the quick"}\n').records
    assert list(record) == ["id", "text", "generated_text", "finish_reason", "usage", "model"]
    assert record["text"] + record["generated_text"] == reference("the quick")
    assert record["finish_reason"] == "length"
    assert record["usage"]["completion_tokens"] == 6
    assert record["model"] == str(tiny)


def test_stdin_is_the_same_as_an_argument(generate):
    argument = generate("the quick").stdout
    assert generate(stdin=b"the quick\n").stdout == argument
    assert generate("-f", "-", stdin=b"the quick\n").stdout == argument


@pytest.mark.slow
def test_stdin_is_left_alone_when_there_is_an_argument(llmcli, tiny, process):
    ran = process("generate", "the", "-m", tiny, *GREEDY, "--json", input=b"rest of the loop's lines\n")
    assert json.loads(ran.stdout)["text"] == "the"


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_one_line_out_for_each_line_in_whatever_the_batch_size(generate, reference, batch_size):
    lines = ["the quick", "", "once upon a time", "dog", "", "a lazy dog sleeps in the warm sun"]
    ran = generate("--lines", "--batch-size", batch_size, stdin="".join(f"{line}\r\n" for line in lines).encode())
    assert ran.stdout.split("\n") == [_one_line(reference(line)) if line else "" for line in lines] + [""]


def test_a_failed_line_is_an_empty_line(generate):
    ran = generate("--lines", stdin=b"the\nbad \xff\ndog\n")
    first, failed, last, end = ran.stdout.split("\n")
    assert (failed, end) == ("", "")
    assert first.startswith("the")
    assert last.startswith("dog")
    why = "cannot decode byte 0xff at offset 4: use --encoding, or convert it to UTF-8 with iconv"
    assert ran.stderr == f"error: line 2: {why}\nerror: 1 of 3 records failed\n"
    assert ran.exit_status == 3


def test_null_in_null_out(generate, reference):
    ran = generate("--null", stdin=b"the\0once\nupon\0")
    assert ran.stdout.split("\0") == [reference("the"), reference("once\nupon"), ""]


def test_csv_in_csv_out(generate):
    ran = generate("--csv", "--field", "body", stdin=b'id,body\n1,the quick\n2,"once\nupon"\n3,a,b\n')
    one, two, three = csv.DictReader(io.StringIO(ran.stdout))
    assert (one["id"], one["body"], one["finish_reason"]) == ("1", "the quick", "length")
    assert json.loads(two["usage"])["completion_tokens"] == 6
    assert json.loads(three["error"])["type"] == "invalid_csv"
    assert ran.exit_status == 3


def test_every_line_in_has_its_line_out(generate):
    data = b"""{"text": "the"}
{broken
{"id": 1}
{"text": 5}
{"text": "\\ud800"}
{"text": ""}
{"error": {"type": "old", "message": "m"}, "x": 1}
"""
    ran = generate("--jsonl", stdin=data)
    kinds = [record["error"]["type"] if isinstance(record.get("error"), dict) else None for record in ran.records]
    assert kinds == [None, "invalid_json", "missing_field", "wrong_type", "invalid_text", None, "old"]
    assert ran.records[1]["line"] == 2
    assert ran.records[2]["id"] == 1
    assert ran.records[5]["generated_text"] == ""
    assert ran.records[6] == {"error": {"type": "old", "message": "m"}, "x": 1}
    assert ran.exit_status == 3


def test_stop_on_error_keeps_what_is_done(generate):
    ran = generate("--lines", "--on-error", "stop", stdin=b"the\n\xff\ndog\n")
    assert ran.stdout.count("\n") == 2
    assert ran.exit_status == 1


def test_a_single_failed_input_exits_1(generate):
    ran = generate(stdin=b"\xff")
    assert (ran.stdout, ran.exit_status) == ("", 1)
    why = "cannot decode byte 0xff at offset 0: use --encoding, or convert it to UTF-8 with iconv"
    assert ran.stderr == f"error: {why}\n"


def test_no_model_is_touched_without_work(llmcli):
    missing = ("-m", "no-such/model", "--offline")
    assert llmcli("generate", *missing, "--lines", stdin=b"").exit_status == 0
    assert llmcli("generate", *missing, "--lines", stdin=b"\n\n").stdout == "\n\n"
    assert llmcli("generate", *missing, "").stdout == "\n"


def test_prompt_template(generate, reference):
    ran = generate("--jsonl", "--prompt", "{animal} {{n}} {n}", stdin=b'{"animal": "dog", "n": 3, "text": "x"}\n')
    assert "dog {n} 3" + ran.records[0]["generated_text"] == reference("dog {n} 3")
    ran = generate("--jsonl", "--prompt", "{animal}", stdin=b'{"text": "x"}\n')
    assert ran.records[0]["error"]["message"].startswith("missing field 'animal'")


def test_file_names_travel(generate, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick\n")
    assert generate("-f", path, "--json").records[0]["file"] == str(path)
    path.write_bytes(b"ok\n\xff\n")
    assert f"error: {path}:2: cannot decode byte" in generate("-f", path, "--lines").stderr


def test_output_goes_to_a_new_file(generate, tmp_path):
    path = tmp_path / "out.jsonl"
    ran = generate("the", "--json", "--output", path)
    assert (ran.stdout, ran.exit_status) == ("", 0)
    assert json.loads(path.read_text())["text"] == "the"
    ran = generate("the", "--json", "--output", path)
    assert ran.exit_status == 2
    assert ran.stderr.startswith(f"error: '{path}' already exists")


def test_stop_texts_are_not_printed(generate, reference):
    new = reference("the quick").removeprefix("the quick")
    stop = new[3:5]
    (record,) = generate("the quick", "--json", "--stop", "never", "--stop", stop).records
    assert record["generated_text"] == new[: new.index(stop)]
    assert record["finish_reason"] == "stop"


def test_stop_texts_do_not_depend_on_the_batch(generate, reference):
    stop = reference("the quick").removeprefix("the quick")[3:5]
    args = ("--lines", "--json", "--stop", stop)
    data = b"the quick\na lazy dog and then\nonce\n"
    apart, together = (generate(*args, "--batch-size", size, stdin=data).stdout for size in (1, 3))
    assert apart == together


def test_a_stop_text_is_sought_in_new_text_only(generate, reference):
    new = reference("the quick").removeprefix("the quick")
    across = "quick" + new[:2]
    (record,) = generate("the quick", "--json", "--stop", across).records
    assert record["generated_text"] == new
    assert (record["finish_reason"], record["usage"]["completion_tokens"]) == ("length", 6)
    assert generate("the quick", "--json", "-o", f"stop_strings={new[1:3]}").records[0]["generated_text"] == new[:1]


def test_several_sequences(llmcli, tiny):
    args = ("generate", "the", "-m", tiny, "--seed", 1, "-n", 3, "--max-new-tokens", 5)
    (record,) = llmcli(*args, "--json").records
    assert len(record["generated_texts"]) == 3
    assert record["generated_text"] == record["generated_texts"][0]
    assert record["usage"]["completion_tokens"] == 15


def test_beams_and_any_option_of_generation_config(generate, reference):
    assert generate("the", "--num-beams", 3, "-o", "length_penalty=0.5").stdout == (
        reference("the", num_beams=3, length_penalty=0.5) + "\n"
    )


def test_what_failed_before_is_passed_on_and_said(generate):
    ran = generate("--jsonl", stdin=b'{"text": "the", "error": {"type": "old", "message": "m"}}\n')
    assert ran.stdout == '{"text": "the", "error": {"type": "old", "message": "m"}}\n'
    assert ran.stderr == "note: 1 of 1 records already had an `error` and were passed on unchanged\n"
    assert ran.exit_status == 0


def test_a_file_field_of_the_records_own_stands(generate, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the", "file": "mine"}\n')
    assert generate("--jsonl", "-f", tmp_path / "a.jsonl").records[0]["file"] == "mine"


def test_a_seed_repeats_a_run(llmcli, tiny):
    args = ("generate", "-m", tiny, "--lines", "--max-new-tokens", 8)
    data = b"the\ndog\nfox\n" * 5
    first, again, other = (llmcli(*args, "--seed", seed, stdin=data).stdout for seed in (7, 7, 8))
    assert first == again != other


def test_a_prompt_longer_than_the_context(generate):
    text = "dog " * 100
    ran = generate(text)
    assert ran.exit_status == 1
    assert "exceeds the context length of 64" in ran.stderr
    assert "--truncate" in ran.stderr
    ran = generate(text, "--truncate", "--json")
    assert ran.exit_status == 0
    assert ran.records[0]["usage"] == {"prompt_tokens": 58, "completion_tokens": 6}
    assert ran.stderr == f"warning: truncated by {ran.records[0]['truncated']} tokens\n"


def test_an_answer_ends_with_the_context_and_alone(generate):
    near, far = "dog " * 29, "the"
    args = ("--lines", "--json", "--max-new-tokens", 20)
    together = generate(*args, stdin=f"{near}\n{far}\n".encode()).records
    apart = [generate(*args, stdin=f"{text}\n".encode()).records[0] for text in (near, far)]
    assert together == apart
    usage = together[0]["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] <= 64
    assert together[1]["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
def test_a_surprise_in_one_record_harms_no_other(generate, monkeypatch, step):
    from llmcli.pipelines.causal import CausalPipeline

    whole = getattr(CausalPipeline, step)

    def fails_for_foxes(self, item, **settings):
        if "fox" in (item if isinstance(item, str) else self.tokenizer.decode(item["input_ids"].tolist())):
            raise TypeError("no foxes")
        return whole(self, item, **settings)

    monkeypatch.setattr(CausalPipeline, step, fails_for_foxes)
    ran = generate("--lines", "--json", stdin=b"the dog\nthe fox\nthe sun\n")
    assert [record.get("error", {}).get("message") for record in ran.records] == [None, "TypeError: no foxes", None]


def test_one_bad_forward_pass_harms_no_other(generate, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    pad = CausalPipeline.pad

    def fails_for_foxes(self, rows, **settings):
        if any("fox" in text for text in map(self.tokenizer.decode, rows)):
            raise RuntimeError("no foxes")
        return pad(self, rows, **settings)

    monkeypatch.setattr(CausalPipeline, "pad", fails_for_foxes)
    ran = generate("--lines", "--json", stdin=b"the dog\nthe fox\nthe sun\n")
    assert [record.get("error", {}).get("message") for record in ran.records] == [None, "RuntimeError: no foxes", None]


def test_the_library_is_checked_before_the_model_is_sought(llmcli):
    ran = llmcli("generate", "x", "-m", "no-such/model", "--offline", "-o", "tempratur=1")
    assert ran.exit_status == 2
    assert "did you mean 'temperature'" in ran.stderr


def test_a_terminal_sees_the_text_in_pieces(llmcli, tiny, monkeypatch):
    from llmcli.io.output import Output

    pieces = []
    stream = Output.stream
    monkeypatch.setattr(Output, "stream", lambda self, text: (pieces.append(text), stream(self, text)))
    args = ("generate", "the quick", "-m", tiny, *GREEDY)
    watched = llmcli(*args, is_terminal=True)
    assert pieces[0] == "the quick"
    assert len(pieces) > 2
    assert watched.stdout == llmcli(*args).stdout


def test_a_terminal_sees_lines_in_their_order(generate):
    data = b"\nthe quick\n\xff\ndog\n\n"
    assert generate("--lines", stdin=data, is_terminal=True).stdout == generate("--lines", stdin=data).stdout


def test_a_run_that_fails_leaves_no_file(llmcli, tmp_path):
    path = tmp_path / "out.txt"
    assert llmcli("generate", "x", "-m", "no/such", "--offline", "--output", path).exit_status == 4
    assert not path.exists()


def test_csv_errors_keep_every_column(generate):
    ran = generate("--csv", stdin=b"id,text\n1,\xff\n2,the\rdog\n3,the dog\n")
    assert ran.stdout.splitlines()[0] == "id,text,generated_text,finish_reason,usage,model,error"
    bad, broken, good = csv.DictReader(io.StringIO(ran.stdout))
    assert (bad["id"], json.loads(bad["error"])["type"]) == ("1", "invalid_utf8")
    assert json.loads(broken["error"])["type"] == "invalid_csv"
    assert (good["id"], good["text"], good["error"]) == ("3", "the dog", "")


@pytest.mark.parametrize("first", ["1", '1,"the" x', "1,the,dog", "1,\xff"])
def test_a_csv_whose_first_row_is_bad_has_all_its_columns(generate, first):
    ran = generate("--csv", stdin=f'id,text\n{first}\n2,"the\rdog"\n'.encode("latin-1"))
    assert ran.exit_status == 3
    bad, good = csv.DictReader(io.StringIO(ran.stdout, newline=""))
    assert bad["error"]
    assert (good["id"], good["text"], good["error"]) == ("2", "the\rdog", "")


def test_null_ends_a_record_and_nothing_else(tmp_path):
    from llmcli.io.output import Output, OutputFormat
    from llmcli.job import Record, Result

    with Output(OutputFormat.NULL, path=tmp_path / "out", model="m") as output:
        output.write(Result(Record({}), text="what a model\0says"))
    assert (tmp_path / "out").read_bytes() == b"what a model says\0"


def test_csv_files_of_other_columns_are_refused(generate, tmp_path):
    (tmp_path / "a.csv").write_text("text\nthe\n")
    (tmp_path / "b.csv").write_text("text,id\nthe,2\n")
    ran = generate("--csv", "-f", tmp_path / "a.csv", "-f", tmp_path / "b.csv")
    assert ran.exit_status == 2
    assert "no column 'id'" in ran.stderr


def test_a_template_without_the_text_does_not_ask_for_it(generate):
    assert generate("--jsonl", "--prompt", "{id}", stdin=b'{"id": "the", "text": ""}').records[0]["generated_text"]


def _one_line(text: str) -> str:
    return text.replace("\r\n", " ").replace("\n", " ")
