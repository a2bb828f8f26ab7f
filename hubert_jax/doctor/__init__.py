# SPDX-License-Identifier: Apache-2.0
"""What `hubert doctor` knows: facts are gathered, and findings are pure functions of facts."""
