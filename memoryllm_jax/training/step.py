"""The jitted train and eval steps, and the state they work on, pinned to a mesh."""

from typing import NamedTuple

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


class Micro(NamedTuple):
    """A micro-batch, [S, N] each, or with a leading axis A all of a batch; fields as of `Batch`."""

    index_SN: jax.Array
    targets_SN: jax.Array
    weights_SN: jax.Array


class Losses(NamedTuple):
    """Means over the positions of an optimizer step, in nats: with z-loss, which is trained on, and without."""

    total: jax.Array
    nll: jax.Array


class Trainer:
    """A model, its optimizer and their compiled steps for one config on one mesh.

    Attributes:
      params_shape, state_shape: abstract trees with shapes, dtypes and shardings.
      shards: number of batch shards.
      batch_sharding: of a batch's leading axis.
      init(key) -> state: {"params", "opt_state", "step"}, made in place on its devices.
      train(state, batch) -> (state, metrics): one optimizer step; the old state is donated.
      evaluate(params, batch) -> (nll in nats, weight): sums over the batch's positions.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = transformer.LanguageModel(config.model)
        self.optimizer = optimizer.make(config)
        self.shards = sharding.batch_shards(mesh)
        self.batch_sharding = NamedSharding(mesh, sharding.spec("shard"))
        self.state_shape = self._abstract_state()
        self.params_shape = self.state_shape["params"]
        state_sharding = jax.tree.map(lambda x: x.sharding, self.state_shape)
        replicated = NamedSharding(mesh, P())
        # Without pinned outputs jit replicates the Adam moments.
        self.init = _InMesh(jax.jit(self._init, out_shardings=state_sharding), mesh)
        train = jax.jit(self._train, donate_argnums=0, out_shardings=(state_sharding, replicated))
        self.train = _InMesh(train, mesh)
        self.evaluate = _InMesh(jax.jit(self._evaluate, out_shardings=replicated), mesh)

    def _abstract_state(self):
        """The state's shapes and dtypes; moments are sharded as their parameters, everything else is replicated."""
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        params = jax.tree.map(lambda x: x.sharding, transformer.abstract_params(self.model, self.mesh))
        replicated = NamedSharding(self.mesh, P())
        opt_state = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, of_parameter: of_parameter,
            shapes["opt_state"],
            params,
            transform_non_params=lambda _: replicated,
        )
        shardings = {"params": params, "opt_state": opt_state, "step": replicated}
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def _init(self, key):
        params = nn.unbox(transformer.init(self.model, key, self.shards))
        return {"params": params, "opt_state": self.optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def _token_rows(self, params, ids_SU):
        return self.model.apply({"params": params}, ids_SU, method="token_rows")

    def _sums(self, params, rows, micro: Micro):
        """(total, nll): sums over one micro-batch, as of `loss.cross_entropy`."""
        c = self.config
        hidden = self.model.apply({"params": params}, rows, micro.index_SN, c.seq_len, method="hidden")
        head_VD = self.model.apply({"params": params}, method="output_embedding")
        x_SND = hidden.reshape(*micro.index_SN.shape, c.model.dim)
        options = loss.Options(c.model.vocab_size, c.optimizer.z_loss, c.model.loss_chunk, c.model.dtype)
        return loss.cross_entropy(x_SND, head_VD, micro.targets_SN, micro.weights_SN, options)

    def _gradients(self, params, batch: Batch):
        """(Losses, gradient of the total by the parameters), over all positions of all micro-batches."""
        weight = batch.weights_SAN.sum()
        # The token memory runs once per optimizer step: every micro-batch reads the same rows, their gradients by the
        # rows are summed, and the sum goes back through the token memory once.
        rows, rows_vjp = jax.vjp(lambda p: self._token_rows(p, batch.ids_SU), params)

        def mean_losses(params, rows, micro):
            total, nll = self._sums(params, rows, micro)
            return total / weight, nll / weight

        value_and_grad = jax.value_and_grad(mean_losses, argnums=(0, 1), has_aux=True)
        micro_batches = _micro_batches(batch)
        if self.config.accumulate == 1:
            losses, (grads, d_rows) = value_and_grad(params, rows, jax.tree.map(lambda x: x[0], micro_batches))
        else:

            def add(sums, micro):
                return jax.tree.map(jnp.add, sums, value_and_grad(params, rows, micro)), None

            # Gradients by params and rows have their shapes. Rows may be bfloat16, their sum is float32.
            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), ((weight, weight), (params, rows)))
            (losses, (grads, d_rows)), _ = jax.lax.scan(add, zeros, micro_batches)
            d_rows = jax.tree.map(lambda d, row: d.astype(row.dtype), d_rows, rows)
        return Losses(*losses), jax.tree.map(jnp.add, grads, rows_vjp(d_rows)[0])

    def _train(self, state, batch: Batch):
        params = state["params"]
        losses, grads = self._gradients(params, batch)
        updates, opt_state = self.optimizer.update(grads, state["opt_state"], params)
        metrics = {
            "loss": losses.nll,
            "z_loss": losses.total - losses.nll,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": optimizer.schedule(self.config)(state["step"]),
        }
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def _evaluate(self, params, batch: Batch):
        rows = self._token_rows(params, batch.ids_SU)
        nll = jax.lax.map(lambda micro: self._sums(params, rows, micro)[1], _micro_batches(batch))
        return nll.sum(), batch.weights_SAN.sum()


class _InMesh:
    """A jitted function that is called, and lowered, within a mesh."""

    def __init__(self, function, mesh: Mesh):
        self._function, self._mesh = function, mesh

    def __call__(self, *args):
        with jax.set_mesh(self._mesh):
            return self._function(*args)

    def lower(self, *args):
        with jax.set_mesh(self._mesh):
            return self._function.lower(*args)


def _micro_batches(batch: Batch) -> Micro:
    """The positions of a batch with the micro-batches on the leading axis: [A, S, N] each."""
    return Micro(*(x.swapaxes(0, 1) for x in (batch.index_SAN, batch.targets_SAN, batch.weights_SAN)))
