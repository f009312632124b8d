"""classify: label a text, by a classification head, by natural language inference, or by a language model."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import TYPE_CHECKING

from llmcli.errors import UsageError
from llmcli.io.units import round_float32
from llmcli.job import Job, JsonObject
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult, prompting, select_parameters
from llmcli.tasks.fields import field_name, read_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Item = tuple[str, JsonObject]  # what is labeled, and the fields for prompts
HYPOTHESIS = "This example is {}."
THRESHOLD = 0.5  # of --multi-label
HEAD_OPTIONS = {"hypothesis": "--hypothesis", "long": "--long", "multi_label": "--multi-label"}


def prepare(job: Job, fields: JsonObject) -> Item | None:
    """Return the text of a record or the job's template filled, and the fields for prompts; None if that is blank."""
    labels = job.parameters.get("labels")
    own = {"labels": list_labels(labels)} if labels else {}
    text = read_prompt(job, fields, own)
    if text is None:
        return None
    given = fields.get(field_name(job, "text"))
    return text, {**fields, "text": fields.get("text", given) if "prompt" in job.parameters else given, **own}


def list_labels(labels: Mapping[str, str]) -> str:
    """Return the labels as a prompt lists them: on one line, or on several if some have descriptions."""
    if not any(labels.values()):
        return ", ".join(labels)
    return "\n".join(f"- {label}{description and f': {description}'}" for label, description in labels.items())


def run_head(job: Job, item: Item, model: LocalModel) -> TaskGenerator:
    """Label with a classification head: with its own labels or, if the job has labels, by inference."""
    if job.parameters.get("calibrate"):
        raise UsageError(f"--calibrate cannot be used with {job.model}, a model with a classification head")
    config = model.config
    if labels := job.parameters.get("labels"):
        return (yield from _run_inference(job, item[0], labels, config))
    (output,) = yield ModelCall([{"text": item[0]}])
    # The pipeline text-classification of Transformers chooses alike.
    is_multiple = config.problem_type == "multi_label_classification" or config.num_labels == 1
    scale = list if config.problem_type == "regression" else sigmoid if is_multiple else softmax
    if scale is list and (job.parameters.get("multi_label") or job.parameters.get("min_score") is not None):
        option = "--multi-label" if job.parameters.get("multi_label") else "--min-score"
        raise UsageError(f"{option} cannot be used with {job.model}, whose scores are not probabilities")
    scores = scale([*map(choose_pool(job), zip(*output["logits"], strict=True))])
    return make_result(job, [config.id2label[i] for i in range(len(scores))], scores, output.get("truncated", 0))


def _run_inference(job: Job, text: str, labels: Mapping[str, str], config: "PreTrainedConfig") -> TaskGenerator:
    """Label by what a text entails (zero-shot classification): W. Yin et al., arXiv 1909.00161."""
    ids = {name.lower(): id for id, name in config.id2label.items()}
    entailment = next((id for name, id in ids.items() if name.startswith("entail")), None)
    if entailment is None:
        names = ", ".join(map(str, config.id2label.values()))
        raise UsageError(f"--labels cannot be used with {job.model}, which has its own", hint=f"its labels: {names}")
    contradiction = -1 if entailment == 0 else 0
    hypothesis, pool = job.parameters.get("hypothesis") or HYPOTHESIS, choose_pool(job)
    outputs = yield ModelCall([{"text": text, "pair": hypothesis.replace("{}", label)} for label in labels])
    logits = [output["logits"] for output in outputs]
    if job.parameters.get("multi_label"):
        scores = sigmoid([pool([row[entailment] - row[contradiction] for row in rows]) for rows in logits])
    else:
        scores = softmax([pool([row[entailment] for row in rows]) for rows in logits])
    return make_result(job, [*labels], scores, max(output.get("truncated", 0) for output in outputs))


def run_language_model(job: Job, item: Item, model: LocalModel) -> TaskGenerator:
    """Label with a language model: by the probability of each label as the answer.

    With `calibrate`, each probability is divided by that for an empty record (contextual calibration): T. Zhao et al.,
    Calibrate Before Use, arXiv 2102.09690.
    """
    labels = job.parameters.get("labels")
    if labels is None:
        raise UsageError(f"{job.model} has no labels of its own", hint="pass --labels a,b,c or --labels @FILE")
    if given := next((option for name, option in HEAD_OPTIONS.items() if job.parameters.get(name)), None):
        hint = "use a model with a classification head, such as -m bart-large-mnli"
        raise UsageError(f"{given} cannot be used with {job.model}, a language model", hint=hint)
    template, fields = prompting.prompt_for(job, model), item[1]
    empty = template.render({**dict.fromkeys(fields, ""), "labels": fields["labels"]})
    prompts = [template.render(fields), *[empty] * bool(job.parameters.get("calibrate"))]
    output, *baseline = yield ModelCall([{"prompt": p, "labels": [*labels], "empty": empty} for p in prompts])
    logprobs = output["logprobs"]
    if baseline:
        logprobs = [own - known for own, known in zip(logprobs, baseline[0]["logprobs"], strict=True)]
    return make_result(job, [*labels], softmax(logprobs), output.get("truncated", 0))


def make_result(job: Job, labels: Sequence[str], scores: Sequence[float], truncated: int) -> TaskResult:
    """Return the result of a record from the score of each label."""
    rounded = [*map(round_float32, scores)]
    ranked = sorted(zip(labels, rounded, strict=True), key=itemgetter(1), reverse=True)
    (label, score), minimum = ranked[0], job.parameters.get("min_score")
    shown = None if minimum is not None and score < minimum else label
    output: JsonObject = {
        "label": shown,
        "score": score,
        "scores": [{"label": name, "score": value} for name, value in ranked],
        **({"truncated": truncated} if truncated else {}),
    }
    if not job.parameters.get("multi_label"):
        return TaskResult(output, shown or "")
    chosen = [name for name, value in ranked if value >= (THRESHOLD if minimum is None else minimum)]
    row = io.StringIO()  # a label with a comma is quoted, as --labels takes it
    csv.writer(row, lineterminator="").writerow(chosen)
    return TaskResult({**output, "labels": chosen}, row.getvalue())


def softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def sigmoid(values: Sequence[float]) -> list[float]:
    return [(1 + math.tanh(value / 2)) / 2 for value in values]


def choose_pool(job: Job) -> Callable[[Sequence[float]], float]:
    """Return what makes one logit of those of all windows of a text."""
    return max if job.parameters.get("long") == "max" else fmean


OUTPUTS = ("label", "score", "scores", "truncated")
EMPTY: JsonObject = {"label": None, "score": None, "scores": []}
STRATEGIES = {
    "sequence_classification": Strategy(run_head, parameters=select_parameters("long")),
    "label": Strategy(run_language_model, can_think=False),
}
TASK = Task(prepare, OUTPUTS, EMPTY, STRATEGIES)
