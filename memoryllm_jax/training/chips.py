"""Accelerators: their data sheets, and stand-ins for them that a step can be compiled for."""

import dataclasses
import functools
import importlib.util
import os

import jax
from jax.experimental import topologies

from memoryllm_jax.common.errors import ArgumentError, one_line
from memoryllm_jax.model import attention

_PLUGINS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}  # modules that hold each platform's compiler
GPU_SHARE = 0.92  # share of a GPU's memory that `train` lets JAX use


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA must know about a GPU to compile for it.

    Attributes:
      capability: CUDA compute capability, (major, minor).
      cores: number of streaming multiprocessors.
      shared_memory: bytes of shared memory of one multiprocessor.
      cache: bytes of the L2 cache.
    """

    capability: tuple[int, int]
    cores: int
    shared_memory: int
    cache: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device by its maker's data sheet. Speeds are in bytes/s; those of networks are of one direction.

    Attributes:
      kinds: JAX's device_kind of the devices that have this peak, without "NVIDIA ".
      peak_flops: FLOP/s of dense bfloat16 products.
      memory: bytes that XLA can use.
      bandwidth: speed of the memory.
      network: speed of all of a device's links to the other devices of its domain, taken together.
      between: speed of a device's share of the network between domains.
      domain: number of devices that `network` joins: those of the largest TPU slice, or of a GPU node.
      torus: number of dimensions of a TPU slice; 0 for a GPU.
      gpu: None for a TPU.
    """

    title: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    bandwidth: float
    network: float
    between: float
    domain: int
    torus: int = 0
    gpu: Gpu | None = None

    @property
    def platform(self) -> str:
        """JAX's name of the platform, which is also the name of the extra that installs its compiler."""
        return "cuda" if self.gpu else "tpu"

    @property
    def accelerator(self) -> attention.Accelerator:
        """The chip as attention's backends are chosen for it."""
        return attention.Accelerator(self.platform, self.title, self.gpu.capability if self.gpu else None)

    def has_compiler(self) -> bool:
        """Whether the JAX plugin with the chip's compiler is installed."""
        try:
            return importlib.util.find_spec(_PLUGINS[self.platform]) is not None
        except ModuleNotFoundError:  # `jax_plugins`, the package around the plugin, is missing
            return False


_AMPERE = Gpu(capability=(8, 0), cores=108, shared_memory=167936, cache=41943040)
_HOPPER = Gpu(capability=(9, 0), cores=132, shared_memory=233472, cache=52428800)
# Peaks, memories and links of GPUs are those of NVIDIA's data sheets: "A100 Tensor Core GPU" (2021), "H100 Tensor Core
# GPU" (SXM and NVL; PCIe in the edition of 2022), "H200 Tensor Core GPU" and "DGX B200". Peaks there are with sparsity,
# and dense products reach half of them. `between` is that of DGX systems, which have a network adapter for each GPU;
# for PCIe and NVL cards, which stand in servers of many makers, 200 Gbit/s are assumed. NVLink bridges, which join two
# or four cards, are left out: cards reach each other through PCIe.
CHIPS = {
    "a100": Chip(
        title="A100 80GB SXM",
        kinds=("A100-SXM4-80GB", "A100-SXM4-40GB", "A100 80GB PCIe", "A100-PCIE-40GB"),
        peak_flops=312e12,
        memory=GPU_SHARE * 80e9,
        bandwidth=2.04e12,
        network=300e9,
        between=25e9,
        domain=8,
        gpu=_AMPERE,
    ),
    "a100-40gb": Chip(
        title="A100 40GB SXM",
        kinds=(),  # those of a100
        peak_flops=312e12,
        memory=GPU_SHARE * 40e9,
        bandwidth=1.555e12,
        network=300e9,
        between=25e9,
        domain=8,
        gpu=_AMPERE,
    ),
    "a100-pcie": Chip(
        title="A100 80GB PCIe",
        kinds=(),  # those of a100
        peak_flops=312e12,
        memory=GPU_SHARE * 80e9,
        bandwidth=1.935e12,
        network=32e9,
        between=25e9,
        domain=8,
        gpu=_AMPERE,
    ),
    "h100": Chip(
        title="H100 80GB SXM",
        kinds=("H100 80GB HBM3", "GH200 480GB"),
        peak_flops=989e12,
        memory=GPU_SHARE * 80e9,
        bandwidth=3.35e12,
        network=450e9,
        between=50e9,
        domain=8,
        gpu=_HOPPER,
    ),
    "h100-pcie": Chip(
        title="H100 80GB PCIe",
        kinds=("H100 PCIe",),
        peak_flops=756e12,
        memory=GPU_SHARE * 80e9,
        bandwidth=2.0e12,
        network=64e9,
        between=25e9,
        domain=8,
        gpu=dataclasses.replace(_HOPPER, cores=114),
    ),
    "h100-nvl": Chip(
        title="H100 94GB NVL",
        kinds=("H100 NVL",),
        peak_flops=835e12,
        memory=GPU_SHARE * 94e9,
        bandwidth=3.9e12,
        network=64e9,
        between=25e9,
        domain=8,
        gpu=_HOPPER,
    ),
    "h200": Chip(
        title="H200 SXM",
        kinds=("H200",),
        peak_flops=989e12,
        memory=GPU_SHARE * 141e9,
        bandwidth=4.8e12,
        network=450e9,
        between=50e9,
        domain=8,
        gpu=_HOPPER,
    ),
    "h200-nvl": Chip(
        title="H200 NVL",
        kinds=("H200 NVL",),
        peak_flops=835e12,
        memory=GPU_SHARE * 141e9,
        bandwidth=4.8e12,
        network=64e9,
        between=25e9,
        domain=8,
        gpu=_HOPPER,
    ),
    "b200": Chip(
        title="B200",
        kinds=("B200",),
        peak_flops=2250e12,
        memory=GPU_SHARE * 180e9,
        bandwidth=7.7e12,
        network=900e9,
        between=50e9,
        domain=8,
        gpu=Gpu(capability=(10, 0), cores=148, shared_memory=233472, cache=132120576),
    ),
    "v4": Chip(
        title="TPU v4",
        kinds=("TPU v4",),
        peak_flops=275e12,
        memory=31.75 * 2**30,
        bandwidth=1.2e12,
        network=6 * 45e9,
        between=6.25e9,
        domain=4096,
        torus=3,
    ),
    "v5e": Chip(
        title="TPU v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        memory=15.75 * 2**30,
        bandwidth=0.82e12,
        network=4 * 45e9,
        between=6.25e9,
        domain=256,
        torus=2,
    ),
    "v5p": Chip(
        title="TPU v5p",
        kinds=("TPU v5", "TPU v5p"),
        peak_flops=459e12,
        memory=95 * 2**30,
        bandwidth=2.77e12,
        network=6 * 90e9,
        between=6.25e9,
        domain=4096,
        torus=3,
    ),
    "v6e": Chip(
        title="TPU v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        memory=31.25 * 2**30,
        bandwidth=1.64e12,
        network=4 * 90e9,
        between=12.5e9,
        domain=256,
        torus=2,
    ),
}


def get(name: str) -> Chip:
    """The chip of this name. Raises: ArgumentError."""
    if name not in CHIPS:
        raise ArgumentError("chip", f"expected one of {', '.join(CHIPS)}, found {name!r}")
    return CHIPS[name]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, by JAX's device_kind; None if no chip of the table has it, as for a CPU.

    Kinds are compared whole: parts of a name do not tell an H100 from an H100 PCIe, or an H200 from a GH200.
    """
    kind = device_kind.removeprefix("NVIDIA ")
    return next((chip.peak_flops for chip in CHIPS.values() if kind in chip.kinds), None)


def devices(name: str, count: int, slices: int = 0) -> tuple[list[jax.Device], str]:
    """Devices to compile for, which need not exist here.

    If the plugin of the chip's platform is installed, they are devices of that chip. Otherwise they are CPU devices,
    and `emulate` must be called before JAX is used.

    Args:
      name: of the chip.
      count: number of devices.
      slices: number of TPU slices; 0: as few as hold the devices.
    Returns: (devices, a clause that says which compiler compiles for them).
    Raises: ArgumentError for a number of devices that makes no whole slices or nodes.
    """
    chip = get(name)
    if chip.gpu:
        _check_nodes(name, chip, count, slices)
    else:
        slices, slice_shape = _slices(name, chip, count, slices)
    if not chip.has_compiler():
        return jax.devices("cpu"), (
            f"XLA for CPUs, on {count} emulated devices: memory is an estimate, kernels are not the chip's; "
            f"pip install 'memoryllm_jax[{chip.platform}]' installs the chip's own compiler, which needs no such chip"
        )
    if chip.gpu:
        nodes, gpus_a_node = max(1, count // chip.domain), min(count, chip.domain)
        describe = functools.partial(
            topologies.get_topology_desc,
            name,
            "cuda",
            target_config=_gpu_target(chip),
            topology=f"1 x {nodes} x {gpus_a_node}",
        )
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no query of Google's metadata server: this is no TPU VM
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may use libtpu too
        options = {"num_slices": slices} if slices > 1 else {}
        shape = "x".join(map(str, slice_shape))
        describe = functools.partial(topologies.get_topology_desc, f"{name}:{shape}", "tpu", **options)
    try:
        topology = describe()
    except Exception as error:  # each plugin raises other types
        reason = one_line(error, 300)
        raise ArgumentError(
            "devices", f"{_PLUGINS[chip.platform]} cannot compile for {count} of {name}: {reason}"
        ) from error
    return list(topology.devices), f"XLA for {chip.title}, which needs no such chip"


def emulate(count: int) -> None:
    """Makes JAX see this many CPU devices and nothing else. Call it before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _check_nodes(name: str, chip: Chip, count: int, slices: int) -> None:
    """Raises: ArgumentError if GPUs do not make whole nodes, or slices of GPUs are asked for."""
    if slices:
        raise ArgumentError("slices", f"expected 0, as only TPUs have slices, found {slices} of {name}")
    if count > chip.domain and count % chip.domain:
        raise ArgumentError(
            "devices", f"expected at most {chip.domain} GPUs, or a multiple of {chip.domain}, found {count}"
        )


def _slices(name: str, chip: Chip, count: int, slices: int) -> tuple[int, list[int]]:
    """(number of slices, shape of one slice). If `slices` is 0, the slices are as few as hold the devices.

    Raises: ArgumentError.
    """
    slices = slices or max(1, count // chip.domain)
    size = count // slices
    smallest = 4 if chip.torus == 3 else 1
    is_power_of_two = size > 0 and size & (size - 1) == 0
    if not is_power_of_two or size * slices != count or not smallest <= size <= chip.domain:
        raise ArgumentError(
            "devices",
            f"expected whole slices of {name}, each a power of two from {smallest} to {chip.domain} devices, "
            f"found {count} devices with slices={slices}",
        )
    # As close to a square or a cube as powers of two come.
    shape = [1] * chip.torus
    while size > 1:
        shape[shape.index(min(shape))] *= 2
        size //= 2
    shape.sort()
    if chip.torus == 3:
        # Google's names of topologies have ones at the end: 2x2x1.
        shape = [n for n in shape if n > 1] + [n for n in shape if n == 1]
    return slices, shape


def _gpu_target(chip: Chip) -> str:
    """The GPU that XLA compiles for, as a GpuTargetConfigProto in text format."""
    gpu = chip.gpu
    major, minor = gpu.capability
    hopper_or_later = major >= 9
    extension = "    feature_extension: ACCELERATED_FEATURES\n" if hopper_or_later else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {128 if hopper_or_later else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.cache}
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
