# SPDX-License-Identifier: Apache-2.0
"""Kills, full disks and long runs: the real commands under what happens to them."""
