"""Loss of a model on held-out text with rows as a ToL file would hold them."""

import numpy as np

from memoryllm_jax import data
from memoryllm_jax.cli import UserError
from memoryllm_jax.decoder import Decoder
from memoryllm_jax.saved import SavedModel
from memoryllm_jax.tol.budget import Scorer

CALIBRATION_TOKENS = 1 << 15  # of the held-out text, on which a budget is measured


def scorer(saved: SavedModel, path: str, tokens: int = CALIBRATION_TOKENS, half: int = 0) -> Scorer:
    """Measures on windows of held-out text: of its windows, every second one, so that each half can judge the other.

    Raises: UserError if the text is too short.
    """
    stream, length = data.Dataset(path).validation, saved.context
    windows_there = (stream.tokens - 1) // length
    chosen = np.arange(half, windows_there, 2)
    if not len(chosen):
        raise UserError(f"{path}: expected at least {(half + 1) * length + 1} held-out tokens, found {stream.tokens}")
    count = min(max(1, tokens // length), len(chosen))
    chosen = chosen[np.linspace(0, len(chosen) - 1, count).astype(int)]
    windows = np.stack([stream.read(int(k) * length, length + 1) for k in chosen])
    wanted = lambda name: not saved.is_memory(name)  # noqa: E731
    params, _ = saved.load(wanted)
    embedding = params["embedding"] if saved.config.tie_embeddings else None
    decoder = Decoder(saved.config, params, saved.mesh)
    batch = decoder.shards * max(1, min(8, 4096 // length) // decoder.shards)
    return Scorer(decoder, windows, embedding, batch)
