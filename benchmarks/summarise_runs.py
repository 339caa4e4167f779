"""Several runs of one recipe with different seeds as one result: mean and spread of the last rounds.

for seed in 0 1 2; do fedpilot run recipes/quickstart.toml --set run.seed=$seed --out runs/seed$seed; done
python benchmarks/summarise_runs.py runs/seed0 runs/seed1 runs/seed2 --last 5 --out results/FILE.json
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def last_mean(lines: list[dict[str, Any]], metric: str, last: int, until: int) -> float:
    """Mean of the metric over the last rounds up to ``until``: the method's number of rounds, for a fair baseline."""
    values = [line["metrics"][metric] for line in lines if until - last < line["round"] <= until]
    return statistics.fmean(values)


def summary_of(directory: Path, metric: str, last: int) -> dict[str, Any]:
    manifest = json.loads((directory / "manifest.json").read_text())
    lines = lines_of(directory)
    rounds = lines[-1]["round"]
    result = {
        "seed": manifest["seed"],
        "rounds": rounds,
        "before": lines[0]["metrics"][metric],
        "method": last_mean(lines, metric, last, rounds),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
    }
    if (directory / "baseline").exists():
        baseline = lines_of(directory / "baseline")
        result["baseline_equal_rounds"] = last_mean(baseline, metric, last, rounds)
        result["baseline_last_rounds"] = last_mean(baseline, metric, last, baseline[-1]["round"])
        result["baseline_rounds"] = baseline[-1]["round"]
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--last", type=int, default=5, help="rounds at the end that are averaged")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = [summary_of(directory, options.metric, options.last) for directory in options.runs]
    manifest = json.loads((options.runs[0] / "manifest.json").read_text())
    keys = [key for key in ("before", "method", "baseline_equal_rounds", "baseline_last_rounds") if key in runs[0]]
    result = {
        "metric": options.metric,
        "last_rounds": options.last,
        "manifest": {key: value for key, value in manifest.items() if key not in ("config", "run_id", "seed")},
        "over_seeds": {key: spread([run[key] for run in runs]) for key in keys},
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
