"""How the processes of a run meet, and end together.

JAX's coordination service, in process 0, holds their heartbeats and a key-value store. A process
that ends says why under a key that all others wait for, so they end within a second, with its exit
code. One that is killed says nothing. Its peers' collectives fail, which becomes one sentence and
the code RESTART; or JAX aborts them first (134): at once where process 0 is gone, and after
HEARTBEAT seconds where another is. JAX's `missed_heartbeat_callback`, which would come before the
abort, aborts too: it gets an argument that has no type in Python (seen in jaxlib 0.12). So whoever
starts a run again treats both codes alike.

This file loads without JAX, whose key-value store has no public name.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import traceback
from typing import Any

from engine.errors import UserError
from engine.format import duration
from engine.mesh.processes import (
    FOREVER,
    MISTAKE,
    RESTART,
    gather_strings,
    group,
    is_first,
    refuse_differences,
)

HEARTBEAT = 8  # seconds without one until JAX gives a process up

# seconds in which the others hear that one ends: process 0 stays as long, for the service ends with
# it
TICK = 1.0

SAME_MISTAKE_SECONDS = 2.0  # in which process 0 meets a mistake of all, and prints it once

ENDED = "thrice/ended"  # the key of the one that ended first: its number, exit code and sentence

PEER_IS_GONE = re.compile(
    r"gloo|nccl|rccl|peer|socket|coordination|heartbeat|UNAVAILABLE|ABORTED|CANCELLED", re.IGNORECASE
)


def join(coordinator: str | None, processes: int | None, process: int | None, seconds: float) -> None:
    """Joins the processes of a run, before JAX's backend starts; None: as the cluster says.

    Ends this process when not all have met within `seconds`, where JAX would abort it. Raises
    UserError when JAX cannot start its service or find the cluster, and when the processes count
    themselves differently.
    """
    import jax
    from jax._src.distributed import global_state

    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"The coordinator {address} has no port: JAX_COORDINATOR_ADDRESS wants HOST:PORT.")
    # JAX would abort
    if jax.config.jax_distributed_verify_secure_credentials and not jax.config.jax_mtls_cert_file:
        raise UserError(
            "JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS wants JAX_MTLS_CERT_FILE, JAX_MTLS_KEY_FILE "
            "and JAX_MTLS_CA_FILE."
        )
    if coordinator and process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _refuse_taken(coordinator)
    # it would replace our handler of SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    how_many = f" {processes}" if processes else ""
    where = f" at {address}" if address else ""
    missing = (
        f"Not all{how_many} processes met{where} within {duration(seconds)}: "
        "start each once, with its own --process and the same --processes, "
        "process 0 at that address."
    )
    timer = threading.Timer(seconds, _leave, (MISTAKE, missing))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=FOREVER, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"This process cannot join the others: {error}. Give --coordinator HOST:PORT "
            "--processes N --process I: all of them the same address, and each its own number."
        ) from error
    finally:
        timer.cancel()
    group.client = global_state.client
    group.process = global_state.process_id
    group.processes = global_state.num_processes
    threading.Thread(target=_watch, args=(group.client,), daemon=True, name="peers").start()
    refuse_differences({"--processes": str(group.processes)})
    group.machines = len({*gather_strings(socket.gethostname())})
    if group.process:  # the console is process 0's; errors go to everyone's stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _refuse_taken(address: str) -> None:
    """Raises UserError when another listens at the port of `host:port`, which JAX would share with
    it.
    """
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at {address}: {error.strerror}. "
            "Give all processes another port by --coordinator."
        ) from error


def end(code: int, sentence: str) -> None:
    """Ends this process and all others with the code, and prints the sentence of an error. With one
    process it only returns.

    Another that has ended before ends this one with its own code.
    """
    if group.client is None:
        return
    if code == MISTAKE and not is_first():
        time.sleep(SAME_MISTAKE_SECONDS)
    try:
        group.client.key_value_set(ENDED, json.dumps([group.process, code, sentence]))
    except Exception:
        # another has said why before, which `_watch` is about to hear; or the service is gone
        time.sleep(TICK)
    if code > 128:
        sentence = ""  # a signal's was printed before
    elif group.process:
        sentence = f"Process {group.process}: {sentence}"
    _leave(code, sentence)


def end_for_error(error: Exception) -> None:
    """Ends all processes for an unexpected error in this one: with RESTART where it says that
    another one is gone.
    """
    if group.client is None:
        return
    text = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, RuntimeError | ValueError) and PEER_IS_GONE.search(text):
        end(
            RESTART,
            f"another one is gone or does not answer ({text}). The same command goes on, in every process.",
        )
    traceback.print_exc()
    end(1, f"it met an error, which it shows: {text}")


def _watch(client: Any) -> None:
    """Ends this process when another one has ended. Process 0 prints why, unless that was its own
    sentence.
    """
    while True:
        try:
            process, code, sentence = json.loads(client.blocking_key_value_get(ENDED, round(1000 * TICK)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # this process has left the service
        else:
            if process != group.process:
                reason = f"Process {process} ended: {sentence}" if is_first() else ""
                _leave(code, reason)
            return


def _leave(code: int, sentence: str) -> None:
    """Prints the sentence, if any, and leaves past Python's and JAX's own way out, which waits for
    the other processes.
    """
    if not group.ending.acquire(blocking=False):
        time.sleep(60)  # another thread leaves
    with contextlib.suppress(OSError):
        if sentence:
            os.write(2, f"error: {sentence}\n".encode())
    if is_first() and group.client is not None:
        time.sleep(TICK)
    os._exit(code)
