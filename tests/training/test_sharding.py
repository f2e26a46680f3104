"""Eight virtual devices train as one does: the same losses, an eighth of the state each, and no more traffic than is known."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from engine.errors import UserError
from engine.mesh.layout import make_mesh
from engine.mesh.rules import leaf_spec
from engine.mesh.shape import MeshShape, check_mesh, parse_mesh
from engine.model.config import preset
from tests.rounding import adam_apart, losses_apart, sums_apart
from tests.training.mesh_cases import BATCH, CFG, RATE, STEPS, TIERS, TOKENS

MESHES = [
    pytest.param(case, mesh, marks=[] if tier == "default" else getattr(pytest.mark, tier))
    for tier in TIERS
    for case, meshes in TIERS[tier].items()
    for mesh in meshes
]
MESHED = pytest.mark.parametrize(("case", "mesh"), MESHES)
PLAIN = 1_570_816  # bytes that a plain step with AdamW exchanges on all three axes
# Of a step: its name, the case of one device with its losses, and bytes it exchanges at most, in
# those of a plain step.
VARIANTS = [
    ("adamw in pieces", "adamw", 1.9),
    ("int8 in pieces", "int8", 0.9),
    ("preference", "preference", 3.1),
    ("splash", "splash", 1.5),
]
# A gradient is a sum over the tokens, behind the sums of each block, twice as many of its backward
# pass, and the head's.
BLOCK_SUMS = (CFG.width, TOKENS, CFG.head_dim, CFG.heads * CFG.head_dim, CFG.width, CFG.ff)
SUMS = (BATCH * TOKENS, *3 * CFG.layers * BLOCK_SUMS, *3 * (CFG.width,), CFG.vocab)
SHARE = sums_apart(*SUMS)
APART = adam_apart(RATE, STEPS, SHARE)
# Bytes that a device's collectives make in a step: weights gathered along `fsdp` (in int8 a byte a
# number), their gradients added up over the rows, the residual stream added up along `tensor`, and
# Muon's matrices dealt out and gathered.
EXCHANGED = {
    ("adamw", "data=8"): {"all-reduce": 409_600},
    ("adamw", "fsdp=8"): {"all-gather": 659_456, "all-to-all": 65_536, "all-reduce": 327_680},
    ("adamw", "data=2,fsdp=4"): {"all-gather": 657_408, "all-to-all": 65_536, "all-reduce": 430_080},
    ("adamw", "fsdp=4,tensor=2"): {"all-gather": 544_768, "all-to-all": 65_536, "all-reduce": 730_996},
    ("muon", "data=2,fsdp=4"): {"all-gather": 1_034_240, "all-to-all": 425_984, "all-reduce": 430_080},
    ("muon", "fsdp=4,tensor=2"): {"all-gather": 643_072, "all-to-all": 425_984, "all-reduce": 862_068},
    ("lora", "data=2,fsdp=4"): {"all-gather": 646_144, "all-to-all": 32_768, "all-reduce": 21_504},
    ("lora", "fsdp=4,tensor=2"): {"all-gather": 544_256, "all-to-all": 32_768, "all-reduce": 515_836},
    ("int8", "fsdp=8"): {"all-gather": 358_400, "all-to-all": 32_768, "all-reduce": 43_008},
    ("int8", "fsdp=4,tensor=2"): {"all-gather": 363_520, "all-to-all": 32_768, "all-reduce": 531_712},
}


@pytest.fixture(scope="module")
def trained(request):
    """Returns what mesh_cases.py prints, in a process that has eight devices."""
    asked = [tier for tier in TIERS if any(item.get_closest_marker(tier) for item in request.session.items)]
    root = Path(__file__).parents[2]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        # XLA's warnings, such as one on what it must gather whole to cut it otherwise
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("mesh_cases.py"), *asked],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.law("sharding equivalence")
@MESHED
def test_losses_and_weights_are_those_of_one_device(trained, case, mesh):
    check_as_one_device(trained, f"{case} {mesh}", case, math.inf)


@pytest.mark.whole
@pytest.mark.law("sharding equivalence")
@pytest.mark.parametrize(("name", "alone", "times"), VARIANTS)
def test_variants_are_those_of_one_device(trained, name, alone, times):
    """On all three axes, and on two: microbatches, a scan, remat, pieces of the loss, a tied head,
    DPO, a TPU's kernel.
    """
    check_as_one_device(trained, name, alone, times)


def check_as_one_device(trained, name, alone, times):
    one, many = trained[f"{alone} one device"], trained[name]
    assert many["losses"] == pytest.approx(one["losses"], rel=0, abs=losses_apart(one["losses"], SHARE))
    assert one["losses"][0] > one["losses"][-1], "it learns something"
    assert many["apart"] < APART
    assert many["donated"]
    assert many["kept"], "the state comes back as it went in"
    assert sum(many["collectives"].values()) < times * PLAIN


@MESHED
def test_a_device_holds_its_share_of_the_state(trained, case, mesh):
    one, many, shape = (
        trained[f"{case} one device"]["held"],
        trained[f"{case} {mesh}"]["held"],
        parse_mesh(mesh),
    )
    for name, (whole, vectors) in one.items():
        assert many[name] == [(whole - vectors) / (shape.fsdp * shape.tensor) + vectors, vectors], (
            "gains are whole everywhere"
        )


@MESHED
def test_the_compiled_step_exchanges_no_more_than_is_known(trained, case, mesh):
    """Muon with remat, int8 in two microbatches. Gains, their gradients and scalars are below 1%;
    XLA would move many times more without the pins.
    """
    known, found = EXCHANGED[case, mesh], trained[f"{case} {mesh}"]["collectives"]
    assert {kind: size for kind, size in found.items() if kind in known or size > 4096} == pytest.approx(
        known, rel=0.02
    )


def test_random_weights_are_those_of_one_device(trained):
    assert trained["init"]["equal"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=2", "axes data, fsdp, tensor, not 'fdsp'. Did you mean 'fsdp'?"),
        ("fsdp", "one number of devices"),
        ("fsdp=0", "one number of devices"),
        (f"fsdp={10**20}", "one number of devices"),
        ("fsdp=2,fsdp=4", "'fsdp=4' does not"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("shape", "batch", "parts", "message"),
    [
        (MeshShape(tensor=2), 8, 1, "tensor=2 .* the 3 key heads: tensor may be 1 or 3"),
        (
            MeshShape(fsdp=8),
            12,
            1,
            "data=1 x fsdp=8 .* the 12 rows of a batch of 12: data times fsdp may be 6 or 12",
        ),
        (
            MeshShape(data=4),
            8,
            4,
            r"the 2 rows of a microbatch of 2 \(a batch of 8 in 4 parts\): data times fsdp may be 2",
        ),
        (MeshShape(fsdp=5), 10, 1, "the model's width of 576: fsdp times tensor may be 4 or 6"),
    ],
)
def test_a_mesh_that_does_not_fit_says_which_would(shape, batch, parts, message):
    with pytest.raises(UserError, match=message):
        check_mesh(shape, preset("smollm2-135m"), batch, parts)


def test_a_mesh_needs_as_many_devices_as_there_are():
    with pytest.raises(UserError, match="fsdp=2 is 2 devices and there are 1"):
        make_mesh(MeshShape(fsdp=2))


def test_a_matrix_without_a_rule_is_an_error():
    sizes = MeshShape(fsdp=2)._asdict()
    assert leaf_spec("opt_state/1/mu/blocks/3/q", (4, 6), sizes) == P("fsdp", "tensor")
    assert leaf_spec("step", (), sizes) == P()
    with pytest.raises(ValueError, match="No rule says where 'blocks/0/experts'"):
        leaf_spec("blocks/0/experts", (4, 6), sizes)
