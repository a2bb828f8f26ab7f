# SPDX-License-Identifier: Apache-2.0
"""Files to numpy arrays and back; no model, no device."""
