"""Several processes that train one model: they agree on what they do, and end together.

A process that ends says why under a key that all others wait for, so they end within a second. One that is killed says
nothing: its peers' collectives fail, or JAX's coordination service misses its heartbeats and aborts them; either becomes one
sentence and the exit code RESTART. A mistake of all is printed by process 0 alone. With one process nothing here does anything.

It loads without JAX, whose key-value store has no public name.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.format import duration

HEARTBEAT = 8  # seconds without one until JAX gives a process up
MISTAKE, RESTART = 2, 75  # exit codes: of an error that the user can mend; that asks for a restart, EX_TEMPFAIL of sysexits.h
TICK = 1.0  # seconds between looks at the watchdog
LINGER_SECONDS = 1.0  # that process 0 stays: the service, by which the others hear why, ends with it
SAME_MISTAKE_SECONDS = 2.0  # in which process 0 meets a mistake of all
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds: process 0 may read a large corpus first
PEER_IS_GONE = re.compile(r"gloo|nccl|rccl|peer|socket|coordination|heartbeat|UNAVAILABLE|ABORTED|CANCELLED", re.IGNORECASE)

SERVICE_FAILS = re.compile("coordination_service|JAX distributed service")  # abort() follows, after a second of stack trace


class _Group:
    """This process's place among the others. `client`: of JAX's service, None with one process."""

    client: Any = None
    process, processes, machines = 0, 1, 1
    mistake = ""  # of this process, which may be that of all
    joining = ""  # the sentence for an abort while it waits for the others
    error_output, library_errors = 2, -1  # file descriptors: the person's stderr; what libraries write to theirs
    held = ""  # of what they wrote, for the abort
    describe_saved: Callable[[], str] = staticmethod(lambda: "Nothing was saved yet.")
    ending = threading.Lock()
    activity, patience, waited = "", float("inf"), 0.0  # seconds without progress until the watchdog ends it; and so far
    abort_handler: Any = None  # kept alive for C


_group = _Group()
_calls: defaultdict[str, itertools.count] = defaultdict(itertools.count)  # a topic -> the numbers of its keys


def hide_library_errors() -> int:
    """Has file descriptor 2 write to a file, which `_watch` copies to where it wrote before; returns a descriptor of that.

    JAX writes a stack trace before it aborts a process, for which there is one sentence.
    """
    _group.error_output = os.dup(2)
    written, path = tempfile.mkstemp()
    _group.library_errors = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.dup2(written, 2)
    os.close(written)
    atexit.register(_show_library_errors)
    return _group.error_output


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
    handle_abort(
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
    begin(jax_distributed.global_state.client, process, processes)
    refuse_differences({"--processes": str(processes)})


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


def begin(client: Any, process: int, processes: int) -> None:
    """Makes this process one of those that the client of JAX's service has joined."""
    _take_library_errors()  # of waiting for the others
    _group.client, _group.process, _group.processes, _group.joining = client, process, processes, ""
    threading.Thread(target=_watch, args=(client,), daemon=True, name="peers").start()
    _group.machines = len({*gather_strings(socket.gethostname())})
    if _group.process:  # the console is process 0's; errors go to everyone's stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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
    return _group.process == 0


def process_count() -> int:
    """Returns the number of processes of this run."""
    return _group.processes


def machine_count() -> int:
    """Returns the number of machines that the processes run on, by their names."""
    return _group.machines


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
    if _group.client is None:
        return [value]
    key, client = f"thrice/{topic}/{next(_calls[topic])}", _group.client
    if is_first():
        others = range(1, _group.processes)
        values = [value, *(client.blocking_key_value_get(f"{key}/{process}", FOREVER) for process in others)]
        client.key_value_set(key, json.dumps(values))
        return values
    client.key_value_set(f"{key}/{_group.process}", value)
    return json.loads(client.blocking_key_value_get(key, FOREVER))


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
    if _group.client is None:
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


@functools.cache
def _gather_program(numbers: int) -> tuple[Any, Any]:
    """Returns the sharding of a row of `numbers` a process, and a program that copies all rows to every process.

    The processes meet when all have compiled it, for Gloo waits only 30 s for the others: see `connect_devices`.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    shape = jax.ShapeDtypeStruct((len(first), numbers), np.float32, sharding=rows)
    program = jax.jit(lambda rows: rows, out_shardings=whole).lower(shape).compile()
    gather_strings()
    return rows, program


def gather_numbers(*numbers: float) -> list[list[float]]:
    """Returns the float32 `numbers` of every process, (processes, numbers), in every process. One collective."""
    if _group.client is None:
        return [[*numbers]]
    import jax
    import numpy as np

    rows, program = _gather_program(len(numbers))
    row = np.array([numbers], np.float32)
    everyone = program(jax.make_array_from_process_local_data(rows, row, (_group.processes, len(numbers))))
    return np.asarray(everyone.addressable_data(0)).tolist()


def expect_progress(activity: str, seconds: float = float("inf")) -> None:
    """Ends this process when `activity` takes longer than `seconds`, unless this is called again."""
    _group.activity, _group.waited, _group.patience = activity, 0.0, seconds


def describe_saved_by(describe: Callable[[], str]) -> None:
    """Sets the last words of a process that ends: which checkpoint is the newest."""
    _group.describe_saved = describe


def _watch(client: Any) -> None:
    """Waits for another process to end, and counts an activity's ticks: a stopped process counts none."""
    while True:
        try:
            process, code, sentence = json.loads(client.blocking_key_value_get("thrice/ended", round(1000 * TICK)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # this process has left the service
            _show_library_errors()
            _group.waited += TICK
            if _group.waited > _group.patience:
                end(RESTART, f"{_group.activity} made no progress for {_group.waited:.0f} s. {_group.describe_saved()}")
        else:
            if process != _group.process:
                printed = code == MISTAKE and _group.process and _group.mistake in ("", sentence)  # by process 0
                why = _group.mistake or f"Process {_group.process} ends because process {process} did: {sentence}"
                _exit(code, "" if printed else why)
            return


def end_for_error(error: Exception) -> None:
    """Ends all processes for an unexpected error in this one: with RESTART where it says that another one is gone."""
    if _group.client is None:
        return
    text = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, RuntimeError | ValueError) and PEER_IS_GONE.search(text):
        during = _group.activity or "its start"
        end(RESTART, f"Process {_group.process} lost another one in {during} ({text}). {_group.describe_saved()}")
    _show_library_errors()
    traceback.print_exc()
    end(1, f"Process {_group.process} met an error, which it shows: {text}")


def end(code: int, sentence: str) -> None:
    """Ends this process, and all others with the same code and sentence. With one process it only returns."""
    if _group.client is None:
        return
    if code == MISTAKE and _group.process:
        _group.mistake = sentence
        time.sleep(SAME_MISTAKE_SECONDS)  # in which `_watch` ends this process if others met the same
    try:
        _group.client.key_value_set("thrice/ended", json.dumps([_group.process, code, sentence]))
    except Exception:  # another has said why before, which `_watch` repeats and ends this process; or the service is gone
        time.sleep(TICK)
    _exit(code, f"Process {_group.process}: {sentence}" if _group.mistake else sentence)


def _exit(code: int, sentence: str = "") -> None:
    """Prints the sentence, if any, and leaves past Python's and JAX's own way out, which waits for the other processes."""
    if not _group.ending.acquire(blocking=False):
        time.sleep(LINGER_SECONDS + 60)  # another thread leaves
    with contextlib.suppress(OSError):
        cursor = "\x1b[?25h\n" * os.isatty(_group.error_output)
        os.write(_group.error_output, (cursor + f"error: {sentence}\n" * bool(sentence)).encode())
    if is_first():
        time.sleep(LINGER_SECONDS)
    os._exit(code)


def _take_library_errors() -> str:
    """Returns what libraries have written and nobody has read."""
    if _group.library_errors < 0:
        return ""
    text = b"".join(iter(lambda: os.read(_group.library_errors, 2**16), b"")).decode(errors="replace")
    text, _group.held = _group.held + text, ""
    return text


def _show_library_errors() -> None:
    """Copies to stderr what libraries have written, unless JAX's service fails."""
    text = _take_library_errors()
    if SERVICE_FAILS.search(text):
        _group.held = text
    elif text and not _group.joining:
        with contextlib.suppress(OSError):
            os.write(_group.error_output, text.encode())


def handle_abort(joining: str) -> None:
    """Makes one sentence of JAX's abort(), by which it ends a process when the coordinator or a heartbeat is gone.

    Before `begin` it is `joining`. A handler in Python would run too late.
    """
    _group.joining = joining

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(_: int) -> None:
        text = _take_library_errors()
        _exit(*((MISTAKE, _group.joining) if _group.joining else _explain_abort(text)))

    _group.abort_handler = handle
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handle)


def _explain_abort(text: str) -> tuple[int, str]:
    """Returns the exit code and the sentence for an abort, of which a library wrote `text`."""
    if again := re.search(r"(\d+) unexpectedly tried to connect", text):
        # A mistake, where the one that had the number lives; others cannot know, and before the first step take it for one.
        code = MISTAKE if int(again[1]) == _group.process or not _group.activity else RESTART
        saved = f" {_group.describe_saved()}" if code == RESTART else ""
        return code, f"Process {again[1]} was started twice: start each once, with its own --process.{saved}"
    if silent := re.search(r"stopped sending heartbeats\):\s+(\d+(?:\s+\d+)*)", text):
        other = f"process {', '.join(silent[1].split())}"
    elif re.search("Failed to send RPC to coordination service|CoordinationService/Heartbeat", text):
        other = "process 0"
    elif PEER_IS_GONE.search(text):
        other = "another one"
    else:
        return RESTART, f"Process {_group.process} was aborted by a library: {text.strip()}\n{_group.describe_saved()}"
    return RESTART, f"Process {_group.process} lost {other}, which is gone or does not answer. {_group.describe_saved()}"
