"""tag: find names, places and other entities in a text."""

from llmcli.job import Job
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskModel, TaskResult, select_parameters
from llmcli.tasks.fields import read_prompt


def run(job: Job, text: str, model: TaskModel) -> TaskGenerator:
    """Find the entities; text mode prints one line for each."""
    (entities,) = yield ModelCall([text])
    lines = []
    for entity in entities:
        span = text[entity["start"] : entity["end"]]  # Some tokenizers count the space before a word as a part of it.
        start = entity["end"] - len(span.lstrip())
        label = entity.get("entity_group") or entity["entity"]
        if span.strip():
            lines.append(f"{' '.join(span.split())}\t{label}\t{start}-{start + len(span.strip())}")
    return TaskResult({"entities": entities}, "\n".join(lines))


STRATEGIES = {"token_classification": Strategy(run, parameters=select_parameters("aggregation"))}
TASK = Task(read_prompt, ("entities",), {"entities": []}, STRATEGIES)
