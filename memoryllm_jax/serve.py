"""Serves a trained model over HTTP: OpenAI's API, and a page to look into the model and to edit it.

    python -m memoryllm_jax.serve --workdir=DIR
    python -m memoryllm_jax.serve --workdir=DIR --tol=tol.safetensors --overlays=FOLDER --port=8000

Open http://127.0.0.1:8000/ in a browser, or give any OpenAI client the address http://127.0.0.1:8000/v1.
"""

import contextlib
import time

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import require
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.tol.serving import ModelOptions


def main(model: ModelOptions, server: ServerOptions) -> None:
    for package in ("uvicorn", "starlette", "prometheus_client", "jinja2"):
        require(package, "serve", "serve")
    # Imported here, as these modules need the packages of the extra.
    from memoryllm_jax.server import listening, look, security
    from memoryllm_jax.server.app import make_app
    from memoryllm_jax.server.served import ServedModel

    # Key and port come first, as reading a large model takes minutes.
    security.read_key(server.api_key_file)
    bound = listening.bind(server.host, server.port)
    with (
        contextlib.closing(bound),
        contextlib.closing(model.open()) as engine,
        contextlib.closing(ServedModel(engine, server)) as served,
    ):
        app = make_app(served)
        print(f"compile for {server.slots} slots of {served.context} tokens ...", flush=True)
        start = time.monotonic()
        served.compile()
        print(f"compiled in {time.monotonic() - start:.0f} seconds", flush=True)

        def say():
            what = engine.trained.facts()["model"]
            print(f"{served.name}: {what}; at {listening.address_of(bound)}", flush=True)

        look.prepare(served)  # while requests are answered
        listening.run(app, bound, say, served.begin_closing, end_s=server.time_limit)


if __name__ == "__main__":
    cli.run(main)
