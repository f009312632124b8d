"""Inputs through a loaded pipeline, in batches: each gets its output, whatever befalls the others."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmcli.errors import LlmcliError, RecordError
from llmcli.job import Failure, Job
from llmcli.tasks import Way

OnText = Callable[[str], None]
Row = dict[str, Any]


@dataclass(slots=True)
class Request:
    """One input on its way. It may take several rows of a batch, as a long context does."""

    input: Any
    rows: list[Row] = field(default_factory=list)
    done: dict[int, Row] = field(default_factory=dict)
    output: Any = None
    failure: Failure | None = None


class Runner:
    """One job on one loaded pipeline. `parameters` are the pipeline's, for all of its steps."""

    def __init__(self, job: Job, way: Way, pipeline: Any, batch_size: int) -> None:
        self.pipeline, self.batch_size = pipeline, batch_size
        self.truncate: Any = job.truncate
        self.parameters = dict(way.settings(job, pipeline))
        self.takes_rows = inspect.isgeneratorfunction(pipeline.preprocess)

    def run(self, requests: Sequence[Request], on_text: OnText | None = None) -> None:
        """Gives every request its output or failure. `on_text` gets the text of a single request as it comes."""
        before, _, after = self.pipeline._sanitize_parameters(**self.parameters)
        for request in requests:
            with failing(request):
                made = self.pipeline.preprocess(request.input, **{**before, "truncate": self.truncate})
                request.rows = [*made] if self.takes_rows else [made]
        self._rows([(request, i) for request in requests for i in range(len(request.rows))], on_text)
        for request in requests:
            if not request.failure:
                with failing(request):
                    rows = [request.done[i] for i in range(len(request.rows))]
                    request.output = self.pipeline.postprocess(rows if self.takes_rows else rows[0], **after)

    def _rows(self, places: list[tuple[Request, int]], on_text: OnText | None) -> None:
        self._batches(places, {})

    def _batches(self, places: list[tuple[Request, int]], settings: Mapping[str, Any]) -> None:
        """Neighbours of like length share a batch: less padding."""
        places = sorted(places, key=lambda place: -_length(place))
        for start in range(0, len(places), self.batch_size):
            self._batch(places[start : start + self.batch_size], settings)

    def _batch(self, places: list[tuple[Request, int]], settings: Mapping[str, Any]) -> None:
        """One forward pass for all, but where it fails one for each."""
        if len(places) == 1:
            with failing(places[0][0]):
                self._forward(places, settings)
            return
        try:
            self._forward(places, settings)
        except LlmcliError:
            raise
        except Exception:  # one record must not take the others with it
            failed = True
        else:
            failed = False
        if failed:  # out here, where the exception holds no memory of the failed pass any more
            for place in places:
                self._batch([place], settings)

    def _forward(self, places: list[tuple[Request, int]], settings: Mapping[str, Any]) -> None:
        from transformers.pipelines.base import pad_collate_fn

        batch = pad_collate_fn(self.pipeline.tokenizer, None)([request.rows[i] for request, i in places])
        outputs = self.pipeline.forward(batch, **settings)
        for row, (request, i) in enumerate(places):
            request.done[i] = {name: value[row : row + 1] if hasattr(value, "shape") else value[row]
                               for name, value in outputs.items()}  # fmt: skip


class GeneratingRunner(Runner):
    """A job that generates text: as the merged GenerationConfig says, and within the model's context."""

    def __init__(self, job: Job, way: Way, pipeline: Any, batch_size: int) -> None:
        super().__init__(job, way, pipeline, batch_size)
        from transformers import set_seed

        from llmcli import generation

        assert way.defaults is not None
        self.config = generation.merge(
            pipeline.model.generation_config,
            job.generation,
            way.defaults,
            self.parameters,
            counts_prompt=not pipeline.model.config.is_encoder_decoder,
        )
        if self.config.pad_token_id is None:
            self.config.pad_token_id = pipeline.tokenizer.pad_token_id
        self.parameters = {"generation_config": self.config}
        self.truncate = (self.config.max_new_tokens or 0) if job.truncate else None
        if job.seed is not None:
            set_seed(job.seed)

    def _rows(self, places: list[tuple[Request, int]], on_text: OnText | None) -> None:
        """Together, but those whose answer must stop where the model's context ends, each length apart."""
        streamer = self._streamer(places[0], on_text) if on_text and len(places) == 1 else None
        by_room: dict[int | None, list[tuple[Request, int]]] = {}
        for place in places:
            by_room.setdefault(self._room(place), []).append(place)
        for room, some in by_room.items():
            config = self.config
            if room is not None:
                config = copy.deepcopy(config)
                config.max_new_tokens, config.max_length = room, None
            self._batches(some, {"generation_config": config, **({"streamer": streamer} if streamer else {})})

    def _room(self, place: tuple[Request, int]) -> int | None:
        """Tokens left for the answer in the model's context, if that is fewer than asked for."""
        request, i = place
        room: int | None = self.pipeline.room(request.rows[i])
        most = self.config.max_new_tokens or self.config.max_length
        return room if room is not None and most is not None and room < most else None

    def _streamer(self, place: tuple[Request, int], on_text: OnText) -> Any:
        """None where tokens do not come one by one: beams, or several sequences at once."""
        from llmcli.pipelines.answers import Deltas

        if (self.config.num_beams or 1) > 1 or (self.config.num_return_sequences or 1) > 1:
            return None
        request, i = place
        return Deltas(self.pipeline.decoder(request.rows[i]), self.config.stop_strings or (), on_text)


@contextmanager
def failing(request: Request) -> Iterator[None]:
    """Whatever goes wrong here is this request's failure; but not what is wrong with the job."""
    try:
        yield
    except RecordError as problem:
        request.failure = failure(problem)
    except LlmcliError:
        raise
    except Exception as problem:
        request.failure = Failure("failed", f"{type(problem).__name__}: {str(problem).strip() or 'no reason given'}")


def failure(problem: RecordError) -> Failure:
    """In one sentence."""
    return Failure(problem.kind, f"{problem.message}: {problem.hint}" if problem.hint else problem.message)


def _length(place: tuple[Request, int]) -> int:
    request, i = place
    return int(request.rows[i]["input_ids"].shape[1])
