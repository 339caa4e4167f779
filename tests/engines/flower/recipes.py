"""The toy recipe of the tests of Flower, and the methods whose bits are compared."""

from typing import Any

RECIPE = """
[run]
name = "toy"
rounds = 2
threads = 1

[model]
source = "model"
rank = 2
max_length = 8
lora_dropout = 0.1

[data]
source = "data.csv"
test_fraction = 0.25

[partition]
kind = "column"
column = "city"

[clients]
memory = ["1 GiB"]

[training]
learning_rate = 0.01
batch_size = 4
max_steps = 2

[server]
fraction = 0.2

[algorithm]
name = "fedit"
"""
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "hetlora": {"r_min": 1, "r_max": 2, "gamma": 0.5},
    "fed-pilot": {"ig_examples": 4, "refresh_every": 1},
    "flora": {},
    "fedex-lora": {},
}
"""The methods that a real deployment is tried with."""

OTHERS: dict[str, dict[str, Any]] = {
    "ffa-lora": {"epsilon": 50.0, "delta": 1e-3},
    "lora-fair": {},
    "flexlora": {"r_min": 1, "r_max": 2},
    "fedra": {},
    "xgblora": {"blocks_per_round": 1},
    "galore": {"rank": 2, "gap": 1},
    "fedaf": {"depth": 1, "length": 4, "ipc": 2, "iterations": 2, "server_steps": 2},
    "fedbiot": {"adapter_blocks": 1, "pre_steps": 1, "align_steps": 1},
    "reclora": {"N": 2, "gate": "none"},
    "fedins": {"size": 4, "top_k": 2, "query": "mean"},
    "fed-hello": {"fim_examples": 2, "warmup_rounds": 0, "refresh_every": 1},
}
"""All the rest: they differ in what goes down and comes up."""
