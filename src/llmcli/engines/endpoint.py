"""The engine of an OpenAI-compatible server: vLLM, TGI, llama.cpp, `transformers serve`."""

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmcli import console
from llmcli.engines.engine import TaskEngine
from llmcli.engines.forwarding import error_text, forward
from llmcli.engines.requests import OnText, Request, RequestSettings, capture_errors
from llmcli.engines.structured import check_answer, constraint_options, read_logprobs, read_text, read_thought
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import Job, JsonObject
from llmcli.models import generation
from llmcli.tasks import Prompt, Strategy
from llmcli.text.splitting import first_stop
from llmcli.text.thoughts import ALL_MARKS, ThoughtFilter, Thoughts

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import CompletionUsage, Model

MAX_RETRIES = 10  # with pauses of 0.5 to 8 seconds, or as long as the server says: about a minute
TIMEOUT_S = 600  # for an answer
POLL_S = 0.1  # after which the engine looks for new records
BYTES_PER_TOKEN = 4  # an estimate
PROTOCOL_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop",
                  "num_return_sequences": "n"}  # fmt: skip
SWITCHABLE = ("vllm", "sglang", "llamacpp")  # who owns the models of servers that accept chat_template_kwargs


class EndpointEngine(TaskEngine):
    """Sends model calls to the job's server. Nothing of the model runs here."""

    def find_model(self, job: Job) -> "RemoteModel":
        assert job.endpoint
        if (job.generation.get("num_beams") or 1) > 1:
            raise UsageError("--num-beams is not supported with --endpoint")
        if job.truncate:
            raise UsageError("--truncate is not supported with --endpoint: only the server can count tokens")
        return RemoteModel(job.model, make_client(job.endpoint))

    def make_runner(self, job: Job, strategy: Strategy, model: "RemoteModel") -> "EndpointRunner":
        _ = model.models  # raises if the server cannot be reached
        try:
            return EndpointRunner(job, strategy, model)
        except RecordError as exc:  # what would be wrong with every record
            raise UsageError(exc.message, exc.hint) from exc

    def local(self) -> TaskEngine:
        from llmcli.engines.local import LocalEngine

        return LocalEngine()


class RemoteModel:
    """A server's model as tasks see it: it chats, and its tokens are estimated."""

    kind = "causal"
    is_chat = True

    def __init__(self, name: str, client: "OpenAI") -> None:
        self.name, self.client = name, client

    @property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and answer, if the server reports it, as vLLM does."""
        model = next((model for model in self.models if model.id == self.name), None)
        return getattr(model, "max_model_len", None)

    @cached_property
    def models(self) -> "list[Model]":
        return list_models(self.client)

    def count_tokens(self, text: str) -> int:
        return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(self.count_tokens(text) for text in texts)


class EndpointRunner:
    """Sends a job's requests, `concurrency` at a time: text to /completions, messages to /chat/completions."""

    def __init__(self, job: Job, strategy: Strategy, model: RemoteModel) -> None:
        self.queue: set[Request] = set()
        self.window = 2 * job.concurrency
        self._model, self._strategy, self._can_think = model, strategy, strategy.can_think
        self._thoughts = Thoughts(ALL_MARKS, is_sure=not self._can_think, can_think=self._can_think)
        self._use(job)
        self._unsent: list[Request] = []
        self._sent: dict[Future[JsonObject], Request] = {}
        self._finished: SimpleQueue[Future[JsonObject]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(job.concurrency)

    def _use(self, job: Job) -> None:
        self._job, self._options = job, protocol_options(job, self._strategy, self._model)
        self._stop = self._options.get("stop", ())
        if not self._can_think and "stop_strings" not in job.generation:
            self._options.pop("stop", None)  # A thought must not end there.

    def _with(self, own: RequestSettings | None) -> "EndpointRunner":
        """Return a runner that sends a request with settings of its own."""
        if not own:
            return self
        runner, seed = copy.copy(self), self._job.seed if own.seed is None else own.seed
        given = generation.override(self._job.generation, own.generation)
        runner._use(replace(self._job, generation=given, seed=seed, constraint=own.constraint))
        return runner

    def add(self, requests: Sequence[Request]) -> None:
        self.queue.update(requests)
        self._unsent += requests

    def step(self, on_text: OnText | None = None) -> list[Request]:
        """Send the requests that are queued, and return those whose answers have arrived, if any soon do."""
        requests, self._unsent = self._unsent, []
        can_stream = self._can_think and self._options.keys().isdisjoint({"n", "stop"}) and self._job.logprobs is None
        if on_text and len(requests) == 1 and can_stream and not requests[0].settings:
            with capture_errors(requests[0]):
                requests[0].output = self._stream(requests[0].input, on_text)
            self.queue.discard(requests[0])
            return requests
        for request in requests:
            with capture_errors(request):
                answer = self._threads.submit(self._with(request.settings)._complete, request.input)
                self._sent[answer] = request
                answer.add_done_callback(self._finished.put)
        finished = [request for request in requests if request.failure]
        with suppress(Empty):
            answer = self._finished.get(timeout=POLL_S)
            while True:
                request = self._sent.pop(answer)
                with capture_errors(request):
                    request.output = answer.result()
                finished.append(request)
                answer = self._finished.get_nowait()
        self.queue.difference_update(finished)
        return finished

    def _complete(self, prompt: Prompt | dict[str, Any]) -> JsonObject:
        with self._translated_errors():
            if isinstance(prompt, dict):  # a request of a batch file
                own = protocol_options(self._job, Strategy(self._strategy.run), self._model)
                return forward(self._model.client, prompt["url"], {**own, **prompt["body"], "model": self._model.name})
            response = self._send(prompt)
            choices = response.choices or []
            if len(choices) < self._options.get("n", 1):
                message = f"server returned {len(choices)} answers: {error_text(response.to_dict())}"
                raise RecordError("invalid_response", message)
            answers = [self._read_answer(choice, prompt) for choice in choices]
            several = {"generated_texts": [text for text, *_ in answers]} if len(answers) > 1 else {}
            logprobs = {} if self._job.logprobs is None else read_logprobs(choices[0])
            return {**_make_output(*answers[0], response.usage), **several, **logprobs}

    def _stream(self, prompt: Prompt, on_text: OnText) -> JsonObject:
        pieces, thoughts, reason, usage = list[str](), "", None, None
        answer = ThoughtFilter(None if isinstance(prompt, str) else self._thoughts)
        with self._translated_errors():
            for chunk in self._send(prompt, stream=True, stream_options={"include_usage": True}):
                usage = chunk.usage or usage
                for choice in (chunk.choices or [])[:1]:
                    reason = choice.finish_reason or reason
                    if thought := read_thought(choice):
                        thoughts, answer = thoughts + thought, ThoughtFilter(None)
                        console.show_thought(thought)
                    if (piece := read_text(choice)) is not None:
                        piece = piece.lstrip() if thoughts and not any(pieces) else piece
                        pieces.append(piece)
                        if shown := answer.feed(piece):
                            on_text(shown)
        if reason is None:
            raise RecordError("server_unreachable", "server stopped in the middle of an answer")
        return _make_output(*self._split("".join(pieces) if pieces else None, thoughts, reason, prompt), usage)

    def _read_answer(self, choice: Any, prompt: Prompt) -> tuple[str, str, str]:
        if refusal := getattr(getattr(choice, "message", None), "refusal", None):
            raise RecordError("missing_answer", f"server refused to answer: {refusal}")
        text, thoughts, reason = self._split(read_text(choice), read_thought(choice), choice.finish_reason, prompt)
        if self._job.constraint:
            check_answer(self._job.constraint, text, reason)
        return text[: first_stop(text, self._stop)], thoughts, reason  # Some servers leave it at the end.

    def _split(self, text: str | None, thoughts: str, reason: str | None, prompt: Prompt) -> tuple[str, str, str]:
        """Return answer, thoughts and finish reason, of which the server may have split off the thoughts."""
        if thoughts and not text and self._can_think and reason in ("stop", "length"):
            return "", thoughts, "length"
        text = _check_text(text, reason)
        if thoughts or isinstance(prompt, str):
            return text.lstrip() if thoughts else text, thoughts, reason or ""
        return self._thoughts.split(text if self._can_think else text.lstrip(), reason or "")

    def _send(self, prompt: Prompt, **options: object) -> Any:
        field = "prompt" if isinstance(prompt, str) else "messages"
        settings = dict(self._options)
        if (number := self._job.logprobs) is not None:
            settings |= {"logprobs": number} if field == "prompt" else {"logprobs": True, "top_logprobs": number}
        client: Any = self._model.client if field == "prompt" else self._model.client.chat
        options |= {"model": self._model.name, field: prompt}
        return client.completions.create(**options, extra_body=settings)  # Servers extend the protocol as they like.

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise RecordError for what is wrong with one request, ModelUnavailableError for what is wrong with all."""
        import openai

        try:
            yield
        except openai.APIStatusError as exc:
            code = exc.status_code
            message = f"server returned HTTP {code}: {error_text(exc.body or exc.message)}"
            if code in (401, 403):
                raise ModelUnavailableError(message, hint="set LLMCLI_API_KEY to the server's key") from exc
            if code == 404:
                hint = "check -m NAME; if the server lacks /v1/completions, use `llmcli chat`"
                raise ModelUnavailableError(message, hint) from exc
            is_temporary = code >= 500 or code in (408, 409, 429)
            raise RecordError("server_error" if is_temporary else "request_rejected", message) from exc
        except openai.APIConnectionError as exc:
            list_models(self._model.client)  # raises if the server cannot be reached at all
            what = "timed out" if isinstance(exc, openai.APITimeoutError) else "closed the connection"
            raise RecordError("server_unreachable", f"server {what} after {MAX_RETRIES + 1} attempts") from exc
        except (openai.OpenAIError, ValueError) as exc:
            raise RecordError("invalid_response", f"invalid response from server: {exc}") from exc
        except (AttributeError, TypeError) as exc:
            raise RecordError("invalid_response", "invalid response from server: not as in the protocol") from exc


def protocol_options(job: Job, strategy: Strategy, model: RemoteModel) -> dict[str, Any]:
    """Return the options of a job under the protocol's names: the user's over the task's."""
    task = {**(strategy.defaults or {}), **strategy.parameters(job, model)}
    if task.get("do_sample"):  # The server decides how.
        task = {"max_new_tokens": task["max_new_tokens"]}
    if job.constraint:
        task.pop("stop_strings", None)  # It may be a part of the answer.
    options = {**task, **job.generation, **({} if job.seed is None else {"seed": job.seed})}
    if isinstance(options.get("stop_strings"), str):
        options["stop_strings"] = [options["stop_strings"]]
    if options.pop("do_sample", None) is False and job.generation.keys().isdisjoint(generation.SAMPLING):
        options["temperature"] = 0
    named = {PROTOCOL_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    owner = next((item.owned_by for item in model.models if item.id == model.name), "")
    if job.constraint:
        named |= constraint_options(job.constraint, owner)
    variables: dict[str, object] = {}
    if job.think is not None or (owner in SWITCHABLE and (job.constraint or not strategy.can_think)):
        variables = dict.fromkeys(("enable_thinking", "thinking"), bool(job.think))
    if variables := {**variables, **job.template_options}:
        named["chat_template_kwargs"] = variables
    return named


def make_client(endpoint: str) -> "OpenAI":
    """Return a client of a server. Raises UsageError for an invalid URL, or if the openai package is missing."""
    try:
        url = urlsplit(endpoint)
    except ValueError:  # brackets without an IPv6 address
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.netloc:
        raise UsageError(f"invalid --endpoint {endpoint!r}: expected a URL", hint="e.g. http://localhost:8000/v1")
    try:
        import jsonschema  # noqa: F401  # needed for answers to schemas
        import openai
    except ImportError as exc:
        hint = "run `pip install 'llmcli[openai]'`"
        raise UsageError(f"--endpoint requires the {exc.name} package", hint) from exc
    openai_key = os.environ.get("OPENAI_API_KEY") if url.scheme == "https" else None  # not to be sent unencrypted
    key = os.environ.get("LLMCLI_API_KEY") or openai_key or "none"
    base_url = endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}/v1"
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=MAX_RETRIES, timeout=TIMEOUT_S)


def list_models(client: "OpenAI") -> "list[Model]":
    """Return the server's models, if it lists them. Raises ModelUnavailableError if the server is unreachable."""
    import openai

    try:
        return list(client.with_options(max_retries=2).models.list())
    except openai.APIConnectionError as exc:
        raise ModelUnavailableError(f"cannot reach {client.base_url}", hint="check that the server is running") from exc
    except (openai.OpenAIError, ValueError):
        return []


def only_model(endpoint: str) -> str:
    """Return the name of the server's only model. Raises UsageError if it has none or several."""
    names = [model.id for model in list_models(make_client(endpoint))]
    if len(names) != 1:
        several = f"the server has {len(names)} models: {', '.join(names[:5])}"
        raise UsageError(several if names else "the server lists no model", hint="choose one with -m NAME")
    return names[0]


def _check_text(text: str | None, finish_reason: str | None) -> str:
    if text is None or finish_reason == "content_filter" or (not text and finish_reason == "length"):
        hint = "increase --max-new-tokens" if finish_reason == "length" else None
        raise RecordError("missing_answer", f"server returned no answer (finish_reason: {finish_reason})", hint)
    return text


def _make_output(text: str, thoughts: str, reason: str, usage: "CompletionUsage | None") -> JsonObject:
    tokens = {name: getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")}
    reasoning = {"reasoning": thoughts.strip()} if thoughts.strip() else {}
    end = {"finish_reason": "length" if reason == "length" else "stop", "usage": tokens}
    return {"generated_text": text, **reasoning, **end}
