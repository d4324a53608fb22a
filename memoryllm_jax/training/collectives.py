"""Collectives of a compiled step, read from its HLO text: kind, bytes, group, and how often a step runs them."""

import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?$")
_MESH_GROUPS = re.compile(r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    operand_bytes: int  # on one device, once
    group: tuple[int, ...]  # of one group, the devices' places in the mesh
    times: int  # a step
    name: str  # the operation in the program that it comes from

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in a step, by the usual ring algorithms."""
        g = len(self.group)
        factor = {"all-gather": g - 1, "all-reduce": 2 * (g - 1) / g, "collective-permute": 1}
        return self.times * self.operand_bytes * factor.get(self.kind, (g - 1) / g)


def collectives(text: str, devices: int) -> list[Collective]:
    """Of the HLO text of a module compiled for `devices`. Raises: ValueError for a loop without a known trip count."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    found = []
    for computation, lines in bodies.items():
        types = {name: kind for name, kind, _, _ in lines}
        for _, _, operation, rest in lines:
            match = _COLLECTIVE.match(operation)
            if match and times.get(computation):
                operands = re.findall(r"%?([\w.-]+)", re.sub(r"/\*.*?\*/", "", rest.partition(")")[0]))
                size = sum(_bytes(types[name]) for name in operands if name in types)
                name = re.search(r'op_name="([^"]*)"', rest)
                group = _group(rest, devices)
                if len(group) > 1:
                    found.append(Collective(match[1], size, group, times[computation], name[1] if name else ""))
    return found


def _computations(text):
    """({name: [(instruction, type, operation, the rest of its line)]}, name of the entry)"""
    bodies, entry, current = {}, None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(match.groups())
    return bodies, entry


def _times(bodies, entry):
    """{computation: how often a step runs it}"""
    times = {entry: 1}
    for computation in reversed(bodies):  # callers stand after what they call
        for name, _, operation, rest in bodies[computation] if computation in times else ():
            if operation.endswith(("-done", "-update")):
                continue
            called = re.findall(r"(?:calls|to_apply|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)", rest)
            trips = _trips(name, rest, bodies) if operation == "while" else 1
            for callee in re.findall(r"[\w.-]+", " ".join(called)):
                if callee in bodies:
                    times[callee] = times.get(callee, 0) + trips * times[computation]
    return times


def _trips(name, rest, bodies):
    if match := re.search(r"known_trip_count\D*(\d+)", rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)[1]
    limits = {int(m[1]) for _, kind, op, r in bodies[condition] if op == "constant" and (m := re.match(r"(\d+)\)", r))}
    if len(limits) != 1:
        raise ValueError(f"loop {name}: expected one constant in its condition, found {limits or 'none'}")
    return limits.pop()


def _bytes(kind):
    total = 0
    for name, dims in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", kind):
        bits = _BITS.get(name) or int(re.search(r"\d+", name)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _group(rest, devices):
    """The first of the groups, in any of HLO's three notations; all devices where none is named."""
    if match := _MESH_GROUPS.search(rest):
        sizes = {k.strip("'\" "): int(v) for k, v in (item.split("=") for item in match[1].split(","))}
        axes = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", match[2])
        shape, moved, at = [], [], 0
        for axis, size in sizes.items():
            part = next(((int(before or 1), int(count or size)) for a, before, count in axes if a == axis), None)
            before, count = part or (1, 1)
            shape += [before, count, size // before // count]
            moved += [at + 1] if part else []
            at += 3
        grid = np.arange(math.prod(shape)).reshape(shape)
        groups = np.moveaxis(grid, moved, range(len(shape) - len(moved), len(shape)))
        return tuple(groups.reshape(-1, math.prod(shape[i] for i in moved))[0].tolist())
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(d) for d in match[3].split(",")]
        order = [int(d) for d in match[4].split(",")] if match[4] else range(len(dims))
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return tuple(grid.reshape(int(match[1]), int(match[2]))[0].tolist())
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        return tuple(int(d) for d in match[1].split(","))
    return tuple(range(devices))
