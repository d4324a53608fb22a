"""The compiled train and eval steps, and the state that they work on, placed on a mesh."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.config import Config
from memoryllm_jax.data import document_starts
from memoryllm_jax.model import loss, modules, sharding, transformer
from memoryllm_jax.training import compilation, norms, optimizer, schedules, spikes
from memoryllm_jax.training.batches import Batch, abstract_batch
from memoryllm_jax.training.sizes import Sizes


class Micro(NamedTuple):
    """A micro-batch: arrays [S, N] with the meaning that they have in `Batch`; [A, S, N] for all of a batch's."""

    index_SN: jax.Array
    targets_SN: jax.Array
    weights_SN: jax.Array
    start_SN: jax.Array | None


class Losses(NamedTuple):
    """Means over the positions of an optimizer step, or sums over those of a micro-batch.

    total: what is minimised, nll + z-loss, in nats.
    nll: cross entropy, in nats.
    added: by part, what the layers add to the residual stream: `norms.of_added` of a step, for a micro-batch the sums
      that it takes. {} if the config asks for no norms.
    """

    total: jax.Array
    nll: jax.Array
    added: dict[str, jax.Array]


class Trainer:
    """A model, its optimizer and their compiled steps for one config on one mesh.

    Attributes:
      params_shape, state_shape: trees of jax.ShapeDtypeStruct with shardings.
      shards: number of batch shards.
      batch_sharding: sharding of a batch's arrays, whose leading axis is the batch shard.
      init(key) -> state: {"params", "opt_state", "step"}, and "spikes" if config.optimizer.max_skipped allows to skip
        steps; each device makes its own part.
      train(state, batch) -> (state, metrics): one optimizer step; the old state is donated. The metrics are the
        scalars loss and z_loss in nats, grad_norm, learning_rate, with Muon muon_learning_rate, with
        config.data.document_mask attention_share (`document_starts.attention_share`), and those of `spikes.guard`. With
        config.log.norms_every there is norms: {"gradient": `norms.of_gradients`, "added": `norms.of_added`}.
      evaluate(params, batch) -> (nll in nats, weight): sums over the batch's positions, without z-loss.
    Raises: UserError if config.xla does not fit the platform.
    """

    def __init__(self, config: Config, mesh: Mesh):
        device = mesh.devices.flat[0]
        options = compilation.options(config, device.platform) | compilation.sum_options(device)
        self.config, self.mesh = config, mesh
        # With micro-batches, what the token memory kept for its backward pass would lie beside the activations of each
        # of them: tens of GB at 1B parameters. Its rows are few beside the positions, so it is cheap to recompute.
        self.model = transformer.LanguageModel(config.model, recompute_memory=config.accumulate > 1)
        abstract = transformer.abstract_params(self.model, mesh, sharding.PRODUCT_MULTIPLE)
        self.optimizer = optimizer.make(config, optimizer.trained(config, abstract), mesh)
        self.shards = sharding.batch_shards(mesh)
        self.batch_sharding = NamedSharding(mesh, sharding.spec("shard"))
        self.state_shape = self._abstract_state(jax.tree.map(lambda x: x.sharding, abstract))
        self.params_shape = self.state_shape["params"]
        state_sharding = jax.tree.map(lambda x: x.sharding, self.state_shape)
        replicated = NamedSharding(mesh, P())
        # Without pinned outputs jit replicates the Adam moments.
        self.init = _InMesh(jax.jit(self._init, out_shardings=state_sharding), mesh)
        train = jax.jit(
            self._train,
            donate_argnums=0,
            out_shardings=(state_sharding, replicated),
            compiler_options=options,
        )
        self.train = self._train_step = _StepInMesh(train, mesh)
        self.evaluate = self._evaluate_step = _StepInMesh(jax.jit(self._evaluate, out_shardings=replicated), mesh)

    def compile(self, train_sizes: Sizes, evaluate_sizes: Sizes) -> None:
        """Compiles the planned sizes of both steps, so that `train` and `evaluate` do not compile them in mid-run.

        Raises: OutOfMemoryError if a step needs more memory than its device has.
        """
        asked = [(self._train_step, self.state_shape, size) for size in train_sizes.planned]
        asked += [(self._evaluate_step, self.params_shape, size) for size in evaluate_sizes.planned]
        lowered = []  # in order, as JAX must not trace in two threads at once
        for step, shapes, size in asked:
            lowered.append(step.lower(shapes, abstract_batch(self.config, self.shards, self.batch_sharding, size)))
        compiled = compilation.all_at_once([step.compile for step in lowered])
        for (step, _, size), executable in zip(asked, compiled, strict=True):
            compilation.check_fits(executable, size, self.mesh.local_devices[0])
            step.keep(size, executable)

    def _abstract_state(self, params):
        """The state's shapes, dtypes and shardings. Moments are sharded as their parameters, counts are replicated.

        Args:
          params: the parameters' shardings.
        """
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        replicated = NamedSharding(self.mesh, P())
        opt_state = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda moment, of_parameter: moment if is_absent(moment) else of_parameter,
            shapes["opt_state"],
            optimizer.trained(self.config, params),
            transform_non_params=lambda _: replicated,
            is_leaf=is_absent,
        )
        shardings = jax.tree.map(lambda _: replicated, shapes) | {"params": params, "opt_state": opt_state}
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def _init(self, key):
        params = nn.unbox(transformer.init(self.model, key, self.shards, sharding.PRODUCT_MULTIPLE))
        opt_state = self.optimizer.init(optimizer.trained(self.config, params))
        state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}
        return state | {"spikes": spikes.init()} if self.config.optimizer.max_skipped else state

    def _token_rows(self, params, batch: Batch, with_added: bool = False):
        """(`transformer.TokenRows` of the ids: embeddings and token memory; what `_apply` notes)."""
        return self._apply(params, "token_rows", with_added, batch.ids_SU, batch.row_ids_SU)

    def _apply(self, params, method: str, with_added: bool, *arguments):
        """(result of a method of the model, {part: what it adds, as in `modules.ADDED`} if that is asked for)."""
        asked = [modules.ADDED] if with_added else []
        result, noted = self.model.apply({"params": params}, *arguments, method=method, mutable=asked)
        groups = noted.get(modules.ADDED, {})
        return result, groups["memory"] if "memory" in groups else norms.of_all_layers(groups)

    def _sums(self, params, rows, micro: Micro, with_added: bool = False) -> Losses:
        """Weighted sums over one micro-batch, see `loss.cross_entropy`, and what the layers add if it is asked for."""
        c = self.config
        arguments = rows, micro.index_SN, c.seq_len, micro.start_SN
        hidden, added = self._apply(params, "hidden", with_added, *arguments)
        head_VD = self.model.apply({"params": params}, method="output_embedding")
        x_SND = hidden.reshape(*micro.index_SN.shape, c.model.dim)
        m = c.model
        options = loss.Options(m.vocab_size, c.optimizer.z_loss, m.loss_chunk, m.dtype, m.logit_softcap)
        total, nll = loss.cross_entropy(x_SND, head_VD, micro.targets_SN, micro.weights_SN, options)
        return Losses(total, nll, added)

    def _gradients(self, params, batch: Batch):
        """(Losses, gradient of the total loss by the trained parameters), over all positions of all micro-batches."""
        with_added = self.config.log.norms_every > 0
        weight = batch.weights_SAN.sum()
        # The token memory is evaluated once per optimizer step. All micro-batches read the same rows; the gradients by
        # these rows are summed over micro-batches, and the sum is propagated through the token memory once.
        trained = optimizer.trained(self.config, params)
        # Layers read the token memory through its rows alone.
        of_layers = {name: part for name, part in trained.items() if name != "memory"}

        def token_rows(trained):
            return self._token_rows(params | trained, batch, with_added)

        def mean_losses(of_layers, rows, micro):
            sums = self._sums(params | of_layers, rows, micro, with_added)
            return sums.total / weight, (sums.nll / weight, sums.added)

        rows, rows_vjp, of_rows = jax.vjp(token_rows, trained, has_aux=True)
        value_and_grad = jax.value_and_grad(mean_losses, argnums=(0, 1), has_aux=True)
        of_micro = functools.partial(value_and_grad, of_layers, rows)
        (total, (nll, added)), (grads, d_rows) = _summed(of_micro, _micro_batches(batch))
        d_rows = jax.tree.map(lambda d, row: d.astype(row.dtype), d_rows, rows)
        if with_added:
            added = norms.of_added(added, of_rows, batch.index_SAN)
        through_rows = rows_vjp(d_rows)[0]
        sums = {name: jax.tree.map(jnp.add, of_part, through_rows[name]) for name, of_part in grads.items()}
        return Losses(total, nll, added), through_rows | sums

    def _train(self, state, batch: Batch):
        """One optimizer step: (the state after it, its metrics)."""
        losses, grads = self._gradients(state["params"], batch)
        trained = optimizer.trained(self.config, state["params"])
        updates, opt_state = self.optimizer.update(grads, state["opt_state"], trained)
        metrics = self._metrics(state["step"], batch, losses, grads)
        params = state["params"] | optax.apply_updates(trained, updates)
        after = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        of_guard = {}
        if self.config.optimizer.max_skipped:
            after, of_guard = spikes.guard(self.config, state, after, metrics["loss"], metrics["grad_norm"])
        return after, metrics | of_guard

    def _metrics(self, step, batch: Batch, losses: Losses, grads) -> dict:
        """The metrics of a step, see `train`, but for those of `spikes.guard`. Args: step: steps done before it."""
        config = self.config
        metrics = {
            "loss": losses.nll,
            "z_loss": losses.total - losses.nll,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedules.learning_rate(config)(step),
        }
        if config.optimizer.name == "muon":
            metrics["muon_learning_rate"] = schedules.learning_rate(config, config.optimizer.muon_lr)(step)
        if batch.start_SAN is not None:
            start_BT = batch.start_SAN.reshape(-1, config.seq_len)
            metrics["attention_share"] = document_starts.attention_share(start_BT)
        if config.log.norms_every:
            metrics["norms"] = {"gradient": norms.of_gradients(grads, config.model.layers), "added": losses.added}
        return metrics

    def _evaluate(self, params, batch: Batch):
        rows, _ = self._token_rows(params, batch)
        nll = jax.lax.map(lambda micro: self._sums(params, rows, micro).nll, _micro_batches(batch))
        return nll.sum(), batch.weights_SAN.sum()


def _summed(of_micro, micro_batches: Micro):
    """The sum of a function's trees of arrays over micro-batches; for a single one, as the function returns it.

    Args:
      micro_batches: arrays [A, S, N].
    """
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if len(micro_batches.index_SN) == 1:
        return of_micro(first)

    def add(sums, micro):
        return jax.tree.map(jnp.add, sums, of_micro(micro)), None

    # Rows of the token memory may be bfloat16; their gradients are summed in float32.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(of_micro, first))
    sums, _ = jax.lax.scan(add, zeros, micro_batches)
    return sums


def is_absent(moment) -> bool:
    """Whether an optimizer has no moment of a parameter, because another one has it (`optax.partition`)."""
    return isinstance(moment, optax.MaskedNode)


class _InMesh:
    """A jitted function that is called and lowered in a mesh, which `sharding.constrain` asks for."""

    def __init__(self, function, mesh: Mesh):
        self._function, self._mesh = function, mesh

    def __call__(self, *args):
        with jax.set_mesh(self._mesh):
            return self._function(*args)

    def lower(self, *args):
        with jax.set_mesh(self._mesh):
            return self._function.lower(*args)


class _StepInMesh(_InMesh):
    """A jitted function of (state or parameters, batch), which runs the executable kept for the batch's size."""

    def __init__(self, function, mesh: Mesh):
        super().__init__(function, mesh)
        self._kept: dict[int, jax.stages.Compiled] = {}

    def keep(self, size: int, executable: jax.stages.Compiled) -> None:
        """Keeps an executable for batches whose distinct ids are padded to `size`. A call of jit would not find it."""
        self._kept[size] = executable

    def __call__(self, first, batch: Batch):
        executable = self._kept.get(batch.ids_SU.shape[1])
        return executable(first, batch) if executable else super().__call__(first, batch)


def _micro_batches(batch: Batch) -> Micro:
    """The positions of a batch, with the micro-batches on the leading axis: [A, S, N]."""
    return Micro(
        index_SN=batch.index_SAN.swapaxes(0, 1),
        targets_SN=batch.targets_SAN.swapaxes(0, 1),
        weights_SN=batch.weights_SAN.swapaxes(0, 1),
        start_SN=None if batch.start_SAN is None else batch.start_SAN.swapaxes(0, 1),
    )
