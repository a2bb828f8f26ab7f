# SPDX-License-Identifier: Apache-2.0
"""Files with anything in them, given to every reader: `make fuzz`."""
