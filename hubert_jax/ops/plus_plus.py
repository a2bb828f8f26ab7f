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
    nearest_NR = jnp.full((rows.num_rows, num_restarts), jnp.inf)
    return _choose(rows, centers_RCD, nearest_NR, jnp.arange(num_codes), num_codes, uniform_CRL)


def refill(sample_ND, centers_CD, kept_C, uniform_C1L) -> jax.Array:
    """The centres with those not in `kept_C` chosen anew among the rows."""
    rows = _Rows(sample_ND)
    nearest_N = jnp.min(jnp.where(kept_C, rows.distances(centers_CD), jnp.inf), axis=1)
    empty_first_C = jnp.argsort(kept_C)
    num_empty = jnp.sum(~kept_C)
    centers_1CD, nearest_N1 = centers_CD[None], nearest_N[:, None]
    return _choose(rows, centers_1CD, nearest_N1, empty_first_C, num_empty, uniform_C1L)[0]


def swap(sample_ND, centers_CD, uniform_SL) -> jax.Array:
    """The centres after S attempts to do better without the one that is missed least.

    Holds the sample's N x C distances.
    """
    rows = _Rows(sample_ND)
    valid_N = rows.valid_N1[:, 0]
    codes_C1 = jnp.arange(len(centers_CD))[:, None]

    def attempt(index, state):
        centers_CD, distances_CN = state
        nearest_N = jnp.min(distances_CN, axis=0)
        code_N = jnp.min(jnp.where(distances_CN == nearest_N, codes_C1, len(centers_CD)), axis=0)
        second_N = jnp.min(jnp.where(codes_C1 == code_N, jnp.inf, distances_CN), axis=0)
        loss_C = jnp.zeros(len(centers_CD)).at[code_N].add(valid_N * (second_N - nearest_N))
        out = jnp.argmin(loss_C)
        without_N = jnp.where(code_N == out, second_N, nearest_N)
        candidates_LD, distances_NL = rows.draw(
            (valid_N * without_N)[:, None], uniform_SL[index][None]
        )
        total_L = valid_N @ jnp.minimum(without_N[:, None], distances_NL)
        best = jnp.argmin(total_L)
        is_better = total_L[best] < valid_N @ nearest_N
        center_D = jnp.where(is_better, candidates_LD[best], centers_CD[out])
        column_N = jnp.where(is_better, distances_NL[:, best], distances_CN[out])
        return centers_CD.at[out].set(center_D), distances_CN.at[out].set(column_N)

    state = (centers_CD, rows.distances(centers_CD).T)
    uniform_SL = jnp.asarray(uniform_SL)
    return jax.lax.fori_loop(0, len(uniform_SL), attempt, state)[0]


class _Rows:
    """The sample around its mean, rows filled up to a whole number of groups."""

    def __init__(self, sample_ND):
        self.rows_ND = jnp.asarray(sample_ND, jnp.float32)
        num_rows = len(sample_ND)
        self.num_groups = 2 ** math.ceil(math.log2(num_rows) / 2)
        filling = -num_rows % self.num_groups
        self.num_rows = num_rows + filling
        self.valid_N1 = (jnp.arange(self.num_rows) < num_rows)[:, None].astype(jnp.float32)
        self.offset_D = jnp.mean(self.rows_ND, axis=0)
        self.shifted_ND = jnp.pad(self.rows_ND - self.offset_D, ((0, filling), (0, 0)))
        self.squares_N1 = jnp.sum(self.shifted_ND * self.shifted_ND, axis=1, keepdims=True)

    def distances(self, points_PD):
        """Squared distances, N x P. What may be rounding alone is 0: no row is chosen twice."""
        shifted_PD = points_PD - self.offset_D
        squares_NP = self.squares_N1 + jnp.sum(shifted_PD * shifted_PD, axis=1)
        products_NP = jnp.matmul(self.shifted_ND, shifted_PD.T, precision=EXACT)
        distances_NP = squares_NP - 2.0 * products_NP
        return jnp.where(distances_NP > 1e-6 * squares_NP, distances_NP, 0.0)

    def draw(self, weights_NR, uniform_RL):
        """Candidates drawn in proportion to weight, P x D, and every row's distance from them."""
        weights_MGR = weights_NR.reshape(-1, self.num_groups, weights_NR.shape[1])
        candidates_PD = self.rows_ND[_draw(weights_MGR, uniform_RL).reshape(-1)]
        return candidates_PD, self.distances(candidates_PD)


def _choose(rows: _Rows, centers_RCD, nearest_NR, slots_C, num_slots, uniform_CRL) -> jax.Array:
    """Fills the centres at the first `num_slots` of `slots_C`, one after the other."""
    shape_RL = uniform_CRL.shape[1:]
    each_R = jnp.arange(shape_RL[0])

    def step(index, state):
        centers_RCD, nearest_NR = state
        weights_NR = rows.valid_N1 * jnp.where(jnp.isinf(nearest_NR), 1.0, nearest_NR)
        candidates_PD, distances_NP = rows.draw(weights_NR, uniform_CRL[index])
        left_NRL = jnp.minimum(nearest_NR[..., None], distances_NP.reshape(-1, *shape_RL))
        best_R = jnp.argmin(jnp.sum(rows.valid_N1[..., None] * left_NRL, axis=0), axis=1)
        chosen_RD = candidates_PD.reshape(*shape_RL, -1)[each_R, best_R]
        return centers_RCD.at[:, slots_C[index]].set(chosen_RD), left_NRL[:, each_R, best_R]

    uniform_CRL = jnp.asarray(uniform_CRL)
    return jax.lax.fori_loop(0, num_slots, step, (centers_RCD, nearest_NR))[0]


def _draw(weights_MGR, uniform_RL) -> jax.Array:
    """Rows with probability proportional to weight: first a group of rows, then one of it."""
    num_groups = weights_MGR.shape[1]
    each_R1 = jnp.arange(len(uniform_RL))[:, None]
    upto_RG = jnp.cumsum(jnp.sum(weights_MGR, axis=0).T, axis=1)
    target_RL = uniform_RL * upto_RG[:, -1:]
    group_RL = jnp.argmax(upto_RG[:, None] > target_RL[..., None], axis=2)
    weights_RLM = jnp.moveaxis(weights_MGR[:, group_RL, each_R1], 0, 2)
    before_RL = upto_RG[each_R1, group_RL] - jnp.sum(weights_RLM, axis=2)
    upto_RLM = before_RL[..., None] + jnp.cumsum(weights_RLM, axis=2)
    row_RL = jnp.argmax(upto_RLM > target_RL[..., None], axis=2)
    return row_RL * num_groups + group_RL
