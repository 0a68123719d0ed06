"""An encoder behind a prompt, with the head of one task: what prompt tuning trains and transfers.

Shapes: B rows, C choices, T tokens, H width, N outputs. A task's format says what the head reads and gives:

    classes  the pooled first token      [B, N]      logits of the classes
    number   the pooled first token      [B, 1]      the number itself
    choice   the pooled first token      [B, C]      one number a choice
    tokens   every token's last state    [B, T, N]   logits of the tags
    span     every token's last state    [B, T, 2]   logits of the answer's start and end

Source: heads and prompts of P-Tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602, sec. 3), which
PANDA's public code is built on.
Differs: a shallow prompt goes through the embedding layer as word embeddings, once; in that code embeddings
that hold positions and segments already go through it again. Masks come from `length`, never from ids. All
dropout (of the prompt, of the head, of the encoder) is off unless the student trains with its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.prompts import DeepPrompt, SoftPrompt

FORMATS = ("classes", "number", "choice", "tokens", "span")
_BY_TOKEN = ("tokens", "span")
FILE = "prompted.safetensors"


def outputs_of(config: Any) -> int:
    """Return how many outputs the head of a task has, from the encoder's configuration as the task set it.

    Raises: ValueError for a format that does not exist.
    """
    told = {"number": 1, "choice": 1, "span": 2}
    if config.task_format not in FORMATS:
        raise ValueError(f"task_format = '{config.task_format}' is none of {', '.join(FORMATS)}")
    return told.get(config.task_format) or int(config.num_labels)


class PromptedEncoder(nn.Module):
    """A frozen encoder, a prompt and a linear head; without a prompt the encoder is trained itself.

    `signature` holds means over texts of its own task, by name, which `kdbench.transferability` compares.
    """

    def __init__(
        self,
        encoder: nn.Module,
        prompt: DeepPrompt | SoftPrompt | None,
        task_format: str,
        outputs: int,
        std: float = 0.02,
    ) -> None:
        """Start the head at normal noise of standard deviation `std`, its bias at 0."""
        super().__init__()
        self.encoder = encoder
        self.prompt = prompt
        self.task_format, self.outputs = task_format, outputs
        self.head = nn.Linear(self.config.hidden_size, outputs)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(getattr(self.config, "hidden_dropout_prob", 0.0))
        self.signature: dict[str, Tensor] = {}
        if prompt is not None:
            encoder.requires_grad_(False)
        dtype = next(encoder.parameters()).dtype
        if dtype == torch.float64:
            self.double()

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    @property
    def reads_pooler(self) -> bool:
        """Whether the head reads the pooled first token."""
        return self.task_format not in _BY_TOKEN

    # ---- forward
    def forward(self, batch: Batch) -> Tensor:
        """Return the outputs as the module's table says, in float32 at least."""
        return self.outputs_from(self.states(batch), batch)

    def outputs_from(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the outputs for the states that `states` gave."""
        features = self.pooled(states) if self.reads_pooler else states
        out: Tensor = self.head(self.dropout(features))
        out = out if out.dtype == torch.float64 else out.float()
        return out.view(batch.size, -1) if self.task_format == "choice" else out

    def states(self, batch: Batch) -> Tensor:
        """Return the last states of the text's tokens up to the longest row, [B, T, H]; [B C, T, H] for
        choices.
        """
        ids, length, segments = batch["input_ids"], batch["length"], batch.get("segment_ids")
        if ids.dim() == 3:
            ids, length = ids.flatten(0, 1), batch["choice_length"].flatten()
            segments = None if segments is None else segments.flatten(0, 1)
        width = int(length.max()) if len(length) else 0
        if not width:
            return next(self.parameters()).new_zeros(len(ids), width, self.config.hidden_size)
        ids = ids[:, :width]
        real = torch.arange(width, device=ids.device) < length[:, None]
        pad = getattr(self.config, "pad_token_id", None)
        inputs: dict[str, Any] = {"attention_mask": real.long()}
        ids = ids if pad is None else ids.masked_fill(~real, pad)
        if segments is not None and getattr(self.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segments[:, :width] * real
        return self._run(ids, inputs)

    def _run(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        encoder: Any = self.encoder
        if self.prompt is None:
            return encoder(input_ids=ids, **inputs).last_hidden_state  # type: ignore[no-any-return]
        rows, length = len(ids), self.prompt.length
        told = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([told.new_ones(rows, length), told], 1)
        if isinstance(self.prompt, DeepPrompt):
            table = self.dropout(self.prompt.table().expand(rows, -1, -1))
            cache = self.prompt.cache(table.to(self._inner_dtype()))
            return encoder(input_ids=ids, past_key_values=cache, **inputs).last_hidden_state  # type: ignore[no-any-return]
        words = encoder.get_input_embeddings()(ids)
        vectors = self.dropout(self.prompt(rows)).to(words.dtype)
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = nn.functional.pad(inputs["token_type_ids"], (length, 0))
        out = encoder(inputs_embeds=torch.cat([vectors, words], 1), **inputs)
        return out.last_hidden_state[:, length:]  # type: ignore[no-any-return]

    def _inner_dtype(self) -> torch.dtype:
        """The precision of keys and values that the encoder's layers make."""
        parameter = next(self.encoder.parameters())
        kind = parameter.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype

    def pooled(self, states: Tensor) -> Tensor:
        """Return the pooled first token [B, H], or its state where the encoder has no pooler."""
        pooler: Any = getattr(self.encoder, "pooler", None)
        if isinstance(pooler, nn.Linear):  # ALBERT's, whose activation stands beside it
            encoder: Any = self.encoder
            return encoder.pooler_activation(pooler(states[:, 0]))  # type: ignore[no-any-return]
        return states[:, 0] if pooler is None else pooler(states)

    # ---- files
    def own(self) -> dict[str, Tensor]:
        """Return what belongs to this model alone, by name: its prompt and its head."""
        return {n: v for n, v in self.state_dict().items() if n.startswith(("prompt.", "head."))}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write prompt, head and signature; the encoder too where it is trained itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {**self.own(), **{f"signature.{n}": v for n, v in self.signature.items()}}
        save_file({n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}, folder / FILE)
        told: dict[str, Any] = {
            "version": 1,
            "encoder": getattr(self.encoder, "kdbench_key", ""),
            "task_format": self.task_format,
            "outputs": self.outputs,
            "prompt": _kind(self.prompt),
            "length": 0 if self.prompt is None else self.prompt.length,
        }
        if self.prompt is None:
            encoder: Any = self.encoder
            encoder.save_pretrained(folder)
        (folder / "prompted.json").write_text(json.dumps(told, indent=1))

    @staticmethod
    def load(folder: Path, encoder: nn.Module) -> PromptedEncoder:
        """Return what `save_pretrained` wrote, in eval mode, on this encoder, which is shared and not copied.

        Raises: UserError where the folder holds none, is torn, or was trained on another encoder.
        """
        if not (folder / "prompted.json").is_file():
            raise UserError(f"{folder}: holds no prompt of an encoder")
        told, tensors = json.loads((folder / "prompted.json").read_text()), load_file(folder / FILE)
        key = getattr(encoder, "kdbench_key", "")
        if told["encoder"] != key:
            raise UserError(
                f"{folder}: its prompt was trained on the encoder {told['encoder']}, this is {key}"
            )
        if told["prompt"] == "none":
            raise UserError(f"{folder}: is a trained encoder without a prompt; there is nothing to transfer")
        prompt = _blank(encoder, told, tensors)
        model = PromptedEncoder(encoder, prompt, told["task_format"], told["outputs"])
        model.signature = {
            n.removeprefix("signature."): v for n, v in tensors.items() if n.startswith("signature.")
        }
        own = {n: v for n, v in tensors.items() if not n.startswith("signature.")}
        lacking = model.own().keys() ^ own.keys()
        if lacking:
            raise UserError(f"{folder}: {FILE} does not fit: {', '.join(sorted(lacking))}")
        model.load_state_dict(own, strict=False)
        return model.to(next(encoder.parameters()).device).eval()


def _kind(prompt: nn.Module | None) -> str:
    return "none" if prompt is None else "deep" if isinstance(prompt, DeepPrompt) else "shallow"


def _blank(
    encoder: nn.Module, told: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> DeepPrompt | SoftPrompt:
    """A prompt of the shape that was saved; its numbers come next."""
    if told["prompt"] == "shallow":
        return SoftPrompt(torch.zeros_like(tensors["prompt.vectors"]))
    first = tensors.get("prompt.mlp.0.weight")
    return DeepPrompt(encoder.config, told["length"], 0.0, 0 if first is None else len(first))
