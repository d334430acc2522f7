"""Configuration of the item table's optimizer."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from distributed_mi.core.config import ConfigModel

Decay = Annotated[float, Field(ge=0, lt=1)]


class TableOptimizerConfig(ConfigModel):
    """How the rows of the item table are trained. The learning rate is an argument of `ItemTable.step`."""

    name: Literal["adam", "adagrad", "row_adagrad", "sgd"] = "adam"
    """Rule: `adam`; `adagrad` with one accumulator per number; `row_adagrad` with one per row (a D-th of the
    memory); `sgd`."""
    lazy: bool = True
    """Adam only. True: a step changes the rows it touches and nothing else, and bias correction counts a row's own
    steps. False: torch's dense Adam, where every row keeps moving by its momentum; costs the whole table at every
    step."""
    beta1: Decay = 0.9
    """Adam's decay of the mean of gradients, per step."""
    beta2: Decay = 0.999
    """Adam's decay of the mean of squared gradients, per step."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of Adam and both Adagrads."""
    initial_accumulator: NonNegativeFloat = 0.0
    """Start of both Adagrads' sums of squared gradients."""
