"""The usual alternative: a Flower app whose client loads the model and runs a Hugging Face Trainer for each message.

Written the way Flower's own example of fine-tuning a language model is: `FedAvg` on the server, one `ClientApp` that
builds the PEFT model, sets the received weights, trains with `Trainer` and sends the weights back. Data, splits, steps,
optimiser, learning rate and evaluation are those of the recipe that `compare_engines.py` runs beside it; it writes them
into a folder that this app reads:

    job.json       model, sizes, learning rate, rounds, blocks of each client, threads of a client
    client-K.json  {"input_ids": [[...]], "labels": [...]}
    test.json      the same

    python app.py FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

FOLDER = Path(os.environ["FLOWER_TRAINER_FOLDER"])
JOB = json.loads((FOLDER / "job.json").read_text())


class Examples(torch.utils.data.Dataset):
    """Tokenised examples as a Trainer reads them."""

    def __init__(self, name: str) -> None:
        self.columns = json.loads((FOLDER / f"{name}.json").read_text())

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, object]:
        ids = self.columns["input_ids"][index]
        return {"input_ids": ids, "labels": self.columns["labels"][index], "length": len(ids)}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads to the longest of the batch."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), JOB["pad_id"])
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def build() -> torch.nn.Module:
    """The base model from disk with fresh adapters."""
    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": JOB["dropout"], "attention_probs_dropout_prob": JOB["dropout"]}
    base = AutoModelForSequenceClassification.from_pretrained(JOB["model"], num_labels=JOB["num_labels"], **dropouts)
    config = LoraConfig(
        task_type="SEQ_CLS", r=JOB["rank"], lora_alpha=JOB["alpha"], target_modules=["query", "value"], lora_dropout=0.0
    )
    return get_peft_model(base, config)


def arguments(**options: object) -> TrainingArguments:
    """What both sides give the Trainer."""
    return TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        per_device_train_batch_size=JOB["batch_size"],
        per_device_eval_batch_size=JOB["eval_batch_size"],
        learning_rate=JOB["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=JOB["bf16"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **options,
    )


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Loads the model, sets the weights, trains, sends the weights back."""
    torch.set_num_threads(JOB["threads"])
    client = int(context.node_config["partition-id"])
    model = build()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    trained = JOB["blocks"][client]
    for name, parameter in model.named_parameters():
        if ".layer." in name and "lora_" in name:
            parameter.requires_grad_(int(name.split(".layer.")[1].split(".")[0]) in trained)
    sampling = {"train_sampling_strategy": "group_by_length"} if JOB["group_by_length"] else {}
    args = arguments(
        num_train_epochs=JOB["local_epochs"], seed=int(message.content["config"]["server-round"]), **sampling
    )
    examples = Examples(f"client-{client}")
    result = Trainer(model, args, train_dataset=examples, data_collator=collate).train()
    metrics = MetricRecord({"loss": result.training_loss, "num-examples": len(examples)})
    content = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics})
    return Message(content, reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg with a central evaluation after each round."""
    torch.set_num_threads(JOB["server_threads"])
    model, test = build(), Examples("test")
    trainer = Trainer(model, arguments(), data_collator=collate, compute_metrics=accuracy)
    history: list[dict[str, float]] = []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        metrics = trainer.evaluate(test)
        history.append({"round": round, "accuracy": metrics["eval_accuracy"], "at": time.time()})
        return MetricRecord({"accuracy": metrics["eval_accuracy"]})

    count = JOB["num_clients"]
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    start = ArrayRecord(get_peft_model_state_dict(model))
    strategy.start(grid, start, num_rounds=JOB["rounds"], train_config=ConfigRecord({}), evaluate_fn=evaluate)
    (FOLDER / "history.json").write_text(json.dumps(history))


def accuracy(predictions: object) -> dict[str, float]:
    """Share of right classes."""
    logits, labels = predictions
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=JOB["num_clients"],
        backend_config={
            "client_resources": {"num_cpus": JOB["cpus_per_client"], "num_gpus": 0.0},
            "init_args": {"num_cpus": JOB["cpus"], "log_to_driver": False, "include_dashboard": False},
        },
    )
    sys.exit(0)
