"""Checkpoints come back bit for bit or not at all: killed, damaged, out of room, or of another model."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from engine.errors import UserError
from engine.storage import checkpoint
from engine.storage.checkpoint import load, load_params, save, steps, sweep, verify
from engine.storage.digest import digest


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Int8:
    values: jax.Array
    scale: jax.Array


def make_params(seed: int) -> dict:
    """Every bfloat16, three NaNs, a -0.0, a 0-d array, a node that is no dict, layers named out of order."""
    draw = np.random.default_rng(seed)
    layers = {name: {"qkv": draw.normal(size=(5, 7)), "norm": np.full(5, -0.0)} for name in ("0", "1", "10")}
    return {
        "layers": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers),
        "embedding": jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)),
        "quantized": Int8(jnp.asarray(draw.integers(-128, 127, (3, 2)), jnp.int8), jnp.ones(2)),
        "nans": jnp.asarray(np.asarray([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)),
        "seed": jnp.int32(seed),
    }


def make_optimizer(seed: int) -> dict:
    """What optax keeps (named tuples, empty states, masked leaves, a count), a PRNG key's data and a flag."""
    weights = {"w": jnp.full((4, 3), seed + 0.1), "frozen": jnp.ones(2)}
    adamw = optax.adamw(optax.linear_schedule(1.0, 0.0, 9), mu_dtype=jnp.bfloat16)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(adamw, {"w": True, "frozen": False}))
    _, state = tx.update(weights, tx.init(weights), weights)
    return {"tx": state, "key": jax.random.key_data(jax.random.key(seed)), "finite": jnp.asarray(True)}


MODEL = jax.eval_shape(lambda: (make_params(0), make_optimizer(0)))
STATE = {"data": {"epoch": 2, "offset": 12345}, "best": 0.1 + 0.2, "words": "é\n"}


def put_model(folder: Path, step: int, **options) -> Path:
    return save(folder, step, make_params(step), make_optimizer(step), STATE, **options)


def tiny(step: int) -> tuple[dict, tuple]:
    return {"w": jnp.arange(6.0).reshape(2, 3) + step}, ({"m": jnp.full(3, step, jnp.bfloat16)},)


def put(folder: Path, step: int, **options) -> Path:
    """Saves a checkpoint so small that hundreds can be made, and told from those of other steps."""
    return save(folder, step, *tiny(step), {"at": step}, **options)


def get(folder: Path, step: int | None = None) -> checkpoint.LoadedCheckpoint:
    return load(folder, step, *jax.eval_shape(lambda: tiny(0)))


def same_bits(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and digest(one) == digest(other)


def is_step(loaded: checkpoint.LoadedCheckpoint, step: int) -> bool:
    """`loaded` is, in all its parts, what `put` wrote for `step`."""
    whole = same_bits((loaded.params, loaded.optimizer), tiny(step))
    return whole and loaded.step == loaded.state["at"] == int(loaded.path.name) == step


# Bit for bit


def test_everything_comes_back_bit_for_bit(tmp_path):
    path = put_model(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "7"
    loaded = load(tmp_path, None, *MODEL)
    assert same_bits(loaded.params, make_params(7))
    assert same_bits(loaded.optimizer, make_optimizer(7))
    assert (loaded.path, loaded.step, loaded.state, loaded.damaged) == (path, 7, STATE, [])
    assert {type(leaf) for leaf in jax.tree.leaves(loaded.params)} == {type(jnp.ones(1))}
    assert verify(path) == []
    below = {"params", "optimizer", "state.json", "manifest.json", "_CHECKPOINT_METADATA", "orbax.checkpoint"}
    assert {entry.name for entry in path.iterdir()} == below


def test_restored_arrays_behave_like_fresh_ones(tmp_path):
    put_model(tmp_path, 1)
    weights = load(tmp_path, None, *MODEL).params["layers"]
    assert not any(leaf.committed for leaf in jax.tree.leaves(weights))
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    assert same_bits(step(weights), step(make_params(1)["layers"]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


def test_host_arrays_scalars_and_strides_come_back(tmp_path):
    host = {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "one": np.float32(-0.0), "flag": np.bool_(True)}
    save(tmp_path, 0, host, {}, {})
    back = load(tmp_path, 0, host, {})
    assert digest(back.params) == digest(host)
    assert back.optimizer == {}


def test_a_sharding_that_is_asked_for_is_used(tmp_path):
    put_model(tmp_path, 1)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), MODEL[0])
    params = load_params(tmp_path, like).params
    assert same_bits(params, make_params(1))
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}


def test_params_load_alone(tmp_path):
    path = put_model(tmp_path, 3)
    shutil.rmtree(path / "optimizer")
    for where in (tmp_path, path, os.path.relpath(path)):
        loaded = load_params(where, MODEL[0])
        assert same_bits(loaded.params, make_params(3))
        assert (loaded.path.resolve(), loaded.optimizer, loaded.state) == (path, None, STATE)
    assert verify(path, "params") == []
    assert verify(path, "optimizer") != []


def test_params_load_without_a_like_tree(tmp_path):
    put_model(tmp_path, 3)
    params = load_params(tmp_path).params
    assert digest(params) == digest(make_params(3))
    assert params["quantized"].keys() == {"values", "scale"}


def test_orbax_itself_reads_a_step_folder(tmp_path):
    from orbax.checkpoint import v1 as ocp

    path = put(tmp_path, 3)
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tiny(0)[0])
    assert digest(ocp.load(path, tree, checkpointable_name="params")) == digest(tiny(3)[0])


@pytest.mark.parametrize(
    ("leaf", "named"),
    [
        (1.0, "float"),
        (jax.random.key(0), "key_data"),
        (jnp.zeros((0, 3)), "without elements"),
        (np.arange(3), "int64"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct"),
    ],
)
def test_a_leaf_that_could_not_come_back_is_refused_before_anything_is_written(tmp_path, leaf, named):
    with pytest.raises((TypeError, ValueError), match=f"params/a/b.*{named}"):
        save(tmp_path, 1, {"a": {"b": leaf}}, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_two_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"params/x/y and params/x\.y"):
        save(tmp_path, 1, {"x": {"y": jnp.ones(1)}, "x.y": jnp.zeros(1)}, {}, {})


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for state in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises((TypeError, ValueError)):
            save(tmp_path, 1, *tiny(1), state)
    assert list(tmp_path.iterdir()) == []


# Another model, other keys


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": jnp.int32(0), "more": jnp.ones(2)}, r"more float32 \(2,\) was wanted and no such array came"),
        ({"seed": None}, r"seed no such array was wanted and int32 \(\) came"),
        ({"seed": jnp.float32(0)}, r"seed float32 \(\) was wanted and int32 \(\) came"),
        ({"seed": jnp.zeros(1, jnp.int32)}, r"seed int32 \(1,\) was wanted and int32 \(\) came"),
        ({"embedding": jnp.zeros((256, 256))}, r"embedding float32 .* was wanted and bfloat16 \(256, 256\) came"),
        ({"layers": {"0": {"norm": jnp.ones(5)}}, "nans": jnp.ones(4)}, r"layers/0/qkv .*\(5 more arrays differ\)"),
    ],
)
def test_another_model_is_named(tmp_path, changed, said):
    put_model(tmp_path, 1)
    like = MODEL[0] | jax.eval_shape(lambda: changed)
    for read in (lambda: load(tmp_path, None, like, MODEL[1]), lambda: load_params(tmp_path, like)):
        with pytest.raises(UserError, match=f"checkpoints/1/params is of another model: at {said}"):
            read()


def test_another_optimizer_is_named(tmp_path):
    put_model(tmp_path, 1)
    like = jax.eval_shape(lambda: optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones((4, 3))}))
    with pytest.raises(UserError, match="checkpoints/1/optimizer is of another model"):
        load(tmp_path, None, MODEL[0], like)


def test_64_bits_are_not_halved_in_silence(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path, 1, {"w": jnp.arange(3, dtype=jnp.int64)}, {}, {})
        assert load_params(tmp_path).params["w"].dtype == jnp.int64
    with pytest.raises(UserError, match=r"w int64 \(3,\) was wanted and int32 \(3,\) came"):
        load_params(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_other_prng_settings_are_refused_for_training_alone(tmp_path, name, value):
    put(tmp_path, 1)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=rf"{name}={before}.*now.*{name}={value}.*{name.upper()}"):
            get(tmp_path)
        assert load_params(tmp_path).step == 1
    finally:
        jax.config.update(name, before)


# T2: damage is named, and the previous good one is used


def damage(path: Path, way: str) -> None:
    data = path.read_bytes()
    if way == "delete":
        path.unlink()
    elif way == "truncate":
        path.write_bytes(data[:-1])
    elif way == "zero":
        path.write_bytes(bytes(len(data)))
    elif way == "flip":
        place = len(data) // 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])


@pytest.mark.parametrize("way", ["delete", "truncate", "zero", "flip"])
def test_every_damage_to_every_file_is_named_and_passed_over(tmp_path, way):
    put(tmp_path, 1)
    newest = put(tmp_path, 2)
    whole = shutil.copytree(newest, tmp_path / "whole")
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        if way != "delete" and (newest / file).stat().st_size == 0:
            continue
        damage(newest / file, way)
        loaded = get(tmp_path)
        assert is_step(loaded, 1), file
        assert len(loaded.damaged) == 1
        assert loaded.damaged[0].startswith(f"{newest / file} "), file
        assert ("bytes instead of" in loaded.damaged[0]) == (way == "truncate" and file.name != "manifest.json")
        assert verify(newest) == loaded.damaged
        if file.parts[0] == "optimizer":
            assert load_params(tmp_path).step == 2
        else:
            fallen_back = load_params(tmp_path)
            assert (fallen_back.step, fallen_back.damaged) == (1, loaded.damaged)
            with pytest.raises(UserError, match=re.escape(str(newest / file))):
                load_params(newest)
        with pytest.raises(UserError, match=re.escape(str(newest / file)) + r".*Try one of steps 1\."):
            get(tmp_path, 2)
        shutil.copy(whole / file, newest / file)
    assert is_step(get(tmp_path), 2)


def test_every_bit_of_the_manifest_guards_itself(tmp_path):
    listing = put(tmp_path, 1) / "manifest.json"
    data = listing.read_bytes()
    for place in range(0, len(data), 7):
        listing.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert verify(listing.parent) == [f"{listing} is damaged"]
    for text in (b"", b"{}", b"[]", b"null", b'{"files": 3}', data + b" ", data.replace(b"\n", b"\r\n")):
        listing.write_bytes(text)
        assert verify(listing.parent) == [f"{listing} is damaged"]


def test_a_file_too_many_is_named(tmp_path):
    put(tmp_path, 1)
    stranger = put(tmp_path, 2) / "params" / "d" / "stranger"
    stranger.write_text("?")
    loaded = get(tmp_path)
    assert (loaded.step, loaded.damaged) == (1, [f"{stranger} does not belong there"])


def test_when_none_is_sound_all_damage_is_named(tmp_path):
    paths = [put(tmp_path, step) / "state.json" for step in (1, 2)]
    for path in paths:
        path.write_text("{}")
    with pytest.raises(UserError) as caught:
        get(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


def test_no_checkpoint_is_said(tmp_path):
    for read in (lambda: get(tmp_path), lambda: load_params(tmp_path), lambda: load_params(tmp_path / "none")):
        with pytest.raises(UserError, match="no checkpoint"):
            read()
    put(tmp_path, 4)
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 4"):
        get(tmp_path, 5)


# T1: a kill at any instant


class Killed(BaseException):
    """The process is gone: nothing it would do afterwards happens."""


class Shim:
    """Sees every open, mkdir, rename, remove, chmod and fsync below a folder; from the k-th on, `error` is raised.

    With `once` only the k-th fails, as on a disk that refuses; otherwise all that follow fail too, so that what lies on
    disk afterwards is what a killed process would have left: no `except` or `finally` can tidy up.
    """

    def __init__(self):
        self.folder, self.at, self.seen, self.error, self.once = "", 0, 0, Killed, False
        self.lock = threading.Lock()
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and self.folder:
            below = str(args[0]).startswith(self.folder)
            if below or (event in ("os.remove", "os.rmdir") and args[1] != -1):  # rmtree names a file by its folder's handle
                self.count()

    def count(self):
        with self.lock:
            self.seen += 1
            failing = self.seen == self.at if self.once else self.seen >= self.at > 0
        if failing:
            raise self.error

    @contextlib.contextmanager
    def armed(self, folder, at, error=Killed, once=False):
        self.folder, self.at, self.seen, self.error, self.once = str(folder), at, 0, error, once
        fsync = os.fsync
        os.fsync = lambda handle: (self.count(), fsync(handle))[1]
        try:
            yield self
        finally:
            os.fsync = fsync
            self.folder, self.at = "", 0


@pytest.fixture(scope="module")
def shim():
    return Shim()  # an audit hook stays for the life of the process


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]


def swept_clean(folder: Path) -> bool:
    """A real kill stops every thread; here those of Orbax may write a little longer into what is being swept."""
    for _ in range(200):
        sweep(folder)
        if not hidden(folder):
            return True
        time.sleep(0.01)
    return False


# Threads of Orbax that are stopped so rudely complain into the void.
rude = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


@rude
@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_instant_leaves_whole_checkpoints_only(tmp_path, shim, replaced):
    before = tmp_path / "before"
    put(before, 1)
    put(before, 2)
    written = 2 if replaced else 3
    with shim.armed(shutil.copytree(before, tmp_path / "unharmed"), 0) as unharmed:
        put(tmp_path / "unharmed", written, keep=2)
    # Every instant of making folders and of committing; every second one of the many alike (hash a file, sync a file).
    last = unharmed.seen
    first = last - 45 if replaced else 1
    instants = [at for at in range(first, last + 1) if at < 35 or at % 2 or at > last - 45]
    outcomes = set()
    for instant in instants:
        run = shutil.copytree(before, tmp_path / str(instant))
        with shim.armed(run, instant), pytest.raises(Killed):
            put(run, written, keep=2)
        assert swept_clean(run), instant
        outcome = tuple(steps(run))
        assert outcome[-1] == written or outcome == (1, 2), instant
        assert all(verify(run / "checkpoints" / str(step)) == [] for step in outcome), instant
        if instant % 30 == 0 or outcome not in outcomes:
            loaded = get(run)
            assert is_step(loaded, outcome[-1]), instant
            assert loaded.damaged == []
        outcomes.add(outcome)
    assert last > 100  # the shim saw the save
    assert outcomes == ({(1, 2)} if replaced else {(1, 2), (1, 2, 3), (2, 3)})


@rude
def test_the_save_after_a_kill_sweeps_and_succeeds(tmp_path, shim):
    put(tmp_path, 1)
    with shim.armed(tmp_path, 45), pytest.raises(Killed):
        put(tmp_path, 2)
    assert hidden(tmp_path) != []
    put(tmp_path, 2)
    assert hidden(tmp_path) == []
    assert is_step(get(tmp_path), 2)


def test_what_another_process_is_writing_is_not_swept(tmp_path):
    put(tmp_path, 1)
    building = tmp_path / "checkpoints" / ".2.abcdefgh"
    building.mkdir()
    with checkpoint._alone_in(tmp_path / "checkpoints"):
        sweep(tmp_path)
        assert building.exists()
        assert get(tmp_path).step == 1
    sweep(tmp_path)
    assert not building.exists()


def test_sigkill_of_a_real_process_at_random_times(tmp_path):
    writer = (
        "import sys, jax.numpy as jnp; from engine.storage.checkpoint import save, steps\n"
        "step = max(steps(sys.argv[1]), default=0)\n"
        "while True:\n"
        "    step += 1\n"
        "    params = {'w': jnp.arange(6.0).reshape(2, 3) + step}\n"
        "    save(sys.argv[1], step, params, ({'m': jnp.full(3, step, jnp.bfloat16)},), {'at': step}, keep=2)\n"
        "    print(step, flush=True)\n"
    )
    root = Path(checkpoint.__file__).parents[2]
    for delay in np.random.default_rng(0).uniform(0, 0.2, 2):
        command = [sys.executable, "-c", writer, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            reported = int(process.stdout.readline())
            time.sleep(delay)
            process.kill()
            reported = max([reported, *map(int, process.stdout.read().split())])
        loaded = get(tmp_path)
        assert loaded.step >= reported
        assert loaded.damaged == []
        assert is_step(loaded, loaded.step)


def test_an_interrupt_at_any_time_leaves_older_checkpoints(tmp_path, capfd):
    put(tmp_path, 1)
    started = time.perf_counter()
    put(tmp_path, 2)
    span = time.perf_counter() - started

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for fraction in np.linspace(0.05, 1.0, 15):
            try:
                signal.setitimer(signal.ITIMER_REAL, span * fraction)
                put(tmp_path, 3)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            loaded = get(tmp_path)
            assert loaded.step in (2, 3)
            assert is_step(loaded, loaded.step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    put(tmp_path, 4)
    assert hidden(tmp_path) == []
    assert capfd.readouterr() == ("", "")


# T8: a disk that refuses


def refused(folder: Path, step: int, wanted: str, reason: str):
    where = re.escape(f"{folder}/checkpoints/{step}")
    return pytest.raises(UserError, match=rf"{where} could not be written \({wanted} MB wanted\): .*{reason}.* untouched")


def test_a_full_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    put(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20))
    with refused(tmp_path, 2, r"0\.0", r"0\.0 MB are free"):
        put(tmp_path, 2)
    assert is_step(get(tmp_path), 1)


def test_a_write_that_fails_in_tensorstore_is_said(tmp_path, capfd, caplog):
    put(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with refused(tmp_path, 2, r"0\.1", os.strerror(errno.EFBIG)):
            put_model(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_step(get(tmp_path), 1)
    assert swept_clean(tmp_path)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", 2, r"0\.0", os.strerror(errno.ENOTDIR)):
        put(tmp_path / "file", 2)


@rude
def test_any_single_refusal_harms_nothing_older(tmp_path, shim, capfd):
    put(tmp_path / "before", 1)
    failed = 0
    for instant in range(1, 112, 3):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(instant))
        with shim.armed(run, instant, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), once=True):
            try:
                put(run, 2, keep=1)
                written = True
            except UserError as error:
                written = False
                failed += 1
                assert f"{run}/checkpoints/2 could not be written" in str(error)  # noqa: PT017
        assert steps(run) == [2] if written else steps(run)[0] == 1, instant
        assert all(verify(run / "checkpoints" / str(step)) == [] for step in steps(run)), instant
        if instant % 9 == 1:
            loaded = get(run)
            assert is_step(loaded, steps(run)[-1])
            assert loaded.damaged == []
    assert failed > 25
    assert capfd.readouterr() == ("", "")


# Which are kept


def test_the_newest_are_kept(tmp_path):
    for step in range(5):
        put(tmp_path, step, keep=2)
        assert steps(tmp_path) == [earlier for earlier in (step - 1, step) if earlier >= 0]
    assert hidden(tmp_path) == []


def test_going_back_removes_no_future_and_is_not_removed_by_it(tmp_path):
    for step in (10, 20, 30):
        put(tmp_path, step)
    put(tmp_path, 15, keep=1)
    assert steps(tmp_path) == [15, 20, 30]
    assert is_step(get(tmp_path, 15), 15)


def test_a_step_is_replaced_whole(tmp_path):
    save(tmp_path, 5, {"w": jnp.ones(3)}, {}, {})
    put(tmp_path, 5)
    assert is_step(get(tmp_path), 5)
    assert hidden(tmp_path) == []


def test_only_folders_named_by_a_number_are_checkpoints(tmp_path):
    assert steps(tmp_path) == []
    put(tmp_path, 12)
    put(tmp_path, 3)
    for name in ("best", "12.bak", ".7.tmp", "-1", "007"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "99").write_text("a file")
    assert steps(tmp_path) == [3, 12]


def test_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("runs/demo"), 1)
    assert get(Path("runs/demo")).path == tmp_path / "runs/demo/checkpoints/1"


@pytest.mark.parametrize("options", [{"keep": 0}, {"step": -1}])
def test_nonsense_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="step must be at least 0 and keep at least 1"):
        save(**{"folder": tmp_path, "step": 1, "params": {}, "optimizer": {}, "state": {}} | options)


def test_orbax_is_imported_only_when_arrays_move():
    code = "import sys, engine.storage.checkpoint; sys.exit(any(name.startswith('orbax') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(checkpoint.__file__).parents[2])


def test_state_is_readable_without_us(tmp_path):
    record = json.loads((put_model(tmp_path, 1) / "state.json").read_text(encoding="utf-8"))
    assert (record["step"], record["state"]) == (1, STATE)
    assert record["prng"] == {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True}
