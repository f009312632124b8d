"""The outputs of pipelines, as tasks read them. They are plain dictionaries that can be written as JSON."""

from typing import TYPE_CHECKING, NotRequired, TypedDict

from llmcli.job import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Usage(TypedDict):
    """Numbers of tokens. A model that generates nothing has no completion tokens."""

    prompt_tokens: int
    completion_tokens: NotRequired[int]


class GeneratedOutput(TypedDict):
    """What a `causal` or `seq2seq` pipeline generates for one prompt."""

    generated_text: str
    generated_texts: NotRequired[list[str]]  # all sequences, if more than one was requested
    truncated: NotRequired[int]  # tokens cut from the prompt
    finish_reason: str
    usage: Usage


class ExtractedAnswer(TypedDict):
    """A span of a context that answers a question."""

    answer: str | None
    score: float
    start: int | None  # characters
    end: int | None


class ExtractedOutput(ExtractedAnswer):
    """What an `extractive_qa` pipeline finds in one context: the best answer, and all if more were requested."""

    answers: NotRequired[list[ExtractedAnswer]]


class EmbeddingOutput(TypedDict):
    """The vector of one text, from an `embedding` pipeline."""

    embedding: list[float]
    truncated: NotRequired[int]
    usage: Usage


class NextTokenOutput(TypedDict):
    """The distribution of the token after one text, from a `next_token` pipeline. V is the size of the vocabulary."""

    probability: "NDArray[np.float32]"  # (V,)
    sampling_probability: "NDArray[np.float32]"  # (V,)
    input_ids: list[int]
    sampling: JsonObject
    truncated: NotRequired[int]
