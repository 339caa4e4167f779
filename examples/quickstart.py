"""The main job from Python: budgets in, one PEFT adapter out.

python examples/quickstart.py recipes/quickstart.toml my-adapter
"""

import sys
from pathlib import Path

import fedpilot


def main(recipe_file: Path, adapter_folder: Path) -> None:
    recipe = fedpilot.load_recipe(recipe_file)
    experiment = fedpilot.experiment(recipe)  # data split and encoded, a training step's memory traced
    algorithm = experiment.algorithm()
    clients = {client.client_id: client for client in experiment.population.clients}

    for state, record in fedpilot.run_rounds(
        algorithm,
        experiment.engine(algorithm),
        experiment.population.clients,
        experiment.evaluate,
        num_rounds=recipe.run.rounds,
        seed=recipe.run.seed,
        cohort_size=recipe.run.cohort,
    ):
        print(f"round {record.round}: accuracy {record.metrics['accuracy']:.3f}, {record.bytes_up} bytes up")
        for plan in record.plans if record.round == 1 else ():
            client = clients[plan.client_id]
            print(f"  {client.name}: blocks {plan.trained}, {plan.peak_bytes} of {client.memory_bytes} bytes")
        for out in record.left_out if record.round == 1 else ():
            print(f"  {clients[out.client_id].name} sits out: {out.reason}")
        deployment = algorithm.deploy(state)

    fedpilot.export_peft(experiment.adapted, deployment, adapter_folder)
    print(f"adapter written to {adapter_folder}; load it with peft.PeftModel.from_pretrained")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
