"""Reads the collectives of a compiled step from its HLO text, to compare formulas with."""

import collections
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COLLECTIVE = re.compile("(all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)")
# mesh['a'=2,'b'=4] {'b'}; 'b':(1)2 is a part of the axis.
_MESH_GROUP = re.compile(r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? ?\{([^}]*)\}")
_Body = collections.namedtuple("_Body", "lines is_entry")
_Instruction = collections.namedtuple("_Instruction", "name type operation rest")


def operand_bytes(text: str) -> dict[tuple[str, int], int]:
    """{(kind of collective, devices in a group): bytes of its operands on one device}; loops count once for each turn.

    A reduce-scatter is counted as an all-reduce, as the TPU compiler writes it as an all-reduce inside a fusion.
    """
    bodies = _computations(text)
    times = _times(bodies)
    found = collections.Counter()
    for name, body in bodies.items():
        types = {instruction.name: instruction.type for instruction in body.lines}
        for instruction in body.lines:
            match = _COLLECTIVE.match(instruction.operation)
            if match and times[name]:
                operands = re.findall(r"%?([\w.-]+)", re.sub(r"/\*.*?\*/", "", instruction.rest.partition(")")[0]))
                size = sum(_bytes(types[operand]) for operand in operands if operand in types)
                kind = match[1].replace("reduce-scatter", "all-reduce")
                found[kind, _group_size(instruction.rest)] += times[name] * size
    return {(kind, group): size for (kind, group), size in found.items() if group > 1}


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
            called = _CALLED.findall(instruction.rest)
            trips = _trips(instruction.rest, bodies) if instruction.operation == "while" else 1
            for name in re.findall(r"[\w.-]+", " ".join(called)):
                if name in bodies:
                    times[name] += trips * times[caller]
    return times


def _trips(rest, bodies):
    """Turns of a loop: the compiler's known_trip_count, or the only constant in the loop's condition."""
    if match := re.search(r"known_trip_count\D*(\d+)", rest):
        return int(match[1])
    condition = bodies[re.search(r"condition=%?([\w.-]+)", rest)[1]]
    (limit,) = {int(i.rest.partition(")")[0]) for i in condition.lines if i.operation == "constant"}
    return limit


def _bytes(kind):
    total = 0
    for name, dims in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", kind):
        bits = {"pred": 8, "bf16": 16}.get(name) or int(re.search(r"\d+", name)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _group_size(rest):
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):  # {{0,1},{2,3}}
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):  # [groups,devices]<=[shape]
        return int(match[1])
    sizes_text, axes = _MESH_GROUP.search(rest).groups()
    sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", sizes_text))
    parts = re.findall(r"'?([a-z]\w*)'?(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
