"""Load on the image server: its share of the bare runtime's throughput, its latencies, and whether anything is lost or crossed.

Rounds of the bare runtime and of the server alternate, because other programs use the machine too. Every image that is answered is
compared with the runtime's own for its prompt and seed, pixel by pixel.

Example, closed loop (8 clients, each sends its next request when it has its answer):

    python -m benchmarks.serve.load engines/out/tiny --clients 8 --seconds 60 -o load

Example, open loop (20 requests a second on average, whatever the server does):

    python -m benchmarks.serve.load engines/out/tiny --rate 20 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import psutil

from benchmarks.serve.images import Rate, References
from benchmarks.serve.report import conditions, summary, table
from benchmarks.serve.server import ServerProcess, cpu_seconds, resident_mib, waited_seconds, words_of
from benchmarks.serve.traffic import WAYS, Client, Outcome

#: Shares of the kinds of requests.
MIXED = "valid=7,invalid=1,aborted=1,malformed=1"
SAMPLE_SECONDS = 0.5
#: The share of valid requests whose images are drawn alone.
STREAMED = WAYS["stream"][1] / sum(weight for _, weight in WAYS.values())


@dataclass(frozen=True)
class Load:
    """How requests arrive."""

    #: Clients of a closed loop. 0: an open loop.
    clients: int
    #: Requests a second of an open loop, with exponentially distributed pauses.
    rate: float
    #: Weights of the kinds of requests.
    mix: dict[str, float]
    seed: int


@dataclass(frozen=True)
class Round:
    """A while of the bare runtime, and then one of the server."""

    bare: Rate
    served: Rate
    outcomes: list[Outcome] = field(repr=False)
    #: (seconds since the first round, resident MiB of the server).
    memory: list[tuple[float, float]] = field(repr=False)


async def offered(load: Load, seconds: float, rng: random.Random, client: Client) -> list[Outcome]:
    """The outcomes of all requests that arrive in `seconds`. Returns when the last of them has its answer."""
    kinds, weights = list(load.mix), list(load.mix.values())
    until = perf_counter() + seconds
    if load.clients:

        async def loop(own: random.Random) -> list[Outcome]:
            outcomes = []
            while perf_counter() < until:
                outcomes.append(await client.send(own.choices(kinds, weights)[0], own))
                if outcomes[-1].verdict == "busy":
                    await asyncio.sleep(own.uniform(0.2, 1.0))
            return outcomes

        loops = [loop(random.Random(rng.random())) for _ in range(load.clients)]
        return [outcome for outcomes in await asyncio.gather(*loops) for outcome in outcomes]
    tasks = []
    arrival = perf_counter()
    while (arrival := arrival + rng.expovariate(load.rate)) < until:
        await asyncio.sleep(max(arrival - perf_counter(), 0))
        own = random.Random(rng.random())
        tasks.append(asyncio.ensure_future(client.send(own.choices(kinds, weights)[0], own, arrival)))
    return list(await asyncio.gather(*tasks))


@contextlib.asynccontextmanager
async def sampled(process: psutil.Process | None, since: float) -> AsyncIterator[list[tuple[float, float]]]:
    """The resident memory of a process while the block runs."""
    samples: list[tuple[float, float]] = []

    async def sample() -> None:
        while process is not None:
            samples.append((perf_counter() - since, resident_mib(process)))
            await asyncio.sleep(SAMPLE_SECONDS)

    task = asyncio.ensure_future(sample())
    try:
        yield samples
    finally:
        task.cancel()


def usage(process: psutil.Process | None) -> tuple[float, float]:
    """Processor time of a server, and how long its thread that draws had to wait for a processor."""
    return (cpu_seconds(process), waited_seconds(process.pid)) if process else (0.0, 0.0)


async def measured(
    load: Load, rounds: int, seconds: float, batch: int, client: Client, process: psutil.Process | None
) -> list[Round]:
    """`rounds` rounds that take `seconds` together on the server, and as long on the bare runtime."""
    rng, since, done = random.Random(load.seed), perf_counter(), []
    share = seconds / rounds
    for _ in range(rounds):
        bare = await asyncio.to_thread(client.references.bare, share, batch, STREAMED)
        async with sampled(process, since) as memory:
            start, used = perf_counter(), usage(process)
            outcomes = await offered(load, share, rng, client)
            cpu, waited = (after - before for after, before in zip(usage(process), used, strict=True))
            served = Rate(sum(outcome.images for outcome in outcomes), perf_counter() - start, cpu, waited)
        done.append(Round(bare, served, outcomes, memory))
    return done


def mix(text: str) -> dict[str, float]:
    """The weights in "valid=7,invalid=1"."""
    weights = {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}
    if unknown := weights.keys() - {"valid", "invalid", "aborted", "malformed"}:
        raise argparse.ArgumentTypeError(f"unknown kinds of requests: {', '.join(sorted(unknown))}")
    return weights


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="what the server and the bare runtime draw with")
    parser.add_argument("--clients", type=int, default=0, help="closed loop: clients, each with one request at a time")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: requests a second on average, with Poisson arrivals")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests arrive, all rounds together (60)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of the bare runtime and the server in turns (6)")
    parser.add_argument("--mix", type=mix, default=MIXED, help=f"weights of the kinds of requests ({MIXED})")
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's side (128)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (20)")
    parser.add_argument("--batch", type=int, default=4, help="the most images that are drawn together, by both (4)")
    parser.add_argument("--threads", type=int, default=1, help="threads that draw, for both (1)")
    parser.add_argument("--tolerance", type=int, default=0, help="the largest difference of a pixel's value from the runtime's (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests and their pauses (0)")
    parser.add_argument("--url", help="a server that runs already, with this bundle; its memory is not measured")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--server-options", default="", help='more options of `sana-export serve`, as in "--queue 16"')
    parser.add_argument("-o", "--output", type=Path, help="writes the results to two files, with .json and .md added")
    return parser


async def run(args: argparse.Namespace, url: str, process: psutil.Process | None) -> list[Round]:
    """Warm up with one round of valid requests, then measure."""
    references = References(args.bundle, args.size, args.steps, threads=args.threads)
    client = Client(url, references, key=args.key, most=args.tolerance)
    load = Load(args.clients, args.rate, args.mix, args.seed)
    # A server draws together what waits together, so the bare runtime gets as large a batch as the clients can fill.
    batch = min(args.batch, args.clients) if args.clients else args.batch
    try:
        await offered(Load(args.clients or args.batch, 0, {"valid": 1.0}, 1), 3.0, random.Random(1), client)
        return await measured(load, args.rounds, args.seconds, batch, client, process)
    finally:
        await client.http.aclose()


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, psutil.Process | None]]:
    """The address of the server, and its process if this one has started it."""
    if args.url:
        yield args.url, None
        return
    options = ("--threads", args.threads, "--batch", args.batch, *words_of(args.server_options))
    with ServerProcess(args.bundle, *options) as started:
        yield started.url, started.meter
        if (code := started.stop()) != 0:
            print(f"the server ended with exit code {code}:\n{started.log()}", file=sys.stderr)


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if isinstance(args.mix, str):
        args.mix = mix(args.mix)
    if bool(args.clients) == bool(args.rate):
        parser.error("give either --clients or --rate")
    with server(args) as (url, process):
        rounds = asyncio.run(run(args, url, process))
    outcomes = [outcome for one in rounds for outcome in one.outcomes]
    result = {
        "conditions": conditions(args),
        "summary": summary(
            [(one.bare, one.served) for one in rounds], outcomes, [sample for one in rounds for sample in one.memory]
        ),
        "rounds": [{"bare": asdict(one.bare), "served": asdict(one.served), "requests": len(one.outcomes)} for one in rounds],
    }
    text = table([result])
    print(text)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        args.output.with_suffix(".md").write_text(text + "\n", "utf-8")
    return 0 if result["summary"]["failures"] == 0 else 5


if __name__ == "__main__":
    sys.exit(main())
