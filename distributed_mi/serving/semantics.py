"""The language side of a workspace, as far as explanations need it: text vectors, exemplars, their interests.

Serving does not need any of it; a workspace without these stages still answers.

Shapes:  n items, M semantic interests of an exemplar, T text width.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import WorkspaceError
from distributed_mi.serving.indexes.base import Vectors

_STAGES = ("embed", "exemplars", "interests")


@dataclass(frozen=True)
class SemanticInterest:
    """One interest that the language side wrote for an exemplar."""

    exemplar_user_index: int
    interest_index: int
    text: str
    item_indices: list[int]
    """Items of the exemplar's history that the answer gives as evidence."""


@dataclass(frozen=True)
class Exemplar:
    """The training user whose interests name another user's, and where those interests come from."""

    user_index: int
    user_id: str
    cluster: int
    num_users: int
    """Training users that it stands for, itself included."""
    similarity: float
    """Negative squared distance between the user's text vector and the exemplar's."""
    assigned_by: str
    """`clustering` for a training user, `nearest exemplar` for others."""
    interests: list[SemanticInterest]
    vectors_MT: Vectors
    prompt_hash: str
    answer: str
    """The stored answer, a JSON text, unless a backend failed over to something else (`step`)."""
    backend: str
    model: str
    step: str
    """Step of the ladder that gave the answer."""


class Semantics:
    """Reads the language side on demand, only the rows that one explanation needs."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @classmethod
    def open(cls, workspace: Workspace) -> tuple[Self | None, str]:
        """The language side, or None with the reason why there is none."""
        prepare = workspace.stage("prepare").require()
        manifests = {name: workspace.stage(name).manifest() for name in _STAGES}
        for name, manifest in manifests.items():
            if manifest is None:
                return None, f"no semantic interests: run `distributed-mi {name} CONFIG` for them"
            expected = {"prepare": prepare.identity}
            expected |= {n: m.identity for n, m in manifests.items() if m is not None and n != name}
            stale = [n for n, identity in manifest.inputs.items() if expected.get(n, identity) != identity]
            if stale:
                return None, f"no semantic interests: stage {name} is older than {stale[0]}, run it again"
        return cls(workspace), ""

    def text_vectors(self, item_indices: list[int]) -> Vectors:
        """Text vectors of items, in their order, `[n, T]`."""
        if not item_indices:
            return np.zeros((0, 0), dtype=np.float32)
        wanted = pc.field("item_index").isin(sorted(set(item_indices)))
        table = self.workspace.stage("embed").read("item_vectors", "item_vectors", filter=wanted)
        vectors = _matrix(table["vector"])
        place = {index: row for row, index in enumerate(table["item_index"].to_pylist())}
        missing = [i for i in item_indices if i not in place]
        if missing:
            raise WorkspaceError(
                f"embed has no vector of item {missing[0]}: run `distributed-mi embed CONFIG` again"
            )
        return vectors[[place[i] for i in item_indices]]

    def exemplar_of(self, train_user_index: int) -> Exemplar:
        """The exemplar of a training user's cluster."""
        condition = pc.field("user_index") == train_user_index
        rows = (
            self.workspace.stage("exemplars").read("assignment", "assignment", filter=condition).to_pylist()
        )
        if not rows:
            raise WorkspaceError(
                f"exemplars has no cluster for training user {train_user_index}: run `distributed-mi exemplars CONFIG`"
            )
        return self._read(rows[0]["exemplar_user_index"], rows[0]["similarity"], "clustering")

    def nearest_exemplar(self, user_vector_T: Vectors) -> Exemplar:
        """The exemplar whose text vector is nearest, for users who were not clustered."""
        users = self.workspace.stage("exemplars").read("exemplars", "exemplars", columns=["user_index"])
        wanted = pc.field("user_index").isin(users["user_index"].combine_chunks())
        table = self.workspace.stage("embed").read("user_vectors", "user_vectors", filter=wanted)
        if not table.num_rows:
            raise WorkspaceError(
                "embed has no vector of any exemplar: run `distributed-mi exemplars CONFIG` again"
            )
        similarity = -((_matrix(table["vector"]) - user_vector_T) ** 2).sum(axis=1)
        best = int(np.argmax(similarity))
        return self._read(table["user_index"][best].as_py(), float(similarity[best]), "nearest exemplar")

    def all_interests(self) -> tuple[list[SemanticInterest], Vectors]:
        """The interests of every exemplar and their text vectors `[N, T]`, in the same order."""
        stage = self.workspace.stage("interests")
        order = [("user_index", "ascending"), ("interest_index", "ascending")]
        found = stage.read("interests", "interests").sort_by(order)
        vectors = stage.read("interest_vectors", "interest_vectors").sort_by(order)
        return [_interest(r) for r in found.to_pylist()], _matrix(vectors["vector"])

    def _read(self, user_index: int, similarity: float, assigned_by: str) -> Exemplar:
        condition = pc.field("user_index") == user_index
        exemplars, interests = self.workspace.stage("exemplars"), self.workspace.stage("interests")
        try:
            cluster = exemplars.read("exemplars", "exemplars", filter=condition).to_pylist()[0]
            answer = interests.read("answers", "answers", filter=condition).to_pylist()[0]
        except IndexError as error:
            raise WorkspaceError(
                f"exemplar {user_index} has no answer: run `distributed-mi interests CONFIG` again"
            ) from error
        found = interests.read("interests", "interests", filter=condition).sort_by("interest_index")
        vectors = interests.read("interest_vectors", "interest_vectors", filter=condition)
        return Exemplar(
            user_index=user_index,
            user_id=cluster["user_id"],
            cluster=cluster["cluster"],
            num_users=cluster["num_users"],
            similarity=similarity,
            assigned_by=assigned_by,
            interests=[_interest(r) for r in found.to_pylist()],
            vectors_MT=_matrix(vectors.sort_by("interest_index")["vector"]),
            **{name: answer[name] or "" for name in ("prompt_hash", "answer", "backend", "model", "step")},
        )


def _interest(row: dict[str, Any]) -> SemanticInterest:
    return SemanticInterest(row["user_index"], row["interest_index"], row["text"], row["item_indices"])


def _matrix(column: pa.ChunkedArray) -> Vectors:
    """Rows of a list column as float32 `[n, T]`."""
    if not len(column):
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([np.asarray(row, dtype=np.float32) for row in column.to_numpy()])


def cosine(a_NT: Vectors, b_MT: Vectors) -> Vectors:
    """Cosine of every row with every row, `[N, M]`; 0 for a zero vector."""
    return _unit(a_NT) @ _unit(b_MT).T


def _unit(rows: Vectors) -> Vectors:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def naming_vector(vectors_nT: Vectors, weights_n: Vectors, recommended_mT: Vectors) -> Vectors:
    """Text vector of a behaviour interest: what it reads and what it recommends, in equal parts, float32 `[T]`.

    Args:
        vectors_nT: text vectors of the history.
        weights_n: attention of the interest to each of them.
        recommended_mT: text vectors of the items recommended from it; may be none.
    """
    parts = [_unit(weights_n @ vectors_nT)]
    if len(recommended_mT):
        parts.append(_unit(recommended_mT.mean(axis=0)))
    return np.sum(parts, axis=0, dtype=np.float32)
