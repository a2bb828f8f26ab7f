# SPDX-License-Identifier: Apache-2.0
"""The project on several processes: one of them is killed, alone or with all the others at once.

Alone: the others lose it, and must end by themselves soon after `--heartbeat_timeout`.
"""

import pathlib
import random
import socket
import time
from collections.abc import Sequence

from tests.chaos.project import HANGS, Change, Project, Ran, Running, draw

HEARTBEAT_SECONDS = 10
ENDS_SECONDS = 6 * HEARTBEAT_SECONDS  # of the others; at most so long after the one
STAGES = (
    "prepare", "features", "cluster", "label", "pretrain", "features of a layer",
    "cluster of a layer", "label by a layer",
)  # fmt: skip


class SeveralProcesses(Project):
    """As Project; `run` starts all processes. A moment is PROCESS/N:SECONDS, or .../alone."""

    def __init__(
        self,
        base: pathlib.Path,
        num_processes: int,
        *,
        stages: Sequence[str] = STAGES,
        xla_flags: str = "",
    ):
        super().__init__(base, stages=stages, xla_flags=xla_flags)
        self.num_processes = num_processes
        self.changes_of: dict[str, list[list[Change]]] = {}  # by stage and process
        self.longest = 0.0  # seconds between the kill of one alone and the end of the others

    def notes(self) -> list[str]:
        return [
            f"{self.num_processes} processes; after the kill of one alone the others ended within"
            f" {self.longest:.1f} s"
        ]

    def run(self, stage: str, *more: str, CHAOS_KILL: str = "", **environment: str) -> Ran:
        which, _, moment = CHAOS_KILL.removesuffix("/alone").partition("/")
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": str(self.num_processes),
        }
        options = [f"--heartbeat_timeout={HEARTBEAT_SECONDS}", *more]
        runs = []
        try:
            for process in range(self.num_processes):
                kill = moment if str(process) == which else ""
                more_of_it = {"JAX_PROCESS_ID": str(process), "CHAOS_KILL": kill}
                runs.append(self.start(stage, *options, **environment, **more_of_it))
            is_killed = which and runs[int(which)].wait().code == -9
            if is_killed and CHAOS_KILL.endswith("/alone"):
                killed = time.monotonic()
                for run in runs:
                    run.wait(ENDS_SECONDS)
                self.longest = max(self.longest, time.monotonic() - killed)
            elif is_killed:
                stop(runs)
            ended = [run.wait() for run in runs]
        finally:
            stop(runs)
        if not which:
            self.changes_of.setdefault(stage, [ran.changes for ran in ended])
        codes = [ran.code for ran in ended]
        if is_killed and HANGS not in codes:
            codes = [-9]
        return Ran(
            HANGS if HANGS in codes else next(filter(None, codes), 0),
            "\n".join(f"process {number}:\n{ran.output}" for number, ran in enumerate(ended)),
            [change for ran in ended for change in ran.changes],
        )

    def draw(self, stage: str, way: str, rng: random.Random) -> str:
        changes = self.changes_of[stage]
        process = rng.choice([number for number, found in enumerate(changes) if found])
        alone = rng.choice(["", "/alone"])
        return f"{process}/{draw(changes[process], way, rng)}{alone}"


def stop(runs: Sequence[Running]) -> None:
    """Those that are still at work."""
    for run in runs:
        if run.process.poll() is None:
            run.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
