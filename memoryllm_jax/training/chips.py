"""Accelerators a run is planned for: their data sheets, and devices to compile for where none is at hand."""

import dataclasses
import functools
import importlib.util
import os

import jax
from jax.experimental import topologies

from memoryllm_jax.common.errors import UserError

# Dense bf16 FLOP/s of one device, from the makers' data sheets (SXM modules), by a part of jax's device_kind.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device by its maker's data sheet; bytes/s are of one direction.

    network: a device's links to the others of its domain, all together.  between: its share of the network outside.
    domain: devices that are joined by `network`: a TPU slice at its largest, a GPU node.
    gpu: compute capability, multiprocessors, shared memory of one in bytes, L2 cache in bytes.
    """

    title: str
    peak_flops: float  # bfloat16, dense
    memory: float  # bytes that XLA can use
    bandwidth: float
    network: float
    between: float
    domain: int
    platform: str = "tpu"
    torus: int = 0  # dimensions of a TPU slice
    gpu: tuple = ()


GPU_SHARE = 0.92  # of a GPU's memory that `train` lets JAX have
_hopper = {"platform": "cuda", "domain": 8, "gpu": ((9, 0), 132, 233472, 52428800)}
CHIPS = {
    "a100": Chip(
        "A100 80GB SXM", 312e12, GPU_SHARE * 80e9, 2.04e12, 300e9, 25e9, 8, "cuda", gpu=((8, 0), 108, 167936, 41943040)
    ),
    "h100": Chip("H100 80GB SXM", 989e12, GPU_SHARE * 80e9, 3.35e12, 450e9, 50e9, **_hopper),
    "h200": Chip("H200 SXM", 989e12, GPU_SHARE * 141e9, 4.8e12, 450e9, 50e9, **_hopper),
    "b200": Chip(
        "B200", 2250e12, GPU_SHARE * 180e9, 7.7e12, 900e9, 50e9, 8, "cuda", gpu=((10, 0), 148, 233472, 132120576)
    ),
    "v4": Chip("TPU v4", 275e12, 31.75 * 2**30, 1.2e12, 6 * 45e9, 6.25e9, 4096, torus=3),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * 2**30, 0.82e12, 4 * 45e9, 6.25e9, 256, torus=2),
    "v5p": Chip("TPU v5p", 459e12, 95 * 2**30, 2.77e12, 6 * 90e9, 6.25e9, 4096, torus=3),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * 2**30, 1.64e12, 4 * 90e9, 12.5e9, 256, torus=2),
}


def get(name: str) -> Chip:
    """Raises: UserError."""
    if name not in CHIPS:
        raise UserError(f"--chip: expected one of {', '.join(CHIPS)}, found {name!r}")
    return CHIPS[name]


def devices(name: str, count: int, slices: int = 0) -> tuple[list[jax.Device], str]:
    """Devices to compile for, and a clause that says which compiler does it.

    The chip's own where its plugin is installed, which needs no such chip; else emulated CPU devices, for which
    `emulate` has to be called before JAX is used. Raises: UserError for a number that makes no slice.
    """
    chip = get(name)
    slices, shape = _slices(chip, count, slices, name)
    plugin = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}[chip.platform]
    try:
        there = importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        extra = {"tpu": "tpu", "cuda": "cuda"}[chip.platform]
        return jax.devices("cpu"), (
            f"XLA for CPUs, on {count} emulated devices: memory is an estimate, kernels are not the chip's; "
            f"pip install 'memoryllm_jax[{extra}]' lets the chip's own compiler do it, here too"
        )
    if chip.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options = {"num_slices": slices} if slices > 1 else {}
        described = functools.partial(topologies.get_topology_desc, f"{name}:{'x'.join(map(str, shape))}", "tpu")
    else:
        options = {"target_config": _target(chip), "topology": " x ".join(map(str, shape))}
        described = functools.partial(topologies.get_topology_desc, name, "cuda")
    try:
        topology = described(**options)
    except Exception as error:  # of the plugin, which has its own ways to refuse
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--devices={count} of {name}: {plugin} cannot compile for them: {reason}") from error
    return list(topology.devices), f"XLA for {chip.title}, which needs no such chip"


def emulate(count: int) -> None:
    """Gives JAX this many CPU devices and nothing else; to be called before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _slices(chip: Chip, count: int, slices: int, name: str) -> tuple[int, list[int]]:
    """(slices, shape of one); for GPUs (1, [slices, nodes, GPUs a node]). As few slices as may be if `slices` is 0."""
    if chip.platform == "cuda":
        if slices:
            raise UserError(f"--slices: expected a TPU, which come in slices, found {name}")
        if count > chip.domain and count % chip.domain:
            raise UserError(f"--devices: expected up to {chip.domain} or whole nodes of {chip.domain}, found {count}")
        return 1, [1, max(1, count // chip.domain), min(count, chip.domain)]
    slices = slices or max(1, count // chip.domain)
    size = count // slices
    if size & (size - 1) or size * slices != count or (chip.torus == 3 and size < 4):
        smallest = 4 if chip.torus == 3 else 1
        raise UserError(
            f"--devices: expected a power of two from {smallest} on for a slice of {name}, or a multiple of its "
            f"{chip.domain} devices, found {count}"
        )
    shape = [1] * chip.torus
    for _ in range(size.bit_length() - 1):
        shape[shape.index(min(shape))] *= 2
    return slices, sorted(shape) if chip.torus == 2 else sorted(shape, key=lambda n: (n == 1, n))


def _target(chip: Chip) -> str:
    """What XLA wants to know of a GPU, as the text of its GpuTargetConfigProto."""
    (major, minor), cores, shared, cache = chip.gpu
    extension = "    feature_extension: ACCELERATED_FEATURES\n" if major >= 9 else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared - 1024}
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.8
  device_memory_size: {int(chip.memory / GPU_SHARE)}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
{extension}  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 10
}}
device_description_str: "{chip.title}"
"""
