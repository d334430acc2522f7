"""EIMF: a behaviour backbone trained with two auxiliary tasks on what a language model said about exemplar users.

arXiv 2411.09410v2. Serving needs the backbone alone: `encode` is the backbone's, no text is read.

    loss  = L_R + gamma (L_S + L_A)                                                                  (15)
    L_R     the backbone's own loss, its regularisers included                                       (13, 14)
    h_im  = sum_k softmax_k(e_i . v_k / sqrt(D)) v_k      v: behaviour interests, e_i: the target's row    (6)
    h_t   = SelfAttention(h_ex)                           h_ex: interests of the user's exemplar     (7)
    h_exv = sum_m softmax_m(e_t . h_t / sqrt(S)) h_t      e_t: text vector of the target             (8)
    L_S   = -log softmax over items of h_exv . e_t                                                   (9)
    L_A   = alpha (CL(h_exv, h_im) + CL(e_t, e_i)) + beta (Cos(h_exv, h_im) + Cos(e_t, e_i))         (10 - 12)

Where the printed equations cannot be meant: (13) prints h_ex for h_im; (9) and (14) lack a minus; the T of e_i^T is
"target", not a transpose; (12) must compare the pooled vectors, because the numbers of interests differ.

What the paper does not print is a switch of `Config`, whose docstring says what the paper has instead: where the
semantic side works and how widths are bridged (`text_width`, `projection`, `alignment_space`), the attentions
(`num_heads`, `residual`, `attention_projections`, `attention_scale`), the items of L_S (`prediction_candidates`,
`mask_accidental_hits`), the contrast (`temperature`, `both_directions`, `mask_equal_targets`), and which behaviour
vector each loss sees (`alignment_read_out`, `recommendation_read_out`). Items without text take no part in L_S and in
the item half of L_A.

With `gamma = 0` the loss is the backbone's and the auxiliary parameters are frozen; their first values are drawn after
the backbone's, so the run equals the plain backbone's bit for bit (`recommendation_read_out` being the backbone's).

Shapes:  B users, G users of the global step, K interests, M semantic interests, N negatives, D item width, T text
width, S width of the semantic side (D or T), A width of the alignment (D or T).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from distributed_mi.core.config import Component, ConfigModel
from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.embeddings.table import ItemTable
from distributed_mi.losses.contrastive import cosine_distance, info_nce
from distributed_mi.losses.full_softmax import full_softmax
from distributed_mi.losses.read_out import hard_read_out, soft_read_out
from distributed_mi.losses.sampled_softmax import sampled_softmax
from distributed_mi.models.base import (
    HistoryBatch,
    LossTerms,
    Recommender,
    SemanticBatch,
    StepRows,
    TrainBatch,
    UserState,
)
from distributed_mi.models.layers import SelfAttention


class Backbone(Component):
    """The behaviour model, with its own fields beside the name."""

    kind: ClassVar[str] = "model"

    name: str = "remi"
    """File name under `distributed_mi/models`, or `package.module:Class`; any model with a loss but this one."""


@dataclass(frozen=True)
class SemanticView:
    """What the auxiliary tasks read of the semantic side.

    Args:
        interest_BS: pooled semantic interest of each user.
        target_BS: text of the target.
        negative_NS: texts of the shared negatives.
        aligned_interest_BA: the first at the width of the alignment.
        aligned_target_BA: the second at the width of the alignment.
    """

    interest_BS: Tensor
    target_BS: Tensor
    negative_NS: Tensor
    aligned_interest_BA: Tensor
    aligned_target_BA: Tensor


class EIMF(Recommender):
    """A backbone aligned with semantic interests; see the module docstring for paper and corrections."""

    requires_semantics = True

    class Config(ConfigModel):
        """The backbone, the weights of the auxiliary tasks, and every choice that the paper does not print."""

        backbone: Backbone = Backbone()
        """The behaviour model and its fields (`[train.model.backbone]`)."""
        gamma: NonNegativeFloat = 0.1
        """Weight of both auxiliary tasks. 0 trains the backbone alone."""
        alpha: NonNegativeFloat = 0.4
        """Weight of the contrastive part of the alignment; the paper keeps alpha + beta = 0.5."""
        beta: NonNegativeFloat = 0.1
        """Weight of the cosine part of the alignment."""
        temperature: PositiveFloat = 0.1
        """tau of the contrast; (10) has it, its value is not printed."""
        text_width: Literal["item", "text"] = "item"
        """Where the semantic side works. `item`: text is projected to the item width first. `text`: attention and
        prediction at text width, projection for the alignment only; the self-attention then has (T / D)^2 times the
        parameters. The paper keeps (7) and (8) at text width and prints no projection at all, although (12) compares
        vectors of both widths."""
        projection: Literal["shared", "separate"] = "shared"
        """One projection between the widths for users' interests and items, or one each; not printed."""
        alignment_space: Literal["item", "text"] = "item"
        """Which way L_A bridges the widths; not printed. `item`: texts are projected to the item width. `text`:
        behaviour interests and item rows are projected to the text width; needs `text_width = "text"`."""
        num_heads: PositiveInt = 1
        """Heads of the self-attention over semantic interests; must divide its width. Not printed."""
        residual: bool = True
        """Add the input of the self-attention to its output. Not printed."""
        attention_projections: bool = True
        """Project queries, keys, values and output of the self-attention, as is usual; (7) prints
        SelfAttention(h_ex, h_ex, h_ex) and no more. False: plain attention without parameters; at `text_width = "text"`
        L_S then has nothing to train, so it must be off."""
        attention_scale: bool = True
        """Divide the scores of the target-aware attentions by the square root of their width; (6) and (8) print no form
        of the attention. Without it the attention is nearly hard at `text_width = "text"`, and a difference of 1e-8 in
        the first values grew to 1e-2 in L_S within 20 steps; one and two workers then agree that far only."""
        prediction: bool = True
        """Use L_S. False: the ablation without semantic prediction."""
        prediction_candidates: Literal["sampled", "all"] = "sampled"
        """Items of the softmax in L_S; (9) sums over items k and does not say which. `sampled`: the target and the
        step's shared negatives. `all`: every item that has a text; each worker's device then holds the text vectors of
        the whole catalogue (V x T float32), and a step projects all of them (losses/full_softmax.py says what it
        costs)."""
        alignment: bool = True
        """Use L_A. False: the ablation without alignment."""
        alignment_read_out: Literal["soft", "hard"] = "soft"
        """Behaviour vector in L_A: target-aware attention as (6) and (12) print, or the interest nearest the target,
        which is what the loss of a backbone with several interests selects."""
        recommendation_read_out: Literal["backbone", "soft"] = "backbone"
        """Behaviour vector in L_R. `backbone`: its own, so that training matches serving. `soft`: the target-aware
        attention of (6), as (13) reads with its misprint corrected, so that L_R and L_A see the same vector; this holds
        for `gamma = 0` too."""
        both_directions: bool = False
        """Also contrast the behaviour side against all texts and average; (10) prints text against all behaviour."""
        mask_equal_targets: bool = True
        """Leave out of the contrast other users of the step with the same target, who are no negatives; (10) sums over
        all users of the batch."""
        mask_accidental_hits: bool = True
        """Leave out of L_S sampled negatives that equal a user's target; not printed."""

    def __init__(self, config: Config, *, items: ItemTable, max_history: int, text_dim: int = 0) -> None:
        super().__init__(config, items=items, max_history=max_history, text_dim=text_dim)
        backbone_class = config.backbone.resolve()
        if not backbone_class.has_loss or backbone_class.requires_semantics:
            raise ConfigError(
                f"eimf: {config.backbone.name} cannot be the backbone; take remi, comirec_sa, ..."
            )
        settings = config.backbone.settings("model.backbone")
        self.backbone: Recommender = backbone_class(settings, items=items, max_history=max_history)
        self.semantic = SemanticSide(config, dim=items.dim, text_dim=text_dim)
        if config.gamma == 0:
            self.semantic.requires_grad_(False)
        if config.recommendation_read_out == "soft" and self.backbone.num_interests > 1:
            if self.backbone.read_out is None:
                raise ConfigError(
                    f"eimf: the loss of {config.backbone.name} has no read_out to replace; set "
                    'recommendation_read_out = "backbone"'
                )
            self.backbone.read_out = self._soft_behaviour

    @property
    def reads_negatives(self) -> bool:
        """The backbone's; L_S reads texts of the negatives, no rows."""
        return self.backbone.reads_negatives

    @property
    def reads_log_q(self) -> bool:
        """Whether the backbone does, or L_S over sampled items."""
        config = self.config
        sampled = config.gamma and config.prediction and config.prediction_candidates == "sampled"
        return self.backbone.reads_log_q or bool(sampled)

    @property
    def reads_catalogue_text(self) -> bool:
        """Whether L_S is a softmax over all items."""
        config = self.config
        return bool(config.gamma and config.prediction and config.prediction_candidates == "all")

    @property
    def num_interests(self) -> int:
        """The backbone's."""
        return self.backbone.num_interests

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        """The backbone's; no text is read."""
        return self.backbone.encode_rows(history, history_rows_BLD)

    def loss_from_rows(self, batch: TrainBatch, rows: StepRows) -> tuple[UserState, LossTerms]:
        """The backbone's terms, and `semantic` (L_S) and `alignment` (L_A) with gamma applied.

        Raises:
            InputError: gamma is not 0 and the batch has no semantic side.
        """
        state, terms = self.backbone.loss_from_rows(batch, rows)
        config = self.config
        if config.gamma == 0:
            return state, terms
        if batch.semantics is None:
            raise InputError(
                "eimf: the batch has no semantic interests; run the stages embed, exemplars, interests"
            )
        has_text_B = batch.semantics.target_text_BT.any(dim=1)
        view = self.semantic(batch.semantics)
        mean = dict(terms.mean)
        if config.prediction:
            mean["semantic"] = config.gamma * has_text_B * self._prediction(batch, batch.semantics, view)
        if config.alignment:
            mean["alignment"] = config.gamma * self._alignment(batch, rows, state, view, has_text_B)
        return state, LossTerms(mean=mean, sum=terms.sum)

    def _prediction(self, batch: TrainBatch, semantics: SemanticBatch, view: SemanticView) -> Tensor:
        """L_S `[B]` (equation 9 over the target and the shared negatives, or over all items)."""
        if self.config.prediction_candidates == "all":
            if semantics.catalogue_text_VT is None:
                raise InputError(
                    "eimf: prediction_candidates is all but the batch has no text of the catalogue"
                )
            return full_softmax(
                view.interest_BS,
                view.target_BS,
                semantics.catalogue_text_VT,
                project=self.semantic.item_text,
            )
        return sampled_softmax(
            view.interest_BS,
            view.target_BS,
            view.negative_NS,
            target_ids_B=batch.target_ids_B,
            negative_ids_N=batch.negative_ids_N,
            mask_accidental_hits=self.config.mask_accidental_hits,
            target_log_q_B=batch.target_log_q_B,
            negative_log_q_N=batch.negative_log_q_N,
            negative_mask_N=semantics.negative_text_NT.any(dim=1),
        )

    def _alignment(
        self, batch: TrainBatch, rows: StepRows, state: UserState, view: SemanticView, has_text_B: Tensor
    ) -> Tensor:
        """L_A `[B]` (equations 10 to 12): users' interests, and items that have a text."""
        soft = self.config.alignment_read_out == "soft"
        read_out = self._soft_behaviour if soft else hard_read_out
        texts = (view.aligned_interest_BA, view.aligned_target_BA)
        behaviours = (read_out(state.interests_BKD, rows.target_BD), rows.target_BD)
        if self.config.alignment_space == "text":
            behaviours = self.semantic.bridge(*behaviours)
        user_B, item_B = self._contrast(batch, texts, behaviours)
        user_B = self.config.alpha * user_B + self.config.beta * cosine_distance(texts[0], behaviours[0])
        item_B = self.config.alpha * item_B + self.config.beta * cosine_distance(texts[1], behaviours[1])
        return user_B + has_text_B * item_B

    def _soft_behaviour(self, interests_BKD: Tensor, target_rows_BD: Tensor) -> Tensor:
        """h_im `[B, D]` (equation 6)."""
        return soft_read_out(target_rows_BD, interests_BKD, scale=self.config.attention_scale)

    def _contrast(
        self, batch: TrainBatch, texts: tuple[Tensor, Tensor], behaviours: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        """CL of the pair of users and of the pair of items, each `[B]`, against all users of the global step."""
        keys_B = batch.target_ids_B if self.config.mask_equal_targets else None
        keys_G = batch.gather(batch.target_ids_B) if self.config.mask_equal_targets else None

        def one_way(anchors: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]) -> list[Tensor]:
            gathered = batch.gather(torch.cat(candidates, dim=1)).chunk(2, dim=1)  # one exchange for both
            return [
                info_nce(
                    anchors_BD,
                    candidates_GD,
                    offset=batch.gather_offset,
                    temperature=self.config.temperature,
                    anchor_keys_B=keys_B,
                    candidate_keys_G=keys_G,
                )
                for anchors_BD, candidates_GD in zip(anchors, gathered, strict=True)
            ]

        forward = one_way(texts, behaviours)
        if not self.config.both_directions:
            return forward
        return [(f + b) / 2 for f, b in zip(forward, one_way(behaviours, texts), strict=True)]


class SemanticSide(nn.Module):
    """Bridge between the widths, self-attention and target-aware attention over texts. Not needed to serve."""

    def __init__(self, config: EIMF.Config, *, dim: int, text_dim: int) -> None:
        super().__init__()
        if text_dim < 1:
            raise ConfigError(
                "eimf: text vectors have no width; run the stages embed, exemplars and interests first"
            )
        width = dim if config.text_width == "item" else text_dim
        if width % config.num_heads:
            raise ConfigError(f"eimf: num_heads {config.num_heads} does not divide the width {width}")
        if config.alignment_space == "text" and config.text_width == "item":
            raise ConfigError('eimf: alignment_space = "text" needs text_width = "text"')
        if config.prediction and config.text_width == "text" and not config.attention_projections:
            raise ConfigError(
                'eimf: with text_width = "text" and attention_projections = false nothing is trained by L_S; '
                "set prediction = false too"
            )
        self.projects_first = config.text_width == "item"
        self.projects_last = config.text_width == "text" and config.alignment_space == "item"
        self.attention_scale = config.attention_scale
        widths = (text_dim, dim) if config.alignment_space == "item" else (dim, text_dim)
        self.interest_projection = nn.Linear(*widths)
        # None when shared: one module under two names would stand twice in a checkpoint.
        self.own_item_projection = nn.Linear(*widths) if config.projection == "separate" else None
        self.attention = SelfAttention(
            width,
            num_heads=config.num_heads,
            residual=config.residual,
            projections=config.attention_projections,
        )

    def bridge(self, interests: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of users' interests and of items at the other width."""
        return self.interest_projection(interests), (self.own_item_projection or self.interest_projection)(
            items
        )

    def item_text(self, text: Tensor) -> Tensor:
        """Texts of items at the width of the semantic side."""
        return (self.own_item_projection or self.interest_projection)(text) if self.projects_first else text

    def forward(self, batch: SemanticBatch) -> SemanticView:
        """Equations 7 and 8, and both vectors of the alignment."""
        interests = batch.interests_BMT
        if self.projects_first:
            interests = self.interest_projection(interests)
        target = self.item_text(batch.target_text_BT)
        attended = self.attention(interests, batch.interests_mask_BM)
        interest = soft_read_out(target, attended, batch.interests_mask_BM, scale=self.attention_scale)
        aligned_interest, aligned_target = interest, target
        if self.projects_last:
            aligned_interest, aligned_target = self.bridge(interest, target)
        return SemanticView(
            interest_BS=interest,
            target_BS=target,
            negative_NS=self.item_text(batch.negative_text_NT),
            aligned_interest_BA=aligned_interest,
            aligned_target_BA=aligned_target,
        )


MODEL = EIMF
