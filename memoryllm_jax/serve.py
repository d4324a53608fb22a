"""Serves a trained model over HTTP: OpenAI's API, and a page to look into the model and to edit it.

    python -m memoryllm_jax.serve --workdir=DIR
    python -m memoryllm_jax.serve --workdir=DIR --tol=tol.safetensors --overlays=FOLDER --port=8000

Open http://127.0.0.1:8000/ in a browser, or give any OpenAI client the address http://127.0.0.1:8000/v1.
"""

import contextlib

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import require
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.tol.serving import ModelOptions


def main(model: ModelOptions, server: ServerOptions) -> None:
    uvicorn = require("uvicorn", "serve", "serve")
    require("starlette", "serve", "serve")
    # Imported here, as these modules need the packages of the extra.
    from memoryllm_jax.server.app import make_app
    from memoryllm_jax.server.served import ServedModel

    with contextlib.closing(model.open()) as engine, contextlib.closing(ServedModel(engine, server)) as served:
        uvicorn.run(make_app(served), host=server.host, port=server.port, log_level="warning")


if __name__ == "__main__":
    cli.run(main)
