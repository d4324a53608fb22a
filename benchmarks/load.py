"""Many clients of a server at once: right texts, nothing left behind, and the speed over one client at a time.

    python benchmarks/load.py --workdir=runs/tiny --tol=runs/tiny.safetensors --output=benchmarks/results/load_cpu.json

Starts `python -m memoryllm_jax.serve` in a process of its own, on a port of this machine. Its clients are in this
process, on the same cores. Parts:

  rounds: the same requests, first by --clients clients at once and then by one client that waits for each text, on
    this server and on one with a single slot. The sides take turns, --rounds times.
  load: --clients clients send random ones of --jobs requests, until --requests are sent or --minutes are over. The
    lengths are mixed; a third has an overlay by name, others an edit, factors, log-probabilities, two sampled texts or
    stop texts. In a tenth of the requests the client hangs up in the middle of the stream.
  end: eight clients read streams while the server gets SIGTERM. It must finish them and end with exit code 0.

Every text is compared with that of `generate` alone for the same request; one that was hung up on, as far as it came.
Requests that the queue has no room for are sent again after the time that the server names.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import tempfile
import time
from typing import Annotated

import common
import load_jobs
import numpy as np
from load_client import Answer, Server, ask
from load_jobs import Job

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import cli, options
from memoryllm_jax.common.options import Option
from memoryllm_jax.tol.serving import open_engine

_HANG_UP = 0.1  # share of the clients that go away
_LAST = 8  # streams that run while the server is ended
_SETTLE_S = 10  # in which a server without clients has to be empty
_SAMPLES = 20  # of its memory, in the record


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of the server."""

    slots: Annotated[int, Option("slots of the server", least=1)] = 16
    clients: Annotated[int, Option("clients at once", least=1)] = 64
    requests: Annotated[int, Option("requests of the load", least=1)] = 2000
    minutes: Annotated[float, Option("longest time of the load", least=0)] = 10.0
    jobs: Annotated[int, Option("different requests", least=1)] = 120
    overlays: Annotated[int, Option("different overlays", least=1)] = 8
    rounds: Annotated[int, Option("times that the sides take turns", least=1)] = 3
    round_requests: Annotated[int, Option("requests of each side in a round", least=1)] = 96

    def __post_init__(self):
        options.check(self)


class Tally:
    """What was found wrong, and the times of the texts.

    Attributes:
      first_s: time to the first token of each whole text.
      kinds: {kind of the request: whole texts that were right}.
      wrong: descriptions of wrong texts.
      failed: messages of requests that failed.
      hung_up, refused: requests that the client left, and those that the queue had no room for.
    """

    def __init__(self):
        self.first_s: list[float] = []
        self.kinds: dict[str, int] = {}
        self.wrong: list[dict] = []
        self.failed: list[str] = []
        self.hung_up = self.refused = 0

    def add(self, job: Job, answer: Answer, is_hang_up: bool) -> None:
        if answer.status != 200 or answer.error or not (answer.is_whole or is_hang_up):
            self.failed.append(f"{job.kind}: {answer.status} {answer.error or 'the stream ended early'}")
            return
        is_right = answer.texts == job.texts
        if not answer.is_whole:
            self.hung_up += 1
            is_right = all(whole.startswith(part) for whole, part in zip(job.texts, answer.texts))
        else:
            self.first_s.append(answer.first_s)
        if is_right:
            self.kinds[job.kind] = self.kinds.get(job.kind, 0) + answer.is_whole
        else:
            request = {name: value for name, value in job.body.items() if name != "prompt"}
            self.wrong.append({"request": request, "expected": job.texts, "found": answer.texts})

    def facts(self) -> dict:
        """The record of it."""
        return {
            "right": sum(self.kinds.values()),
            "right_by_kind": self.kinds,
            "hung_up": self.hung_up,
            "refused_and_sent_again": self.refused,
            "wrong": len(self.wrong),
            "failed": len(self.failed),
            "examples": [*self.wrong[:3], *self.failed[:3]],
            "first_token_s": {f"p{p}": float(np.percentile(self.first_s, p)) for p in (50, 99)} if self.first_s else {},
        }


async def work_off(server: Server, jobs, clients: int, tally: Tally, rng: random.Random, hang_up: float = 0.0) -> None:
    """So many clients take jobs from an iterator until it ends; each waits for its text before it takes the next."""

    async def client():
        for job in jobs:
            leave_after = rng.randint(1, 20) if rng.random() < hang_up else None
            while (answer := await ask(server, job.body, leave_after)).status == 429:
                tally.refused += 1
                await asyncio.sleep(answer.retry_after)
            tally.add(job, answer, leave_after is not None)

    await asyncio.gather(*(client() for _ in range(clients)))


def timed(server: Server, jobs: list[Job], clients: int, tally: Tally) -> dict[str, float]:
    """Works off all jobs. Returns: tokens a second, seconds of the server's cores a token, times to the first token."""
    before, used, start = len(tally.first_s), server.processor_s(), time.perf_counter()
    asyncio.run(work_off(server, iter(jobs), clients, tally, random.Random(0)))
    seconds = time.perf_counter() - start
    tokens = sum(job.new_tokens for job in jobs)
    first_s = tally.first_s[before:]
    return {
        "tokens_per_second": tokens / seconds,
        "processor_ms_per_token": 1e3 * (server.processor_s() - used) / tokens,
        "first_token_p50_s": float(np.percentile(first_s, 50)),
        "first_token_p99_s": float(np.percentile(first_s, 99)),
    }


def rounds(server: Server, alone: Server, jobs: list[Job], settings: Settings, tally: Tally) -> dict:
    """Times the sides in turns."""
    many = f"{settings.clients} clients"
    sides = {many: (server, settings.clients), "one client": (server, 1), "one client, one slot": (alone, 1)}
    found = {name: [] for name in sides}
    # A stop id or text ends some texts early: all kinds but these, so that the number of tokens is known.
    jobs = [job for job in jobs if job.kind != "stop"]
    jobs = [jobs[k % len(jobs)] for k in range(settings.round_requests)]
    for number in range(settings.rounds + 1):
        for name, (where, clients) in sides.items():
            measured = timed(where, jobs, clients, tally)
            if number:  # the first round compiles what the server has not
                found[name].append(measured)
                print(f"{name}: {measured['tokens_per_second']:.0f} tokens a second", flush=True)
    out = {}
    for name, measured in found.items():
        out[name] = {key: common.spread([one[key] for one in measured]) for key in measured[0]}
        if name != many:
            speeds = ([one["tokens_per_second"] for one in found[side]] for side in (many, name))
            out[name]["speed_of_all_clients_over_it"] = common.ratio(*speeds)
    return out


def load(server: Server, jobs: list[Job], settings: Settings) -> dict:
    """Loads the server with random jobs. Returns: what was found, and what the server held before, meanwhile, after."""
    rng, tally = random.Random(1), Tally()
    end = time.monotonic() + 60 * settings.minutes
    sent = 0

    def stream():
        nonlocal sent
        while sent < settings.requests and time.monotonic() < end:
            sent += 1
            yield rng.choice(jobs)

    memory: list[tuple[int, int]] = []  # (requests sent, bytes)

    async def watch():
        while True:
            memory.append((sent, server.rss()))
            await asyncio.sleep(min(1.0, 60 * settings.minutes / _SAMPLES))

    async def run():
        watching = asyncio.create_task(watch())
        await work_off(server, stream(), settings.clients, tally, rng, _HANG_UP)
        watching.cancel()

    before = {"open_files": server.open_files(), "threads": server.threads()}
    start = time.monotonic()
    asyncio.run(run())
    seconds = time.monotonic() - start
    after = settled(server)
    memory.append((sent, server.rss()))
    step = max(1, len(memory) // _SAMPLES)
    return tally.facts() | {
        "requests": sent,
        "seconds": seconds,
        "before": before,
        "after": after | {"open_files": server.open_files(), "threads": server.threads()},
        "memory_mb_by_requests": [(count, round(size / 1e6, 1)) for count, size in (*memory[::step], memory[-1])],
    }


def settled(server: Server) -> dict[str, float]:
    """The sequences that are left when all clients are gone, after at most _SETTLE_S."""
    end = time.monotonic() + _SETTLE_S
    while True:
        found = server.metrics()
        left = {name: found[f"memoryllm_{name}_sequences"] for name in ("running", "waiting")}
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def ended(server: Server, jobs: list[Job]) -> dict:
    """Ends the server while streams run. Returns: what came of them, and the exit code."""
    tally = Tally()

    async def run():
        streams = asyncio.gather(*(ask(server, job.body) for job in jobs))
        await asyncio.to_thread(_until_running, server, len(jobs))
        server.terminate()
        for job, answer in zip(jobs, await streams):
            tally.add(job, answer, False)

    asyncio.run(run())
    facts = tally.facts()
    return {name: facts[name] for name in ("right", "wrong", "failed", "examples")} | {"exit_code": server.close()}


def _until_running(server, count):
    end = time.monotonic() + _SETTLE_S
    while time.monotonic() < end:
        if server.metrics()["memoryllm_running_sequences"] >= count:
            return


def prepare(workdir: str, tol: str, folder: str, settings: Settings) -> list[Job]:
    """Writes overlays into a folder. Returns: the requests, with the texts that are right."""
    rng = random.Random(0)
    edits = load_jobs.make_overlays(tol, workdir, folder, settings.overlays, rng)
    with contextlib.closing(open_engine(workdir, tol)) as engine:
        dataset = run_data.open_data(engine.trained)
        jobs = load_jobs.make_jobs(engine, dataset, edits, settings.jobs, rng)
    found = list(load_jobs.with_texts(workdir, tol, folder, jobs))
    print(f"{len(found)} different requests of {sum(job.new_tokens for job in found)} new tokens", flush=True)
    rng.shuffle(found)
    return found


def main(
    settings: Settings,
    workdir: Annotated[str, Option("checkpoints of a trained model")],
    tol: Annotated[str, Option("its ToL file")],
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    more = {"settings": dataclasses.asdict(settings)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [f"--workdir={os.path.abspath(workdir)}", f"--tol={os.path.abspath(tol)}", f"--overlays={folder}"]
        # Before JAX starts threads in this process, which a fork would not survive.
        server, alone = (
            stack.enter_context(contextlib.closing(Server([*command, f"--slots={slots}"])))
            for slots in (settings.slots, 1)
        )
        jobs = prepare(workdir, tol, folder, settings)
        tally = Tally()
        results = {"start_s": server.start_s, "rounds": rounds(server, alone, jobs, settings, tally)}
        results["texts_of_rounds"] = tally.facts()
        common.write(output, results, more)
        results["load"] = found = load(server, jobs, settings)
        results["end"] = ended(server, [job for job in jobs if job.kind in ("plain", "overlay")][:_LAST])
        common.write(output, results, more)
    print(f"{found['requests']} requests in {found['seconds']:.0f} s: {found['wrong']} wrong, {found['failed']} failed")


if __name__ == "__main__":
    cli.run(main, computes=False)
