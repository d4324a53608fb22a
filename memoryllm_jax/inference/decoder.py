"""A trained model's decoder over token rows: prefill, decode steps with a key-value cache, and scoring of text.

It holds attention, FFN-C and the output head. The caller passes the rows of the token memory as `TokenRows`, so the
decoder does not know whether they were computed from weights or looked up.

Shapes: B sequences, T positions, D model width, H heads, K head size, V token ids as the head stores them, L layers,
C positions of the cache, S batch shards, N = B T / S positions of a shard; b sequences of one prefill.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import ahead, gradients, sequences
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.inference.sampling import Sampling, draw
from memoryllm_jax.inference.steps import Rules, Standing, Taken, take
from memoryllm_jax.model import attention, loss, sharding, transformer
from memoryllm_jax.model.sharding import constrain
from memoryllm_jax.model.token_memory import TokenRows, take_rows

_SMALLEST_BUCKET = 16
_CACHE_AXES = ("batch", "heads", None, None)


def bucket(size: int, most: int) -> int:
    """The size to pad to, so that few shapes compile: a power of two of at least 16, or `most` if that is less."""
    return min(most, max(_SMALLEST_BUCKET, next_power_of_two(size)))


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


class Decoder:
    """The compiled functions of one model. Each compiles once for each combination of shapes.

    Methods take arrays of the host or the device, and return before the device is done.

    Args:
      params: parameters as `TrainedModel.load` gives them; "memory" and an untied "embedding" are not used.
      mesh: the mesh that the parameters lie on.
    Attributes:
      shards: batch shards of the mesh. The size of each batch must be a multiple of it.
    """

    def __init__(self, config: ModelConfig, params: dict, mesh):
        self.config, self.mesh = config, mesh
        self.shards = sharding.batch_shards(mesh)
        self.fill(params)
        # Fixed for all results that a later call takes: with other shardings that call would compile again.
        whole, of_cache = NamedSharding(mesh, P()), NamedSharding(mesh, sharding.spec(*_CACHE_AXES))
        self._empty = ahead.jit(self._empty_body, static_argnums=(0, 1), out_shardings=of_cache)
        self._start = ahead.jit(lambda *trees: trees, out_shardings=whole)
        self._steps = ahead.jit(
            self._steps_body,
            static_argnames=("rows", "sampling", "vocab_size", "count"),
            donate_argnames="cache",
            out_shardings=Taken(whole, whole, of_cache),
        )

    def fill(self, params: dict) -> None:
        """Takes other parameters of the same shapes; the compiled functions stay."""
        self.params = {name: params[name] for name in ("layers", "final_norm")}
        self.params["head"] = params["embedding" if self.config.tie_embeddings else "head"]

    @property
    def weights_bytes(self) -> int:
        """Bytes of the decoder's weights. A decode step reads each of them once."""
        return sum(x.nbytes for x in jax.tree.leaves(self.params))

    def scaled(self, memory_L: np.ndarray, compute_L: np.ndarray) -> "Decoder":
        """This decoder with what each layer's token memory and FFN-C add multiplied by a factor.

        The compiled functions are shared, so other factors need no compilation.

        Args:
          memory_L: the factors of the token memory by layer.
          compute_L: the factors of FFN-C by layer, or of base's FFN.
        """
        factors = transformer.Factors(memory_L.astype(np.float32), compute_L.astype(np.float32))
        return self.with_params(factors=factors)

    def with_params(self, **params) -> "Decoder":
        """This decoder with some parameters replaced, such as `layers`. The compiled functions are shared."""
        # A shallow copy is enough, because the jitted functions take the parameters as an argument.
        other = copy.copy(self)
        other.params = self.params | params
        return other

    def empty_cache(self, batch: int, capacity: int, in_segments: bool = False) -> list:
        """A cache for each layer, for `batch` sequences of at least `capacity` positions.

        Args:
          in_segments: whether each is a list of `attention.segments`, for a `Reach` that counts these.
        """
        sizes = tuple(attention.segments(capacity)) if in_segments else (capacity,)
        with jax.set_mesh(self.mesh):
            layers = self._empty(batch, sizes)
        return layers if in_segments else [cache for (cache,) in layers]

    def prefill(self, rows: TokenRows, index_bT: np.ndarray, lengths_b: np.ndarray, slots_b: np.ndarray, cache):
        """Runs prompts through the decoder and writes their keys and values to the cache.

        Args:
          rows: rows of the prompts' tokens.
          index_bT: int32, the row of each position. Prompts are padded on the right with the index of any row.
          lengths_b: int32, the length of each prompt without padding.
          slots_b: int32, the place in the cache's batch for each prompt. A place past the end is not written, which
            serves prompts that only pad the batch.
          cache: the cache of all sequences. It is donated, so it must not be used afterwards.
        Returns: (float32 logits [b, V] of the token after each prompt, the cache with the prompts).
        """
        with jax.set_mesh(self.mesh):
            index_SN = self._by_shard(index_bT)
            return sequences.prefill(self.config, self.params, rows, index_SN, lengths_b, slots_b, cache)

    def start(self, standing: Standing, rules: Rules) -> tuple[Standing, Rules]:
        """Copies arrays of the host to each device, as `steps` needs them."""
        with jax.set_mesh(self.mesh):
            return self._start(standing, rules)

    def steps(
        self,
        rows: RowSource,
        standing: Standing,
        rules: Rules,
        cache: list[attention.Cache],
        sampling: Sampling,
        vocab_size: int,
        count: int,
    ) -> Taken:
        """Takes decode steps in one call: each gets the rows of the last tokens, runs the decoder and draws.

        Steps end early where a row of a running sequence is not on the device, and where all sequences have ended.

        Args:
          standing, rules: from `start`; after the first call, the standing that the call before returned.
          cache: the cache of the earlier positions. It is donated, so it must not be used afterwards.
          sampling: how tokens are drawn.
          vocab_size: only ids below it are drawn.
          count: the most steps.
        """
        with jax.set_mesh(self.mesh):
            return self._steps(
                self.params,
                rows.arrays,
                standing,
                rules,
                cache=cache,
                rows=rows,
                sampling=sampling,
                vocab_size=vocab_size,
                count=count,
            )

    def score(self, rows: TokenRows, index_BT, targets_BT, weights_BT):
        """Sum over all positions of weight * negative log-probability of the target.

        Args:
          rows: rows of the positions' tokens.
          index_BT: int32, the row of each position.
          targets_BT: int32, the token id after each position.
          weights_BT: float32, the weight of each position.
        Returns: the sum in nats, a float32 scalar on the device.
        """
        with jax.set_mesh(self.mesh):
            batch = [self._by_shard(x) for x in (index_BT, targets_BT, weights_BT)]
            return sequences.score(self.config, self.params, rows, *batch, length=index_BT.shape[1])

    def log_probs(self, rows: TokenRows, index_BT, targets_BT) -> loss.TargetScores:
        """The log-probability of each target and whether it is the likeliest id, each [B, T].

        The arguments are those of `score`.
        """
        with jax.set_mesh(self.mesh):
            batch = [self._by_shard(x) for x in (index_BT, targets_BT)]
            return sequences.log_probs(self.config, self.params, rows, *batch, length=index_BT.shape[1])

    def row_gradients(self, rows: TokenRows, index_BT, targets_BT, weights_BT, layers) -> gradients.RowGradients:
        """The gradient of `score` with respect to the rows of some layers. The other arguments are those of `score`."""
        with jax.set_mesh(self.mesh):
            batch = [self._by_shard(x) for x in (index_BT, targets_BT, weights_BT)]
            length = index_BT.shape[1]
            return gradients.row_gradients(self.config, self.params, rows, *batch, length=length, layers=layers)

    def _by_shard(self, x):
        return x.reshape(self.shards, -1)

    def _empty_body(self, batch, sizes):
        def empty(size):
            shape = sharding.padded((batch, self.config.key_heads, size, self.config.head_dim), _CACHE_AXES)
            zeros = jnp.zeros(shape, self.config.dtype)
            return attention.Cache(zeros, zeros)

        return [[empty(size) for size in sizes] for _ in range(self.config.layers)]

    def step(
        self,
        params: dict,
        rows: TokenRows,
        index_B,
        position_B,
        cache: list,
        reach: attention.Reach = attention.WHOLE,
    ):
        """Runs one token of each sequence through the decoder. For use in jit, inside the mesh.

        Args:
          params: the decoder's parameters, which a jitted function takes as an argument.
          rows: rows of the tokens.
          index_B: int32, the row of each sequence's token.
          position_B: int32, the token's position in its sequence. A token past the cache's end is not written to it,
            and its logits are arbitrary.
          cache: the cache of the earlier positions.
          reach: how much of the cache is read, at least up to the tokens.
        Returns: (float32 logits [B, V] of the next token, the cache with these tokens).
        """
        # All layers are one function, unlike in sequences.py: for one position, a call takes longer than its work.
        c = self.config
        index_SN, position_B1 = self._by_shard(index_B), position_B[:, None]
        x_BTD = take_rows(rows.x0_SUD, index_SN).reshape(-1, 1, c.dim).astype(c.dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        rope = transformer.rope_table(c, position_B1)
        written = []
        for layer, (layer_params, old) in enumerate(zip(params["layers"], cache, strict=True)):
            ffn_SUD, factors = sequences.rows_of_layer(rows, params, layer)
            past = attention.Past(old, position_B1, reach)
            out = transformer.apply_layer(c, layer_params, x_BTD, ffn_SUD, index_SN, rope, past, factors)
            x_BTD = out.x_BTD
            written.append(out.keys_values)
        x_BTD = sequences.normalised(c, params["final_norm"], x_BTD)
        return sequences.logits(c, params["head"], x_BTD[:, 0]), written

    def _steps_body(self, params, arrays, standing, rules, cache, rows, sampling, vocab_size, count):
        index_B = jnp.arange(len(standing.tokens_B))

        def decode(tokens_B, position_B, cache):
            return self.step(params, rows.gather(arrays, tokens_B), index_B, position_B, cache)

        def draw_next(logits_BV, position_B):
            return draw(logits_BV, rules.seed, rules.number_B, position_B, sampling, vocab_size)

        has_rows = None if rows.on_device else functools.partial(rows.holds, arrays)
        # A GPU waits for the host wherever a condition depends on results. Where no row can be missing, it takes all
        # steps instead: those after the end are ignored.
        ends_early = has_rows is not None or self.mesh.devices.flat[0].platform not in ("gpu", "cuda")
        return take(decode, draw_next, has_rows, standing, rules, cache, count, ends_early)
