"""Configuration of the exemplars stage."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from distributed_mi.core.config import ConfigModel, runtime

Damping = Annotated[float, Field(ge=0.5, lt=1.0)]


class ExemplarsConfig(ConfigModel):
    """How training users are clustered around exemplar users."""

    method: Literal["auto", "exact", "distributed", "sparse"] = "auto"
    """`exact`: all pairs of users count, though only those that can matter are kept (about 2 kB a user; 12 bytes a pair
    at worst). `distributed`: the same with rows spread over `num_actors` Ray actors. `sparse`: pairs of a
    k-nearest-neighbour graph, for millions of users. `auto`: `exact` while it fits into memory and half an hour, else
    `sparse`."""
    preference: float | Literal["median", "none"] = -10.0
    """Self-similarity on the scale of squared distances (see `embed.rescale`); lower gives fewer exemplars. EIMF's best
    are -10 on Beauty, -5 on Grocery, -2 on Office. `median`: the median similarity. `none`: all are exemplars."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Exemplars per user, for example 0.03. The preference that gives them is found by bisection; `preference` is then
    not read. None: `preference` says."""
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
    neighbours: PositiveInt = 64
    """`sparse`: neighbours of each user in the graph, before it is made symmetric."""
    most_neighbours: PositiveInt = 256
    """`sparse` in one process: longest neighbour list; lists double where a pair outside of them may matter."""
    probes: PositiveInt = 16
    """`sparse`: cells of the neighbour index that a search looks into; more finds more of the true neighbours."""
    warm_start: bool = False
    """Begin from the messages that the stage's previous run left, matched by user id: fewer rounds when most users
    stay. The result may be another local optimum than that of a fresh start."""
    num_actors: PositiveInt = runtime(1)
    """Ray actors that share the rows with `distributed` (then at least 2) and `sparse`. Labels do not depend on it,
    except that the graph of `sparse` does not grow on more than one."""
    checkpoint_every: PositiveInt = runtime(10)
    """Rounds between two checkpoints of the actors' messages, from which a run goes on when an actor dies."""
    force: bool = runtime(False)
    """Start although the predicted memory is not there. On the command line: `--force`."""
    compare_facility_location: bool = runtime(True)
    """Also choose as many exemplars by greedy facility location, so that the report can say which is better. Left out
    above 30,000 users."""
    preference_curve: bool = runtime(True)
    """Also run with the preference times 1/4, 1/2, 2 and 4, for the report's plot of the share of exemplars. Left out
    above 30,000 users and when whole rows are kept."""
