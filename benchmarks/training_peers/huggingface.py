"""Hugging Face's Trainer and TRL's SFTTrainer on the benchmark's samples.

Both get their samples already tokenised and tiled, in memory, so their figures hold no data loading at all; ours reads
shards, decodes and tiles while it trains. Settings are the fastest that keep the result: fused AdamW, no logging, no
saving, and our ``loss_only`` head (target rows alone), which model classes of transformers do not have; TRL brings its own.
"""

from __future__ import annotations

from typing import Any

import torch

from training_peers.layouts import padded
from training_peers.measure import Steps
from training_peers.world import Row, Size


def dataset(rows: list[Row]) -> Any:
    """Sample numbers and lengths as TRL and the Trainer's length grouping want them; the rows stay in memory."""
    from datasets import Dataset

    return Dataset.from_dict({"number": list(range(len(rows))), "length": [len(row.ids) for row in rows]})


def counting(kind: type, steps: Steps) -> type:
    """A Trainer class whose micro-batches and steps are counted and timed, and nothing else."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.end()

    class Counting(kind):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask, pixels = inputs["attention_mask"], inputs.get("pixel_values")
            steps.add(
                mask.sum(1).tolist(),
                mask.numel(),
                0 if pixels is None else len(pixels),
                int((inputs["labels"] != -100).sum()),
            )
            return super().training_step(model, inputs, *args, **kwargs)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(Clock())
            return super().train(*args, **kwargs)

    return Counting


def train(
    model: Any, rows: list[Row], size: Size, per_batch: int, grouped: bool, trl: bool, folder: str, steps: Steps
) -> None:
    """Step ``steps.total`` times; ``per_batch`` rows a forward, ``size.batch`` an optimizer step."""
    from transformers import Trainer, TrainingArguments

    def lay(items: list[dict[str, Any]]) -> dict[str, Any]:
        return padded([rows[item["number"]] for item in items])

    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": per_batch,
        "gradient_accumulation_steps": max(1, size.batch // per_batch),
        "max_steps": steps.total,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": cuda,
        "train_sampling_strategy": "group_by_length" if grouped else "random",
        "dataloader_drop_last": True,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": size.seed,
        "use_cpu": not cuda,
    }
    if trl:
        from trl import SFTConfig, SFTTrainer

        from training_peers.world import tokenizer

        settings = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        trainer = counting(SFTTrainer, steps)(
            model=model, args=settings, train_dataset=dataset(rows), data_collator=lay, processing_class=tokenizer()
        )
    else:
        trainer = counting(Trainer, steps)(
            model=model,
            args=TrainingArguments(**options),
            train_dataset=dataset(rows),
            data_collator=lambda items: {**lay(items), "loss_only": True},
        )
    steps.begin()
    trainer.train()


def why_trl_cannot_pack() -> str:
    """TRL's own words when asked to pack samples with images."""
    import inspect

    from trl.trainer import sft_trainer

    line = "Packing is not supported for vision datasets"
    return (
        line
        if line in inspect.getsource(sft_trainer)
        else "packing of vision datasets is no longer refused: add it here"
    )
