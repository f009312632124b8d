"""llmcli merge: put the outputs of shards together."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmcli.io.formats import InputFormat
from llmcli.io.merge import merge_shards
from llmcli.io.output import Sink
from llmcli.options import InputOptions, Quiet, Verbose, expand_options
from llmcli.options.input_output import FORMATS, OutputPath


@expand_options
def merge(
    files: Annotated[list[str], Argument(metavar="FILE", show_default=False)],
    lines: Annotated[bool, Option("--lines", help="Treat each line as a result.")] = False,
    null: Annotated[bool, Option("--null", help="Treat each NUL-terminated string as a result.")] = False,
    jsonl: Annotated[bool, Option("--jsonl", help="Treat each line as a result, which is JSON.")] = False,
    csv: Annotated[bool, Option("--csv", help="Treat each row as a result; the first row is the header.")] = False,
    output: OutputPath = None, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Merge the outputs of shards.

    Each FILE is the output of a run with --shard. If FILE.state is beside each, the files may come in any order.
    Otherwise, pass all in the order of the shards; the format is that of an option, of the suffix, or lines.

    \b
    llmcli merge shard.0.jsonl shard.1.jsonl > out.jsonl
    """
    chosen = InputOptions(lines=lines, null=null, jsonl=jsonl, csv=csv).format()
    path = None if output == Path("-") else output
    with Sink(path) as sink:
        try:
            for block in merge_shards(files, None if chosen is InputFormat.WHOLE else FORMATS[chosen]):
                sink.write(block.decode("utf-8", "backslashreplace"))
        except BaseException:
            if path:
                path.unlink()
            raise
