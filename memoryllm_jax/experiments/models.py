"""Trained models to look at side by side."""

import contextlib
import dataclasses

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import serving


@dataclasses.dataclass
class Models:
    """Trained models to look at side by side, loaded one at a time.

    Args:
      workdirs: of the models.  tol: a ToL file to serve the rows of the only one, or "".
    """

    workdirs: list[str]
    tol: str = ""
    place: str = ""
    dtype: str = ""

    def __post_init__(self):
        if self.place and not self.tol:
            raise UserError("--rows: expected --tol too, as it says where its rows are served from")
        if self.tol and len(self.workdirs) > 1:
            raise UserError(f"--tol={self.tol}: expected one --workdir, found {len(self.workdirs)}")
        self.mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
        self.facts, self.labels, self.configs = {}, [], []
        for workdir in self.workdirs:
            with contextlib.closing(TrainedModel(workdir, dtype=self.dtype)) as trained:
                label = trained.config.architecture
                self.labels.append(f"{label} {workdir}" if label in self.labels else label)
                self.configs.append(trained.config)
                about = trained.facts()
                self.facts |= {f"{self.labels[-1]}: {name}": text for name, text in about.items()}
        self.facts |= {"rows": f"{self.tol}, on {self.place or 'disk'}"} if self.tol else {}

    def __iter__(self):
        """(label, Engine) of each in turn: its architecture, and its folder where two have the same."""
        for label, workdir in zip(self.labels, self.workdirs):
            model = serving.open_engine(workdir, self.tol, self.place, dtype=self.dtype, mesh=self.mesh)
            with contextlib.closing(model):
                yield label, model
