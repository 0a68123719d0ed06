"""Seconds of a student's update: Prompt-Distiller against prompt-tuning on as many texts.

    python benchmarks/few_shot_step.py [--repeats 60] [--texts 8]

One process, one thread, alternating updates of the same trainer that runs use, float32, random weights and
texts; prompt-tuning reads `texts` labelled texts, Prompt-Distiller half of them labelled and half unlabelled.
Teachers and probes are run before: only an update counts. Prints the medians and their ratio, of seconds on
the clock and of seconds of the processor, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, Distiller
from kdbench.distillers.prompt_distiller import PromptDistiller
from kdbench.distillers.student_pt import StudentPT
from kdbench.harness import BatchSource, SourceData, Trainer

LENGTH, CLASSES, SHOTS, RATIO = 32, 2, 16, 10  # tokens of a text, classes, texts per class, |Xu| / |X|
SHAPES = {  # layers, width, heads, vocabulary
    "BERT 2 x 48": (2, 48, 4, 65),
    "BERT-small 4 x 512": (4, 512, 8, 30522),
}
WARM_UP = 5


def bert(shape: tuple[int, int, int, int]) -> Any:
    return BertForMaskedLM(BertConfig(**_sizes(*shape)))


def roberta() -> Any:
    return RobertaForMaskedLM(RobertaConfig(**_sizes(3, 48, 4, 65), pad_token_id=1, type_vocab_size=1))


def _sizes(layers: int, width: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 128,
        "num_labels": CLASSES,
    }


def rows(count: int, first: int, labelled: bool) -> Batch:
    """Random texts of 16 to 32 tokens, one view for all roles."""
    draw = torch.Generator().manual_seed(first)
    own = {
        "input_ids": torch.randint(5, 65, (count, LENGTH), generator=draw),
        "length": torch.randint(LENGTH // 2, LENGTH + 1, (count,), generator=draw),
        "mask_index": torch.full((count,), 7),
        "verbalizer_ids": torch.tensor([10, 11]).repeat(count, 1),
    }
    fields = {"example_id": torch.arange(first, first + count)}
    fields["class_label"] = torch.arange(count) % CLASSES if labelled else torch.full((count,), -1)
    for prefix in ("", "teacher.", "pretrained."):
        fields |= {prefix + name: value for name, value in own.items()}
    return Batch(fields)


def trainer_of(distiller: Distiller, batch_size: int) -> Trainer:
    """A trainer whose method has prepared."""
    sets = {
        "train": rows(CLASSES * SHOTS, 100, True),
        "dev": rows(CLASSES * SHOTS, 500, True),
        "unlabeled": rows(CLASSES * SHOTS * RATIO, 1000, False),
    }
    sources = {name: BatchSource(batch) for name, batch in sets.items()}
    training = TrainingConfig(
        optimizer_steps=10**6, batch_size=batch_size, lr=1e-5, schedule="linear", checkpoint_every=0
    )
    trainer = Trainer(distiller, sources["train"], training, 1, extras={"unlabeled": sources["unlabeled"]})
    made = trainer.prepare(SourceData(sources, batch_size, torch.device("cpu"))) or {}
    trainer.source = BatchSource(made["train"]) if made else trainer.source
    trainer.extras |= {name: BatchSource(batch) for name, batch in made.items() if name != "train"}
    return trainer


def seconds(trainer: Trainer) -> tuple[float, float]:
    """Seconds of one update, on the clock and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    trainer.one_visit()
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds of an update, Prompt-Distiller against prompt-tuning"
    )
    parser.add_argument("--repeats", type=int, default=60, help="updates of each method that are timed")
    parser.add_argument("--texts", type=int, default=8, help="texts that an update reads")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        plain = trainer_of(StudentPT(StudentPT.Config(), bert(shape)), chosen.texts)
        settings = PromptDistiller.Config(probe_steps=1)
        ours = trainer_of(PromptDistiller(settings, bert(shape), roberta(), roberta()), chosen.texts // 2)
        times: dict[str, list[tuple[float, float]]] = {"prompt-tuning": [], "Prompt-Distiller": []}
        for number in range(WARM_UP + chosen.repeats):
            for method, trainer in zip(times, (plain, ours), strict=True):
                spent = seconds(trainer)
                if number >= WARM_UP:
                    times[method].append(spent)
        for place, measure in enumerate(("clock", "processor")):
            medians = {m: statistics.median(spent[place] for spent in found) for m, found in times.items()}
            told = ", ".join(f"{method} {1e3 * median:.2f} ms" for method, median in medians.items())
            ratio = medians["Prompt-Distiller"] / medians["prompt-tuning"]
            print(f"{name}, {measure}: {told}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
