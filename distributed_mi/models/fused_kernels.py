"""Attentive pooling, read-out, sampled softmax and routing penalty of some users in one compiled call, with gradients.

Made of the kernels of `models.kernels` and `losses.kernels`, which have the formulas. Between two of them there is no
Python and no meeting of threads: users do not depend on each other before their gradients are added up.

Shapes:  B users in question, L history, N shared negatives, P real places of their histories, R rows, K interests, D
width, A inner width, M distances from the newest item.
"""

import numpy as np
from numba import njit

from distributed_mi.core.vector_math import gather
from distributed_mi.losses import kernels as losses
from distributed_mi.models import kernels as pooling


@njit(nogil=True, cache=True, error_model="numpy")
def loss_and_gradients(
    source_RD,
    slots_P,
    places_P,
    starts_B1,
    length,
    target_slots_B,
    negative_slots_N,
    positions_MD,
    inner_DA,
    bias_A,
    outer_KA,
    target_ids_B,
    ids_N,
    target_log_q_B,
    log_q_N,
    beta,
    window,
    loss_flow_B,
    routing_flow_B,
    loss_B,
    routing_B,
    grad_rows_PD,
    grad_target_BD,
):
    """Losses of some users, and gradients of all that they read.

    Args:
        source_RD: where rows are read.
        slots_P: which of them stand at the real places of these users' histories.
        places_P: of `models.kernels.find_places`, of these users.
        starts_B1: of it too; the first may be any number.
        length: L.
        target_slots_B: rows of the targets.
        negative_slots_N: rows of the negatives.
        positions_MD: vectors by distance; empty: none.
        inner_DA: W1.
        bias_A: b1; empty: none.
        outer_KA: W2, transposed.
        target_ids_B: ids of the targets; empty: a negative that is the user's target counts like any other.
        ids_N: ids of the negatives.
        target_log_q_B: see `losses.kernels.softmax_forward`.
        log_q_N: see there.
        beta: concentration of the softmax.
        window: length of the routing penalty.
        loss_flow_B: gradient of each loss.
        routing_flow_B: gradient of each penalty; empty: there is no penalty.
        loss_B: out.
        routing_B: out, where there is a penalty.
        grad_rows_PD: out.
        grad_target_BD: out.

    Returns:
        Gradients of negatives, positions, W1, b1 and W2 transposed; of positions and b1 zeros of some shape where
        there are none.
    """
    batch, dim = len(target_slots_B), source_RD.shape[1]
    inner_dim, num_interests = inner_DA.shape[1], len(outer_KA)
    starts_B1 = starts_B1 - starts_B1[0]
    target_BD = np.empty((batch, dim), np.float32)
    gather(source_RD, target_slots_B, target_BD)
    negative_ND = np.empty((len(negative_slots_N), dim), np.float32)
    gather(source_RD, negative_slots_N, negative_ND)
    rows_PD = np.empty((len(places_P), dim), np.float32)
    keys_PD = np.empty((len(places_P), dim), np.float32)
    hidden_PA = np.empty((len(places_P), inner_dim), np.float32)
    scores_KP = np.empty((num_interests, len(places_P)), np.float32)
    attention_BKL = np.zeros((batch, num_interests, length), np.float32)
    interests_BKD = np.zeros((batch, num_interests, dim), np.float32)
    pooling.forward(
        source_RD,
        slots_P,
        positions_MD,
        inner_DA,
        bias_A,
        outer_KA,
        places_P,
        starts_B1,
        rows_PD,
        keys_PD,
        hidden_PA,
        scores_KP,
        attention_BKL,
        interests_BKD,
    )
    best_B, query_BD = np.empty(batch, np.int64), np.empty((batch, dim), np.float32)
    losses.pick_closest(interests_BKD, target_BD, best_B, query_BD)
    kept_BN = np.empty((batch, len(negative_ND)), np.float32)
    probability_B, sums_2B = np.empty(batch, np.float32), np.empty((2, batch), np.float64)
    losses.softmax_forward(
        query_BD,
        target_BD,
        negative_ND,
        target_log_q_B,
        target_ids_B,
        ids_N,
        log_q_N,
        np.empty(0, np.bool_),
        beta,
        True,
        kept_BN,
        loss_B,
        probability_B,
        sums_2B,
    )
    grad_query_BD, grad_negative_ND = np.empty_like(query_BD), np.empty_like(negative_ND)
    losses.softmax_backward(
        query_BD,
        target_BD,
        negative_ND,
        loss_flow_B,
        probability_B,
        kept_BN,
        sums_2B,
        beta,
        True,
        np.empty_like(kept_BN),
        grad_query_BD,
        grad_target_BD,
        grad_negative_ND,
    )
    grad_interests_BKD = interests_BKD  # what stands there is not read any more
    losses.put_back(grad_query_BD, best_B, grad_interests_BKD)
    grad_attention_BKL = np.empty((batch if len(routing_flow_B) else 0, num_interests, length), np.float32)
    if len(routing_flow_B):
        mean_BK, cost_BK = np.empty((2, batch, num_interests), np.float32)
        losses.routing_forward(attention_BKL, dim, window, routing_B, mean_BK, cost_BK)
        losses.routing_backward(attention_BKL, mean_BK, cost_BK, routing_flow_B, dim, grad_attention_BKL)
    grad_positions_MD, grad_inner_DA = np.zeros_like(positions_MD), np.empty_like(inner_DA)
    grad_bias_A, grad_outer_KA = np.zeros(inner_dim, np.float32), np.zeros_like(outer_KA)
    pooling.backward(
        grad_interests_BKD,
        grad_attention_BKL,
        attention_BKL,
        rows_PD,
        inner_DA,
        outer_KA,
        places_P,
        starts_B1,
        keys_PD,
        hidden_PA,
        scores_KP,
        np.empty_like(hidden_PA),
        np.empty_like(keys_PD),
        grad_rows_PD,
        grad_positions_MD,
        grad_inner_DA,
        grad_bias_A,
        grad_outer_KA,
    )
    return grad_negative_ND, grad_positions_MD, grad_inner_DA, grad_bias_A, grad_outer_KA
