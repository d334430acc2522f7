"""Configuration of the exemplars stage."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from distributed_mi.core.config import ConfigModel, runtime

Damping = Annotated[float, Field(ge=0.5, lt=1.0)]


class ExemplarsConfig(ConfigModel):
    """How training users are clustered around exemplar users."""

    method: Literal["exact"] = "exact"
    """`exact`: blocked affinity propagation over all pairs of users, 12 bytes a pair (3.9 GB for 17,890 users)."""
    preference: float | Literal["median", "none"] = -10.0
    """Self-similarity on the scale of squared distances (see `embed.rescale`); lower gives fewer exemplars. EIMF's best
    are -10 on Beauty, -5 on Grocery, -2 on Office. `median`: the median similarity. `none`: all are exemplars."""
    damping: Damping = 0.5
    """Weight of the previous message, in [0.5, 1), in the first attempt."""
    max_iter: PositiveInt = 200
    """Message rounds of the first attempt."""
    convergence_iter: PositiveInt = 15
    """Rounds with unchanged exemplars that count as converged."""
    retry_damping: tuple[Damping, ...] = (0.7, 0.9, 0.95)
    """Damping of each further attempt while the messages have not converged. Empty: no further attempt."""
    retry_max_iter: PositiveInt = 400
    """Message rounds of each further attempt."""
    compare_facility_location: bool = runtime(True)
    """Also choose as many exemplars by greedy facility location, so that the report can say which is better."""
