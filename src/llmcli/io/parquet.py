"""Read Parquet and Arrow files, and write Parquet with the same columns and those of the results.

Columns stay in Arrow until a task or an output asks for their values. A Parquet file cannot be read before its end is
written. Until then, the results are JSON Lines in PATH.state.rows, with the same log as those of other formats.
"""

import io
import json
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmcli import console
from llmcli.errors import LlmcliError, UsageError, first_line, reason
from llmcli.io.decoding import printable
from llmcli.io.output import OutputSpec, Sink, is_terminal, to_json
from llmcli.io.records import Input
from llmcli.io.run_log import RunLog, sync
from llmcli.job import Record

BATCH_ROWS, BATCH_BYTES = 2**10, 2**22  # maximum size of what is read at a time
BUFFER_BYTES = 2**16  # per column; without a buffer, a whole row group would be in memory
GROUP_BATCHES, GROUP_BYTES = 64, 2**22  # about the maximum size of a row group, which is in memory when it is written
COPY_BYTES = 2**20


@dataclass(frozen=True)
class TableSource:
    """The files of --parquet, and the columns to read. No columns are all columns."""

    inputs: Sequence[Input]
    columns: Sequence[str]
    states: dict[str | None, tuple[int, ...]] = field(default_factory=dict)  # of the files, when they were first opened

    def open(self) -> Iterator["TableFile"]:
        """Yield the files, each of which is open until the next one."""
        for input in self.inputs:
            with input.open() as stream:
                status = os.fstat(stream.fileno())
                state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
                if self.states.setdefault(input.name, state) != state:
                    raise LlmcliError(f"{input.name or 'stdin'} has changed since the run was started")
                yield TableFile(input.name and printable(input.name), stream, self.columns)

    def schema(self) -> Any:
        """Return the schema of the first file. Raises UsageError if another file has a different one."""
        (name, first), *others = [(table.where, table.schema) for table in self.open()]
        if different := [other for other, schema in others if not schema.equals(first)]:
            message = f"{different[0]}: the columns or their types are not those of {name}"
            raise UsageError(message, hint="run files with other columns alone, or use --json")
        return first

    def records(self) -> Iterator[Record]:
        """Yield the rows of all files."""
        counts, done = [table.count for table in self.open()], 0
        total = 0 if None in counts else sum(filter(None, counts))
        for table in self.open():
            before = done
            for batch in table.batches():
                get_values, size = cache(partial(read_column, batch)), batch.nbytes // batch.num_rows
                for index in range(batch.num_rows):
                    done += 1
                    fields = Row(get_values, batch.schema.names, index, done, size)
                    fraction = done / total if total else None
                    yield Record(fields, table.name, done - before, input_fraction=fraction, is_row=True)


class TableFile:
    """A Parquet file, or an Arrow file or stream, as its signature says. Raises UsageError if it cannot be read."""

    def __init__(self, name: str | None, stream: Any, columns: Sequence[str]) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        self.name, self.where, self.count = name, name or "stdin", None  # of rows, if the file says so
        stream.seek(0)
        signature = stream.read(6)
        stream.seek(0)
        with _translated_errors(f"{self.where}: cannot read the table"):
            if signature.startswith(b"PAR1"):
                file = ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
                schema, self.count, groups = file.schema_arrow, file.metadata.num_rows, range(file.num_row_groups)
                rows = _limit_rows(self.count, sum(file.metadata.row_group(i).total_byte_size for i in groups))
                self._read = partial(file.iter_batches, rows, columns=columns or None, use_threads=False)
            elif signature == b"ARROW1":
                file = pa.ipc.open_file(stream)
                schema, self._read = file.schema, partial(map, file.get_batch, range(file.num_record_batches))
            elif signature.startswith(b"\xff\xff\xff\xff"):
                file = pa.ipc.open_stream(stream)
                schema, self._read = file.schema, partial(iter, file)
            else:
                raise UsageError(f"{self.where}: expected a Parquet or Arrow file, got other data")
        counts = Counter(schema.names)
        for column in columns or counts:
            if counts[column] != 1:
                problem = f"{'duplicate' if counts[column] else '--columns: unknown'} column {column!r}"
                raise UsageError(f"{self.where}: {problem}", hint=f"columns: {', '.join(counts)[:200]}")
        self.schema = pa.schema([schema.field(column) for column in dict.fromkeys(columns or counts)], schema.metadata)

    def batches(self) -> Iterator[Any]:
        """Yield the rows as record batches."""
        with _translated_errors(f"{self.where}: cannot read the table"):
            for batch in self._read():
                rows = batch.select(self.schema.names)
                step = _limit_rows(rows.num_rows, rows.nbytes)
                yield from (rows.slice(start, step) for start in range(0, rows.num_rows, step))


@contextmanager
def _translated_errors(message: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as exc:
        raise UsageError(f"{message}: {first_line(exc)}") from exc


def _limit_rows(count: int, size: int) -> int:
    """Return how many rows, of `count` that have `size` bytes, are read at a time."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(1, size)))


class Row(Mapping[str, Any]):
    """The fields of a record, which is row `number` of the input. `size` is about their number of characters."""

    def __init__(
        self, get_values: Callable[[str], list[Any]], names: list[str], index: int, number: int, size: int
    ) -> None:
        self._get_values, self._names, self._index, self._number, self.size = get_values, names, index, number, size

    def __getitem__(self, name: str) -> Any:
        return self._get_values(name)[self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> Any:  # Other processes get a dictionary.
        return dict, (dict(self),)

    def __str__(self) -> str:  # in the log of a run, which has a fingerprint of the files
        return str(self._number)


class ConvertedText(str):
    """A value that only JSON has as text. As the text of a record, it has the wrong type."""


def read_column(batch: Any, name: str) -> list[Any]:
    """Return the values of a column as JSON has them: times and decimals as strings, binary values as Base64."""
    import pyarrow as pa
    from pyarrow import types

    array = batch.column(name)
    kind = array.type
    if types.is_temporal(kind) and not types.is_interval(kind):  # Those of Python have no nanoseconds.
        utc = array.cast(pa.timestamp(kind.unit)) if types.is_timestamp(kind) else array
        end = "Z" if getattr(kind, "tz", None) else ""
        texts = utc.cast(pa.string()).to_pylist()
        return [text and ConvertedText(text.replace(" ", "T") + end) for text in texts]
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:  # With lone surrogates, a text is a failed record.
        if not types.is_string(kind) and not types.is_large_string(kind):
            raise UsageError(
                f"column {name!r} has text that is not UTF-8", hint="leave it out with --columns"
            ) from None
        values = [value and value.decode("utf-8", "surrogateescape") for value in array.cast(pa.binary()).to_pylist()]
    except ValueError as exc:
        raise UsageError(f"cannot convert column {name!r} to JSON: {exc}", hint="leave it out with --columns") from exc
    if not all(isinstance(value, str | int | None) for value in values):
        text = json.dumps(values, default=lambda item: b64encode(item).decode() if type(item) is bytes else str(item))
        values = json.loads(text, parse_constant=lambda name: None)  # JSON has no NaN.
        values = [ConvertedText(value) if isinstance(value, str) else value for value in values]
    return values


class TableWriter:
    """Writes the rows of a shard of a table with results. `names` is what `OutputSpec.name_fields` returns."""

    def __init__(self, source: TableSource, names: Mapping[str, str | None], shard: tuple[int, int]) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        self._source, self._shard, own, known = source, shard, source.schema(), _result_types()
        # `Output` keeps the field `file` of a record.
        kept = {new: name for name, new in names.items() if new and not (name == new == "file" in own.names)}
        self._types = {new: known.get(name) for new, name in kept.items()}  # None: JSON
        if replaced := [new for new, kind in self._types.items() if new in own.names and own.field(new).type != kind]:
            console.warning(f"results replace these columns: {', '.join(replaced)}; to keep both: --rename")
        fields = {field.name: field for field in own} | {
            new: (new, kind or pa.string()) for new, kind in self._types.items()
        }
        self._schema = pa.schema(fields.values(), own.metadata)
        with _translated_errors("cannot write the columns of the input as Parquet"):
            ParquetWriter(io.BytesIO(), self._schema).close()

    def write(self, path: Path, log: RunLog) -> None:
        """Write each row of the input that has a result in the log, and the result, to `path`."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        new, sizes, group = Path(f"{path}.state.new.parquet"), (entry.size for entry in log), list[Any]()
        try:
            with (
                console.working(f"writing {path}"),
                log.output.open("rb") as results,
                new.open("wb") as file,
                ParquetWriter(file, self._schema, compression="zstd") as writer,
            ):
                for batch in self._read_shard():
                    group.append(self._add_results(batch, [*map(results.read, islice(sizes, batch.num_rows))]))
                    if len(group) == GROUP_BATCHES or sum(rows.nbytes for rows in group) > GROUP_BYTES:
                        writer.write_table(pa.Table.from_batches(group))
                        group.clear()
                if group:
                    writer.write_table(pa.Table.from_batches(group))
            sync(new)
            os.replace(new, path)
        except OSError as exc:
            raise LlmcliError(f"cannot write to {path}: {reason(exc)}") from exc
        finally:
            new.unlink(missing_ok=True)

    def _read_shard(self) -> Iterator[Any]:
        start, step = self._shard
        for batch in chain.from_iterable(table.batches() for table in self._source.open()):
            yield batch.take([*range(start, batch.num_rows, step)]) if step > 1 else batch
            start = (start - batch.num_rows) % step

    def _add_results(self, batch: Any, lines: list[bytes]) -> Any:
        """Return rows with their results, which are lines of JSON. A row whose line is empty is dropped."""
        import pyarrow as pa

        kept, results = [bool(line) for line in lines], [json.loads(line) for line in lines if line]
        own = batch if all(kept) else batch.filter(pa.array(kept))
        columns = {name: own.column(name) for name in own.schema.names}
        for name, kind in self._types.items():
            values = [result.get(name) for result in results]
            if kind is None:
                values = [None if value is None else to_json(value) for value in values]
            try:
                columns[name] = pa.array(values, kind or pa.string())
            except pa.ArrowException as exc:
                raise LlmcliError(f"cannot write column {name!r} as {kind}: {first_line(exc)}") from exc
        return pa.RecordBatch.from_arrays([*columns.values()], schema=self._schema)


def _result_types() -> dict[str, Any]:
    """Return the types of result fields by their names."""
    import pyarrow as pa

    text, number, integer, array, struct = pa.string(), pa.float64(), pa.int64(), pa.list_, pa.struct
    span = {"score": number, "start": integer, "end": integer}
    token = {"token": text, "logprob": number, "bytes": array(integer)}
    return {
        **dict.fromkeys(("generated_text", "translation_text", "summary_text", "answer", "passage", "label"), text),
        **dict.fromkeys(("from", "to", "finish_reason", "reasoning", "model", "file"), text),
        **dict.fromkeys(("score", "logprob", "mean_logprob", "perplexity", "bits_per_byte"), number),
        **dict.fromkeys(("rank", "start", "end", "tokens", "chunks", "truncated"), integer),
        **dict.fromkeys(("generated_texts", "translation_texts", "summary_texts", "labels"), array(text)),
        "embedding": array(pa.float32()),
        "scores": array(struct({"label": text, "score": number})),
        "answers": array(struct({"answer": text, **span, "file": text})),
        "entities": array(struct({"entity_group": text, "entity": text, "word": text, **span})),
        "logprobs": struct({"content": array(struct({**token, "top_logprobs": array(struct(token))}))}),
        "token_logprobs": array(struct({"token": text, "id": integer, "logprob": number})),
        "usage": struct({"prompt_tokens": integer, "completion_tokens": integer}),
        "error": struct({"type": text, "message": text}),
    }


@contextmanager
def file_for_stdout(spec: OutputSpec) -> Iterator[OutputSpec]:
    """Yield a spec that writes to a temporary file, and copy the file to stdout."""
    if is_terminal():
        raise UsageError("cannot write Parquet to a terminal", hint="use --output PATH, or --json")
    with TemporaryDirectory(prefix="llmcli") as folder:
        yield replace(spec, path=(path := Path(folder, "stdout.parquet")), fingerprint="")
        if path.exists():
            sink = Sink()
            with path.open("rb") as file:
                for data in iter(partial(file.read, COPY_BYTES), b""):
                    sink.write_bytes(data)
