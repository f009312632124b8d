"""qa: answer a question from a text, by extracting a span of the text or by prompting a language model."""

import re
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.models import registry
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskModel, TaskResult, prompting, select_parameters
from llmcli.tasks.fields import field_name, text_field
from llmcli.tasks.generated import merge_usage
from llmcli.text.splitting import split

MAX_CONTEXT_TOKENS = 1000  # a longer text is searched for the passages that are most similar to the question
MAX_PASSAGES = 3
NO_ANSWER = {"answer": None, "score": None, "start": None, "end": None}
EXTRACTIVE = ("top_k", "max_answer_len", "handle_impossible_answer", "doc_stride", "max_seq_len")
select_extractive = select_parameters(*EXTRACTIVE)


class Question(NamedTuple):
    """A question, the documents to answer it from, and the fields of its record."""

    text: str
    documents: Sequence[JsonObject]
    fields: JsonObject


def prepare(job: Job, fields: JsonObject) -> Question | None:
    """Return the question of a record and its documents, or None if the question or all documents are blank."""
    question = text_field(fields, field_name(job, "question"))
    documents = job.parameters.get("documents")
    if documents is None:
        documents = [{"text": text_field(fields, field_name(job, "context"))}]
    documents = [document for document in documents if document["text"].strip()]
    return Question(question, documents, fields) if documents and question.strip() else None


def run_extractive(job: Job, question: Question, model: TaskModel) -> TaskGenerator:
    """Answer with a question-answering head: extract the most likely spans of all documents."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt cannot be used with {job.model}, an extractive model without prompts")
    if job.generation:
        raise UsageError(f"{next(iter(job.generation))} cannot be used with {job.model}, an extractive model")
    top_k: int = job.parameters.get("top_k") or 1
    inputs = [{"question": question.text, "context": document["text"]} for document in question.documents]
    outputs = yield ModelCall(inputs)
    answers = [
        {**{key: value for key, value in answer.items() if key in NO_ANSWER}, **_file_field(document)}
        for document, output in zip(question.documents, outputs, strict=True)
        for answer in output.get("answers", [output])
    ]
    empty = [answer for answer in answers if answer["answer"] == ""]
    if len(question.documents) > 1 and empty:
        # The answer is missing only if it is missing from all documents, so the lowest score counts.
        answers = [answer for answer in answers if answer["answer"]] + [min(empty, key=itemgetter("score"))]
    answers = sorted(answers, key=itemgetter("score"), reverse=True)[:top_k]
    all_answers = {"answers": answers} if top_k > 1 else {}
    return TaskResult({**answers[0], **all_answers}, "\n".join(str(answer["answer"] or "") for answer in answers))


def run_prompted(job: Job, question: Question, model: TaskModel) -> TaskGenerator:
    """Answer with a language model by instruction, from the passages that are most similar to the question."""
    if given := next(iter(select_extractive(job, model)), None):
        message = f"{given} is for extractive models, but {job.model} generates its answer"
        raise UsageError(message, hint="use an extractive model: -m roberta-squad2")
    if (job.generation.get("num_return_sequences") or 1) > 1:
        raise UsageError(f"-n is not supported by qa with {job.model}, which generates one answer")
    prompt, documents = prompting.prompt_for(job, model), question.documents
    if sum(model.count_tokens(document["text"]) for document in documents) <= MAX_CONTEXT_TOKENS:
        passages = [
            _make_passage(document, start, start + len(text))
            for document in documents
            for start, text in split(document["text"], model.count_tokens, MAX_CONTEXT_TOKENS // 8)
        ]
        context = "\n\n".join(document["text"] for document in documents)
    else:
        encoder = registry.default_names("search")[0]
        search = Job("search", encoder, parameters={"limit": MAX_PASSAGES}, load_options=job.load_options)
        (result,) = yield ModelCall([{"query": question.text, "documents": documents}], job=search)
        places = sorted((match["of"], match["start"], match["end"]) for match in result["matches"])
        passages = [_make_passage(documents[number], start, end) for number, start, end in places]
        context = "\n\n".join(passage["passage"] for passage in passages)
    fields = {**question.fields, "question": question.text, "context": context}
    outputs = yield ModelCall([prompt.render(fields)], strip=True)
    answer, usage = outputs[0]["generated_text"].strip(), merge_usage(outputs)
    if not answer or _normalize(answer) in map(_normalize, prompt.unknown_answers):
        return TaskResult({**NO_ANSWER, "passage": None, **usage}, "")
    return TaskResult({"answer": answer, "score": None, **_find_source(answer, passages), **usage}, answer)


def _find_source(answer: str, passages: Sequence[JsonObject]) -> JsonObject:
    """Return the passage that most likely contains a generated answer: all of it, or words that few passages have."""
    wanted = _normalize(answer)
    texts = [_normalize(passage["passage"]) for passage in passages]
    vocabularies = [set(text.split()) for text in texts]
    frequency = {word: sum(word in words for words in vocabularies) for word in set(wanted.split())}
    scores = [
        (wanted in text, sum(1 / frequency[word] for word in frequency.keys() & words))
        for text, words in zip(texts, vocabularies, strict=True)
    ]
    return passages[scores.index(max(scores))]


def _make_passage(document: JsonObject, start: int, end: int) -> JsonObject:
    return {"start": start, "end": end, "passage": document["text"][start:end], **_file_field(document)}


def _file_field(document: JsonObject) -> JsonObject:
    return {"file": document["file"]} if document.get("file") else {}


def _normalize(text: str) -> str:
    """Return the words of a text in lowercase, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


OUTPUTS = ("answer", "score", "start", "end", "passage", "finish_reason", "usage")
STRATEGIES = {
    "extractive_qa": Strategy(run_extractive, parameters=select_extractive),
    "causal": Strategy(run_prompted, prompting.GREEDY, prompting.prompt_settings, can_think=False),
}
TASK = Task(prepare, OUTPUTS, NO_ANSWER, STRATEGIES)
