"""The engine of a server that speaks the OpenAI protocol: vLLM, TGI, llama.cpp's, `transformers serve`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from llmcli.engines.engine import TaskEngine
from llmcli.engines.requests import OnText, Request, capture_errors
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import Job
from llmcli.tasks import Strategy
from llmcli.text import stops

RETRIES = 10  # with pauses of 0.5 to 8 seconds, or as long as the server says: about a minute
TIMEOUT = 600  # seconds for an answer
POLL = 0.1  # seconds after which new records are looked for
NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # asking for one asks for sampling
STANDARD = ("max_tokens", "stop", "n", "temperature", "top_p", "seed")  # others are extensions of one server or another


class EndpointEngine(TaskEngine):
    """Sends what steps ask for to the job's server; nothing of it runs here."""

    def check(self, job: Job) -> None:
        if (job.generation.get("num_beams") or 1) > 1:
            raise UsageError("--num-beams does not go with --endpoint: servers do not search")
        if job.truncate:
            raise UsageError("--truncate does not go with --endpoint: the server alone knows how long a text is")

    def find_model(self, job: Job) -> "RemoteModel":
        assert job.endpoint
        return RemoteModel(job.model, server(job.endpoint))

    def make_runner(self, job: Job, strategy: Strategy, model: "RemoteModel") -> "EndpointRunner":
        model.context_length  # noqa: B018  # asks the server, which should be there
        return EndpointRunner(job, strategy, model)

    def local(self) -> TaskEngine:
        from llmcli.engines.local import LocalEngine

        return LocalEngine()


class RemoteModel:
    """What steps know of a model that a server has. It chats; its tokens are estimated."""

    kind = "causal"
    is_chat = True

    def __init__(self, name: str, client: Any) -> None:
        self.name, self.client = name, client

    @property
    def pipeline(self) -> "RemoteModel":
        return self

    @cached_property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer, where the server says it, as vLLM does."""
        mine = (each for each in models(self.client) if each.id == self.name)
        return getattr(next(mine, None), "max_model_len", None)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, at four bytes a token."""
        return -(-len(text.encode("utf-8", "replace")) // 4)

    def count_prompt_tokens(self, prompt: str | Sequence[Mapping[str, str]]) -> int:
        """Tokens of a prompt, or of messages."""
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(self.count_tokens(text) for text in texts)


class EndpointRunner:
    """A job's requests, `concurrency` at a time. Text goes to /completions, messages to /chat/completions."""

    def __init__(self, job: Job, strategy: Strategy, model: RemoteModel) -> None:
        self.queue: set[Request] = set()
        self._model = model
        self._options = options(job, strategy, model)
        self._queued: list[Request] = []
        self._over: SimpleQueue[tuple[Request, Future[Any]]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(job.concurrency)

    def add(self, requests: Sequence[Request]) -> None:
        """They wait for a step."""
        self.queue.update(requests)
        self._queued += requests

    def step(self, on_text: OnText | None = None) -> None:
        """All that wait are sent, as far as there are connections; some are over, or none for a while."""
        queued, self._queued = self._queued, []
        if on_text and len(queued) == 1 and self._options.keys().isdisjoint({"n", "stop"}):
            with capture_errors(queued[0]):
                queued[0].output = self._streamed(queued[0].input, on_text)
            self.queue.discard(queued[0])
            return
        for request in queued:
            sent = self._threads.submit(self._answer, request.input)
            sent.add_done_callback(partial(self._put, request))
        try:
            found = [self._over.get(timeout=POLL)]
        except Empty:
            return
        while not self._over.empty():
            found.append(self._over.get())
        for request, future in found:
            with capture_errors(request):
                request.output = future.result()
            self.queue.discard(request)

    def _put(self, request: Request, future: "Future[Any]") -> None:
        self._over.put((request, future))

    def _answer(self, prompt: Any) -> dict[str, Any]:
        with self._told():
            response = self._create(prompt)
        choices = getattr(response, "choices", None) or []
        if len(choices) < self._options.get("n", 1):
            raise RecordError("invalid_response", f"the server gave {len(choices)} answers")
        texts = [self._cut(choice.text if isinstance(prompt, str) else choice.message.content) for choice in choices]
        several = {"generated_texts": texts} if len(texts) > 1 else {}
        return {"generated_text": texts[0], **several, **_ended(choices[0].finish_reason, response.usage)}

    def _streamed(self, prompt: Any, on_text: OnText) -> dict[str, Any]:
        said, reason, usage = "", None, None
        with self._told():
            for chunk in self._create(prompt, stream=True, stream_options={"include_usage": True}):
                usage = chunk.usage or usage
                for choice in chunk.choices[:1]:
                    piece = (choice.text if isinstance(prompt, str) else choice.delta.content) or ""
                    said, reason = said + piece, choice.finish_reason or reason
                    on_text(piece)
        if reason is None:
            raise RecordError("server_unreachable", "the server broke off its answer")
        return {"generated_text": said, **_ended(reason, usage)}

    def _create(self, prompt: Any, **settings: Any) -> Any:
        client = self._model.client
        if isinstance(prompt, str):
            return client.completions.create(model=self._model.name, prompt=prompt, **self._options, **settings)
        return client.chat.completions.create(model=self._model.name, messages=prompt, **self._options, **settings)

    def _cut(self, text: str | None) -> str:
        """Without a stop text, which some servers leave at the end."""
        text = text or ""
        return text[: stops.first_stop(text, self._options.get("stop", ()))]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong is this record's failure, unless it would be that of all."""
        import openai

        try:
            yield
        except openai.APIStatusError as exc:
            code, why = exc.status_code, f"the server says {exc.status_code}: {_sentence(exc)}"
            is_ill = code >= 500 or code in (408, 409, 429)
            if code in (401, 403):
                raise ModelUnavailableError(why, hint="the key comes from LLMCLI_API_KEY") from exc
            if code == 404:
                raise ModelUnavailableError(
                    why, hint="check -m NAME; without /v1/completions, use `llmcli chat`"
                ) from exc
            raise RecordError("server_error" if is_ill else "request_rejected", why) from exc
        except openai.APIConnectionError as exc:
            models(self._model.client)  # raises where the server is gone, and not this request alone
            why = "did not answer in time" if isinstance(exc, openai.APITimeoutError) else "cut the connection"
            raise RecordError("server_unreachable", f"the server {why}, {RETRIES + 1} times") from exc
        except (openai.OpenAIError, ValueError) as exc:
            raise RecordError("invalid_response", f"the server's answer makes no sense: {exc}") from exc


def options(job: Job, strategy: Strategy, model: RemoteModel) -> dict[str, Any]:
    """The protocol's names for what the user gave, over what the task says. How to sample is the server's to say, where
    neither does."""
    task = {**(strategy.defaults or {}), **strategy.parameters(job, model)}
    if task.get("do_sample"):
        task = {"max_new_tokens": task["max_new_tokens"]}
    given = {**task, **job.generation, **({} if job.seed is None else {"seed": job.seed})}
    if isinstance(given.get("stop_strings"), str):
        given["stop_strings"] = [given["stop_strings"]]
    if given.pop("do_sample", None) is False and job.generation.keys().isdisjoint(SAMPLING):
        given["temperature"] = 0
    named = {NAMES.get(name, name): value for name, value in given.items() if value is not None}
    standard = {name: named.pop(name) for name in STANDARD if name in named}
    return {**standard, **({"extra_body": named} if named else {})}


def server(endpoint: str) -> Any:
    """A client of it. Raises UsageError for what is no URL, and where the openai package is missing."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise UsageError(f"--endpoint takes a URL, not {endpoint!r}", hint="like http://localhost:8000/v1")
    try:
        import openai
    except ImportError as exc:
        raise UsageError("--endpoint needs the openai package", hint="run `pip install 'llmcli[openai]'`") from exc
    theirs = os.environ.get("OPENAI_API_KEY") if url.scheme == "https" else None  # not to be sent in the clear
    return openai.OpenAI(
        base_url=endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}/v1",
        api_key=os.environ.get("LLMCLI_API_KEY") or theirs or "none",
        max_retries=RETRIES,
        timeout=TIMEOUT,
    )


def models(client: Any) -> list[Any]:
    """What the server says it has. Raises LlmcliError where nobody answers."""
    import openai

    try:
        return list(client.with_options(max_retries=2).models.list())
    except openai.APIConnectionError as exc:
        raise ModelUnavailableError(f"{client.base_url} cannot be reached", hint="is the server running?") from exc
    except (openai.OpenAIError, ValueError):
        return []  # not every server tells


def only_model(endpoint: str) -> str:
    """The one that the server has. Raises UsageError where it has another number of them."""
    names: list[str] = [each.id for each in models(server(endpoint))]
    if len(names) != 1:
        about = f"the server has {len(names)} models: {', '.join(names[:5])}" if names else "the server names no model"
        raise UsageError(about, hint="say which: -m NAME")
    return names[0]


def _ended(reason: str | None, usage: Any) -> dict[str, Any]:
    return {
        "finish_reason": "length" if reason == "length" else "stop",
        "usage": {name: getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")},
    }


def _sentence(exc: Any) -> str:
    """What the server says, without the JSON around it."""
    body = exc.body
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), str(body))
    return " ".join(str(body or exc.message).split())[:500]
