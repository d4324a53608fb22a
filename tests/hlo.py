"""Reads the collectives and other operations of a compiled step from its HLO text."""

import collections
import math
import re
from collections.abc import Mapping

import numpy as np

# The first line of a function:
#   %fused_computation.8 (param_0.8: f32[128,64], param_1.8: f32[64,112]) -> f32[128,112] {
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
# A line in it, as (name, type, operation, rest). The type of several results is a tuple in brackets.
#   %all-gather.41 = f32[64,112]{1,0} all-gather(%fusion.8), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
# The operation: all-gather, or all-gather-start where the compiler lets computation overlap with it.
_COLLECTIVE = re.compile("(all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?$")
# The functions that an instruction calls:
#   calls=%fused_computation.8    to_apply=%add.14    body=%region_8.11
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")
# What a GPU computes as a matrix product or attention: a kernel of Triton, or a call of a library.
_PRODUCT = re.compile(r"calls=%[\w.]*gemm_fusion|__cublas|__cudnn")
# The operands, with a comment before every fifth one:
#   %dot.145, %dot.146, /*index=5*/%dot.147
_OPERAND = re.compile(r"%([\w.-]+)")
# How often a loop turns, if the compiler knows:
#   backend_config={"known_trip_count":{"n":"3"}}
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Element type and sizes of an array, in the type of a result:
#   f32[64,112]{1,0}    pred[]
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
# Three notations for the devices that a collective joins. Two groups of four devices, each listed:
#   replica_groups={{0,1,2,3},{4,5,6,7}}
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
# The devices in an order, as the shape of all devices and its transposition, both or the first alone:
#   [4,2]T(1,0)
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# Two groups of four devices, from all devices in an order:
#   replica_groups=[2,4]<=[4,2]T(1,0)
_COUNTED_GROUPS = re.compile(rf"replica_groups=\[\d+,(\d+)\]<={_ORDER}")
# Groups along the axis fsdp of a mesh, whose devices may be in another order:
#   replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
#   replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
_MESH_GROUPS = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")

_Body = collections.namedtuple("_Body", "lines is_entry")
_Instruction = collections.namedtuple("_Instruction", "name type operation rest")


def operand_bytes(text: str, mesh_shape: Mapping[str, int]) -> dict[tuple[str, tuple[str, ...]], int]:
    """{(kind of collective, mesh axes that a group spans): bytes of its operands on one device}.

    Loops count once for each turn. A reduce-scatter is counted as an all-reduce, as the TPU compiler writes it as an
    all-reduce inside a fusion.
    """
    bodies = _computations(text)
    times = _times(bodies)
    found = collections.Counter()
    for name, body in bodies.items():
        types = {instruction.name: instruction.type for instruction in body.lines}
        for instruction in body.lines:
            match = _COLLECTIVE.match(instruction.operation)
            if match and times[name]:
                operands = _OPERAND.findall(instruction.rest.partition(")")[0])
                size = sum(_bytes(types[operand]) for operand in operands if operand in types)
                kind = match[1].replace("reduce-scatter", "all-reduce")
                found[kind, _axes(_group(instruction.rest), mesh_shape)] += times[name] * size
    return {(kind, axes): size for (kind, axes), size in found.items() if axes}


def products_while_gathering(text: str) -> list[int]:
    """For each all-gather in the order of the text, how many matrix products a GPU computes meanwhile."""
    found = []
    for body in _computations(text).values():
        under_way = {}
        for instruction in body.lines:
            if instruction.operation == "all-gather-start":
                under_way[instruction.name] = 0
            elif instruction.operation == "all-gather-done":
                found.append(under_way.pop(_OPERAND.search(instruction.rest)[1]))
            elif _PRODUCT.search(instruction.rest):
                under_way = {name: count + 1 for name, count in under_way.items()}
    return found


def results(text: str, operation: str) -> list[str]:
    """The types of all results of an operation, such as ["bf16[64,112]{1,0}"] of pad, in the order of the text."""
    return [i.type for body in _computations(text).values() for i in body.lines if i.operation == operation]


def arrays(text: str) -> set[tuple[tuple[int, ...], int]]:
    """(sizes of its axes, its bytes) of every array that an operation results in."""
    types = {i.type for body in _computations(text).values() for i in body.lines}
    found = {match[0] for type_ in types for match in _ARRAY.finditer(type_)}
    return {(tuple(int(d) for d in _ARRAY.match(a)[2].split(",") if d), _bytes(a)) for a in found}


def _computations(text):
    bodies, current = {}, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies[match[2]] = _Body([], bool(match[1]))
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.lines.append(_Instruction(*match.groups()))
    return bodies


def _times(bodies):
    """{name of a computation: how often one step runs it}"""
    times = collections.Counter({name: 1 for name, body in bodies.items() if body.is_entry})
    for caller in reversed(bodies):  # HLO text lists a computation before the ones that call it
        for instruction in bodies[caller].lines:
            if instruction.operation.endswith(("-done", "-update")):
                continue
            trips = _trips(instruction.rest, bodies) if instruction.operation == "while" else 1
            for name in _CALLED.findall(instruction.rest):
                times[name] += trips * times[caller]
    return times


def _trips(rest, bodies):
    """Turns of a loop: the compiler's known_trip_count, or the only constant in the loop's condition."""
    if match := _TRIP_COUNT.search(rest):
        return int(match[1])
    condition = bodies[re.search(r"condition=%([\w.-]+)", rest)[1]]
    (limit,) = {int(i.rest.partition(")")[0]) for i in condition.lines if i.operation == "constant"}
    return limit


def _bytes(kind):
    total = 0
    for name, dims in _ARRAY.findall(kind):
        bits = {"pred": 8, "bf16": 16}.get(name) or int(re.search(r"\d+", name)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _group(rest):
    """The devices of the first group that a collective joins, by their place in the mesh."""
    if match := _LISTED_GROUPS.search(rest):
        return _numbers(match[1])
    if match := _COUNTED_GROUPS.search(rest):
        return _devices(match[2], match[3])[: int(match[1])]
    mesh, shape, order, names = _MESH_GROUPS.search(rest).groups()
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
    devices = _devices(shape or ",".join(map(str, sizes.values())), order).reshape(list(sizes.values()))
    along = {name.strip("'") for name in names.split(",")}
    return devices[tuple(slice(None) if name in along else 0 for name in sizes)].ravel()


def _devices(shape, order):
    """The numbers of all devices in the order that `_ORDER` reads."""
    devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (devices.transpose(_numbers(order)) if order else devices).ravel()


def _numbers(text):
    return [int(number) for number in text.split(",")]


def _axes(group, mesh_shape):
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(group, list(mesh_shape.values()))
    axes = tuple(name for name, place in zip(mesh_shape, places, strict=True) if len(set(place)) > 1)
    assert len(group) == math.prod(mesh_shape[name] for name in axes), (group, axes)
    return axes
