"""A long text brought down to its most central sentences: for models too small to build on summaries of their own."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from llmcli.job import Job
from llmcli.models import registry
from llmcli.tasks import ModelCall
from llmcli.text import languages

SENTENCES = 10  # of all parts, or one of each where they are more
LENGTHS = range(40, 400)  # characters of a sentence that can stand alone


def condensed(
    job: Job, parts: Sequence[str], count: Callable[[str], int], most: int
) -> Generator[ModelCall, list[Any], str]:
    """The sentences of each part that are nearest to the middle of its part's and of the whole text's meaning, in
    their order; at most `most` tokens in all, of which each part has its share.

    Centroid summarization: Radev et al., "Centroid-based summarization of multiple documents", 2004, with sentence
    vectors in the place of word counts.
    """
    import numpy as np

    sentences = [_sentences(part) for part in parts]
    texts = [sentence for some in sentences for sentence in some]
    if not texts:
        return ""
    embed = Job(
        "embed", registry.default_names("embed")[0], load_options=job.load_options, batch_size=32, truncate=True
    )
    outputs = yield ModelCall([{"text": text} for text in texts], job=embed)
    vectors = np.array([output["embedding"] for output in outputs])
    each = max(1, SENTENCES // len(parts))
    chosen: list[str] = []
    used = start = 0
    for number, some in enumerate(sentences, start=1):
        own = vectors[start : start + len(some)]
        start += len(some)
        if len(own):
            nearness = own @ _middle(own) + own @ _middle(vectors)
            lengths = [count(sentence) for sentence in some]
            best: list[int] = []
            for i in np.argsort(-nearness):
                if len(best) < each and used + lengths[i] <= most * number / len(parts):
                    best.append(int(i))
                    used += lengths[i]
            chosen += [some[i] for i in sorted(best)]
    return " ".join(chosen)


def _sentences(text: str) -> list[str]:
    found = (" ".join(sentence.split()) for sentence in languages.sentences(text, languages.likely(text) or "en"))
    return [sentence for sentence in found if len(sentence.encode()) in LENGTHS and sentence[-1] in ".!?。！？"]


def _middle(vectors: Any) -> Any:
    mean = vectors.mean(0)
    return mean / ((mean @ mean) ** 0.5 or 1)
