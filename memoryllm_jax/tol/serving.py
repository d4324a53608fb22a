"""A trained model opened for use, its rows computed live or looked up in a ToL file."""

from absl import flags

from memoryllm_jax.checkpoint.trained import SavedModel
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling, generate
from memoryllm_jax.tol import build, edit, format, rows

PLACES = ("device", "host", "disk")


class Model:
    """A decoder and its rows, ready to generate.

    Args:
      tol: path of a ToL file; "" computes rows live.  place: device, host or disk.  cache: bytes of rows cached on
        the device, for host and disk.  overlay: path of edits, or "".  mesh: as of `SavedModel`.
    Raises: UserError.
    """

    def __init__(
        self,
        workdir: str,
        tol: str = "",
        place: str = "disk",
        cache: int = 256 << 20,
        overlay: str = "",
        step: int | None = None,
        dtype: str = "",
        mesh=None,
    ):
        if overlay and not tol:
            raise UserError("--overlay: expected --tol too, as edits are those of a ToL file")
        if place not in PLACES:
            raise UserError(f"--rows: expected one of {', '.join(PLACES)}, found {place!r}")
        self._tol = format.TolFile(tol) if tol else None  # first: a broken file is told of at once
        self.saved = saved = SavedModel(workdir, step, dtype, mesh)
        self.tokenizer, self.config = saved.tokenizer, saved.config
        if self._tol is None:
            params, _ = saved.load(lambda name: True)
            self.rows = LiveRows(self.config, params, saved.mesh)
        else:
            self._tol.check_model(self.config, saved.tokenizer.digest, None)
            edits = edit.Overlay.open(overlay, self._tol) if overlay else None
            params, digest = saved.load(lambda name: not saved.is_memory(name))
            self._tol.check_model(self.config, saved.tokenizer.digest, digest)
            self.rows = self._looked_up(place, cache, params, edits)
        self.decoder = self._whole = Decoder(self.config, params, saved.mesh)

    def contribute(self, contribution: Contribution) -> None:
        """Takes in so much of what the FFNs add from now on. Raises: UserError."""
        self.decoder = self._whole.scaled(*contribution.factors(self.config))

    def _looked_up(self, place, cache, params, edits):
        mesh, embedding = self.saved.mesh, params.get("embedding")
        repair = build.Repair(self.saved, self._tol)
        if place == "device":
            return rows.DeviceRows(self._tol, mesh, embedding, edits, repair)
        table = rows.HostTable(self._tol, repair) if place == "host" else rows.DiskTable(self._tol, repair=repair)
        return rows.CachedRows(table, mesh, cache, embedding, edits)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, after the id that begins a document."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int = 0, stop_ids=()):
        """As `sampling.generate`."""
        sizes = (self.saved.context, self.tokenizer.vocab_size)
        return generate(self.decoder, self.rows, prompts, max_tokens, sampling, seed, *sizes, frozenset(stop_ids))

    def close(self) -> None:
        self.rows.close()
        self.saved.close()
        if self._tol is not None:
            self._tol.close()


def model_from_flags(mesh=None) -> Model:
    """The model that the flags of `cli.define_model_flags` name. Raises: UserError."""
    f = flags.FLAGS
    if not f.tol and (f["rows"].present or f["cache"].present):
        raise UserError("--rows, --cache: expected --tol too, as they say where its rows come from")
    layers = {name: cli.layer_list(f[name].value, name) for name in ("drop_layers", "drop_compute")}
    contribution = Contribution(f.alpha, f.alpha_compute, **layers)
    model = Model(f.workdir, f.tol, f.rows, cli.size(f.cache, "cache"), f.overlay, f.step, f.dtype, mesh)
    if contribution != Contribution():
        model.contribute(contribution)
    return model
