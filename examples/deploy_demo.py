"""A federation of real processes on one machine: a server and four nodes over TLS, from certificates to the adapter.

    python examples/deploy_demo.py [FOLDER]

It runs the commands that docs/deployment.md gives for several machines, each in a process of its own, and prints them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from fedpilot.engines.flower.deployment import end, free_port

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.toml"
CLIENTS = ("amazon", "movie", "nyt", "tweets")  # values of the column that the recipe divides its data by, sorted


def fedpilot(*arguments: object) -> list[str]:
    command = [sys.executable, "-m", "fedpilot", *map(str, arguments)]
    print("$ fedpilot", *arguments, flush=True)
    return command


def main(folder: Path) -> None:
    certs, run, address = folder / "certs", folder / "run", f"127.0.0.1:{free_port()}"
    subprocess.run(fedpilot("certs", certs, *(part for name in CLIENTS for part in ("--node", name))), check=True)
    serve = fedpilot("serve", RECIPE, "--certs", certs, "--address", address, "--out", run)
    server = subprocess.Popen(serve)
    nodes = []
    try:
        for number, name in enumerate(CLIENTS):
            keys = ("--ca", certs / "ca.crt", "--key", certs / "nodes" / name)
            join = fedpilot("join", address, *keys, "--folder", folder / name, "--partition", number)
            with (folder / f"{name}.log").open("wb") as log:
                nodes.append(subprocess.Popen(join, stdout=log, stderr=log))
        code = server.wait()
    finally:
        for process in (server, *nodes):
            end(process)
    if code:
        sys.exit(code)
    subprocess.run(fedpilot("export", run, folder / "adapter"), check=True)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="fedpilot-demo-"))
    place.mkdir(parents=True, exist_ok=True)
    main(place)
