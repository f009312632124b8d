"""The engine of an OpenAI-compatible server: vLLM, TGI, llama.cpp, `transformers serve`."""

import copy
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.engines.engine import TaskEngine
from llmcli.engines.requests import OnText, Request, RequestSettings, capture_errors
from llmcli.engines.servers import MAX_RETRIES, error_text, forward, list_models, make_client, translated_errors
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

POLL_S = 0.1  # after which the engine looks for new records
RETRIES_BEFORE_OTHER = 3  # of a request that another server can get: a few seconds
TEMPORARY = ("server_error", "server_unreachable")  # failures that another server may not have
BYTES_PER_TOKEN = 4  # an estimate
PROTOCOL_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop",
                  "num_return_sequences": "n"}  # fmt: skip
SWITCHABLE = ("vllm", "sglang", "llamacpp")  # who owns the models of servers that accept chat_template_kwargs


class EndpointEngine(TaskEngine):
    """Sends model calls to the job's servers. Nothing of the model runs here."""

    def find_model(self, job: Job) -> "RemoteModel":
        if (job.generation.get("num_beams") or 1) > 1:
            raise UsageError("--num-beams is not supported with --endpoint")
        if job.truncate:
            raise UsageError("--truncate is not supported with --endpoint: only the server can count tokens")
        return RemoteModel(job.model, [make_client(endpoint) for endpoint in job.endpoint])

    def make_runner(self, job: Job, strategy: Strategy, model: "RemoteModel") -> "EndpointRunner":
        _ = model.entry  # raises if no server can be reached
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

    def __init__(self, name: str, servers: "list[OpenAI]") -> None:
        self.name, self.servers = name, servers

    @property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and answer, if the server reports it, as vLLM does."""
        return getattr(self.entry, "max_model_len", None)

    @cached_property
    def entry(self) -> "Model | None":
        """The model as a server lists it. Raises ModelUnavailableError if no server can be reached."""
        models: list[Model] = []
        for server in [*self.servers]:
            try:
                models += list_models(server)
            except ModelUnavailableError as exc:
                self.leave_out(server, exc)
        return next((model for model in models if model.id == self.name), None)

    def leave_out(self, server: "OpenAI", error: ModelUnavailableError) -> None:
        """Send no more requests to a server. Raises the error if it is the last one."""
        if server not in self.servers:
            return
        self.servers.remove(server)
        if not self.servers:
            raise error
        console.warning(f"{server.base_url} is left out: {error.message}")

    def count_tokens(self, text: str) -> int:
        return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(self.count_tokens(text) for text in texts)


class EndpointRunner:
    """Sends a job's requests, `concurrency` at a time to each server: text to /completions, messages to
    /chat/completions."""

    def __init__(self, job: Job, strategy: Strategy, model: RemoteModel) -> None:
        self.queue: set[Request] = set()
        capacity = job.concurrency * len(model.servers)
        self.window = 2 * capacity
        self._model, self._strategy, self._can_think = model, strategy, strategy.can_think
        self._thoughts = Thoughts(ALL_MARKS, is_sure=not self._can_think, can_think=self._can_think)
        self._use(job)
        self._unsent: deque[Request] = deque()
        self._sent: dict[Future[JsonObject], tuple[Request, OpenAI]] = {}
        self._busy: Counter[OpenAI] = Counter()  # number of requests
        self._failed_at: dict[Request, OpenAI] = {}  # requests that another server may answer
        self._finished: SimpleQueue[Future[JsonObject]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(capacity)

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
        can_stream = self._can_think and self._options.keys().isdisjoint({"n", "stop"}) and self._job.logprobs is None
        if on_text and len(self._unsent) == 1 and can_stream and not self._unsent[0].settings:
            request, shown = self._unsent.popleft(), list[str]()

            def show(text: str) -> None:
                shown.append(text)
                on_text(text)

            try:
                with capture_errors(request):
                    request.output = self._stream(request.input, show)
            except ModelUnavailableError as exc:
                if shown:
                    raise
                self._model.leave_out(self._model.servers[0], exc)
                self._unsent.appendleft(request)
                return []
            self.queue.discard(request)
            return [request]
        finished = list[Request]()
        limit = self._job.concurrency
        while self._unsent and (free := [server for server in self._model.servers if self._busy[server] < limit]):
            request = self._unsent.popleft()
            failed_at = self._failed_at.get(request)
            server = min(free, key=lambda server: (server is failed_at, self._busy[server]))
            retries = MAX_RETRIES if failed_at or len(self._model.servers) == 1 else RETRIES_BEFORE_OTHER
            with capture_errors(request):
                answer = self._threads.submit(self._with(request.settings)._complete, request.input, server, retries)
                self._busy[server] += 1
                self._sent[answer] = request, server
                answer.add_done_callback(self._finished.put)
            finished += [request] if request.failure else []
        with suppress(Empty):
            answer = self._finished.get(timeout=POLL_S)
            while True:
                finished += self._receive(answer)
                answer = self._finished.get_nowait()
        self.queue.difference_update(finished)
        return finished

    def _receive(self, answer: Future[JsonObject]) -> list[Request]:
        """Return the request of an answer; if another server may answer it, queue it again instead."""
        request, server = self._sent.pop(answer)
        self._busy[server] -= 1
        try:
            with capture_errors(request):
                request.output = answer.result()
        except ModelUnavailableError as exc:
            self._model.leave_out(server, exc)
        else:
            is_temporary = request.failure and request.failure.type in TEMPORARY
            if not is_temporary or len(self._model.servers) == 1 or request in self._failed_at:
                self._failed_at.pop(request, None)
                return [request]
            self._failed_at[request], request.failure = server, None
        self._unsent.appendleft(request)
        return []

    def _complete(self, prompt: Prompt | dict[str, Any], server: "OpenAI", retries: int) -> JsonObject:
        client = server.with_options(max_retries=retries)
        with translated_errors(client):
            if isinstance(prompt, dict):  # a request of a batch file
                own = protocol_options(self._job, Strategy(self._strategy.run), self._model)
                return forward(client, prompt["url"], {**own, **prompt["body"], "model": self._model.name})
            response = self._send(client, prompt)
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
        server = self._model.servers[0]
        with translated_errors(server):
            for chunk in self._send(server, prompt, stream=True, stream_options={"include_usage": True}):
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

    def _send(self, client: "OpenAI", prompt: Prompt, **options: object) -> Any:
        field = "prompt" if isinstance(prompt, str) else "messages"
        settings = dict(self._options)
        if (number := self._job.logprobs) is not None:
            settings |= {"logprobs": number} if field == "prompt" else {"logprobs": True, "top_logprobs": number}
        api: Any = client if field == "prompt" else client.chat
        options |= {"model": self._model.name, field: prompt}
        return api.completions.create(**options, extra_body=settings)  # Servers extend the protocol as they like.


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
    owner = model.entry.owned_by if model.entry else ""
    if job.constraint:
        named |= constraint_options(job.constraint, owner)
    variables: dict[str, object] = {}
    if job.think is not None or (owner in SWITCHABLE and (job.constraint or not strategy.can_think)):
        variables = dict.fromkeys(("enable_thinking", "thinking"), bool(job.think))
    if variables := {**variables, **job.template_options}:
        named["chat_template_kwargs"] = variables
    return named


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
