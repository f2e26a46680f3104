"""Several processes that train one model: which one this is, and what they agree on, by JAX's store.

A command joins them, and fills `group`; with one process all functions answer at once. This file
loads without JAX.
"""

import contextlib
import itertools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError

MISTAKE = 2  # the exit code of an error that the user can mend
RESTART = 75  # the exit code that asks for a restart, EX_TEMPFAIL of sysexits.h
# The variables by which Kubeflow's Trainer tells a process of its place.
ANNOUNCED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FOREVER = 7 * 24 * 3600  # seconds: process 0 may read a large corpus first


class _Group:
    """This process's place among the others. `client`: of JAX's service, None with one process."""

    client: Any = None
    process = 0
    processes = 1
    machines = 1
    ending = threading.Lock()


group = _Group()
# for each topic, the numbers of its keys in JAX's store
_calls: defaultdict[str, itertools.count] = defaultdict(itertools.count)


class Announced(NamedTuple):
    """Where process 0 listens, how many processes there are, and which this is."""

    coordinator: str
    processes: int
    process: int


def announced() -> Announced | None:
    """Returns what the variables of Kubeflow's Trainer say: JAX itself reads only the first; None
    without them.

    Raises UserError where one is missing or no number that it can be.
    """
    values = [os.environ.get(name, "") for name in ANNOUNCED]
    if not values[1]:
        return None
    for name, value in zip(ANNOUNCED, values):
        if not value:
            raise UserError(
                f"{ANNOUNCED[1]} is set, and {name} is not: a process needs all of {', '.join(ANNOUNCED)}."
            )
    coordinator, processes, process = values
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise UserError(
            f"{ANNOUNCED[2]}={process} is one of 0 to {ANNOUNCED[1]} - 1, and {ANNOUNCED[1]} is {processes}."
        )
    return Announced(coordinator, int(processes), int(process))


def in_cluster() -> bool:
    """Returns whether Kubeflow's Trainer, SLURM, Open MPI or a TPU slice started several processes, of
    which this is one.
    """
    kubeflow = announced()
    if kubeflow and kubeflow.processes > 1:
        return True
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            return True
    from jax._src import cloud_tpu_init, clusters

    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    for cluster in clusters.ClusterEnv._cluster_types:
        if "tpu" in cluster.name and cluster.is_env_present() and cluster.get_process_count() > 1:
            return True
    return False


def refuse_cluster(what: str) -> None:
    """Raises UserError for a command of one process when a cluster started several."""
    if in_cluster():
        raise UserError(
            f"{what} runs in one process and the cluster started several: "
            "ask it for one, as in srun --ntasks=1."
        )


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    return group.process == 0


def process_count() -> int:
    return group.processes


def machine_count() -> int:
    return group.machines


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Lets process 0 through the block before all others, which find in their caches what it made."""
    if not is_first():
        gather_strings()
    yield
    if is_first():
        gather_strings()


def gather_strings(value: str = "", topic: str = "run") -> list[str]:
    """Returns every process's value, in every process, once all have called this. Threads need a
    topic each.
    """
    if group.client is None:
        return [value]
    key = f"thrice/{topic}/{next(_calls[topic])}"
    client = group.client
    if is_first():
        values = [value]
        for process in range(1, group.processes):
            values.append(client.blocking_key_value_get(f"{key}/{process}", 1000 * FOREVER))
        client.key_value_set(key, json.dumps(values))
        return values
    client.key_value_set(f"{key}/{group.process}", value)
    return json.loads(client.blocking_key_value_get(key, 1000 * FOREVER))


def refuse_differences(facts: dict[str, str]) -> None:
    """Raises the same UserError in every process when the facts of one differ from process 0's,
    naming which and where.
    """
    first, *others = map(json.loads, gather_strings(json.dumps(facts)))
    for process, other in enumerate(others, 1):
        differing = [name for name in first | other if other.get(name) != first.get(name)]
        if differing:
            name, *more_names = differing
            more = ""
            if more_names:
                more = f", and another {', '.join(more_names[:3])}"
            raise UserError(
                f"Process {process} has another {name} ({other.get(name)}) than process 0 "
                f"({first.get(name)}){more}. All processes of a run must have the same flags and data."
            )


def refuse_unshared(folder: Path) -> None:
    """Raises UserError in every process when one does not see what process 0 writes in `folder`."""
    if group.client is None:
        return
    where = gather_strings(str(folder.absolute()))[0]
    mark = folder / gather_strings(f".shared-{os.getpid()}-{time.time_ns()}")[0]
    if is_first():
        mark.touch()
    gather_strings()  # the mark is there before any process looks
    own_answer = ""
    if mark.exists():
        own_answer = "seen"
    answers = gather_strings(own_answer)
    if is_first():
        mark.unlink()
    blind = [str(process) for process, answer in enumerate(answers) if not answer]
    if blind:
        raise UserError(
            f"{where} is not shared: process {', '.join(blind)} does not see what process 0 writes there. "
            "Choose an output folder on a file system that all hosts mount."
        )


def gather_numbers(*numbers: float) -> list[list[float]]:
    """Returns the float32 `numbers` of every process, (processes, numbers), in every process. One
    collective.
    """
    if group.client is None:
        return [[*numbers]]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(np.array(numbers, np.float32)).tolist()
