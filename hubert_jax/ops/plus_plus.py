# SPDX-License-Identifier: Apache-2.0
"""k-means++: centres drawn from the data, each far from those before it; and swaps.

Every new centre is the best of 2 + log2(C) candidates, which are drawn with probability
proportional to their squared distance from the nearest centre so far (Arthur and Vassilvitskii,
2007, section 5: the greedy form). All restarts go in step, so that one matmul a centre gives the
distances of all candidates of all restarts. Swaps (Lattanzi and Sohler, 2019) then move a centre
of little use, one of two in the same cluster, to where one is missing; Lloyd's passes cannot.

N rows, D width, C codes, R restarts, L candidates, S swaps, P points (R x L), G groups of M rows
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

EXACT = jax.lax.Precision.HIGHEST


def draws(random: np.random.Generator, *, num_codes: int, num_restarts: int) -> np.ndarray:
    """Uniform numbers that choose the candidates, C x R x L: all the chance that seeding needs."""
    return random.random((num_codes, num_restarts, num_candidates(num_codes)), np.float32)


def num_candidates(num_codes: int) -> int:
    return 2 + int(math.log2(num_codes))


def seed(sample_ND, uniform_CRL) -> jax.Array:
    """R independent choices of C centres among the rows: R x C x D."""
    rows = _Rows(sample_ND)
    num_codes, num_restarts, _ = uniform_CRL.shape
    centers_RCD = jnp.zeros((num_restarts, num_codes, sample_ND.shape[1]))
    # Nothing is near a centre yet; infinity also makes the first draw an even one.
    nearest_MG = jnp.where(rows.valid_MG, jnp.inf, 0.0)
    nearest_RMG = jnp.broadcast_to(nearest_MG, (num_restarts, *nearest_MG.shape))
    return _choose(rows, centers_RCD, nearest_RMG, jnp.arange(num_codes), num_codes, uniform_CRL)


def refill(sample_ND, centers_CD, kept_C, uniform_C1L) -> jax.Array:
    """The centres with those not in `kept_C` chosen anew among the rows."""
    rows = _Rows(sample_ND)
    distances_CMG = jnp.where(kept_C[:, None, None], rows.distances(centers_CD), jnp.inf)
    nearest_MG = jnp.where(rows.valid_MG, jnp.min(distances_CMG, axis=0), 0.0)
    empty_first_C = jnp.argsort(kept_C)
    num_empty = jnp.sum(~kept_C)
    return _choose(
        rows, centers_CD[None], nearest_MG[None], empty_first_C, num_empty, uniform_C1L
    )[0]  # fmt: skip


def swap(sample_ND, centers_CD, uniform_SL) -> jax.Array:
    """The centres after S attempts to do better without the one that is missed least.

    Holds the sample's C x N distances.
    """
    rows = _Rows(sample_ND)
    codes_C11 = jnp.arange(len(centers_CD))[:, None, None]

    def nearest_two(distances_CMG):
        nearest_MG = jnp.min(distances_CMG, axis=0)
        code_MG = jnp.min(
            jnp.where(distances_CMG == nearest_MG, codes_C11, len(centers_CD)), axis=0
        )
        second_MG = jnp.min(jnp.where(codes_C11 == code_MG, jnp.inf, distances_CMG), axis=0)
        return code_MG, nearest_MG, second_MG

    def attempt(index, state):
        centers_CD, distances_CMG, (code_MG, nearest_MG, second_MG) = state
        loss_C = jnp.zeros(len(centers_CD)).at[code_MG].add(second_MG - nearest_MG)
        out = jnp.argmin(loss_C)
        without_MG = jnp.where(code_MG == out, second_MG, nearest_MG)
        candidates_LD, distances_LMG = rows.draw(without_MG[None], uniform_SL[index][None])
        total_L = jnp.sum(jnp.minimum(without_MG, distances_LMG), axis=(1, 2))
        best = jnp.argmin(total_L)
        is_better = total_L[best] < jnp.sum(nearest_MG)
        center_D = jnp.where(is_better, candidates_LD[best], centers_CD[out])
        row_MG = jnp.where(is_better, distances_LMG[best], distances_CMG[out])
        distances_CMG = distances_CMG.at[out].set(row_MG)
        two = jax.lax.cond(is_better, nearest_two, lambda _: state[2], distances_CMG)
        return centers_CD.at[out].set(center_D), distances_CMG, two

    distances_CMG = rows.distances(centers_CD)
    state = (centers_CD, distances_CMG, nearest_two(distances_CMG))
    uniform_SL = jnp.asarray(uniform_SL)
    return jax.lax.fori_loop(0, len(uniform_SL), attempt, state)[0]


class _Rows:
    """The sample around its mean, row m * G + g being row m of group g.

    Rows that fill up the groups have distance 0 to everything: no sum counts them, no draw finds
    them.
    """

    def __init__(self, sample_ND):
        self.rows_ND = jnp.asarray(sample_ND, jnp.float32)
        num_rows = len(sample_ND)
        num_groups = 2 ** math.ceil(math.log2(num_rows) / 2)
        filling = -num_rows % num_groups
        self.offset_D = jnp.mean(self.rows_ND, axis=0)
        self.shifted_ND = jnp.pad(self.rows_ND - self.offset_D, ((0, filling), (0, 0)))
        squares_N = jnp.sum(self.shifted_ND * self.shifted_ND, axis=1)
        self.squares_MG = squares_N.reshape(-1, num_groups)
        self.valid_MG = (jnp.arange(num_rows + filling) < num_rows).reshape(-1, num_groups)

    def distances(self, points_PD):
        """Squared distances, P x M x G. What may be rounding alone is 0: no row is chosen twice."""
        shifted_PD = points_PD - self.offset_D
        squares_P = jnp.sum(shifted_PD * shifted_PD, axis=1)
        products_PN = jnp.matmul(shifted_PD, self.shifted_ND.T, precision=EXACT)
        squares_PMG = self.squares_MG + squares_P[:, None, None]
        distances_PMG = squares_PMG - 2.0 * products_PN.reshape(squares_PMG.shape)
        is_apart_PMG = self.valid_MG & (distances_PMG > 1e-6 * squares_PMG)
        return jnp.where(is_apart_PMG, distances_PMG, 0.0)

    def draw(self, weights_RMG, uniform_RL):
        """Candidates drawn in proportion to weight, P x D, and every row's distance from them."""
        candidates_PD = self.rows_ND[_draw(weights_RMG, uniform_RL).reshape(-1)]
        return candidates_PD, self.distances(candidates_PD)


def _choose(rows: _Rows, centers_RCD, nearest_RMG, slots_C, num_slots, uniform_CRL) -> jax.Array:
    """Fills the centres at the first `num_slots` of `slots_C`, one after the other."""
    shape_RL = uniform_CRL.shape[1:]
    each_R = jnp.arange(shape_RL[0])

    def step(index, state):
        centers_RCD, nearest_RMG = state
        weights_RMG = jnp.where(jnp.isinf(nearest_RMG), 1.0, nearest_RMG)
        candidates_PD, distances_PMG = rows.draw(weights_RMG, uniform_CRL[index])
        distances_RLMG = distances_PMG.reshape(*shape_RL, *rows.valid_MG.shape)
        left_RLG = jnp.sum(jnp.minimum(nearest_RMG[:, None], distances_RLMG), axis=2)
        best_R = jnp.argmin(jnp.sum(left_RLG, axis=2), axis=1)
        chosen_RD = candidates_PD.reshape(*shape_RL, -1)[each_R, best_R]
        nearest_RMG = jnp.minimum(nearest_RMG, distances_RLMG[each_R, best_R])
        return centers_RCD.at[:, slots_C[index]].set(chosen_RD), nearest_RMG

    uniform_CRL = jnp.asarray(uniform_CRL)
    return jax.lax.fori_loop(0, num_slots, step, (centers_RCD, nearest_RMG))[0]


def _draw(weights_RMG, uniform_RL) -> jax.Array:
    """Rows with probability proportional to weight: first a group of rows, then one of it."""
    num_groups = weights_RMG.shape[2]
    each_R1 = jnp.arange(len(uniform_RL))[:, None]
    upto_RG = jnp.cumsum(jnp.sum(weights_RMG, axis=1), axis=1)
    target_RL = uniform_RL * upto_RG[:, -1:]
    group_RL = jnp.argmax(upto_RG[:, None] > target_RL[..., None], axis=2)
    weights_RLM = weights_RMG[each_R1, :, group_RL]
    before_RL = upto_RG[each_R1, group_RL] - jnp.sum(weights_RLM, axis=2)
    upto_RLM = before_RL[..., None] + jnp.cumsum(weights_RLM, axis=2)
    row_RL = jnp.argmax(upto_RLM > target_RL[..., None], axis=2)
    return row_RL * num_groups + group_RL
