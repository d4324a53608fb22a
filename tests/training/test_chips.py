"""The table of accelerators: numbers of devices, shapes of slices, and peak FLOP/s."""

import pytest

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.training import chips


@pytest.mark.parametrize(
    "name, count, slices, message",
    [
        ("tpu", 8, 0, "chip: expected one of a100, .*, found 'tpu'"),
        ("h100", 12, 0, "devices: expected at most 8 GPUs, or a multiple of 8, found 12"),
        ("h100", 8, 2, "slices: expected 0, as only TPUs have slices, found 2 of h100"),
        ("v5p", 24, 0, "devices: expected whole slices of v5p, each a power of two from 4 to 4096 devices, found 24"),
        ("v5e", 8, 3, "devices: expected whole slices of v5e, .*, found 8 devices with slices=3"),
        ("v5e", 512, 1, "devices: expected whole slices of v5e, .* to 256 devices, found 512 devices with slices=1"),
    ],
)
def test_numbers_of_devices_that_do_not_exist_are_refused(name, count, slices, message):
    with pytest.raises(ArgumentError, match=message):
        chips.devices(name, count, slices)


@pytest.mark.parametrize(
    "name, count, slices, shape",
    [
        ("v5p", 64, 0, (1, [4, 4, 4])),
        ("v5p", 8, 0, (1, [2, 2, 2])),
        ("v5p", 4, 0, (1, [2, 2, 1])),
        ("v5e", 512, 0, (2, [16, 16])),
        ("v5e", 8, 0, (1, [2, 4])),
        ("v5e", 64, 4, (4, [4, 4])),
    ],
)
def test_slices_are_as_few_and_as_cubic_as_they_can_be(name, count, slices, shape):
    assert chips._slices(name, chips.get(name), count, slices) == shape


@pytest.mark.parametrize(
    "device_kind, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H20", None),  # the table lacks it
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peak_flops_by_jaxs_name_of_a_device(device_kind, flops):
    assert chips.peak_flops(device_kind) == flops
