"""What a round over a Flower deployment costs above the training itself, and what travels.

    python benchmarks/flower_overhead.py                         # 4 nodes, 6 rounds, polling of 0.1, 0.5 and 3 s
    python benchmarks/flower_overhead.py --polls 0.5 --rounds 3

A server and its nodes as real processes on this machine, over TLS and with node authentication; MiniLM-L3, FedIT at
rank 8, 2 steps of 16 examples a client. The first round is left out: in it, the nodes measure their memory. Beside the
round's seconds: the longest local update, the server's evaluation, its own work on the wire (see `engine.Wire`), and
the rest, which is waiting for somebody to look. Polling of 3 s is Flower's own, but for the process that it starts for
each message.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpilot.config.recipe import Recipe, load_recipe
from fedpilot.config.schema import ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.engines.flower import certificates, deployment
from fedpilot.engines.flower.timing import Timing

CLIENTS = ("amazon", "movie", "nyt", "tweets")


def recipe_of(rounds: int) -> Recipe:
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "tiny.toml")
    return replace(
        recipe,
        run=replace(recipe.run, rounds=rounds),
        model=replace(recipe.model, rank=8, alpha=16),
        clients=replace(recipe.clients, memory=(ByteSize(2**30),), tiers=()),
        algorithm=AlgorithmSettings("fedit"),
        baseline=None,
    )


def measured(rounds: int, poll_s: float, folder: Path) -> list[dict[str, Any]]:
    """Lines of the run, from round 2, with what the log says of the wire."""
    certificates.make(folder / "certs", [], CLIENTS)
    port, run, nodes = deployment.free_port(), folder / "run", []
    for partition, name in enumerate(CLIENTS):
        keys = ("--ca", folder / "certs" / "ca.crt", "--key", folder / "certs" / "nodes" / name)
        options = ("--folder", folder / name, "--partition", partition, "--poll", poll_s)
        command = [sys.executable, "-m", "fedpilot", "join", f"127.0.0.1:{port}", *map(str, (*keys, *options))]
        nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    try:
        timing = Timing(poll_s=min(poll_s, 0.1))
        serving = deployment.Serving(
            run, recipe_of(rounds), folder / "certs", "127.0.0.1", port, poll_s=poll_s, timing=timing
        )
        deployment.serve(serving, lambda text: None)
    finally:
        for node in nodes:
            deployment.end(node)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = (run / "log.txt").read_text()
    for line in lines:
        found = re.search(rf"round {line['round']} on the wire: (\d+) bytes down, (\d+) up; (.*)", log)
        if found:
            line["wire"] = (int(found[1]), int(found[2]))
            line["spent"] = {name: float(s) for name, s in re.findall(r"(\w+) ([\d.]+) s", found[3])}
    return lines[2:]


def report(lines: list[dict[str, Any]], poll_s: float) -> str:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    total = median([line["seconds"]["total"] for line in lines])
    training = median([max(upload["metrics"]["seconds"] for upload in line["uploads"]) for line in lines])
    evaluation = median([line["seconds"]["evaluate"] for line in lines])
    spent = {name: median([line["spent"].get(name, 0.0) for line in lines]) for name in lines[0]["spent"]}
    above = total - training - evaluation
    rest = above - sum(spent.values())
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items())
    last = lines[-1]
    tensors, wire = last["bytes_down"] + last["bytes_up"], sum(last["wire"])
    return (
        f"poll {poll_s:g} s: round {total:.2f} s = longest local update {training:.2f} + evaluation {evaluation:.2f} + "
        f"overhead {above:.2f} (server: {parts}; waiting and nodes {rest:.2f}); "
        f"wire {wire:,} bytes for {tensors:,} bytes of tensors, {100 * (wire / tensors - 1):.2f} % more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--polls", type=float, nargs="+", default=[0.1, 0.5, 3.0])
    options = parser.parse_args()
    print(f"{platform.platform()}, {platform.machine()}; 4 nodes and the server on this machine", flush=True)
    for poll_s in options.polls:
        with tempfile.TemporaryDirectory(prefix="fedpilot-overhead-") as folder:
            print(report(measured(options.rounds, poll_s, Path(folder)), poll_s), flush=True)


if __name__ == "__main__":
    main()
