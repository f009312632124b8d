"""Reduces a long text to its most central sentences, for models that are too small to summarize their own summaries."""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from llmcli.job import Job
from llmcli.models import registry
from llmcli.tasks import ModelCall
from llmcli.tasks.outputs import EmbeddingOutput
from llmcli.text import languages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_SENTENCES = 10  # of all parts together, or one of each part if there are more parts
SENTENCE_BYTES = range(40, 400)  # length of a sentence that is likely to make sense alone


def condense(
    job: Job, parts: Sequence[str], count_tokens: Callable[[str], int], max_tokens: int
) -> Generator[ModelCall, list[Any], str]:
    """Select the most central sentences of a text.

    The score of a sentence is its cosine similarity to the centroid of its part plus that to the centroid of the text.
    This is centroid summarization with sentence vectors in place of word counts (Radev et al., "Centroid-based
    summarization of multiple documents", 2004).

    Yields:
        One call that embeds all sentences.

    Returns:
        The sentences in the order of the text, at most `max_tokens` tokens, of which each part has an equal share.
    """
    import numpy as np

    sentences = [_split_sentences(part) for part in parts]
    texts = [sentence for part in sentences for sentence in part]
    if not texts:
        return ""
    encoder = registry.default_names("embed")[0]
    embed = Job("embed", encoder, load_options=job.load_options, batch_size=32, truncate=True)
    outputs: list[EmbeddingOutput] = yield ModelCall([{"text": text} for text in texts], job=embed)
    vectors = np.array([output["embedding"] for output in outputs])
    text_centroid = _centroid(vectors)
    max_sentences = max(1, MAX_SENTENCES // len(parts))
    selected: list[str] = []
    used = start = 0
    for number, part in enumerate(sentences, start=1):
        part_vectors = vectors[start : start + len(part)]
        start += len(part)
        if not part:
            continue
        scores = part_vectors @ _centroid(part_vectors) + part_vectors @ text_centroid
        lengths = [count_tokens(sentence) for sentence in part]
        best: list[int] = []
        for i in np.argsort(-scores):
            if len(best) < max_sentences and used + lengths[i] <= max_tokens * number / len(parts):
                best.append(int(i))
                used += lengths[i]
        selected += [part[i] for i in sorted(best)]
    return " ".join(selected)


def _split_sentences(text: str) -> list[str]:
    """Return the complete sentences of a text that are likely to make sense alone."""
    language = languages.detect_or_none(text) or "en"
    sentences = [" ".join(sentence.split()) for sentence in languages.split_sentences(text, language)]
    return [s for s in sentences if len(s.encode()) in SENTENCE_BYTES and s[-1] in ".!?。！？"]


def _centroid(vectors: "NDArray[np.float64]") -> "NDArray[np.float64]":
    mean: NDArray[np.float64] = vectors.mean(0)
    return mean / (float(mean @ mean) ** 0.5 or 1)
