"""The validation function that training calls between steps, on all workers at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from distributed_mi.core.artifacts import Workspace
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation import scoring
from distributed_mi.evaluation.metrics.base import CatalogueInfo, RankedLists
from distributed_mi.evaluation.protocol import Cases, load_cases, load_catalogue
from distributed_mi.evaluation.topk import rank_share
from distributed_mi.models.base import Recommender

logger = logging.getLogger(__name__)

DEFAULT_METRICS = ("recall@50", "hit_rate@50", "ndcg@50")
"""What is measured between steps; early stopping reads the first."""


@dataclass(frozen=True)
class Validator:
    """Evaluate a model that is being trained. Picklable: it carries names and reads the users where it runs.

    Args:
        workspace_url: with a complete prepare stage.
        max_history: newest events of a user that the model reads.
        metrics: `name@k` strings.
        users_per_batch: users that a worker ranks at once, rounded up to a multiple of 64.
        split: whose users.
    """

    workspace_url: str
    max_history: int
    metrics: tuple[str, ...] = DEFAULT_METRICS
    users_per_batch: int = 4096
    split: str = "validation"

    def __call__(self, model: Recommender, group: WorkerGroup) -> dict[str, float]:
        """Metrics of the split's users, equal on all workers. Collective; the model's mode is left as it was."""
        generation = Workspace(self.workspace_url).stage("prepare").require().generation
        cases, catalogue = _read(self.workspace_url, generation, self.split)
        mine = rank_share(
            model,
            cases,
            group,
            length=scoring.longest(self.metrics),
            users_per_batch=self.users_per_batch,
            max_history=self.max_history,
        )
        # The lists, not sums of metrics, are exchanged: sums in another order would differ in the last digits.
        ranked = torch.cat(group.all_gather_rows(torch.from_numpy(mine).to(group.device))).cpu().numpy()
        values = scoring.score(RankedLists(ranked, *cases.labels, catalogue), self.metrics).values
        return {name: value for name, value in values.items() if value is not None}


@lru_cache(maxsize=2)
def _read(workspace_url: str, generation: str, split: str) -> tuple[Cases, CatalogueInfo]:
    workspace = Workspace(workspace_url)
    cases = load_cases(workspace, split)
    logger.info("%s users of generation %s: %s", split, generation, f"{cases.num_users:,}")
    return cases, load_catalogue(workspace)


def make_validator(
    workspace_url: str,
    max_history: int,
    metrics: Sequence[str] = DEFAULT_METRICS,
    users_per_batch: int = 4096,
) -> Validator:
    """The validation function of a workspace; see `Validator`.

    Raises:
        ConfigError: a metric is malformed or unknown.
    """
    scoring.build(metrics)
    return Validator(Workspace(workspace_url).absolute_url, max_history, tuple(metrics), users_per_batch)
