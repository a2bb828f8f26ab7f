# SPDX-License-Identifier: Apache-2.0
"""How fast everything is, beside the peers that are installed: `hubert bench`.

`timing` lets contenders take turns in one process; each other file knows one kind of work, ours and
theirs; `counts` are the operations that the work takes.
"""
