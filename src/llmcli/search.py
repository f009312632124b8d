"""Passages nearest in meaning: texts are cut, embedded once, and ranked by the query's dot product."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcli import console, encoder, registry, store
from llmcli.engines.local import LocalEngine
from llmcli.errors import LlmcliError
from llmcli.job import Job, Record
from llmcli.vectors import VectorCache

PASSAGE = 128  # tokens at most: a paragraph, more or less
KEEP_EVERY = 64  # passages embedded before their vectors are kept


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a file; `line` is where it begins, counted from 1."""

    text: str
    file: str | None
    line: int


def cut(records: Sequence[Record], folder: Path) -> Iterator[Passage]:
    """The records' texts in pieces of at most PASSAGE tokens, cut between headings of Markdown, paragraphs,
    sentences or words as the tokens allow; a record that is a line stays whole where it fits."""
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    most = min(PASSAGE, encoder.window(folder) - tokenizer.num_special_tokens_to_add(is_pair=False))
    plain, markdown = (kind.from_huggingface_tokenizer(tokenizer, most) for kind in (TextSplitter, MarkdownSplitter))
    for record in records:
        splitter = markdown if (record.file or "").endswith((".md", ".markdown")) else plain
        text, line, counted = record.fields["text"], record.line or 1, 0
        for start, piece in splitter.chunk_indices(text):
            line += text.count("\n", counted, start)
            counted = start
            yield Passage(piece, record.file, line)


def nearest(job: Job, query: str, records: Sequence[Record], limit: int) -> list[tuple[Passage, float]]:
    """The `limit` passages with the greatest cosine similarity to the query, the best first; equals in input order.

    Raises what the engine raises; LlmcliError where a text cannot be embedded or the cache not be used.
    """
    import numpy as np

    placement = job.placement
    folder = store.pull(registry.resolve(job.model), offline=placement.offline, allow_pickle=placement.allow_pickle)
    passages = list(cut(records, folder))
    if not passages:
        return []
    with VectorCache(_identity(folder, job)) as cache:
        texts = {query, *(passage.text for passage in passages)}
        known = cache.find(texts)
        missing = texts - known.keys()
        # Of like length together: less padding.
        known |= _embedded(job, sorted(missing, key=lambda text: (len(text), text)), cache)
    matrix = np.frombuffer(b"".join(known[passage.text] for passage in passages), "<f4").reshape(len(passages), -1)
    scores = matrix @ np.frombuffer(known[query], "<f4")
    best = np.argsort(-scores, kind="stable")[:limit]
    return [(passages[i], float(scores[i])) for i in best]


def _embedded(job: Job, texts: Sequence[str], cache: VectorCache) -> dict[str, bytes]:
    """The texts' vectors, kept in the cache as they come."""
    import numpy as np

    vectors: dict[str, bytes] = {}
    fresh: dict[str, bytes] = {}
    with console.working(f"embedding {len(texts)} passages"):
        for result in LocalEngine().run(job, [Record({"text": text}) for text in texts]):
            if result.failure:
                raise LlmcliError(result.failure.message)
            fresh[result.record.fields["text"]] = np.array(result.output["embedding"], "<f4").tobytes()
            if len(fresh) == KEEP_EVERY:
                cache.add(fresh)
                vectors |= fresh
                fresh = {}
        cache.add(fresh)
    return vectors | fresh


def _identity(folder: Path, job: Job) -> str:
    """What the vectors depend on, beside the text: the weights and their precision."""
    changed = max(file.stat().st_mtime_ns for file in folder.iterdir())
    return f"{folder} {changed} {job.placement.dtype}"
