"""A federation as users of Flower write it, for `simulators.py`: PEFT, and a Trainer.

    PYTHON benchmarks/flower_peft.py FOLDER

It follows Flower's own example of tuning language models (FlowerTune), with what slows that down
left out: blocks are tokenised before, nothing is logged, evaluated or saved on the way, arrays are
the adapter's alone, and a Ray actor keeps the backbone that it has loaded. The example loads it
in each call, which `"kept": false` does too.
"""

import sys
import tempfile
import time
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peers import Told, blocks, finish, kept, model_of, read
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

client, server = ClientApp(), ServerApp()


def arguments(told: Told, place: str, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=place,
        max_steps=told["steps"],
        per_device_train_batch_size=told["batch"],
        learning_rate=told["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=told["clip"],
        bf16=told["bf16"],
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


@client.train()
def train(message: Message, context: Context) -> Message:
    asked, number = message.content["config"], int(context.node_config["partition-id"])
    assert isinstance(asked, ConfigRecord)
    folder, round_ = str(asked["folder"]), int(str(asked["server-round"]))
    told = read(folder)
    model = kept(folder) if told["kept"] else model_of(folder)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    rows: Any = [{"input_ids": row, "labels": row} for row in blocks(folder, number)]
    seed = told["seed"] + round_ * told["clients"] + number
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(model=model, args=arguments(told, place, seed), train_dataset=rows)
        loss = trainer.train().training_loss
    metrics = MetricRecord({"num-examples": len(rows), "train_loss": loss})
    sent = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": sent, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    del context
    folder = sys.argv[1]
    told, model = read(folder), model_of(folder)
    plan = FedAvg(
        fraction_train=told["cohort"] / told["clients"],
        fraction_evaluate=0.0,
        min_train_nodes=told["cohort"],
        min_available_nodes=told["clients"],
    )
    began = time.perf_counter()
    done = plan.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=told["rounds"],
        train_config=ConfigRecord({"folder": folder}),
    )
    finish(folder, model, cast(Any, done.arrays.to_torch_state_dict()), time.perf_counter() - began)


if __name__ == "__main__":
    import flower_peft  # by its name, so that actors import it, and keep what it keeps
    from flwr.simulation import run_simulation

    told = read(sys.argv[1])
    run_simulation(
        flower_peft.server,
        flower_peft.client,
        num_supernodes=told["clients"],
        backend_config={"client_resources": {"num_cpus": told["cpus"], "num_gpus": 0.0}},
    )
