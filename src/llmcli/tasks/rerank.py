"""rerank: score how relevant a text is to the query of the job."""

from llmcli.tasks import Strategy, Task, passthrough, select_parameters
from llmcli.tasks.fields import read_prompt

OUTPUTS = ("rank", "score", "truncated")  # The command, which has all scores, adds the rank.
STRATEGY = Strategy(passthrough, parameters=select_parameters("query"))
TASK = Task(read_prompt, OUTPUTS, {"rank": None, "score": None}, {"reranking": STRATEGY})
