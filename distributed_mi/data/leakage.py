"""The check that runs after every split: are labels of the evaluation among the events that are trained on?

It reads the tables that were written, not the plan that made them. What must be zero depends on the protocol:

    by-user          users in both training and evaluation; label events in training
    leave-one-out    label events in training
    global-temporal  label events in training; training events at or after the first label

An event is (user, item, time). Where a user has several identical ones, they are told apart by number: the
evaluation row holds them all, so training may hold what is left when the labels are taken away.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import polars as pl

from distributed_mi.core.errors import LeakageError

_EVENT = ("user_id", "item_indices", "timestamps")
_MUST_BE_ZERO = {
    "by-user": ("shared_users", "label_events_in_train"),
    "leave-one-out": ("label_events_in_train",),
    "global-temporal": ("label_events_in_train", "future_train_events"),
}


@dataclass(frozen=True)
class LeakageCounts:
    """What was found in one partition of users, or in all.

    Args:
        label_events: labels of validation and test.
        label_events_in_train: labels that are also trained on.
        shared_users: users with both training events and labels.
        future_train_events: training events at or after the first label of all users.
    """

    label_events: int = 0
    label_events_in_train: int = 0
    shared_users: int = 0
    future_train_events: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def first_label_ms(*evaluation: pl.DataFrame) -> int | None:
    """Earliest time of a label in evaluation sequences, milliseconds; None without labels."""
    times = [_labels(rows)["timestamps"].min() for rows in evaluation]
    return min((int(t) for t in times if t is not None), default=None)  # type: ignore[arg-type]


def count_leaks(
    train: pl.DataFrame, *evaluation: pl.DataFrame, first_label: int | None = None
) -> LeakageCounts:
    """Compare the training sequences of some users with the evaluation sequences of the same users.

    Args:
        train: `sequences` rows.
        evaluation: `sequences` rows of validation and of test.
        first_label: earliest label over all users, milliseconds; by default that of these rows.
    """
    if first_label is None:
        first_label = first_label_ms(*evaluation)
    train_events = train.select(_EVENT).explode("item_indices", "timestamps")
    counts = LeakageCounts(
        future_train_events=0
        if first_label is None
        else train_events.filter(pl.col("timestamps") >= first_label).height
    )
    trained = train_events.group_by(_EVENT).agg(pl.len().cast(pl.Int64).alias("trained"))
    label_users = []
    for rows in evaluation:
        labels = _labels(rows)
        label_users.append(labels["user_id"])
        found = LeakageCounts(
            label_events=labels.height, label_events_in_train=_leaked(rows, labels, trained)
        )
        counts += found
    users = pl.concat(label_users).unique() if label_users else pl.Series("user_id", [], dtype=pl.String)
    shared = train.filter(pl.col("user_id").is_in(users.implode()))["user_id"].n_unique()
    return counts + LeakageCounts(shared_users=shared)


def _labels(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per label event."""
    labels = rows.select(
        "user_id",
        pl.col("item_indices").list.slice(pl.col("num_history")),
        pl.col("timestamps").list.slice(pl.col("num_history")),
    ).filter(pl.col("item_indices").list.len() > 0)
    return labels.explode("item_indices", "timestamps")


def _leaked(rows: pl.DataFrame, labels: pl.DataFrame, trained: pl.DataFrame) -> int:
    """Label events that training holds beyond what the row has besides its labels."""
    labelled = labels.group_by(_EVENT).agg(pl.len().cast(pl.Int64).alias("labelled"))
    whole = rows.select(_EVENT).explode("item_indices", "timestamps")
    present = whole.group_by(_EVENT).agg(pl.len().cast(pl.Int64).alias("present"))
    joined = labelled.join(trained, on=_EVENT).join(present, on=_EVENT)
    excess = (pl.col("trained") + pl.col("labelled") - pl.col("present")).clip(0, pl.col("labelled"))
    return int(joined.select(excess.sum()).item())


def verdict(counts: LeakageCounts, protocol: str) -> dict[str, Any]:
    """The counts with `passed`, `protocol` and one sentence for reports (`text`)."""
    passed = not any(getattr(counts, name) for name in _MUST_BE_ZERO[protocol])
    found = [
        f"{counts.label_events_in_train:,} of {counts.label_events:,} label events are in the training events"
    ]
    if "shared_users" in _MUST_BE_ZERO[protocol]:
        found.append(f"{counts.shared_users:,} users have both")
    if "future_train_events" in _MUST_BE_ZERO[protocol]:
        found.append(f"{counts.future_train_events:,} training events are not before the first label")
    text = f"Leakage check {'passed' if passed else 'FAILED'} for {protocol}: {', '.join(found)}."
    return {"passed": passed, **vars(counts), "protocol": protocol, "text": text}


def require_clean(counts: LeakageCounts, protocol: str) -> dict[str, Any]:
    """The verdict.

    Raises:
        LeakageError: labels would be trained on.
    """
    found = verdict(counts, protocol)
    if not found["passed"]:
        raise LeakageError(found["text"])
    return found
