# SPDX-License-Identifier: Apache-2.0
"""The ground floor: arrays in, arrays out; numpy and jax only."""
