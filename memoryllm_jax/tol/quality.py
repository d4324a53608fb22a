"""Loss of a model on held-out text with rows as a ToL file would hold them."""

import numpy as np

from memoryllm_jax import data
from memoryllm_jax.cli import UserError
from memoryllm_jax.decoder import Decoder
from memoryllm_jax.saved import SavedModel
from memoryllm_jax.tol.budget import Scorer

CALIBRATION_TOKENS = 1 << 15  # of the training text, on which a budget is measured


def scorer(saved: SavedModel, path: str, tokens: int = CALIBRATION_TOKENS, split: str = "train") -> Scorer:
    """Measures on windows that are evenly spread over a split of prepared data. Raises: UserError."""
    stream = getattr(data.Dataset(path), split)
    length = saved.context
    count = min(max(1, tokens // length), (stream.tokens - 1) // length)
    if count < 1:
        raise UserError(f"{path}: expected at least {length + 1} tokens of {split} text, found {stream.tokens}")
    starts = np.linspace(0, stream.tokens - length - 1, count).astype(int)
    windows = np.stack([stream.read(int(start), length + 1) for start in starts])
    wanted = lambda name: not saved.is_memory(name)  # noqa: E731
    params, _ = saved.load(wanted)
    embedding = params["embedding"] if saved.config.tie_embeddings else None
    decoder = Decoder(saved.config, params, saved.mesh)
    batch = decoder.shards * max(1, min(8, 4096 // length) // decoder.shards)
    return Scorer(decoder, windows, embedding, batch)
