"""Who the clients of a run are, on disk: a report is made without data and model."""

import json
import logging
from pathlib import Path

from fedpilot import checkpoint
from fedpilot.config.population import Population

logger = logging.getLogger(__name__)

FILE = "population.json"


def write(population: Population, folder: Path) -> Path:
    """Names, tiers, budgets, speeds and numbers of examples of all clients.

    Examples by class are there where the run divided the data itself: of a node's own rows it knows the number only.

    Args:
        population: The clients.
        folder: The run directory.

    Raises:
        RecordError: It cannot be written.
    """
    clients = [
        {
            "name": client.name,
            "tier": tier,
            "memory_bytes": client.memory_bytes,
            "num_examples": client.num_examples,
            "flops_per_second": client.flops_per_second,
            "deadline_s": client.deadline_s,
            "counts": counts.tolist() if counts.sum() == client.num_examples else None,
        }
        for client, tier, counts in zip(population.clients, population.tiers, population.counts, strict=True)
    ]
    file = folder / FILE
    with checkpoint.writing(file):
        body = {"class_names": list(population.class_names), "clients": clients}
        checkpoint.write_file(file, (json.dumps(body) + "\n").encode())
    return file
