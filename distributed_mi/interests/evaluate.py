"""The quality of a workspace's interests, without a judge: `quality.py` says what is measured, this file on whom.

Reads   prepare (all splits), embed, exemplars, interests
Writes  <workspace>/interests/quality: report.json, report.md, plots; exemplars/, members/, newcomers/ with one row for
        each user that was scored

A score says something only about items that the interests did not see. What they saw is decided by the split:

    population   has the interests of             leave-one-out, global-temporal     by-user
    exemplars    its own                          labels of validation and test      last fifth of the events: SEEN
    members      its cluster's exemplar           labels of validation and test      last fifth of the events: SEEN
    newcomers    the exemplar that is nearest     labels                             labels
                 to the mean of its history

Under by-user a training user has no later events: all of them were in the prompt. Its sequence is then cut in time
here, the first `history_fraction` of the events as history, and the report says `saw_whole_history: true` beside the
number: it tells how well interests describe, not whether they foretell. Members' later items were in nobody's prompt
on their account, but in the text vector that chose their exemplar, so they carry the same label. Newcomers are users
outside of the training split; their history alone chose their exemplar, as in serving, so that by-user too has one
number without the label. A user's later items never include items of the history, also not of the part that was
beyond the length of the prompt.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import WorkspaceError
from distributed_mi.interests import quality_report
from distributed_mi.interests.quality import (
    InterestVectors,
    LaterItems,
    SemanticScores,
    chance,
    coverage,
    distinctness,
    semantic_scores,
)
from distributed_mi.interests.quality_users import Population, Users, item_vectors, matrix
from distributed_mi.interests.resampling import Floats, Ints, estimates, paired_differences

logger = logging.getLogger(__name__)

STAGE = "interests/quality"

_SEEN = {
    "exemplars": "the interests were made from the whole history, later items included",
    "members": "the text vector that chose the exemplar was made from the whole history, later items included",
    "newcomers": "",
}


def evaluate(
    workspace: Workspace,
    *,
    num_others: int = 99,
    history_fraction: float = 0.8,
    max_users: int = 5_000,
    bootstrap_samples: int = 1_000,
    seed: int = 7,
) -> dict[str, Any]:
    """Measure the interests of a workspace, or return the report that is there.

    Args:
        workspace: with complete stages prepare, embed, exemplars and interests. The caller holds its lock.
        num_others: exemplars that each user's own is ranked among; all others when there are fewer.
        history_fraction: share of a training user's events, rounded down, that counts as history where prepare held
            out none of them.
        max_users: users of each population that are scored, drawn at random when there are more.
        bootstrap_samples: resamples behind each 95 % interval; 0: no intervals.
        seed: of all draws.

    Returns:
        The content of report.json.

    Raises:
        WorkspaceError: a stage is missing, or is older than one that it was made from.
        ValueError: an argument out of range.
    """
    if num_others < 1 or max_users < 1 or not 0.0 < history_fraction < 1.0 or bootstrap_samples < 0:
        raise ValueError(
            "needs num_others and max_users of at least 1, history_fraction between 0 and 1 and no negative "
            f"bootstrap_samples; got {num_others}, {max_users}, {history_fraction}, {bootstrap_samples}"
        )
    settings = {
        "num_others": num_others,
        "history_fraction": history_fraction,
        "max_users": max_users,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
    }
    manifests = _require(workspace)
    key = StageKey(STAGE, {n: m.identity for n, m in manifests.items()}, settings)
    run = workspace.stage(STAGE).open(key)
    if run.manifest is None:
        _Measurement(workspace, manifests, settings).write(run)
        logger.info("interests: see %s/%s/report.md", workspace.url, STAGE)
    return read_json(run.fs, f"{run.directory.base}/report.json")


def render(report: dict[str, Any]) -> str:
    """Tables for the terminal."""
    return quality_report.text(report)


def _require(workspace: Workspace) -> dict[str, Manifest]:
    """Manifests of the stages that are read.

    Raises:
        WorkspaceError: one is missing, or was made from other results than those that are there.
    """
    names = ("prepare", "embed", "exemplars", "interests")
    manifests = {n: workspace.stage(n).require() for n in names}
    for name, manifest in manifests.items():
        for source, identity in manifest.inputs.items():
            if source in manifests and manifests[source].identity != identity:
                raise WorkspaceError(
                    f"stage {name} of {workspace.url} was made from another result of {source} than the one that is "
                    f"there: run `distributed-mi {name} CONFIG` first"
                )
    return manifests


class _Measurement:
    """Scores each population of a workspace and writes the report."""

    def __init__(
        self, workspace: Workspace, manifests: Mapping[str, Manifest], settings: Mapping[str, Any]
    ) -> None:
        self.manifests, self.settings = manifests, settings
        self.embed = workspace.stage("embed")
        self.users = Users(workspace, **{n: settings[n] for n in ("history_fraction", "max_users", "seed")})
        stage = workspace.stage("interests")
        vectors = stage.read("interest_vectors", "interest_vectors", columns=["user_index", "vector"])
        self.interests = InterestVectors.build(vectors["user_index"].to_numpy(), matrix(vectors["vector"]))
        self.support: dict[int, set[int]] = {}
        for row in stage.read("interests", "interests", columns=["user_index", "item_indices"]).to_pylist():
            self.support.setdefault(row["user_index"], set()).update(row["item_indices"])

    def write(self, run: StageRun) -> None:
        """Score, then commit tables, report and plots."""
        sections: dict[str, Any] = {}
        per_user: dict[str, dict[str, Floats]] = {}
        populations = self.users.read()
        for p in populations:
            scores, later = self._score(p)
            within = self._within(p) if p.name == "exemplars" else {}
            per_user[p.name] = scores.own | scores.lift | within
            sections[p.name] = self._section(p, scores, later)
            run.write_table(f"{p.name}/part-0.parquet", _table(p, per_user[p.name]), "per_user")
        report = self._report(sections, per_user["exemplars"])
        pictures = quality_report.plots(report, per_user)
        files = {
            "report.json": json.dumps(report, indent=2, allow_nan=False).encode() + b"\n",
            "report.md": quality_report.markdown(report, sorted(pictures)).encode(),
            **pictures,
        }
        facts = ("saw_whole_history", "scores", "lift")
        stats = {n: {f: s[f] for f in facts} for n, s in sections.items()} | {"within": report["within"]}
        run.commit(rows={p.name: len(p.users) for p in populations}, stats=stats, top_files=files)

    def _score(self, p: Population) -> tuple[SemanticScores, LaterItems]:
        """Semantic scores, and what they were taken over: the later items that have a text."""
        items_VT, row_of = item_vectors(self.embed, {i for x in p.later for i in x}, with_text_only=True)
        rows, history = (
            [[row_of[i] for i in items if i in row_of] for items in side] for side in (p.later, p.history)
        )
        later = LaterItems.build(p.users, p.exemplars, rows, history)
        if not row_of:
            items_VT = np.zeros((0, self.interests.vectors_RT.shape[1]), np.float32)
        scores = semantic_scores(
            self.interests,
            later,
            items_VT,
            num_others=self.settings["num_others"],
            seed=self.settings["seed"],
        )
        if not p.reason and scores.num_others == 0:
            p.reason = "there is one exemplar only, and no other to compare it with"
        elif not p.reason and not any(rows):
            p.reason = "nobody has later items"
        return scores, later

    def _within(self, p: Population) -> dict[str, Floats]:
        """Scores of the exemplars that need no later items.

        Coverage is of the newest `max_history` distinct items, also where a prompt had to be made shorter than that.
        """
        places = self.interests.places(np.asarray(p.users, dtype=np.int64))
        length = self.manifests["interests"].config["max_history"]
        rows = self.users.rows("train", p.users)
        shown = [list(dict.fromkeys(reversed(r["item_indices"])))[:length] for r in rows]
        support = [self.support.get(u, set()) for u in p.users]
        return {"coverage": coverage(support, shown), **distinctness(self.interests, places)}

    def _section(self, p: Population, scores: SemanticScores, later: LaterItems) -> dict[str, Any]:
        """What the report says of a population. Users of one exemplar are drawn together."""
        exemplars = np.asarray(p.exemplars, dtype=np.int64)
        scored = ~np.isnan(scores.own["rank_percentile"])
        options = {"samples": self.settings["bootstrap_samples"], "seed": self.settings["seed"]}
        lift = paired_differences(scores.swapped, scores.own, exemplars, **options)
        over_random = paired_differences(scores.random, scores.own, exemplars, **options)
        return {
            "saw_whole_history": p.saw_whole_history,
            "caveat": _SEEN[p.name] if p.saw_whole_history else "",
            "reason": p.reason,
            "available": p.available,
            "drawn": len(p.users),
            "users": int(scored.sum()),
            "without_later_items": int((later.counts == 0).sum()),
            "later_items_without_text": sum(map(len, p.later)) - len(later.rows),
            "later_items_per_user": _mean(later.counts[scored]),
            "interests_per_user": _mean(self.interests.counts[self.interests.places(exemplars[scored])]),
            "scores": self._estimates(scores.own, exemplars),
            "lift": {d.metric: d.to_dict() for d in lift},
            "random_exemplar": self._estimates(scores.random, exemplars),
            "over_random_exemplar": {d.metric: d.to_dict() for d in over_random},
        }

    def _report(self, sections: Mapping[str, Any], exemplars: Mapping[str, Floats]) -> dict[str, Any]:
        stats = self.manifests["interests"].stats
        split = self.manifests["prepare"].config.get("split")
        num_others = min(self.settings["num_others"], self.interests.num_exemplars - 1)
        within = {n: exemplars[n] for n in ("coverage", "distinctness", "near_duplicates")}
        return {
            "backend": stats.get("backend", "unknown"),
            "models": stats.get("models", []),
            "steps": stats.get("steps", {}),
            "split": split["name"] if isinstance(split, Mapping) else "unknown",
            "held_out_events_of_training_users": self.users.held_out,
            "item_text": list(self.manifests["embed"].config.get("item_fields", ["title"])),
            "num_exemplars": self.interests.num_exemplars,
            "interests_per_exemplar": _mean(self.interests.counts),
            "num_others": num_others,
            "chance": chance(num_others),
            "within": self._estimates(within, None),
            "populations": dict(sections),
            "settings": dict(self.settings),
        }

    def _estimates(self, per_user: Mapping[str, Floats], groups: Ints | None) -> dict[str, Any]:
        samples, seed = self.settings["bootstrap_samples"], self.settings["seed"]
        return {n: e.to_dict() for n, e in estimates(per_user, groups, samples=samples, seed=seed).items()}


def read_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any]:
    """Content of a JSON file."""
    with filesystem.open_input_stream(path) as stream:
        content: dict[str, Any] = json.loads(stream.read())
    return content


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 3) if len(values) else None


def _table(p: Population, per_user: Mapping[str, Floats]) -> pa.Table:
    """One row per user, a column per metric; null where the user has no value."""
    return pa.table(
        {
            "user_index": pa.array(p.users, pa.int64()),
            "user_id": pa.array(p.user_ids, pa.string()),
            "num_history": pa.array([len(x) for x in p.history], pa.int64()),
            "num_labels": pa.array([len(x) for x in p.later], pa.int64()),
            "ranked_item_indices": pa.array(
                [[]] * len(p.users), pa.list_(pa.int64())
            ),  # nothing is recommended
            "exemplar_user_index": pa.array(p.exemplars, pa.int64()),
            **{n: pa.array(v, mask=np.isnan(v)) for n, v in per_user.items()},
        }
    )
