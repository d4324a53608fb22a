"""Options of the server."""

import dataclasses
import ipaddress
import os
from typing import Annotated

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, what it is given, and its limits. Raises: ArgumentError."""

    host: Annotated[str, Option("address to listen on; another one than loopback needs --api_key_file")] = "127.0.0.1"
    port: Annotated[int, Option("port to listen on; 0: any free one", least=0)] = 8000
    names: Annotated[
        tuple[str, ...], Option("further host names by which requests may reach the server, such as a proxy's")
    ] = ()
    name: Annotated[str, Option("name of the model in requests; by default that of the workdir's folder")] = ""
    overlays: Annotated[str, Option("folder of overlays that requests may name, and where the page keeps edits")] = ""
    api_key_file: Annotated[str, Option("text file with the key that requests must bring")] = ""
    slots: Annotated[int, Option("sequences that are generated at a time", least=1)] = 16
    queue: Annotated[int, Option("sequences that may wait for a slot", least=0)] = 64
    context: Annotated[int, Option("most tokens of a sequence, prompt included; 0: the model's context", least=0)] = 0
    time_limit: Annotated[float, Option("seconds after which a request is ended", least=1)] = 600.0
    body_limit: Annotated[str, Option("largest body of a request")] = "1MiB"

    def __post_init__(self):
        options.check(self)
        options.size(self.body_limit, "body_limit")
        if self.port > 65535:
            raise ArgumentError("port", f"expected at most 65535, found {self.port}")
        if not is_loopback(self.host) and not self.api_key_file:
            problem = f"expected a loopback address such as 127.0.0.1, or --api_key_file as well, found {self.host!r}"
            raise ArgumentError("host", problem)
        if self.overlays and not os.path.isdir(self.overlays):
            raise ArgumentError("overlays", f"expected a folder, found none at {self.overlays!r}")

    @property
    def body_bytes(self) -> int:
        """`body_limit` in bytes."""
        return options.size(self.body_limit, "body_limit")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
