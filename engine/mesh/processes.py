"""Several processes that train one model: they meet, agree on what they do, and end together.

JAX's coordination service, in process 0, holds their heartbeats and a key-value store. A process that ends says why under a
key that all others wait for, so they end within a second, with its exit code. One that is killed says nothing: its peers'
collectives fail, which becomes one sentence and the code RESTART, or JAX misses its heartbeat and aborts them (134).

With one process `join` is not called. This file loads without JAX, whose key-value store has no public name.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.format import duration

MISTAKE, RESTART = 2, 75  # exit codes: of an error that the user can mend; that asks for a restart, EX_TEMPFAIL of sysexits.h
HEARTBEAT = 8  # seconds without one until JAX gives a process up
TICK = 1.0  # seconds in which the others hear that one ends: process 0 stays as long, for the service ends with it
SAME_MISTAKE_SECONDS = 2.0  # in which process 0 meets a mistake of all, and prints it once
FOREVER = 7 * 24 * 3600  # seconds: process 0 may read a large corpus first
ENDED = "thrice/ended"  # the key of the one that ended first: its number, exit code and sentence
PEER_IS_GONE = re.compile(r"gloo|nccl|rccl|peer|socket|coordination|heartbeat|UNAVAILABLE|ABORTED|CANCELLED", re.IGNORECASE)


class _Group:
    """This process's place among the others. `client`: of JAX's service, None with one process."""

    client: Any = None
    process, processes, machines = 0, 1, 1
    ending = threading.Lock()


group = _Group()
_calls: defaultdict[str, itertools.count] = defaultdict(itertools.count)  # a topic -> the numbers of its keys


def join(coordinator: str | None, processes: int | None, process: int | None, seconds: float) -> None:
    """Joins the processes of a run, before JAX's backend starts; None: as the cluster says.

    Ends this process when not all have met within `seconds`, where JAX would abort it. Raises UserError when JAX cannot start
    its service or find the cluster, and when the processes count themselves differently.
    """
    import jax
    from jax._src.distributed import global_state

    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"The coordinator {address} has no port: JAX_COORDINATOR_ADDRESS wants HOST:PORT.")
    if jax.config.jax_distributed_verify_secure_credentials and not jax.config.jax_mtls_cert_file:  # JAX would abort
        raise UserError(
            "JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS wants JAX_MTLS_CERT_FILE, JAX_MTLS_KEY_FILE and JAX_MTLS_CA_FILE."
        )
    if coordinator and process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _refuse_taken(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would replace our handler of SIGTERM
    missing = (
        f"Not all{f' {processes}' if processes else ''} processes met{f' at {address}' if address else ''} within "
        f"{duration(seconds)}: start each once, with its own --process and the same --processes, process 0 at that address."
    )
    timer = threading.Timer(seconds, _leave, (MISTAKE, missing))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=FOREVER, heartbeat_timeout_seconds=HEARTBEAT
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"This process cannot join the others: {error}. Give --coordinator HOST:PORT --processes N --process I: all of "
            "them the same address, and each its own number."
        ) from error
    finally:
        timer.cancel()
    group.client, group.process, group.processes = global_state.client, global_state.process_id, global_state.num_processes
    threading.Thread(target=_watch, args=(group.client,), daemon=True, name="peers").start()
    refuse_differences({"--processes": str(group.processes)})
    group.machines = len({*gather_strings(socket.gethostname())})
    if group.process:  # the console is process 0's; errors go to everyone's stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _refuse_taken(address: str) -> None:
    """Raises UserError when another listens at the port of `host:port`, which JAX would share with it."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at {address}: {error.strerror}. Give all processes another port by --coordinator."
        ) from error


def in_cluster() -> bool:
    """Whether SLURM, Open MPI or a TPU slice started several processes, of which this is one."""
    if any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    from jax._src import cloud_tpu_init, clusters

    kinds = clusters.ClusterEnv._cluster_types if cloud_tpu_init.running_in_cloud_tpu_vm else []
    return any("tpu" in kind.name and kind.is_env_present() and kind.get_process_count() > 1 for kind in kinds)


def refuse_cluster(what: str) -> None:
    """Raises UserError for a command of one process when a cluster started several."""
    if in_cluster():
        raise UserError(f"{what} runs in one process and the cluster started several: ask it for one, as in srun --ntasks=1.")


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return group.process == 0


def process_count() -> int:
    return group.processes


def machine_count() -> int:
    """Returns the number of machines that the processes run on, by their names."""
    return group.machines


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Lets process 0 through the block before all others, which find in their caches what it fetched and made."""
    if not is_first():
        gather_strings()
    yield
    if is_first():
        gather_strings()


def gather_strings(value: str = "", topic: str = "run") -> list[str]:
    """Returns every process's value, in every process, once all have called this. Threads need a topic each."""
    if group.client is None:
        return [value]
    key, client = f"thrice/{topic}/{next(_calls[topic])}", group.client
    if is_first():
        others = range(1, group.processes)
        values = [value, *(client.blocking_key_value_get(f"{key}/{process}", 1000 * FOREVER) for process in others)]
        client.key_value_set(key, json.dumps(values))
        return values
    client.key_value_set(f"{key}/{group.process}", value)
    return json.loads(client.blocking_key_value_get(key, 1000 * FOREVER))


def refuse_differences(facts: dict[str, str]) -> None:
    """Raises the same UserError in every process when the facts of one differ from process 0's, naming which and where."""
    first, *others = map(json.loads, gather_strings(json.dumps(facts)))
    for process, other in enumerate(others, 1):
        if names := [name for name in first | other if other.get(name) != first.get(name)]:
            more = f", and another {', '.join(names[1:4])}" if names[1:] else ""
            raise UserError(
                f"Process {process} has another {names[0]} ({other.get(names[0])}) than process 0 ({first.get(names[0])})"
                f"{more}. All processes of a run must have the same flags and data."
            )


def refuse_unshared(folder: Path) -> None:
    """Raises UserError in every process when one does not see what process 0 writes in `folder`."""
    if group.client is None:
        return
    where = gather_strings(str(folder.absolute()))[0]
    mark = folder / gather_strings(f".shared-{os.getpid()}-{time.time_ns()}")[0]
    if is_first():
        mark.touch()
    gather_strings()
    unshared = [str(process) for process, seen in enumerate(gather_strings("seen" * mark.exists())) if not seen]
    if is_first():
        mark.unlink()
    if unshared:
        raise UserError(
            f"{where} is not shared: process {', '.join(unshared)} does not see what process 0 writes there. Give an "
            "--out-dir on a file system that all hosts mount."
        )


def gather_numbers(*numbers: float) -> list[list[float]]:
    """Returns the float32 `numbers` of every process, (processes, numbers), in every process. One collective."""
    if group.client is None:
        return [[*numbers]]
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(np.array(numbers, np.float32)).tolist()


def end(code: int, sentence: str) -> None:
    """Ends this process and all others with the code, and prints the sentence of an error. With one process it only returns.

    Another that has ended before ends this one with its own code.
    """
    if group.client is None:
        return
    if code == MISTAKE and not is_first():
        time.sleep(SAME_MISTAKE_SECONDS)
    try:
        group.client.key_value_set(ENDED, json.dumps([group.process, code, sentence]))
    except Exception:  # another has said why before, which `_watch` is about to hear; or the service is gone
        time.sleep(TICK)
    name = f"Process {group.process}: " if group.process else ""
    _leave(code, "" if code > 128 else name + sentence)  # a signal's was printed before


def end_for_error(error: Exception) -> None:
    """Ends all processes for an unexpected error in this one: with RESTART where it says that another one is gone."""
    if group.client is None:
        return
    text = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, RuntimeError | ValueError) and PEER_IS_GONE.search(text):
        end(RESTART, f"another one is gone or does not answer ({text}). The same command goes on, in every process.")
    traceback.print_exc()
    end(1, f"it met an error, which it shows: {text}")


def _watch(client: Any) -> None:
    """Ends this process when another one has ended. Process 0 prints why, unless that was its own sentence."""
    while True:
        try:
            process, code, sentence = json.loads(client.blocking_key_value_get(ENDED, round(1000 * TICK)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # this process has left the service
        else:
            if process != group.process:
                _leave(code, f"Process {process} ended: {sentence}" if is_first() else "")
            return


def _leave(code: int, sentence: str) -> None:
    """Prints the sentence, if any, and leaves past Python's and JAX's own way out, which waits for the other processes."""
    if not group.ending.acquire(blocking=False):
        time.sleep(60)  # another thread leaves
    with contextlib.suppress(OSError):
        os.write(2, f"error: {sentence}\n".encode() if sentence else b"")
    if is_first() and group.client is not None:
        time.sleep(TICK)
    os._exit(code)
