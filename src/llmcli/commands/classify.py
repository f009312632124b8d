"""llmcli classify: label each text."""

import csv
from dataclasses import replace
from typing import Annotated, Literal

from typer import Option

from llmcli.errors import ExitStatus, UsageError, reason
from llmcli.job import Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, Prompt, Texts, expand_options
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters

MAX_LABELS = 1000


@expand_options
def classify(
    texts: Texts,
    labels: Annotated[str | None, Option("--labels", metavar="LIST|@FILE",
        help="Labels, separated by commas, or a file of labels.")] = None,
    multi_label: Annotated[bool, Option("--multi-label", help="List all labels that apply.")] = False,
    min_score: Annotated[float | None, Option(metavar="X", min=0, max=1,
        help="Leave the label empty if its score is below X.")] = None,
    calibrate: Annotated[bool, Option("--calibrate",
        help="Divide by the probabilities for an empty text.")] = False,
    hypothesis: Annotated[str | None, Option(metavar="TEMPLATE",
        help='Hypothesis of NLI models (default: "This example is {}.").')] = None,
    long: Annotated[Literal["truncate", "mean", "max"] | None, Option(
        help="How classification heads read long texts.")] = None,
    prompt: Prompt = None,
    truncate: Annotated[bool, Option("--truncate", help="Truncate inputs longer than the context length.")] = False,
    *, input: InputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Label each text.

    A language model requires --labels; so does an NLI model (natural language inference). Other classification models
    have labels of their own. Text mode prints the label alone; --json adds the score of each label.

    FILE of --labels has one label per line, with or without a description: "label: description".

    \b
    llmcli classify --labels positive,negative "What a lovely day."
    llmcli classify --labels @topics.txt --lines -f headlines.txt
    llmcli classify -m distilbert-sst2 --jsonl < reviews.jsonl
    llmcli classify -m bart-large-mnli --labels sport,politics --csv < news.csv
    """
    known = None if labels is None else _read_labels(labels)
    for option, is_given in (("--calibrate", calibrate), ("--hypothesis", hypothesis is not None)):
        if is_given and known is None:
            raise UsageError(f"{option} requires --labels")
    if hypothesis is not None and hypothesis.count("{}") != 1:
        raise UsageError("--hypothesis requires one {} for the label", hint='e.g. "This text is about {}."')
    parameters: dict[str, object] = {
        "fields": input.roles("text"), "labels": known, "multi_label": multi_label, "min_score": min_score,
        "calibrate": calibrate, "hypothesis": hypothesis, "long": long,
    }  # fmt: skip
    spec = output.spec(input, texts)
    job = model.job("classify", {**parameters, **build_prompt_parameters(prompt)}, truncate=truncate)
    return run(job, input.read(texts), replace(spec, finish=_add_labels) if multi_label else spec)


def _read_labels(value: str) -> dict[str, str]:
    """Return the labels of --labels with their descriptions, which are empty if there are none."""
    if value.startswith("@"):
        try:
            with open(value[1:], encoding="utf-8-sig") as file:
                lines = file.read().split("\n")
        except OSError as exc:
            hint = "quote a label that starts with @: --labels '\"@a\",b'"
            raise UsageError(f"--labels: {value}: {reason(exc)}", hint) from exc
        except UnicodeDecodeError as exc:
            raise UsageError(f"--labels: {value} is not UTF-8") from exc
        parts = [f"{line.strip()} ".partition(": ") for line in lines if line.strip()]
        rows = [(label.strip(), description.strip()) for label, _, description in parts]
    else:
        try:
            (row,) = csv.reader([value], skipinitialspace=True, strict=True)
        except csv.Error as exc:
            hint = "quote a label that has a comma, a quote or a line break: '\"a, b\",c'"
            raise UsageError(f"--labels: expected a row of CSV, got {value[:60]!r}", hint) from exc
        rows = [(label.strip(), "") for label in row]
    names = [label for label, _ in rows]
    if not 2 <= len(names) <= MAX_LABELS:
        many = "each record is compared with every label"
        hint = many if len(names) > 1 else "separate labels with commas: --labels a,b,c"
        raise UsageError(f"--labels: expected 2 to {MAX_LABELS} labels, got {len(names)}", hint)
    if "" in names:
        raise UsageError("--labels: label is empty")
    if len(set(names)) < len(names):
        raise UsageError(f"--labels: duplicate label {max(names, key=names.count)!r}")
    return dict(rows)


def _add_labels(result: Result) -> list[Result]:
    """Return a result with `labels`, which that of a blank text lacks."""
    if not result.output:
        return [result]
    return [replace(result, output={**result.output, "labels": result.output.get("labels", [])})]
