"""Affinity propagation with its rows spread over Ray actors.

Every actor keeps the messages of a range of rows: whole rows (`dense`), the pairs that can matter (`lists`), or a
k-nearest-neighbour graph from an index built in shards (`sparse`). A round needs one thing of the others: the column
sums, U numbers, added up by an all-reduce of torch.distributed (gloo) between the actors. The beliefs come to the
driver, which decides about convergence exactly as it does for one process.

An actor may die. Every `checkpoint_every` rounds each writes its messages to a directory that all of them reach
(safetensors; temporary name, then rename). After a death new actors start from the newest complete checkpoint and do
the rounds since then again; rounds are deterministic, so the result is the same.

Shapes:  U users, R rows of an actor, D width of the vectors.
"""

import contextlib
import json
import logging
import os
import resource
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch import Tensor

from distributed_mi.core.errors import StageError
from distributed_mi.exemplars.lists import OF_ALL_USERS, ListMessages, NeighbourLists
from distributed_mi.exemplars.messages import DenseMessages, Messages
from distributed_mi.exemplars.neighbours import (
    FIRST_LENGTH,
    ExactNeighbours,
    NeighbourIndex,
    measure,
    merge_found,
    reverse_edges,
    with_edges,
)
from distributed_mi.exemplars.problem import Problem, Warm, check_vectors
from distributed_mi.exemplars.similarity import Similarity, VectorSimilarities, row_blocks

logger = logging.getLogger(__name__)

Kind = Literal["dense", "lists", "sparse"]

PEER_TIMEOUT = timedelta(seconds=300)
"""Longest wait of an actor for the others' column sums."""

DEATH_NOTICED_S = 2.0
"""After one death, how long the others are given to turn out dead too."""


@dataclass(frozen=True)
class Blocks:
    """How rows are spread over actors."""

    kind: Kind = "lists"
    """What each actor keeps of its rows."""
    num_actors: int = 2
    """Ranges of rows."""
    cpus_per_actor: float = 1.0
    """Logical CPUs of each; also its threads, at least one."""
    neighbours: int = FIRST_LENGTH
    """Entries of a list to begin with; for `sparse` they are all."""
    probes: int = 16
    """Cells of an index that a search looks into, for `sparse`."""
    checkpoint_dir: str | None = None
    """Directory that all nodes share. None: no checkpoints; after a death all rounds are done again."""
    checkpoint_every: int = 10
    """Rounds between two checkpoints."""
    max_restarts: int = 5
    """Deaths that are put up with."""


class _RowBlock:
    """The actor: messages of rows `low` to `high`."""

    def __init__(self, blocks: Blocks, rank: int, bounds: Sequence[int], vectors_UD: np.ndarray) -> None:
        torch.set_num_threads(max(1, int(blocks.cpus_per_actor)))
        # the vectors lie in the object store, shared by all actors of a node; nobody writes to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._blocks, self._rank, self._bounds = blocks, rank, list(bounds)
        self._low, self._high = bounds[rank], bounds[rank + 1]
        self._vectors = vectors_UD
        self._lists: NeighbourLists | None = None
        self._source: ExactNeighbours | None = None
        self._messages: Messages | None = None

    def ping(self) -> int:
        """Whether it lives: the process id."""
        return os.getpid()

    def open_store(self) -> tuple[str, int]:
        """Where the others meet this actor, for rank 0: host and port, which is bound from now on."""
        host = ray.util.get_node_ip_address()
        self._store = torch.distributed.TCPStore(
            host, 0, len(self._bounds) - 1, is_master=True, wait_for_workers=False, timeout=PEER_TIMEOUT
        )
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Meet the others; collective."""
        count = len(self._bounds) - 1
        if count == 1:
            return
        if self._rank > 0:
            self._store = torch.distributed.TCPStore(host, port, count, is_master=False, timeout=PEER_TIMEOUT)
        torch.distributed.init_process_group(
            "gloo", store=self._store, rank=self._rank, world_size=count, timeout=PEER_TIMEOUT
        )

    def _sum(self, sums_U: np.ndarray) -> np.ndarray:
        if len(self._bounds) > 2:
            torch.distributed.all_reduce(torch.from_numpy(sums_U))
        return sums_U

    def begin(self, preferences_U: np.ndarray, damping: float) -> int:
        """Messages before the first round; returns the pairs kept."""
        own = preferences_U[self._low : self._high]
        users = len(self._vectors)
        if self._blocks.kind == "dense":
            self._messages = DenseMessages(self._rows(), self._low, own, damping, self._sum)
        else:
            if self._lists is None:
                vectors = torch.from_numpy(self._vectors)
                self._source = ExactNeighbours(VectorSimilarities(vectors), self._low)
                self._lists = self._source.lists(self._high - self._low, self._blocks.neighbours)
            self._messages = ListMessages(
                self._lists, users, self._low, own, damping, self._sum, source=self._source
            )
        return self.pairs()

    def begin_from(self, summary: dict[str, np.ndarray]) -> None:
        """Begin near the messages of an earlier run over other lists; whole rows begin from nothing."""
        if isinstance(self._messages, ListMessages):
            self._messages.begin_from(summary)

    def summary(self) -> dict[str, np.ndarray] | None:
        """As `ListMessages.summary`, of the own rows; None for whole rows."""
        return self._messages.summary() if isinstance(self._messages, ListMessages) else None

    def _rows(self) -> np.ndarray:
        """Similarities of the own rows; kept between runs, their diagonal is scratch."""
        if isinstance(self._messages, DenseMessages):
            rows = self._messages.similarities_RU
            self._messages = None
            return rows
        vectors = torch.from_numpy(self._vectors)
        similarity = Similarity(vectors)
        rows = np.empty((self._high - self._low, len(vectors)), dtype=np.float32)
        for low, high in row_blocks(len(rows), 8 * len(vectors)):
            rows[low:high] = similarity.rows(vectors[self._low + low : self._low + high]).numpy()
        return rows

    # the k-nearest-neighbour graph in shards: each actor indexes its own users and answers everybody's queries

    def build_index(self) -> None:
        """Index the own users."""
        own = self._vectors[self._low : self._high]
        self._index = NeighbourIndex(own, first_row=self._low, probes=self._blocks.probes)

    def search(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """What the own index finds for users `low` to `high`."""
        return self._index.search(self._vectors[low:high], self._blocks.neighbours + 1)

    def merge(self, *parts: tuple[np.ndarray, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Lists of the own rows from what all indexes found; returns reversed pairs for each actor."""
        own = np.arange(self._low, self._high)
        lists = merge_found(list(parts), own, self._blocks.neighbours)
        measure(lists, VectorSimilarities(torch.from_numpy(self._vectors)), self._low)
        self._lists = lists
        rows, columns, values = reverse_edges(lists, self._low)
        to = np.searchsorted(self._bounds, rows, side="right") - 1
        return [
            (rows[to == rank], columns[to == rank], values[to == rank])
            for rank in range(len(self._bounds) - 1)
        ]

    def add_reversed(self, rank: int, *parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Make the graph symmetric."""
        assert self._lists is not None
        rows, columns, values = (np.concatenate([p[rank][i] for p in parts]) for i in range(3))
        self._lists = with_edges(self._lists, self._low, rows, columns, values)
        del self._index

    def round(self) -> np.ndarray:
        """One round; returns the beliefs of the own rows. Collective."""
        assert self._messages is not None
        return self._messages.round()

    def set_preferences(self, preferences_U: np.ndarray) -> None:
        """Other self-similarities from the next round on."""
        assert self._messages is not None
        self._messages.set_preferences(preferences_U)

    def pairs(self) -> int:
        """Pairs whose messages are kept here."""
        if isinstance(self._messages, ListMessages):
            return self._messages.lists.entries
        return (self._high - self._low) * len(self._vectors)

    def unproven(self) -> int:
        """Rows that a pair outside of their list could have changed."""
        return self._messages.unproven if isinstance(self._messages, ListMessages) else 0

    def peak_bytes(self) -> int:
        """Largest resident size of this process, shared memory of the object store included."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def save(self, folder: str) -> None:
        """Write the own messages under a temporary name, then rename.

        Raises:
            OSError: the disk is full or not to be reached.
        """
        from safetensors.numpy import save_file

        assert self._messages is not None
        path = Path(folder) / f"rows-{self._low}-{self._high}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        try:
            save_file(self._messages.state(), str(temporary))
            os.replace(temporary, path)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from error

    def restore(self, folder: str) -> None:
        """Go on from what `save` wrote."""
        from safetensors.numpy import load_file

        assert self._messages is not None
        self._messages.restore(load_file(Path(folder) / f"rows-{self._low}-{self._high}.safetensors"))


class RemoteMessages(Messages):
    """Messages of all users, kept by actors; dead ones are replaced without anybody noticing but the log.

    Args:
        problem: starts actors.
        preferences_U: self-similarities.
        damping: weight of the previous message.
        warm: what to begin from instead of nothing; see `ListMessages.begin_from`.
    """

    def __init__(
        self,
        problem: "DistributedProblem",
        preferences_U: np.ndarray,
        damping: float,
        warm: dict[str, np.ndarray] | None = None,
    ) -> None:
        self._problem, self.damping, self._warm = problem, damping, warm
        self.users = self.rows = len(preferences_U)
        self.first_row = 0
        self.rounds = 0
        """Rounds done."""
        self._events = [(0, preferences_U.copy())]
        self._saved = 0
        self._folder: Path | None = None
        if problem.blocks.checkpoint_dir is not None:
            self._folder = Path(problem.blocks.checkpoint_dir) / f"damping-{damping:g}"
        self.call("begin", ray.put(preferences_U), damping)
        if warm is not None:
            self.call("begin_from", ray.put(warm))

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors; after a death, of those that went on in their place.

        Raises:
            StageError: actors died more often than `max_restarts`.
        """
        death: RayError | None = None
        while True:
            try:
                if death is not None:
                    self._recover(death)
                return self._problem.call(method, *arguments)
            except RayError as error:
                death = error
                if not isinstance(error, RayActorError) and not self._problem.dead(error):
                    raise

    def round(self) -> np.ndarray:
        """One round on all actors; see `Messages.round`."""
        belief_U = np.concatenate(self.call("round"))
        self.rounds += 1
        every = self._problem.blocks.checkpoint_every
        if self._folder is not None and self.rounds % every == 0:
            self._save()
        return belief_U

    def set_preferences(self, preferences_U: np.ndarray) -> None:
        """As in `Messages`."""
        self._events.append((self.rounds, preferences_U.copy()))
        self.call("set_preferences", ray.put(preferences_U))

    def _save(self) -> None:
        """A checkpoint; one that cannot be written costs nothing but the chance to go on from it."""
        assert self._folder is not None
        folder = self._folder / f"round-{self.rounds}"
        try:
            self.call("save", str(folder))
            (folder / "complete.json").write_text(json.dumps({"rounds": self.rounds}), encoding="utf-8")
        except (RayTaskError, OSError) as error:
            cause = getattr(error, "cause", None) or error
            if not isinstance(cause, OSError):
                raise
            logger.warning(
                "exemplars: no checkpoint after round %d (%s); should an actor die, the run goes on from round %d",
                self.rounds,
                cause,
                self._saved,
            )
            _remove(folder)
            return
        old = self._folder / f"round-{self._saved}"
        self._saved = self.rounds
        _remove(old)

    def _recover(self, error: RayError) -> None:
        """New actors where some have died, brought to where the others were."""
        self._problem.restart(error)
        self._problem.call("begin", ray.put(self._events[0][1]), self.damping)
        if self._warm is not None:
            self._problem.call("begin_from", ray.put(self._warm))
        done = 0
        if self._saved:
            assert self._folder is not None
            self._problem.call("restore", str(self._folder / f"round-{self._saved}"))
            done = self._saved
        logger.warning(
            "exemplars: going on from round %d, %d rounds are done again", done, self.rounds - done
        )
        for number in range(done, self.rounds + 1):
            for since, preferences_U in self._events[1:]:
                if since == number:
                    self._problem.call("set_preferences", ray.put(preferences_U))
            if number < self.rounds:
                self._problem.call("round")

    def summary(self) -> dict[str, np.ndarray] | None:
        """As `ListMessages.summary`, of all users."""
        parts = self.call("summary")
        if parts[0] is None:
            return None
        return {
            name: value if name in OF_ALL_USERS else np.concatenate([p[name] for p in parts])
            for name, value in parts[0].items()
        }

    def clear(self) -> None:
        """Remove the checkpoints."""
        if self._folder is not None:
            _remove(self._folder / f"round-{self._saved}")

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("round() asks the actors")


class DistributedProblem(Problem):
    """Rows spread over Ray actors; Ray must be running. See the module docstring.

    Args:
        vectors_UD: float32 vectors, on the driver too: it labels the users in the end.
        blocks: how rows are spread.
    """

    def __init__(self, vectors_UD: Tensor | np.ndarray, blocks: Blocks) -> None:
        vectors = check_vectors(vectors_UD)
        users = len(vectors)
        if blocks.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {blocks.num_actors}")
        self.blocks, self.exact = blocks, blocks.kind != "sparse"
        self.similarities: VectorSimilarities = VectorSimilarities(vectors)
        count = min(blocks.num_actors, users)
        self._bounds = [users * i // count for i in range(count + 1)]
        self._vectors = ray.put(vectors.numpy())
        self.actors: list[Any] = []
        self.deaths = 0
        """Actors' deaths so far."""
        self.peak_bytes: list[int] = []
        """Largest resident size of each actor, known once closed."""
        death: RayActorError | None = None
        try:
            while True:
                try:
                    if death is None:
                        self._start()
                    else:
                        self.restart(death)
                    break
                except RayActorError as error:
                    death = error
        except BaseException:
            self._kill()
            raise

    def _start(self) -> None:
        options = {"num_cpus": self.blocks.cpus_per_actor, "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(_RowBlock).options(**options)
        self.actors = [
            actor.remote(self.blocks, rank, self._bounds, self._vectors)
            for rank in range(len(self._bounds) - 1)
        ]
        host, port = ray.get(self.actors[0].open_store.remote())
        self.call("join", host, port)
        if self.blocks.kind == "sparse":
            self._build_graph()

    def _build_graph(self) -> None:
        self.call("build_index")
        ranges = list(zip(self._bounds, self._bounds[1:], strict=False))
        found = [[a.search.remote(low, high) for a in self.actors] for low, high in ranges]
        reverse = [a.merge.remote(*parts) for a, parts in zip(self.actors, found, strict=True)]
        ray.get([a.add_reversed.remote(rank, *reverse) for rank, a in enumerate(self.actors)])

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all actors and wait for all answers, unless one of them has died.

        Raises:
            RayActorError: one has died. The others are not waited for: who does not talk to the dead one itself hangs
                in the all-reduce.
            RayError: another error; the first, when every actor has answered.
        """
        waiting = {getattr(a, method).remote(*arguments): rank for rank, a in enumerate(self.actors)}
        values: list[Any] = [None] * len(waiting)
        failure: RayError | None = None
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=2 * PEER_TIMEOUT.total_seconds())
            if not done:
                raise failure or GetTimeoutError(
                    f"exemplars: {len(waiting)} actors do not answer to {method}"
                )
            rank = waiting.pop(done[0])
            try:
                values[rank] = ray.get(done[0])
            except RayActorError:
                raise
            except (
                RayError
            ) as error:  # perhaps of an actor whose peer has died: the peer's own error says more
                failure = failure or error
        if failure is not None:
            raise failure
        return values

    def dead(self, error: RayError) -> list[int]:
        """Actors that do not live any more, after an error of a call."""
        pings = {a.ping.remote(): rank for rank, a in enumerate(self.actors)}
        # a living actor may hang in an all-reduce with the dead one, and then answers no ping
        patience = DEATH_NOTICED_S if isinstance(error, RayActorError) else PEER_TIMEOUT.total_seconds()
        answered, _ = ray.wait(list(pings), num_returns=len(pings), timeout=patience)
        found = []
        for answer in answered:
            try:
                ray.get(answer)
            except RayActorError:
                found.append(pings[answer])
        return sorted(found)

    def restart(self, error: RayError) -> None:
        """Replace all actors after a death.

        Raises:
            StageError: too many deaths.
        """
        dead = self.dead(error)
        self.deaths += max(1, len(dead))
        logger.warning("exemplars: actor %s died (%s)", ", ".join(map(str, dead)), str(error).splitlines()[0])
        if self.deaths > self.blocks.max_restarts:
            raise StageError(
                f"exemplars: {self.deaths} actors died, at most {self.blocks.max_restarts} are put up with"
            ) from error
        self._kill()
        self._start()

    def messages(self, preferences_U: np.ndarray, damping: float, warm: Warm | None = None) -> Messages:
        """As in `Problem`. From `Messages` of an earlier run it only keeps the lists; a summary it begins from."""
        if isinstance(self.last, RemoteMessages):
            self.last.clear()
        self.last = RemoteMessages(self, preferences_U, damping, warm if isinstance(warm, dict) else None)
        return self.last

    @property
    def summary(self) -> dict[str, np.ndarray] | None:
        """As in `Problem`."""
        return self.last.summary() if isinstance(self.last, RemoteMessages) else None

    @property
    def pairs(self) -> int:
        """Pairs whose messages the actors keep."""
        return sum(self.last.call("pairs")) if isinstance(self.last, RemoteMessages) else 0

    @property
    def unproven(self) -> int:
        """Rows that a pair outside of their list could have changed."""
        return sum(self.last.call("unproven")) if isinstance(self.last, RemoteMessages) else 0

    def close(self) -> None:
        """End the actors and remove their checkpoints."""
        if isinstance(self.last, RemoteMessages):
            self.last.clear()
        with contextlib.suppress(RayError):
            self.peak_bytes = self.call("peak_bytes")
        self._kill()

    def _kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def _remove(folder: Path) -> None:
    """Remove a checkpoint; what cannot be removed is left and said."""
    import shutil

    if folder.exists():
        try:
            (folder / "complete.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("exemplars: could not remove the checkpoint %s: %s", folder, error)
