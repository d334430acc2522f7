"""What every backend takes and gives; `tests/contracts/test_backends.py` says what is asked of each.

A backend answers prompts. It knows neither Ray, nor retries, nor where answers are stored: `ladder.py` retries,
`pool.py` places and replaces, `work.py` stores.

Requests stream: `submit` hands one in, `collect` gives what is answered by now, in any order. An engine that batches
continuously so never waits for the slowest answer of a batch. A backend that answers a batch at a time only writes
`generate`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import DistributedMIError, StageError
from distributed_mi.interests.history import Exemplar, HistoryItem

logger = logging.getLogger(__name__)


class BackendDeadError(DistributedMIError):
    """The backend cannot answer anything any more and has to be started anew."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        exemplar: whose interests are asked for, with the items that stand in the prompt.
        prompt: text of the user message.
        max_answer_tokens: tokens the answer may have.
        prefix: what the answer begins with already; the response holds only what follows. For backends that
            `can_continue`.
    """

    exemplar: Exemplar
    prompt: str
    max_answer_tokens: int
    prefix: str = ""

    @property
    def user_index(self) -> int:
        """Which exemplar."""
        return self.exemplar.user_index


@dataclass(frozen=True)
class Response:
    """What came of one request: a text, or an error that concerns this request alone."""

    user_index: int
    text: str = ""
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    num_cached_tokens: int = 0
    """Tokens of the prompt that the backend did not have to read again (prefix cache)."""
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str | None = None


@dataclass(frozen=True)
class BackendContext:
    """What a backend is told of the run.

    Args:
        answer_schema: JSON schema that an answer must satisfy.
        max_interests: interests in an answer.
        max_interest_chars: characters of one interest's text.
        catalogue: every item, for backends with `uses_catalogue`; else empty.
    """

    answer_schema: dict[str, Any]
    max_interests: int
    max_interest_chars: int
    catalogue: Sequence[HistoryItem] = field(default=(), repr=False)


def estimate_tokens(text: str) -> int:
    """Tokens of a text for want of a tokenizer, rather too many: a token of English titles has about four bytes."""
    return -(-len(text.encode()) // 3)


class Backend(ABC):
    """Base of every backend. A file exports its subclass as `BACKEND`."""

    Config: ClassVar[type[ConfigModel]]
    in_process: ClassVar[bool] = False
    """Cheap enough to run in the driver; then no Ray is started."""
    uses_catalogue: ClassVar[bool] = False
    """Whether `BackendContext.catalogue` must be filled."""
    cacheable: ClassVar[bool] = True
    """Whether an answer costs more than looking it up."""
    can_continue: ClassVar[bool] = False
    """Whether it can go on from a truncated answer (`Request.prefix`)."""

    def __init__(self, config: Any, context: BackendContext) -> None:
        self.config = config
        self.context = context
        self._held: list[Request] = []

    @classmethod
    @abstractmethod
    def model_of(cls, config: Any) -> str:
        """Name and version of what answers, as stored beside every answer. Known without loading it."""

    @classmethod
    def identity_of(cls, config: Any) -> dict[str, Any]:
        """What decides an answer besides prompt and schema: model, its files, sampling. Goes into the prompt hash."""
        return {
            "backend": cls.__name__,
            "model": cls.model_of(config),
            "config": config.result_fields(),
            "files": cls.fingerprint(config),
        }

    @property
    def model_id(self) -> str:
        """`model_of` this backend's configuration."""
        return self.model_of(self.config)

    @property
    def identity(self) -> dict[str, Any]:
        """`identity_of` this backend's configuration."""
        return self.identity_of(self.config)

    @property
    def window(self) -> int:
        """Requests that it should hold at a time so that it never idles."""
        return 64

    def submit(self, request: Request) -> None:
        """Take in one request; it may be worked on at once. No other request of the same user is held."""
        self._held.append(request)

    def collect(self) -> list[Response]:
        """Wait until at least one request that is held is answered, and give up all that are; [] when none is held.

        What the backend cannot answer gets a `Response` with `error`; no exception concerns a single request.

        Raises:
            BackendDeadError: nothing more can be answered by this instance; what is held is lost.
        """
        held, self._held = self._held, []
        return self._answer_or_halve(held) if held else []

    def _answer_or_halve(self, requests: Sequence[Request]) -> list[Response]:
        """`generate`; after an exception each half, so that one bad prompt fails alone."""
        try:
            responses = self.generate(requests)
        except BackendDeadError:
            raise
        except Exception as error:
            name = type(self).__name__
            if len(requests) == 1:
                user = requests[0].user_index
                logger.warning("%s failed on user %d: %r", name, user, error)
                return [Response(user, finish_reason="error", error=repr(error))]
            logger.warning("%s failed on %d prompts, halving: %r", name, len(requests), error)
            middle = len(requests) // 2
            return self._answer_or_halve(requests[:middle]) + self._answer_or_halve(requests[middle:])
        if [r.user_index for r in responses] != [r.user_index for r in requests]:
            raise StageError(
                f"{type(self).__name__} did not answer each of {len(requests)} requests exactly once and in order "
                f"({len(responses)} responses). This is an error in the backend."
            )
        return responses

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request exactly once, in order.

        A request that cannot be answered gets a `Response` with `error`. An exception means that none was answered; the
        caller then tries smaller groups, so that one bad prompt fails alone.

        Raises:
            BackendDeadError: nothing more can be answered by this instance.
        """

    @classmethod
    def fingerprint(cls, config: Any) -> Any:
        """JSON-ready identity of local model files, so that new weights under an old name redo the stage; else None."""
        return None

    @classmethod
    def token_counter(cls, config: Any) -> Callable[[str], int] | None:
        """Counts the tokens of a prompt as the model will read it, without loading the model; None: unknown."""
        return None

    @classmethod
    def ray_actor_options(cls, config: Any) -> dict[str, Any]:
        """Resources of one actor, as `ray.remote` takes them."""
        return {"num_cpus": 1}

    @classmethod
    def runtime_env(cls, config: Any) -> dict[str, Any]:
        """Ray runtime environment of one actor; environment variables have to be set before the library is imported."""
        return {}
