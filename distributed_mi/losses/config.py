"""Configuration of the recommendation loss and of the negative sampler."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from distributed_mi.core.config import ConfigModel

LossName = Literal["sampled_softmax", "hard_negatives", "in_batch", "bpr", "gbce", "full_softmax"]


class LossConfig(ConfigModel):
    """How a user's interests are compared with the target and with other items."""

    name: LossName = "sampled_softmax"
    """`sampled_softmax` over the target and the step's shared negatives. `hard_negatives`: the same, with negatives
    weighted by how near they are (REMI). `in_batch`: softmax over the targets of all users of the step. `bpr`: target
    against each shared negative, pairwise. `gbce`: binary cross-entropy on target and shared negatives, calibrated;
    not for interests that are means of item vectors (`comirec_sa`, `remi`), whose scores cannot all be negative.
    `full_softmax`: softmax over all items, in tiles; every step then trains every row. `in_batch` and `full_softmax`
    look up no negatives. `train.negatives.log_q` corrects the first three; for `in_batch`, whose negatives are as
    popular as targets, with `train.negatives.name = "popularity"`."""
    beta: NonNegativeFloat = 1.0
    """`hard_negatives` only: concentration of the weights on the nearest negatives; 0 weighs all alike. The model
    `remi` has `ihn_beta` instead."""
    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    """`gbce` only, t of the paper: 0 is plain binary cross-entropy, 1 undoes all of the overconfidence that comes with
    few negatives."""
    choice: Literal["target", "argmax", "label_aware"] = "target"
    """`full_softmax` only, for models with several interests: which of them scores an item. `target`: the one nearest
    the user's target scores all items, as in the other losses. `argmax`: the one nearest the item, by which items are
    ranked when serving. `label_aware`: all of them, by MIND's attention of the item on the interests."""
    power: NonNegativeFloat = 1.0
    """`choice = "label_aware"` only: factor on the scores inside its attention. 0 averages the interests, a large one
    is `argmax`."""

    @model_validator(mode="after")
    def _no_idle_field(self) -> Self:
        """Refuse a field that was changed and that the chosen loss does not read."""
        readers = {"beta": "hard_negatives", "calibration": "gbce", "choice": "full_softmax"}
        for field, reader in readers.items():
            if self._changed(field) and self.name != reader:
                raise ValueError(f'{field} belongs to name = "{reader}" and name is "{self.name}"')
        if self._changed("power") and self.choice != "label_aware":
            raise ValueError(f'power belongs to choice = "label_aware" and choice is "{self.choice}"')
        return self

    def _changed(self, field: str) -> bool:
        return bool(getattr(self, field) != type(self).model_fields[field].default)


class HardLossConfig(LossConfig):
    """The same with REMI's loss as the default, and its `beta` beside this table."""

    name: LossName = "hard_negatives"
    """As for the other models (`sampled_softmax`, `hard_negatives`, `in_batch`, `bpr`, `gbce`, `full_softmax`), with
    another default."""

    @model_validator(mode="after")
    def _no_second_beta(self) -> Self:
        if self._changed("beta"):
            raise ValueError("beta: this model has ihn_beta beside the table loss; set that")
        return self


class ObjectiveConfig(ConfigModel):
    """What a model's configuration says about its recommendation loss; models build theirs on it."""

    mask_accidental_hits: bool = True
    """Leave out negatives that equal a user's target. False: as REMI's code."""
    loss: LossConfig = LossConfig()
    """How interests are compared with the target and other items (`[train.model.loss]`)."""

    @model_validator(mode="after")
    def _no_idle_mask(self) -> Self:
        if self.loss.name == "full_softmax" and not self.mask_accidental_hits:
            raise ValueError(
                "mask_accidental_hits = false: full_softmax sees every item once and has no accidental hits"
            )
        return self


class NegativesConfig(ConfigModel):
    """Which items a step's targets are compared with."""

    name: Literal["uniform", "log_uniform", "popularity"] = "uniform"
    """`uniform` over the catalogue; `log_uniform` in the popularity rank (item 1 is the most popular);
    `popularity`: how often an item occurs in training, to the power of `popularity_power`."""
    num_negatives: PositiveInt = 1280
    """N, negatives of a step, drawn with replacement and shared by all users of the step."""
    popularity_power: NonNegativeFloat = 1.0
    """Exponent on the counts of `popularity`; 0 is uniform over the items that occur in training."""
    log_q: bool = False
    """Subtract the log of the sampling probability from the logits, which makes sampled softmax an estimate of the
    full one. Without effect for `uniform`."""
