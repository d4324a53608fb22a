"""Slots with different overlays in one batch: each has the rows that its overlay alone gives."""

import jax
import numpy as np
import pytest
from lab import GREEDY, written

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.slots import Settings, Slots
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edit_spec import Blend, Replace, Suppress, Swap, Zero
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.slot_edits import PoolFullError, SlotEdits

SLOTS = 64


def overlays_of(memory, layers):
    """One overlay for each slot. They differ, but share rows; all orders of new rows and suppressed keys are there."""
    rng, out = np.random.default_rng(0), []
    for slot in range(SLOTS):
        a, b = slot, 300 + slot % 7
        new = [
            Swap(token=a, by=b),
            Blend(token=a, by=b, share=0.25, layers=(slot % 2,)),
            Replace(token=a, by=b, layers=(slot % 2,)),
            Zero(token=b),
        ]
        keys = [Suppress(layer=layers[slot % len(layers)], key=slot % 2), Suppress(layer=layers[-1], key=5)]
        specs = [new[slot % 4], keys[0], new[slot // 4 % 4], keys[1]][: 1 + slot % 5 if slot % 5 < 4 else 0]
        if slot % 3 == 0:
            specs = specs[::-1]
        overlay = Overlay(memory)
        for spec in specs:
            Editor(overlay).add(spec)
        if slot % 8 == 1:
            row = rng.standard_normal((memory.layers, memory.dim), np.float32)
            Editor(overlay).give("learned", {a: row})
        out.append(overlay if slot else None)
    return out


def equal_rows(found, expected):
    """Whether rows are equal to the bit; a layer that rows lack equals zero."""
    np.testing.assert_array_equal(found.x0_SUD, expected.x0_SUD)
    for mine, theirs in zip(found.rows_LSUP, expected.rows_LSUP, strict=True):
        if theirs is None:
            assert not np.asarray(mine).any()
        else:
            np.testing.assert_array_equal(mine, theirs)


def of_row(rows, u):
    return jax.tree.map(lambda x: x[:, u], rows)


@pytest.mark.parametrize(
    "name, place, choices, first",
    [
        ("flex-3", "", {}, 0),
        ("tied", "device", {}, 1),
        ("flex-3", "host", {"drop_layers": ("1",)}, 2),
    ],
)
def test_64_slots_have_the_rows_of_their_overlays(lab, name, place, choices, first):
    """All slots are filled; those compared, for which functions of their own compile, are others in each case."""
    compared = range(first, SLOTS, 7)  # no pattern of `overlays_of` repeats after 7 slots
    files = {"tol": lab.tol(name, **choices), "rows": place, "cache": None if place == "device" else 1 << 16}
    with lab.model(name, **(files if place else {})) as engine:
        source, mesh, memory = engine.rows, engine.trained.mesh, serving.memory_of(engine)
        held = [layer for layer in range(2) if memory.holds(layer).any()]
        overlays = overlays_of(memory, held)
        edits = SlotEdits(memory, mesh, SLOTS, tokens=4, keys=2)
        for slot, overlay in enumerate(overlays):
            edits.place(slot, overlay)
        step = jax.jit(lambda of_source, of_edits, ids_B: edits.apply(of_edits, ids_B, source.gather(of_source, ids_B)))
        piece = jax.jit(edits.apply_to_slot)
        alone = {slot: EditedRows(source, overlays[slot] or Overlay(memory), mesh) for slot in compared}
        gather = jax.jit(alone[first].gather)  # the edits are its arguments
        rng = np.random.default_rng(1)
        for ids_B in (np.arange(SLOTS), 300 + np.arange(SLOTS) % 7, rng.integers(0, 512, SLOTS)):
            ids_B = ids_B.astype(np.int32)
            if not source.on_device:
                source.reserve(SLOTS)
                source.hold(ids_B)
            with jax.set_mesh(mesh):
                found = step(source.arrays, edits.arrays, ids_B)
                for slot, rows in alone.items():
                    expected = gather(rows.arrays, ids_B)
                    equal_rows(of_row(found, slot), of_row(expected, slot))
            if place and overlays[slot]:  # rows of a file are the same to the bit wherever they are edited
                on_host = overlays[slot].rows(ids_B)
                for layer in held:
                    np.testing.assert_array_equal(expected.rows_LSUP[layer][0], on_host[:, layer])
        ids_U = np.array([*range(0, SLOTS, 3), *range(300, 307)], np.int32)
        rows = source.fetch(ids_U)
        rows = rows._replace(rows_LSUP=list(rows.rows_LSUP))
        for slot in compared[::3]:
            with jax.set_mesh(mesh):
                found = piece(edits.arrays, np.int32(slot), ids_U, rows)
            equal_rows(found, alone[slot].fetch(ids_U))
        assert step._cache_size() == piece._cache_size() == 1


def test_texts_of_64_slots_with_64_overlays_are_those_of_generate(lab):
    prompts = [[slot, 300 + slot % 7, 17] for slot in range(SLOTS)]
    with lab.model("flex-3") as engine:
        memory, mesh = serving.memory_of(engine), engine.trained.mesh
        overlays, rng = [None], np.random.default_rng(0)
        for slot in range(1, SLOTS):
            # Rows as large as the residual stream, as those of the small model hardly change its texts
            rows = {token: 9 * rng.standard_normal((2, memory.dim), np.float32) for token in (17, slot)}
            overlays.append(Overlay(memory))
            Editor(overlays[slot]).give("learned", rows)
            for spec in (Swap(token=slot, by=300 + slot % 7), Suppress(layer=1, key=slot % 2)):
                Editor(overlays[slot]).add(spec)
        edits = SlotEdits(memory, mesh, SLOTS, tokens=4, keys=2)
        slots = Slots(engine, SLOTS, 16, edits)
        texts = []
        for slot, overlay in enumerate(overlays):
            slots.begin(slot, Settings(sampling=GREEDY, end=10))
            edits.place(slot, overlay)
            texts += [[slots.read_piece(slots.prefill(slot, prompts[slot], 0, False, True)).token]]
        while len(texts[0]) < 7:
            for text, token in zip(texts, slots.read(slots.step()).tokens_B.tolist()):
                text.append(token)
        plain = written(engine, prompts, 7)
        assert texts[0] == plain[0] and len({tuple(text) for text in texts}) > SLOTS // 2
        for slot in (1, 43):
            engine.rows = EditedRows(engine.rows, overlays[slot], mesh)
            assert texts[slot] == written(engine, [prompts[slot]], 7)[0]
            engine.rows = engine.rows.source


def test_equal_edits_share_the_pools_and_what_has_no_room_is_refused(lab):
    with lab.model("flex-3") as engine:
        memory = serving.memory_of(engine)
        edits = SlotEdits(memory, engine.trained.mesh, slots=8, tokens=2, keys=1, pooled_rows=3, pooled_keys=1)
        default = SlotEdits(memory, engine.trained.mesh, slots=2)  # as docs/serving.md says
        assert default.bytes == 2 * (16 * 2 * (4 * 32 + 1) + 4 * (4 * 512 + 4 * 32 + 4) + 2064)
        assert edits.bytes == sum(x.nbytes for x in edits.arrays)

        def overlay(*specs):
            out = Overlay(memory)
            for spec in specs:
                Editor(out).add(spec)
            return out

        for slot in range(6):
            edits.place(slot, overlay(Zero(token=slot), Zero(token=100 + slot)))  # all rows are the same one
        edits.place(6, overlay(Swap(token=3, by=4)))
        for _ in range(2):
            with pytest.raises(PoolFullError, match=r"edits: expected at most 0 new rows beside those .*, found 2"):
                edits.place(7, overlay(Swap(token=5, by=6)))
        edits.free(6)
        for slot in (7, 6):
            edits.place(slot, overlay(Swap(token=5, by=6)))
            edits.place(5 - slot % 2, overlay(Suppress(layer=1, key=3)))
        with pytest.raises(PoolFullError, match=r"edits: expected at most 0 suppressed keys beside those .*, found 1"):
            edits.place(3, overlay(Zero(token=9), Suppress(layer=1, key=4)))
        for specs, found in (
            ([Zero(token=token) for token in (1, 2, 3)], "at most 2 tokens with new rows, found 3"),
            ([Suppress(layer=1, key=key) for key in (3, 4)], "at most 1 suppressed keys, found 2"),
        ):
            with pytest.raises(UserError, match=f"edits: expected {found}"):
                edits.check(overlay(*specs))
        edits.free(7)
        edits.place(6, overlay(Swap(token=7, by=8)))  # takes the place of rows that no slot has
        ids_B = np.array([0, 101, 2, 3, 4, 5, 7, 6], np.int32)
        expected = memory.rows(ids_B)
        expected[:3] = 0
        expected[4:6] = overlay(Suppress(layer=1, key=3)).rows(ids_B[4:6])
        expected[6] = memory.rows(ids_B[6:] + 1)[0]
        with jax.set_mesh(engine.trained.mesh):
            found = edits.apply(edits.arrays, ids_B, engine.rows.fetch(ids_B))
        for slot in range(3):
            edits.free(slot)
        edits.place(0, overlay(Blend(token=1, by=2, share=0.5)))
    np.testing.assert_allclose(np.stack(found.rows_LSUP, 2)[0], expected, atol=1e-6)
