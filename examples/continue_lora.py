"""Train a LoRA further as a Bayesian one.

    python examples/continue_lora.py

A plain LoRA is trained by PEFT and the Trainer of Transformers, and saved. It is loaded again, `bayesianize` puts a
Gaussian over its head, and BlobTrainer continues and fits a temperature on held-out queries. The table shows both on
queries that neither has seen.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize, evaluation, predict
from bloblora.data import support_desk
from bloblora.models import DEFAULT_MODEL, load_model, load_tokenizer

TRAINING = {"per_device_train_batch_size": 16, "learning_rate": 2e-3, "save_strategy": "no", "report_to": []}


def main(arguments: list[str] | None = None) -> None:
    """Train a LoRA, continue it, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=120, help="of the LoRA; half as many follow")
    parser.add_argument("--samples", type=int, default=5, help="number of weight samples N")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.model)
    train, held_out, test = (support_desk(split) for split in ("train", "validation", "test"))
    labels = sorted({record["label"] for record in train})
    dataset, validation = (
        [{**tokenizer(record["text"]), "labels": labels.index(record["label"])} for record in records]
        for records in (train, held_out)
    )
    collator = DataCollatorWithPadding(tokenizer)
    inputs = tokenizer([record["text"] for record in test], padding=True, return_tensors="pt")
    targets = torch.tensor([labels.index(record["label"]) for record in test])
    set_seed(0)
    base = load_model(options.model, num_labels=len(labels))

    with tempfile.TemporaryDirectory() as folder:
        lora = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"]))
        stock = TrainingArguments(folder, max_steps=options.steps, **TRAINING)
        Trainer(lora, stock, train_dataset=dataset, data_collator=collator).train()
        lora.save_pretrained(folder)

        model = PeftModel.from_pretrained(lora.unload(), folder, is_trainable=True)
        rows = {"LoRA": evaluation.summary(predict(model, inputs, progress=True), targets)}

        posterior = bayesianize(model, BlobConfig(head_prior_std="auto"))
        continued = BlobTrainingArguments(folder, max_steps=max(1, options.steps // 2), **TRAINING)
        BlobTrainer(model, continued, train_dataset=dataset, eval_dataset=validation, data_collator=collator).train()
        for num_samples in (0, options.samples):
            found = predict(model, inputs, num_samples, seed=0, progress=True)
            rows[f"continued as BLoB, N = {num_samples}"] = evaluation.summary(found, targets)
    Console().print(evaluation.rich_table(rows, f"{len(test)} test queries"))
    print(f"median Ω {posterior.summary()['median_std']:.3f}")


if __name__ == "__main__":
    main()
