"""Joins the processes of a run at the coordinator, the service of JAX in process 0. It loads without JAX."""

import math
import os
import socket
import time

from engine.errors import UserError
from engine.format import duration
from engine.mesh import processes as group

HEARTBEAT = 8  # seconds without one until JAX gives a process up


def find_coordinator(
    processes: int | None, process: int | None, coordinator: str | None, seconds: float
) -> tuple[str, int, int]:
    """Returns the coordinator's `host:port`, the number of processes and of this one; None: as the cluster says.

    Raises UserError when the cluster says nothing, when the port is taken, and when nobody listens there within `seconds`.
    """
    import jax
    from jax._src import clusters

    if jax.config.jax_distributed_verify_secure_credentials and not jax.config.jax_mtls_cert_file:
        raise UserError(
            "JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS wants JAX_MTLS_CERT_FILE, JAX_MTLS_KEY_FILE and JAX_MTLS_CA_FILE."
        )
    for name in ("CERT", "KEY", "CA"):
        path = getattr(jax.config, f"jax_mtls_{name.lower()}_file")
        if path and not os.access(path, os.R_OK):
            raise UserError(f"JAX_MTLS_{name}_FILE names {path}, which is not there or cannot be read.")
    try:
        address, processes, process, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"), processes, process, None, None, math.ceil(seconds)
        )
    except RuntimeError as error:
        if "mpi4py" in str(error):
            raise UserError(
                "Open MPI 5 says which process this is only through mpi4py: install it in this environment, or use Open MPI 4."
            ) from error
        raise UserError(f"The cluster does not say which process this is: {error}") from error
    if address is None or processes is None or process is None:
        raise UserError("No cluster says how many processes there are: give --coordinator HOST:PORT --processes N --process I.")
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"The coordinator {address} has no port: JAX_COORDINATOR_ADDRESS wants HOST:PORT.")
    if process:
        _reach(address, seconds)
    else:
        _refuse_taken(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{address.rpartition(':')[2]}")
    return address, processes, process


def join(address: str, processes: int, process: int, seconds: float) -> None:
    """Joins the processes of a run within `seconds`. Must come before JAX's backend starts.

    Raises UserError when JAX's service cannot start, and when processes count themselves differently.
    """
    import jax
    from jax._src import distributed as jax_distributed

    # Its notice is SIGTERM, whose handler it would replace; `gather_numbers` carries our own, and Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    group.handle_abort(
        f"Not all {processes} processes met at {address} within {seconds:g} s: start each once, with its own --process and the "
        "same --processes."
    )
    timeout = math.ceil(seconds)  # 0 would be for ever
    try:
        jax.distributed.initialize(
            address, processes, process, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(f"Process {process} cannot start at {address}: {error}. Give another address or port.") from error
    group.begin(jax_distributed.global_state.client, process, processes)
    group.refuse_differences({"--processes": str(processes)})


def _reach(coordinator: str, seconds: float) -> None:
    """Waits until the coordinator listens: JAX would abort the process instead of raising an error."""
    host, _, port = coordinator.rpartition(":")
    begin, reason = time.monotonic(), ""
    while time.monotonic() - begin < seconds:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UserError(
        f"The coordinator at {coordinator} could not be reached for {duration(seconds)}: {reason}. Process 0 listens there: "
        "check that it runs, and the address."
    )


def _refuse_taken(address: str) -> None:
    """Raises UserError when process 0 cannot listen at `host:port`: JAX would end it with SIGSEGV."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    host = "0.0.0.0" if host == "::" and not socket.has_dualstack_ipv6() else host  # as gRPC has it
    try:
        version, kind, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(version, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended is no obstacle
            if version == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(where)
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at {address}: {error.strerror}. Give all processes another port, by --coordinator or, "
            "under a cluster, by JAX_COORDINATOR_PORT."
        ) from error
