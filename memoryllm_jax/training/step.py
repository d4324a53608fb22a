"""The jitted train and eval steps, and the state they work on, pinned to a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.config import Config
from memoryllm_jax.model import loss, sharding, transformer
from memoryllm_jax.training import optimizer
from memoryllm_jax.training.batches import Batch


class Trainer:
    """A model, its optimizer and their compiled steps for one config on one mesh.

    Attributes:
      params_shape, state_shape: abstract trees with shapes, dtypes and shardings.
      init(key) -> state: {"params", "opt_state", "step"}, made in place on its devices.
      train(state, batch) -> (state, metrics): one optimizer step; the old state is donated.
      evaluate(params, batch) -> (nll in nats, weight): sums over the batch's positions.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = transformer.LanguageModel(config.model)
        self.optimizer = optimizer.make(config)
        self.shards = sharding.batch_shards(mesh)
        params_sharding = jax.tree.map(lambda x: x.sharding, transformer.abstract_params(self.model, mesh))
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        replicated = NamedSharding(mesh, P())
        # Without pinned outputs jit replicates the Adam moments.
        moments = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, s: s,
            shapes["opt_state"],
            params_sharding,
            transform_non_params=lambda _: replicated,
        )
        state_sharding = {"params": params_sharding, "opt_state": moments, "step": replicated}
        self.state_shape = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_sharding
        )
        self.params_shape = self.state_shape["params"]
        self.batch_sharding = NamedSharding(mesh, sharding.spec("shard"))
        self.init = self._in_mesh(jax.jit(self._init, out_shardings=state_sharding))
        out = (state_sharding, replicated)
        self.train = self._in_mesh(jax.jit(self._train, donate_argnums=0, out_shardings=out))
        self.evaluate = self._in_mesh(jax.jit(self._evaluate, out_shardings=replicated))

    def _in_mesh(self, function):
        def within(action):
            def call(*args):
                with jax.set_mesh(self.mesh):
                    return action(*args)

            return call

        call = within(function)
        call.lower = within(function.lower)
        return call

    def _init(self, key):
        params = nn.unbox(transformer.init(self.model, key, self.shards))
        return {"params": params, "opt_state": self.optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def _sums(self, params, rows, micro):
        """(total, nll) over one micro-batch; micro = (index, targets, weights), each [S, N]."""
        c = self.config
        index_SN, targets_SN, weights_SN = micro
        hidden = self.model.apply({"params": params}, rows, index_SN, c.seq_len, method="hidden")
        head_VD = self.model.apply({"params": params}, method="output_embedding")
        x_SND = hidden.reshape(*index_SN.shape, c.model.dim)
        options = loss.Options(c.model.vocab_size, c.optimizer.z_loss, c.model.loss_chunk, c.model.dtype)
        return loss.cross_entropy(x_SND, head_VD, targets_SN, weights_SN, options)

    def _token_rows(self, params, ids_SU):
        return self.model.apply({"params": params}, ids_SU, method="token_rows")

    def _gradients(self, params, batch: Batch):
        """((mean loss with z-loss, mean nll), gradient of the former), over all positions of all micro-batches."""
        weight = batch.weights_SAN.sum()
        # The token memory runs once per optimizer step; its gradient is applied once, after all micro-batches.
        rows, rows_vjp = jax.vjp(lambda p: self._token_rows(p, batch.ids_SU), params)

        def mean_loss(params, rows, micro):
            total, nll = self._sums(params, rows, micro)
            return total / weight, nll / weight

        value_and_grad = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        micro_batches = [x.swapaxes(0, 1) for x in batch[1:]]
        if self.config.accumulate == 1:
            losses, (grads, d_rows) = value_and_grad(params, rows, [x[0] for x in micro_batches])
        else:

            def accumulate(carry, micro):
                return jax.tree.map(jnp.add, carry, value_and_grad(params, rows, micro)), None

            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), ((weight, weight), (params, rows)))
            (losses, (grads, d_rows)), _ = jax.lax.scan(accumulate, zeros, micro_batches)
            d_rows = jax.tree.map(lambda g, r: g.astype(r.dtype), d_rows, rows)
        return losses, jax.tree.map(jnp.add, grads, rows_vjp(d_rows)[0])

    def _train(self, state, batch: Batch):
        params = state["params"]
        (total, nll), grads = self._gradients(params, batch)
        updates, opt_state = self.optimizer.update(grads, state["opt_state"], params)
        metrics = {
            "loss": nll,
            "z_loss": total - nll,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": optimizer.schedule(self.config)(state["step"]),
        }
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def _evaluate(self, params, batch: Batch):
        rows = self._token_rows(params, batch.ids_SU)
        micro_batches = [x.swapaxes(0, 1) for x in batch[1:]]
        nll = jax.lax.map(lambda micro: self._sums(params, rows, micro)[1], micro_batches)
        return nll.sum(), batch.weights_SAN.sum()
