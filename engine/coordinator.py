"""Meets the other processes of a run at the coordinator, the service of JAX in process 0. It loads without JAX."""

import os
import socket
import threading
import time

from engine import distributed
from engine.errors import UserError

HEARTBEAT = 8  # seconds without one until JAX gives a process up


def connect(processes: int | None, process: int | None, coordinator: str | None, seconds: float) -> None:
    """Joins the processes of a run within `seconds`; None: as the cluster says. Must come before JAX's backend starts.

    Raises UserError when the cluster says nothing, or nobody listens at the coordinator's `host:port`.
    """
    import jax
    from jax._src import distributed as jax_distributed

    # Its notice is SIGTERM, whose handler it would replace; `gather_numbers` carries our own, and Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_distributed_verify_secure_credentials and not jax.config.jax_mtls_cert_file:
        raise UserError(
            "JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS wants JAX_MTLS_CERT_FILE, JAX_MTLS_KEY_FILE and JAX_MTLS_CA_FILE."
        )
    for name in ("CERT", "KEY", "CA"):
        path = getattr(jax.config, f"jax_mtls_{name.lower()}_file")
        if path and not os.access(path, os.R_OK):
            raise UserError(f"JAX_MTLS_{name}_FILE names {path}, which is not there or cannot be read.")
    where = coordinator or "the cluster's coordinator"
    if coordinator and process:
        _reach(coordinator, seconds)
    distributed._group.joining = (
        f"Not all {processes or ''} processes met at {where} within {seconds:g} s: start each, with its own --process."
    )
    distributed._handle_abort()
    nowhere, distributed._group.error_output = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(nowhere, 2)  # JAX prints a stack trace before it aborts
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=round(seconds), heartbeat_timeout_seconds=HEARTBEAT
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        if "must be defined" in str(error) or "should be defined" in str(error):
            raise UserError(
                "No cluster says how many processes there are: give --coordinator HOST:PORT --processes N --process I."
            ) from error
        raise UserError(f"Process {process} cannot start at {where}: {error}. Give another address or port.") from error
    finally:
        os.dup2(distributed._group.error_output, 2)
    state = jax_distributed.global_state
    distributed._group.client, distributed._group.process, distributed._group.processes, distributed._group.joining = (
        state.client,
        state.process_id,
        state.num_processes,
        "",
    )
    threading.Thread(target=distributed._watch, args=(state.client,), daemon=True, name="peers").start()
    distributed._group.machines = len({*distributed.gather_strings(socket.gethostname())})
    if distributed._group.process:  # the console is process 0's; errors go to everyone's stderr
        os.dup2(nowhere, 1)


def _reach(coordinator: str, seconds: float) -> None:
    """Waits until the coordinator listens: JAX would abort the process instead of raising an error."""
    host, _, port = coordinator.rpartition(":")
    begin, reason = time.monotonic(), ""
    while (passed := time.monotonic() - begin) < seconds:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UserError(
        f"The coordinator at {coordinator} could not be reached for {passed:.0f} s: {reason}. Process 0 listens there: check "
        "that it runs, and the address."
    )
