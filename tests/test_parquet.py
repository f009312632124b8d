"""--parquet: tables in and out, whose columns keep their types, and what is resumed, refused or failed."""

import datetime
import decimal
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS

from llmcli import tasks
from llmcli.errors import LlmcliError
from llmcli.io.parquet import TableFile, TableSource, _result_types, read_column
from llmcli.io.records import open_inputs

TEXTS = ["the quick brown fox", "a lazy dog", " ", None, "once upon"]
NOON = datetime.datetime(2026, 1, 2, 12, 30, tzinfo=datetime.UTC)
OWN = {  # columns of many types, each with a null
    "id": pa.array([1, 2, None, 2**62, -5]),
    "day": pa.array([NOON.date(), None, NOON.date(), None, None], pa.date32()),
    "at": pa.array([NOON, NOON, None, NOON, None], pa.timestamp("ns", "Europe/Paris")),
    "price": pa.array([decimal.Decimal("1.50"), None, None, None, decimal.Decimal("-0.01")], pa.decimal128(9, 2)),
    "ratio": pa.array([0.5, float("nan"), None, float("inf"), -0.0], pa.float32()),
    "image": pa.array([b"\xff\0", None, b"", b"a", b"b"]),
    "tags": pa.array([["a", None], [], None, ["b"], []]),
    "about": pa.array([{"n": 1, "ok": True}, None, {"n": None, "ok": False}, None, None]),
    "kind": pa.array(["x", "y", None, "x", "y"]).dictionary_encode(),
    "pairs": pa.array([[("k", 1)], None, [], None, None], pa.map_(pa.string(), pa.int16())),
}


def write(path, columns=OWN, texts=TEXTS, **settings):
    """Save a table with the column `text` and others."""
    pq.write_table(pa.table({**columns, "text": pa.array(texts, pa.large_string())}), path, **settings)
    return path


@pytest.fixture
def generate(llmcli, tiny):
    greedy = ("--temperature", 0, "--max-new-tokens", 4, "--dtype", "float32")
    return lambda *args: llmcli("generate", "-m", tiny, "--parquet", *greedy, *args)


def test_columns_keep_their_types_and_nulls(generate, tmp_path):
    source = pq.read_table(write(tmp_path / "in.parquet", row_group_size=2))
    ran = generate("-f", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet")
    assert (ran.exit_status, ran.stdout) == (3, ""), ran.stderr
    assert ran.stderr.splitlines()[-1] == "error: 1 of 5 records failed"
    table = pq.read_table(tmp_path / "out.parquet")
    own = table.select(source.column_names)
    assert own.schema.equals(source.schema, check_metadata=True)
    assert own.drop_columns("ratio").equals(source.drop_columns("ratio"))
    assert str(own["ratio"].to_pylist()) == str(source["ratio"].to_pylist())
    added = {field.name: str(field.type) for field in table.schema if field.name not in own.column_names}
    assert added == {
        "generated_text": "string", "finish_reason": "string",
        "usage": "struct<prompt_tokens: int64, completion_tokens: int64>", "model": "string", "file": "string",
        "error": "struct<type: string, message: string>",
    }  # fmt: skip
    rows = table.to_pylist()
    assert [row["error"] and row["error"]["type"] for row in rows] == [None, None, None, "wrong_type", None]
    assert [row["generated_text"] for row in rows][2:4] == ["", None]
    assert rows[0]["usage"]["completion_tokens"] == 4
    assert sorted(os.listdir(tmp_path)) == ["home", "in.parquet", "out.parquet"]


def test_results_equal_those_of_json_lines(generate, tiny, llmcli, tmp_path):
    path = write(tmp_path / "in.parquet", {"id": pa.array(range(5))})
    assert generate("-f", path, "--output", tmp_path / "out.parquet").exit_status == 3
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    written = [{name: value for name, value in row.items() if value is not None} for row in rows]
    records = [{name: value for name, value in record.items() if value is not None}
               for record in generate("-f", path, "--json").records]  # fmt: skip
    assert written == records


def test_json_output_has_strings_for_what_json_lacks(generate, tmp_path):
    first, second, *_ = generate("-f", write(tmp_path / "in.parquet"), "--json", "--select", "model").records
    assert {name: first[name] for name in OWN} == {
        "id": 1, "day": "2026-01-02", "at": "2026-01-02T12:30:00.000000000Z", "price": "1.50", "ratio": 0.5,
        "image": "/wA=", "tags": ["a", None], "about": {"n": 1, "ok": True}, "kind": "x", "pairs": [["k", 1]],
    }  # fmt: skip
    assert second["ratio"] is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("score", "--tokens"), ["logprob", "perplexity", "tokens", "token_logprobs"]),
        (("classify", "--labels", "fox,dog"), ["label", "score", "scores"]),
        (("chat", "--logprobs", "--choice", "fox", "--schema-field", "schema"), ["data", "mean_logprob", "logprobs"]),
        (("chat", "-n", 2, "--seed", 1, "--max-new-tokens", 2), ["generated_text", "generated_texts", "usage"]),
        (("summarize", "--max-new-tokens", 4), ["summary_text", "chunks"]),
    ],
)
def test_results_of_each_task_are_typed(llmcli, chatty, tmp_path, args, expected):
    path = write(tmp_path / "in.parquet", {"schema": pa.array([{"type": "boolean"}] * 3)}, TEXTS[:3])
    ran = llmcli(*args, "-m", chatty, "--parquet", "-f", path, "--output", tmp_path / "out.parquet")
    assert ran.exit_status == 0, ran.stderr
    table = pq.read_table(tmp_path / "out.parquet")
    for name in expected:
        assert table[name].type == _result_types().get(name, pa.string()), name
        assert table[name].null_count < len(table), name
    if "data" in expected:
        assert {json.loads(text) for text in table["data"].to_pylist() if text} <= {True, False}


def test_embeddings_are_lists_of_float32(llmcli, encoder, tmp_path):
    path = write(tmp_path / "in.parquet", {}, TEXTS[:3])
    ran = llmcli("embed", "-m", encoder, "--parquet", "-f", path, "--output", tmp_path / "out.parquet")
    assert ran.exit_status == 0, ran.stderr
    vectors = pq.read_table(tmp_path / "out.parquet")["embedding"]
    assert vectors.type == pa.list_(pa.float32())
    assert [vector and len(vector) for vector in vectors.to_pylist()] == [32, 32, None]
    (first, *_) = llmcli("embed", "-m", encoder, "--parquet", "-f", path, "--json").records
    assert vectors[0].as_py() == pytest.approx(first["embedding"], abs=1e-7)


def test_result_fields_of_all_tasks_have_types():
    own = {"next", "sampling", "attention", "layers", "heads", "text", "line", "untranslated"}  # not of tables
    names = {name for task in tasks.task_names() for name in tasks.load_task(task).outputs}
    assert names - own - _result_types().keys() == set()


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow_files_are_read_by_their_signature(generate, tmp_path, kind):
    table, path = pq.read_table(write(tmp_path / "in.parquet")), tmp_path / "in.data"
    opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression="lz4" if kind == "feather" else None)
    with opened(path, table.schema, options=options) as writer:
        writer.write_table(table, 2)
    for name in ("parquet", "data"):
        generate("-f", tmp_path / f"in.{name}", "--output", tmp_path / f"{name}.parquet", "--select", "generated_text")
    expected, found = (
        pq.read_table(tmp_path / name).drop_columns("ratio") for name in ("parquet.parquet", "data.parquet")
    )
    assert found.equals(expected)


def test_files_with_equal_columns_are_one_table(generate, tmp_path):
    paths = [write(tmp_path / f"{i}.parquet", {"id": pa.array([i])}, ["the fox"]) for i in range(3)]
    files = [part for path in paths for part in ("-f", path)]
    assert generate(*files, "--output", tmp_path / "out.parquet").exit_status == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [0, 1, 2]
    assert table["file"].to_pylist() == [str(path) for path in paths]
    write(paths[2], {"id": pa.array(["x"])}, ["the fox"])
    ran = generate(*files, "--output", tmp_path / "other.parquet")
    assert (ran.exit_status, "types are not those of" in ran.stderr) == (2, True)
    assert not (tmp_path / "other.parquet").exists()
    assert len(generate(*files, "--json").records) == 3


def test_columns_are_read_alone(generate, tmp_path):
    path = write(tmp_path / "in.parquet")
    args = (
        "-f",
        path,
        "--output",
        tmp_path / "out.parquet",
        "--select",
        "generated_text",
        "--rename",
        "generated_text=new",
    )
    assert generate(*args, "--columns", "text, id").exit_status == 3
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["text", "id", "new"]
    for columns, error in (("text,di", "unknown column 'di'"), ("id", "missing field 'text' in all records")):
        ran = generate("-f", path, "--json", "--columns", columns)
        assert (ran.exit_status, error in ran.stderr, "hint: " in ran.stderr) == (2, True, True), ran.stderr


def test_result_replaces_column_of_its_name(generate, tmp_path):
    columns = {"generated_text": pa.array([1, 2]), "file": pa.array(["a", "b"])}
    path = write(tmp_path / "in.parquet", columns, ["the fox", "a dog"])
    ran = generate("-f", path, "--output", tmp_path / "out.parquet")
    assert ran.stderr.count("warning: results replace these fields of the records: generated_text") == 1
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names.count("generated_text") == 1
    assert (table["generated_text"].type, table["file"].to_pylist()) == (pa.string(), ["a", "b"])


def test_filter_drops_rows(llmcli, tiny, tmp_path):
    path = write(tmp_path / "in.parquet", {"id": pa.array(range(5))})
    (fox, dog, *_) = llmcli("score", "-m", tiny, "--parquet", "-f", path, "--json").records
    limit = (fox["perplexity"] + dog["perplexity"]) / 2
    llmcli(
        "score", "-m", tiny, "--parquet", "-f", path, "--max-perplexity", limit, "--output", tmp_path / "out.parquet"
    )
    ids = pq.read_table(tmp_path / "out.parquet")["id"].to_pylist()
    assert (0 in ids, 1 in ids, 2 in ids, 3 in ids) == (
        fox["perplexity"] < limit,
        dog["perplexity"] < limit,
        False,
        True,
    )


def test_shards_are_parts_of_the_table(generate, tmp_path):
    texts = ["the fox", "a dog", None, "the sun", "once", "upon", "warm"]
    path = write(tmp_path / "in.parquet", {"id": pa.array(range(7))}, texts, row_group_size=2)
    files = ("-f", path, "-f", path)
    assert generate(*files, "--output", tmp_path / "whole.parquet").exit_status == 3
    whole = pq.read_table(tmp_path / "whole.parquet")
    for i in range(3):
        generate(*files, "--shard", f"{i}/3", "--output", tmp_path / f"{i}.parquet")
        assert pq.read_table(tmp_path / f"{i}.parquet").equals(whole.take([*range(i, 14, 3)]))
    assert not list(tmp_path.glob("*.state*"))


def test_empty_table_has_all_columns(generate, tmp_path):
    ran = generate("-f", write(tmp_path / "in.parquet", {}, []), "--output", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert (ran.exit_status, len(table), "generated_text" in table.column_names) == (0, 0, True)


def test_text_that_is_not_utf8_fails_its_row(generate, tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"the fox"]).buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    ran = generate("-f", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet")
    assert (ran.exit_status, "in.parquet:1: field 'text': lone surrogate" in ran.stderr) == (3, True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["text"].cast(pa.binary()).to_pylist() == [b"caf\xe9", b"the fox"]


def test_stopped_run_resumes(generate, tmp_path):
    path, out = write(tmp_path / "in.parquet", texts=[*TEXTS[:2], None, "a", "b"]), tmp_path / "out.parquet"
    assert generate("-f", path, "--output", tmp_path / "whole.parquet").exit_status == 3
    ran = generate("-f", path, "--output", out, "--on-error", "stop")
    assert (ran.exit_status, ran.stderr.splitlines()[-1]) == (1, "hint: to continue: rerun with --resume")
    assert sorted(os.listdir(tmp_path))[2:4] == ["out.parquet.state", "out.parquet.state.rows"]
    ran = generate("-f", path, "--output", out)
    assert (ran.exit_status, "'out" not in ran.stderr, "already exists" in ran.stderr) == (2, True, True)
    ran = generate("-f", path, "--output", out, "--resume", "--columns", "text")
    assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)
    for said in ("error: 1 of 5 records failed", f"note: '{out}' is already complete"):
        ran = generate("-f", path, "--output", out, "--resume")
        assert (ran.exit_status, said in ran.stderr) == (3, True)
        assert str(pq.read_table(out).to_pylist()) == str(pq.read_table(tmp_path / "whole.parquet").to_pylist())
    out.unlink()
    assert generate("-f", path, "--output", out, "--resume").exit_status == 3
    assert len(pq.read_table(out)) == 5
    (tmp_path / "out.parquet.state").unlink()
    ran = generate("-f", path, "--output", out, "--resume")
    assert (ran.exit_status, "state file" in ran.stderr) == (2, True)


@pytest.mark.parametrize("resumes", [True, False])
def test_failed_rows_are_retried(generate, tmp_path, monkeypatch, resumes):
    from llmcli.pipelines.causal import CausalPipeline

    path, out = write(tmp_path / "in.parquet", {"id": pa.array(range(5))}), tmp_path / "out.parquet"
    generate("-f", path, "--output", tmp_path / "whole.parquet")
    whole = pq.read_table(tmp_path / "whole.parquet")
    preprocess = CausalPipeline.preprocess

    def fail(pipeline, prompt, **settings):
        if "fox" in prompt:
            raise RuntimeError("no foxes")
        return preprocess(pipeline, prompt, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(CausalPipeline, "preprocess", fail)
        assert "error: 2 of 5" in generate("-f", path, "--output", out, *["--resume"] * resumes).stderr
    assert pq.read_table(out)["error"].null_count == 3
    if resumes:  # the same output
        ran = generate("-f", path, "--output", out, "--resume", "--retry-errors")
    else:  # the output as the input of another run
        carried = generate("-f", out, "--output", tmp_path / "carried.parquet")
        assert "note: 2 of 5 records already had an `error`" in carried.stderr
        assert pq.read_table(tmp_path / "carried.parquet").equals(pq.read_table(out))
        ran = generate("-f", out, "--output", tmp_path / "again.parquet", "--retry-errors")
        out = tmp_path / "again.parquet"
    assert (ran.exit_status, "error: 1 of 5 records failed" in ran.stderr) == (3, True)
    assert pq.read_table(out).select(whole.column_names).equals(whole)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--parquet", "the fox"), "TEXT cannot be used with --parquet"),
        (("--parquet",), "stdin: --parquet requires a regular file"),
        (("--parquet", "--csv", "-f", "in.parquet"), "--csv cannot be used with --parquet"),
        (("--parquet", "-f", "in.csv"), "in.csv: expected a Parquet or Arrow file, got other data"),
        (("--parquet", "-f", "cut.parquet"), "cut.parquet: cannot read the table: "),
        (("--parquet", "-f", "broken.parquet"), "broken.parquet: cannot read the table: "),
        (("--parquet", "-f", "in.parquet", "--output", "out.jsonl"), "cannot write parquet to 'out.jsonl'"),
        (("--parquet", "-f", "in.parquet", "--output", "in.parquet"), "'in.parquet' already exists"),
        (("--parquet", "-f", "twice.arrow", "--output", "out.parquet"), "twice.arrow: duplicate column 'text'"),
        (("--parquet", "-f", "union.arrow", "--output", "out.parquet"), "cannot write the columns of the input"),
        (("--jsonl", "-f", "in.csv", "--output", "out.parquet"), "cannot write json to 'out.parquet'"),
        (("--jsonl", "-f", "in.parquet"), "in.parquet: expected UTF-8, got Parquet or Arrow"),
        (("--csv", "-f", "in.csv", "--columns", "text"), "--columns requires --parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_or_written_is_refused(llmcli, tiny, tmp_path, monkeypatch, args, error):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "in.parquet", texts=["the fox", "a dog", "a", "b", "c"]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    (tmp_path / "broken.parquet").write_bytes(data[:4] + b"\0" * 1000 + data[1004:])
    (tmp_path / "in.csv").write_text("text\nthe fox\n")
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["x", "y"])])
    texts = pa.array(["a", "b"])
    for name, table in (
        ("twice", pa.table([texts] * 2, ["text"] * 2)),
        ("union", pa.table([texts, union], ["text", "u"])),
    ):
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    before = sorted(os.listdir())
    ran = llmcli("generate", "-m", tiny, *args, stdin=None if "the fox" in args else b"PAR1")
    assert (ran.exit_status, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.startswith(f"error: {error}")
    assert sorted(set(os.listdir()) - {"out.parquet.state"}) == before


def test_missing_package_is_named(generate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ran = generate("-f", tmp_path / "in.parquet")
    assert ran.exit_status == 2
    assert ran.stderr == 'error: --parquet requires the package pyarrow\nhint: pip install "llmcli[parquet]"\n'


def test_terminal_gets_no_parquet(llmcli, tiny, tmp_path):
    ran = llmcli("generate", "-m", tiny, "--parquet", "-f", write(tmp_path / "in.parquet"), is_terminal=True)
    assert (ran.exit_status, "cannot write Parquet to a terminal" in ran.stderr) == (2, True)


def test_only_columns_that_are_read_are_converted(tmp_path):
    with write(tmp_path / "in.parquet").open("rb") as stream:
        (batch,) = TableFile("in", stream, ["text", "id"]).batches()
    assert batch.schema.names == ["text", "id"]
    assert read_column(batch, "text") == TEXTS


@pytest.mark.slow
def test_stdin_and_stdout_are_tables(process, tiny, tmp_path):
    path = write(tmp_path / "in.parquet", {}, ["the fox", "a dog"])
    with path.open("rb") as stdin:
        ran = process("generate", "-m", tiny, "--parquet", "--max-new-tokens", 2, stdin=stdin)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert pq.read_table(pa.BufferReader(ran.stdout)).column_names[:2] == ["text", "generated_text"]


@pytest.mark.slow
def test_killed_run_equals_undisturbed_run(tiny, tmp_path):
    choose = random.Random(3)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(1, 30))) if i % 50 else None for i in range(600)]
    path = write(tmp_path / "in.parquet", {"id": pa.array(range(600), pa.uint16())}, texts, row_group_size=200)
    options = ["generate", "-m", tiny, "--parquet", "-f", path, "--temperature", 0, "--max-new-tokens", 8,
               "--dtype", "float32", "--batch-size", 4, "--output"]  # fmt: skip
    command = [sys.executable, "-m", "llmcli", *map(str, options)]
    subprocess.run([*command, tmp_path / "whole.parquet"], stderr=subprocess.DEVNULL)
    whole, out = pq.read_table(tmp_path / "whole.parquet"), tmp_path / "out.parquet"
    rows = tmp_path / "out.parquet.state.rows"
    for point in sorted(choose.randrange(1, 80_000) for _ in range(3)):
        running = subprocess.Popen([*command, out, "--resume"], stderr=subprocess.DEVNULL)
        while running.poll() is None and not (rows.exists() and rows.stat().st_size >= point):
            time.sleep(0.001)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmcli"]
    subprocess.run([*torchrun, *map(str, options), out, "--resume"], stderr=subprocess.DEVNULL)
    assert pq.read_table(out).equals(whole)


@pytest.mark.slow
def test_worker_runs_tables(place, process, chatty, tmp_path):
    path = write(tmp_path / "in.parquet")
    for keep_alive in ("0", "1m"):
        ran = process("generate", "-m", chatty, "--parquet", "-f", path, "--temperature", 0, "--max-new-tokens", 2,
                      "--keep-alive", keep_alive, "--output", tmp_path / f"{keep_alive}.parquet")  # fmt: skip
        assert ran.returncode == 3, ran.stderr
    alone, warm = (pq.read_table(tmp_path / f"{name}.parquet").drop_columns("ratio") for name in ("0", "1m"))
    assert warm.equals(alone)


def test_binary_column_is_no_text(llmcli, tiny, tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"the fox", None])}), tmp_path / "in.parquet")
    ran = llmcli("generate", "-m", tiny, "--parquet", "--json", "-f", tmp_path / "in.parquet")
    assert [record["error"]["type"] for record in ran.records] == ["wrong_type", "wrong_type"]


def test_file_replaced_during_run_is_an_error(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    source = TableSource(open_inputs([], [str(path)]), [])
    assert source.schema().names == ["text"]
    pq.write_table(pa.table({"text": ["b", "a", "c"]}), path)
    with pytest.raises(LlmcliError, match="has changed since the run was started"):
        list(source.open())


def test_retried_rows_lose_old_errors_whatever_is_selected(llmcli, tiny, tmp_path):
    error = {"type": "internal_error", "message": "x"}
    path, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"text": ["the fox", "a dog"], "error": [error, None]}), path)
    args = ("generate", "-m", tiny, "--max-new-tokens", 1, "--retry-errors", "--select", "generated_text")
    assert llmcli(*args, "--parquet", "-f", path, "--output", output).exit_status == 0
    assert pq.read_table(output).column("error").to_pylist() == [None, None]
