"""qa: a question answered from a text, cut out of it by a model made for that, or told by a language model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmcli.errors import RecordError, UsageError
from llmcli.job import Job
from llmcli.models import registry
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskResult, prompting
from llmcli.tasks.fields import text_field
from llmcli.tasks.generated import merge_usage
from llmcli.text import chunking

WHOLE = 1000  # tokens of text that go into a prompt as they are; of a longer one, the passages nearest to the question
PASSAGES = 3
CUTTING = ("top_k", "max_answer_len", "handle_impossible_answer", "doc_stride", "max_seq_len")
NO_ANSWER = {"answer": None, "score": None, "start": None, "end": None}

Document = Mapping[str, Any]  # `text`, and the `file` that it came from


def prepare(job: Job, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record's `question` and the `documents` to find its answer in, the job's or the record's own; None where
    these are empty."""
    roles = job.parameters.get("fields", {})
    documents = job.parameters.get("documents")
    question = text_field(fields, roles.get("question", "question"))
    if documents is None:
        documents = [{"text": text_field(fields, roles.get("context", "context"))}]
    if not question.strip():
        raise RecordError("empty", "the question is empty")
    documents = [each for each in documents if each["text"].strip()]
    return {**fields, "question": question, "documents": documents} if documents else None


def extracted(job: Job, asked: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By a question-answering head: the likeliest spans of all documents."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt does not go with {job.model}: it cuts answers out, and is not prompted")
    if job.generation:
        option = next(iter(job.generation))
        raise UsageError(f"{job.model} cuts its answer out of the text: {option} is for models that write one")
    top_k: int = job.parameters.get("top_k") or 1
    documents: Sequence[Document] = asked["documents"]
    outputs = yield ModelCall([{"question": asked["question"], "context": each["text"]} for each in documents])
    found = [
        {**{key: answer[key] for key in NO_ANSWER}, **({"file": document["file"]} if document.get("file") else {})}
        for document, output in zip(documents, outputs, strict=True)
        for answer in output.get("answers", [output])
    ]
    if len(documents) > 1 and (nothing := [answer for answer in found if answer["answer"] == ""]):
        # That there is no answer has to hold for all of them.
        found = [answer for answer in found if answer["answer"]] + [min(nothing, key=lambda each: each["score"])]
    found = sorted(found, key=lambda answer: -answer["score"])[:top_k]
    several = {"answers": found} if top_k > 1 else {}
    return TaskResult({**found[0], **several}, "\n".join(answer["answer"] or "" for answer in found))


def parameters(job: Job, pipeline: Any = None) -> Mapping[str, Any]:
    """Those of the pipeline that the user gave."""
    return {name: job.parameters[name] for name in CUTTING if job.parameters.get(name) is not None}


def prompted(job: Job, asked: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By a language model: an answer, and the `passage` that it came from, whose characters `start` and `end` tell."""
    if given := parameters(job):
        raise UsageError(
            f"{job.model} writes its answer: {next(iter(given))} is for models that cut it out of the text",
            hint="take one that does: -m roberta-squad2",
        )
    if (job.generation.get("num_return_sequences") or 1) > 1:
        raise UsageError(f"{job.model} answers a question once: -n says nothing")
    pipeline, prompt = model.pipeline, prompting.prompt_for(job, model.pipeline)
    documents: Sequence[Document] = asked["documents"]
    if sum(pipeline.count_tokens(each["text"]) for each in documents) <= WHOLE:
        passages = [_passage(documents, i, at, at + len(text)) for i, each in enumerate(documents)
                    for at, text in chunking.cut(each["text"], pipeline.count_tokens, WHOLE // 8)]  # fmt: skip
        context = "\n\n".join(each["text"] for each in documents)
    else:
        encoder = registry.default_names("search")[0]
        search = Job("search", encoder, parameters={"limit": PASSAGES}, load_options=job.load_options)
        ((nearest),) = yield ModelCall([{"query": asked["question"], "texts": documents}], job=search)
        places = [(match["of"], match["start"], match["end"]) for match in nearest["matches"]]
        passages = [_passage(documents, *place) for place in sorted(places)]
        context = "\n\n".join(passage["passage"] for passage in passages)
    (output,) = yield ModelCall([prompt({**asked, "context": context})], strip=True)
    answer = output["generated_text"].strip()
    if not answer or _plain(answer) in map(_plain, prompt.unknown):
        return TaskResult({**NO_ANSWER, "passage": None, **merge_usage([output])}, "")
    source = max(passages, key=_likeness(answer, [passage["passage"] for passage in passages]))
    return TaskResult({"answer": answer, "score": None, **source, **merge_usage([output])}, answer)


def _passage(documents: Sequence[Document], number: int, start: int, end: int) -> dict[str, Any]:
    document = documents[number]
    file = {"file": document["file"]} if document.get("file") else {}
    return {"start": start, "end": end, "passage": document["text"][start:end], **file}


def _likeness(answer: str, texts: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[bool, float]]:
    """How much of the answer stands in a passage: all of it, or its words, of which the rarer ones say more."""
    plain = [_plain(text) for text in texts]
    rarity = {
        word: 1 / found for word in set(_plain(answer).split()) if (found := sum(word in t.split() for t in plain))
    }

    def like(passage: Mapping[str, Any]) -> tuple[bool, float]:
        text = _plain(passage["passage"])
        return _plain(answer) in text, sum(rarity.get(word, 0) for word in set(text.split()))

    return like


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


TASK = Task(
    prepare,
    ("answer", "score", "start", "end", "passage", "finish_reason", "usage"),
    NO_ANSWER,
    {
        "extractive_qa": Strategy(extracted, parameters=parameters),
        "causal": Strategy(prompted, prompting.GREEDY, prompting.parameters),
    },
)
