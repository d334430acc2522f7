"""What every backend takes and gives; `tests/contracts/test_backends.py` says what is asked of each.

A backend answers prompts. It knows neither Ray, nor retries, nor where answers are stored: `ladder.py` retries,
`pool.py` places and replaces, `work.py` stores.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import DistributedMIError
from distributed_mi.interests.history import Exemplar, HistoryItem


class BackendDeadError(DistributedMIError):
    """The backend cannot answer anything any more and has to be started anew."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        exemplar: whose interests are asked for, with the items that stand in the prompt.
        prompt: text of the user message.
        max_answer_tokens: tokens the answer may have.
    """

    exemplar: Exemplar
    prompt: str
    max_answer_tokens: int

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


class Backend(ABC):
    """Base of every backend. A file exports its subclass as `BACKEND`."""

    Config: ClassVar[type[ConfigModel]]
    in_process: ClassVar[bool] = False
    """Cheap enough to run in the driver; then no Ray is started."""
    uses_catalogue: ClassVar[bool] = False
    """Whether `BackendContext.catalogue` must be filled."""

    def __init__(self, config: Any, context: BackendContext) -> None:
        self.config = config
        self.context = context

    @property
    @abstractmethod
    def model_id(self) -> str:
        """Name and version of what answers, as stored beside every answer."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an answer besides prompt and schema: model, revision, sampling. Goes into the prompt hash."""
        return {"backend": type(self).__name__, "model": self.model_id, "config": self.config.result_fields()}

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
    def ray_actor_options(cls, config: Any) -> dict[str, Any]:
        """Resources of one actor, as `ray.remote` takes them."""
        return {"num_cpus": 1}

    @classmethod
    def runtime_env(cls, config: Any) -> dict[str, Any]:
        """Ray runtime environment of one actor; environment variables have to be set before the library is imported."""
        return {}
