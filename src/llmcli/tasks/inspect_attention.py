"""inspect attention: compute the attention weights between the tokens of a text."""

from llmcli.tasks import Strategy, Task, passthrough, select_parameters
from llmcli.tasks.fields import read_text

OUTPUTS = ("tokens", "attention", "layers", "heads")
STRATEGY = Strategy(passthrough, parameters=select_parameters("layer", "head"))
TASK = Task(read_text, OUTPUTS, {}, {"causal_attention": STRATEGY, "attention": STRATEGY})
