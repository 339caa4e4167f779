"""What a pool of sets could gain on data of several domains, if it chose well: a classifier for each part of the data.

    python benchmarks/domain_heads.py recipes/fedins.toml [--seeds 3] [--blocks 6] [--regularisation 0.1]

A multinomial logistic regression is fitted to the frozen model's last hidden states at the first position, pooled over
all clients, and read on the test set: one for all, one for each domain (the column of ``evaluation.by``), one for each
cluster of the queries that FedIns may use. The distance from one head to a head for each domain is what a perfect
choice is worth to heads alone; a head for each cluster is what choosing by the nearest key can come to. The purity of
clusters is the share of test examples that are of their cluster's most frequent domain.
"""

import argparse
import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from fedpilot.config import setup
from fedpilot.config.population import load_population
from fedpilot.config.recipe import load_recipe
from fedpilot.model import AdaptedModel, build_model
from fedpilot.training import Examples

QUERIES = ("cls", "mean")


def states(model: AdaptedModel, examples: Examples, depths: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Hidden states after so many blocks (0: all), by pooling and depth, and the labels."""
    found: dict[str, list[np.ndarray]] = {f"{kind} {depth}": [] for kind in QUERIES for depth in depths}
    labels = []
    for start in range(0, len(examples), 64):
        rows = list(range(start, min(start + 64, len(examples))))
        batch = dict(next(iter(examples.subset(rows).batches(len(rows), None))))
        labels.append(batch.pop("labels").numpy())
        inputs = {name: tensor for name, tensor in batch.items() if name in model.accepted}
        for depth in depths:
            for kind in QUERIES:
                found[f"{kind} {depth}"].append(model.query(inputs, kind, depth).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(labels)


def accuracy(of_train: np.ndarray, of_test: np.ndarray, data: tuple[np.ndarray, ...], strength: float) -> float:
    """Share of the test set that is right with a head for each value of the two arrays."""
    x, y, x_test, y_test = data
    right = 0
    for value in np.unique(of_test):
        train, test = of_train == value, of_test == value
        head = LogisticRegression(C=strength, max_iter=200).fit(x[train], y[train])
        right += int((head.predict(x_test[test]) == y_test[test]).sum())
    return right / len(y_test)


def measured(recipe_path: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies and purities by name; the seed draws the clusters, and the examples stay the same."""
    recipe = load_recipe(recipe_path, [*options.overrides, f"run.seed={seed}"])
    people = load_population(recipe)
    settings = setup.model_settings(recipe, people)
    model = build_model(settings, num_labels=setup.num_labels(recipe, people), device="cpu", seed=seed)
    depths = (0, options.blocks)
    (train, y), (test, y_test) = states(model, people.train, depths), states(model, people.test, depths)
    scaler = StandardScaler().fit(train["cls 0"])
    data = (scaler.transform(train["cls 0"]), y, scaler.transform(test["cls 0"]), y_test)
    by = recipe.evaluation.by
    if by is None:
        raise SystemExit("evaluation.by must name the column that holds the domain")
    domains, domains_test = (np.array(rows.column(by).tolist()) for rows in (people.table.train, people.table.test))
    result = {
        "one head": accuracy(np.zeros(len(y)), np.zeros(len(y_test)), data, options.regularisation),
        "a head for each domain": accuracy(domains, domains_test, data, options.regularisation),
    }
    count = len(np.unique(domains))
    for kind in QUERIES:
        for depth in depths:
            name = f"{kind} {depth}"
            clusters = KMeans(count, n_init=5, random_state=seed).fit(normalize(train[name]))
            chosen = clusters.predict(normalize(test[name]))
            where = f"{count} clusters of {kind} after {depth or 'all'} blocks"
            result[f"a head for each of {where}"] = accuracy(clusters.labels_, chosen, data, options.regularisation)
            most = sum(max(np.unique(domains_test[chosen == c], return_counts=True)[1]) for c in np.unique(chosen))
            result[f"purity of {where}"] = float(most / len(chosen))
    return result


def main() -> None:
    """Prints a mean and a standard deviation over seeds for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6, help="After how many blocks the other query is taken.")
    parser.add_argument("--regularisation", type=float, default=0.1, metavar="C", help="Inverse strength.")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    runs = [measured(options.recipe, seed, options) for seed in range(options.seeds)]
    print(f"{datetime.date.today()}, {options.recipe.name}, {options.seeds} seeds, C = {options.regularisation:g}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"  {name:52} {statistics.mean(values):.3f} +- {spread:.3f}")


if __name__ == "__main__":
    main()
