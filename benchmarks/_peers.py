"""Both sides of the speed benchmark: models, texts, kdbench's own update, and peers that do the same work.

Everything that is timed has a `step`, which makes one update (or samples once), and `use`, which gives it
other texts. A side that trains also has `scored`: loss and gradient on given responses, by which the
benchmark sees that two sides compute the same before it times them.

Source: the plain loop and the restatement of PromptKD's iteration are written from Agarwal et al. 2024,
https://arxiv.org/abs/2306.13649, algorithm 1, and Kim et al. 2024, https://arxiv.org/abs/2402.12842,
algorithm 1, whose code keeps the logits of all positions, takes three softmaxes per divergence and masks
afterwards.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kdbench import registry, stages
from kdbench.clock import running
from kdbench.config import TrainingConfig
from kdbench.distiller import Batch, token_mean
from kdbench.harness import BatchSource, Recorder, Trainer
from kdbench.losses import reverse_kl
from kdbench.predict import predict
from kdbench.rollout import Draw, rollout

LR, CLIP, SEED, PAD = 1e-5, 1.0, 1, 0
UPDATES = 10**6  # what the schedules count on; no benchmark makes as many
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Sizes of one comparison: shapes of the models are (layers, width, heads), lengths are in tokens."""

    vocab: int
    teacher: tuple[int, int, int] = (6, 512, 8)
    student: tuple[int, int, int] = (3, 256, 4)
    batch: int = 8
    prompt: int = 64  # of the longest prompt
    shortest: int = 21  # of the shortest prompt where prompts are ragged
    new: int = 64  # tokens sampled per prompt
    vectors: int = 7  # of the soft prompt
    prompts: int = 64  # in a set that is answered as in evaluation
    products: tuple[int, ...] = (512, 1024, 2048, 4096)  # sizes of the square products that are timed


def trl_version() -> str | None:
    """Return the version of TRL, None where it is not installed."""
    return importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None


# ---- models and texts
def _gpt2(shape: tuple[int, int, int], setting: Setting, seed: int, tied: bool) -> GPT2LMHeadModel:
    layers, width, heads = shape
    config = GPT2Config(
        vocab_size=setting.vocab,
        n_positions=max(256, setting.prompt + setting.new + setting.vectors),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=PAD,
        eos_token_id=None,  # so that all responses have the full length
        pad_token_id=PAD,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).eval()


def pair(setting: Setting, tied: bool = True) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Return student and frozen teacher; the same numbers at every call, a copy for each side."""
    teacher = _gpt2(setting.teacher, setting, 1, tied).requires_grad_(False)
    return _gpt2(setting.student, setting, 0, tied), teacher


def texts(setting: Setting, ragged: bool, count: int | None = None, responses: bool = False) -> Batch:
    """Return `count` prompts (a batch of them where None), all of the longest length unless `ragged`, with
    random responses where wanted.
    """
    count = count or setting.batch
    draw = torch.Generator().manual_seed(SEED)
    shortest = setting.shortest if ragged else setting.prompt
    prompt = torch.linspace(shortest, setting.prompt, count).round().long()
    length = prompt + (setting.new if responses else 0)
    ids = torch.randint(1, setting.vocab, (count, int(length.max())), generator=draw)
    ids = ids.masked_fill(torch.arange(ids.shape[1]) >= length[:, None], PAD)
    fields = {"example_id": torch.arange(count), "input_ids": ids, "prompt_length": prompt, "length": length}
    return Batch(fields)


def short(setting: Setting) -> Batch:
    """Return as many texts as a batch has, of two tokens and a response of two."""
    ids = torch.arange(1, 1 + 4 * setting.batch).view(setting.batch, 4) % (setting.vocab - 1) + 1
    two = torch.full((setting.batch,), 2)
    return Batch(
        {
            "example_id": torch.arange(setting.batch),
            "input_ids": ids,
            "prompt_length": two,
            "length": 2 * two,
        }
    )


def left_padded(batch: Batch, end: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, T] of texts up to their `end`, a field of lengths, with padding before them."""
    stop = batch[end]
    width = int(stop.max())
    place = torch.arange(width) - (width - stop)[:, None]
    ids = batch["input_ids"].gather(1, place.clamp(min=0)).masked_fill(place < 0, PAD)
    return ids, (place >= 0).long()


def positions(mask: Tensor) -> Tensor:
    """Return position ids [B, T] that count the real tokens only."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def end_token(student: GPT2LMHeadModel, setting: Setting) -> int:
    """Give the student an end token that it draws in about three of every `new` steps: responses of up to
    `new` tokens are then a third of that long on average.

    The bias of its last norm gets a large component along one direction, and the end token's row of the head
    is that direction, scaled until its logit is log(chance / (1 - chance)) over the others' log-sum-exp.
    """
    end, chance = setting.vocab - 1, 1 / (setting.new / 3 + 2 / 3)
    with torch.no_grad():
        direction = torch.randn(setting.student[1], generator=torch.Generator().manual_seed(SEED))
        direction /= direction.norm()
        size = math.sqrt(setting.student[1])
        student.transformer.ln_f.bias.copy_(size * direction)
        ids, mask = left_padded(texts(setting, ragged=True), "prompt_length")
        logits = student(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[:, -1]
        others = float(logits[:, :end].logsumexp(-1).mean())
        student.lm_head.weight[end] = direction * (others + math.log(chance / (1 - chance))) / size
    student.config.eos_token_id = student.generation_config.eos_token_id = end
    return end


# ---- ours
def _as_a_run_loads(model: Any, setting: Setting) -> Any:
    """Do to a model what `kdbench.stages` does to those of a run."""
    model.kdbench_encode = lambda text: list(range(1, 1 + setting.vectors))
    model.kdbench_pad = PAD
    for part in (model, model.base_model):
        part.warn_if_padding_and_no_attention_mask = lambda ids, mask: None
    return model


class Ours:
    """Updates of a registered method by the trainer that runs use: clock, log, optimizers and all."""

    def __init__(self, method: str, settings: Mapping[str, Any], batch: Batch, setting: Setting) -> None:
        student, teacher = (_as_a_run_loads(model, setting) for model in pair(setting))
        self.student, self.teacher = student, teacher
        roles = {"student": student, "teacher": teacher}
        cls = registry.load_distiller(method)
        self.distiller: Any = stages.build(cls, settings, roles.__getitem__, SEED, method)
        training = TrainingConfig(
            optimizer_steps=UPDATES,
            batch_size=setting.batch,
            lr=LR,
            max_new_tokens=setting.new,
            schedule="constant",
            grad_clip=CLIP,
            checkpoint_every=0,
        )
        self._folder = tempfile.TemporaryDirectory()  # a run's log is part of its cost
        self.trainer = Trainer(
            self.distiller, BatchSource(batch), training, SEED, folder=Path(self._folder.name)
        )

    def use(self, batch: Batch, new: int) -> None:
        """Train on these texts from now on."""
        self.trainer.source, self.trainer.max_new_tokens = BatchSource(batch), new

    def step(self) -> None:
        """Make one update."""
        with running(self.trainer.clock):
            self.trainer.one_visit()

    def step_without_clock(self) -> None:
        """Make one update whose phases are not measured: a clock sets the kernel's peak back."""
        self.trainer.one_visit()

    def step_through_onednn(self) -> None:
        """Make one update with matrix products through oneDNN."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            self.step()
        finally:
            torch.set_float32_matmul_precision(before)

    def scored(self, batch: Batch, loss: str = "loss", of: str = "student") -> tuple[float, Gradients]:
        """Return a loss of the method on these responses and its gradient in one of its modules."""
        self.distiller.zero_grad()
        value = getattr(self.distiller, loss)(batch, self.trainer)
        value.backward()
        return float(value.detach()), _taken(getattr(self.distiller, of))

    def first_loss(self) -> float:
        """Make one update and return the loss that it descended."""
        self.trainer.recorder = Recorder()
        self.step()
        found = self.trainer.recorder.losses[-1]["student/loss"]
        self.trainer.recorder = None
        return found


class Bare:
    """The update of `Ours` with kdbench's functions and no harness."""

    def __init__(self, batch: Batch, setting: Setting) -> None:
        self.student, self.teacher = (_as_a_run_loads(model, setting) for model in pair(setting))
        self.batch, self.new, self.visit = batch, setting.new, 0
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=LR, fused=True)

    def step(self) -> float:
        """Make one update and return its loss."""
        draw = Draw(SEED, self.visit, rollout_batch=self.batch.size, max_new_tokens=self.new)
        sampled = rollout(self.student, self.batch, draw)
        q = predict(self.student, sampled)
        with torch.no_grad():
            p = predict(self.teacher, sampled)
        loss = token_mean(reverse_kl(q, p), sampled)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.visit += 1
        return float(loss.detach())


def _taken(module: nn.Module) -> Gradients:
    """The gradients of a module, which are then forgotten."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


# ---- plain implementations
class Plain:
    """On-policy distillation as written by hand: `generate`, two forwards with full logits, reverse KL, clip,
    AdamW.
    """

    def __init__(self, batch: Batch, setting: Setting) -> None:
        self.student, self.teacher = pair(setting)
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=LR)
        self.use(batch, setting.new)

    def use(self, batch: Batch, new: int) -> None:
        """Train on these prompts from now on."""
        self.ids, self.mask = left_padded(batch, "prompt_length")
        self.new = new

    def step(self) -> None:
        """Make one update."""
        ids = generate(self.student, self.ids, self.mask, self.new)
        mask = torch.cat([self.mask, torch.ones_like(ids[:, self.ids.shape[1] :])], dim=1)
        self.loss(ids, mask, self.new).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad()

    def loss(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """Return KL(q || p) over the last `new` tokens of each row, nats per token."""
        told = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        with torch.no_grad():
            log_p = self.teacher(**told, use_cache=False).logits[:, -new - 1 : -1].log_softmax(-1)
        log_q = self.student(**told, use_cache=False).logits[:, -new - 1 : -1].log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    def scored(self, batch: Batch) -> tuple[float, Gradients]:
        """Return loss and gradient on responses of equal length."""
        ids, mask = left_padded(batch, "length")
        value = self.loss(ids, mask, int((batch["length"] - batch["prompt_length"]).max()))
        value.backward()
        return float(value.detach()), _taken(self.student)


class PlainPromptKD:
    """PromptKD's iteration as its code does the work: one generation, three teacher forwards, one teacher
    backward to the prompt, two student forwards, one student backward, three masked divergences on all
    positions, two optimizers.
    """

    def __init__(self, batch: Batch, setting: Setting, prompt: Tensor, coefficient: float) -> None:
        self.student, self.teacher = pair(setting)
        self.prompt = nn.Parameter(prompt.detach().clone())
        self.coefficient = coefficient  # of the regularisation
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=LR)
        self.prompt_adam = torch.optim.AdamW([self.prompt], lr=LR)
        self.use(batch, setting.new)

    def use(self, batch: Batch, new: int) -> None:
        """Train on these prompts from now on."""
        self.ids, self.mask = left_padded(batch, "prompt_length")
        self.new = new

    def step(self) -> None:
        """Make one update of the prompt and one of the student."""
        ids = generate(self.student, self.ids, self.mask, self.new)
        mask = torch.cat([self.mask, torch.ones_like(ids[:, self.ids.shape[1] :])], dim=1)
        self.prompt_loss(ids, mask, self.new).backward()
        nn.utils.clip_grad_norm_([self.prompt], CLIP)
        self.prompt_adam.step()
        self.prompt_adam.zero_grad()
        self.student_loss(ids, mask, self.new).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad()

    def prompt_loss(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """Return KL(p_P || q) + b KL(p_P || p), nats per token."""
        with torch.no_grad():
            student = self._logits(self.student, ids, mask)
        prompted = self._prompted(ids, mask)
        with torch.no_grad():
            bare = self._logits(self.teacher, ids, mask)
        followed = _masked_reverse_kl(prompted, student, new)
        return followed + self.coefficient * _masked_reverse_kl(prompted, bare, new)

    def student_loss(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """Return KL(q || p_P), nats per token."""
        student = self._logits(self.student, ids, mask)
        with torch.no_grad():
            prompted = self._prompted(ids, mask)
        return _masked_reverse_kl(student, prompted, new)

    def _logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        told = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        logits: Tensor = model(**told, use_cache=False).logits[:, :-1]
        return logits

    def _prompted(self, ids: Tensor, mask: Tensor) -> Tensor:
        count = len(self.prompt)
        vectors = self.prompt[None].expand(len(ids), -1, -1)
        whole = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, count), mask], dim=1)
        embedded = torch.cat([vectors, self.teacher.get_input_embeddings()(ids)], dim=1)
        told = {"inputs_embeds": embedded, "attention_mask": whole, "position_ids": positions(whole)}
        logits: Tensor = self.teacher(**told, use_cache=False).logits[:, count:-1]
        return logits

    def scored(self, batch: Batch, of: str) -> tuple[float, Gradients]:
        """Return loss and gradient of "prompt" or "student" on responses of equal length."""
        ids, mask = left_padded(batch, "length")
        new = int((batch["length"] - batch["prompt_length"]).max())
        value = (self.prompt_loss if of == "prompt" else self.student_loss)(ids, mask, new)
        value.backward()
        found = _taken(self.student)
        if of == "prompt":
            assert self.prompt.grad is not None
            found, self.prompt.grad = {"vectors": self.prompt.grad}, None
        return float(value.detach()), found


def _masked_reverse_kl(q: Tensor, p: Tensor, new: int) -> Tensor:
    """KL(q || p) over the last `new` of the positions, taken at all of them, with entries at -inf masked."""
    probs = torch.softmax(q, dim=-1, dtype=torch.float32)
    log_q = torch.log_softmax(q, dim=-1, dtype=torch.float32)
    log_p = torch.log_softmax(p, dim=-1, dtype=torch.float32)
    infinite = torch.isinf(p) | torch.isinf(q)
    products = torch.masked_fill(probs * log_p, infinite, 0)
    products = products - torch.masked_fill(probs * log_q, infinite, 0)
    wanted = torch.arange(q.shape[1]) >= q.shape[1] - new
    wanted = wanted.expand(len(q), -1).reshape(-1)
    return -(products.sum(-1).view(-1) * wanted).sum() / wanted.sum()


def generate(student: Any, ids: Tensor, mask: Tensor, new: int, greedy: bool = False) -> Tensor:
    """Return prompts and sampled tokens of transformers' `generate`, [B, T + new] or shorter."""
    student.eval()
    found: Tensor = student.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        max_new_tokens=new,
        pad_token_id=PAD,
    )
    return found


# ---- sampling alone
class OursSampling:
    """Responses of `rollout` to the same prompts, each time another draw; counts their tokens."""

    def __init__(
        self, student: Any, batch: Batch, setting: Setting, rollout_batch: int, draws: int = 1
    ) -> None:
        self.student, self.batch, self.draws = _as_a_run_loads(student, setting), batch, draws
        self.new, self.rollout_batch = setting.new, rollout_batch
        self.visits = itertools.count()
        self.lengths: list[int] = []

    def step(self) -> None:
        """Sample `draws` times."""
        for _ in range(self.draws):
            found = self.sampled(next(self.visits))
            self.lengths += (found["length"] - found["prompt_length"]).tolist()

    def sampled(self, visit: int, greedy: bool = False) -> Batch:
        """Return the batch with one response each."""
        draw = Draw(SEED, visit, rollout_batch=self.rollout_batch, max_new_tokens=self.new)
        return rollout(self.student, self.batch, draw, temperature=0.0 if greedy else 1.0)


class PlainSampling:
    """Responses of `generate` to the same prompts, in batches of `size`; counts their tokens."""

    def __init__(self, student: Any, batch: Batch, setting: Setting, size: int, draws: int = 1) -> None:
        self.student, self.new, self.draws = student, setting.new, draws
        parts = [batch.rows(slice(at, at + size)) for at in range(0, batch.size, size)]
        self.parts = [left_padded(part, "prompt_length") for part in parts]
        self.lengths: list[int] = []

    def step(self) -> None:
        """Sample `draws` times."""
        for _ in range(self.draws):
            for ids, mask in self.parts:
                found = generate(self.student, ids, mask, self.new)[:, ids.shape[1] :]
                ends = torch.zeros_like(found)
                if self.student.config.eos_token_id is not None:
                    ends = (found == self.student.config.eos_token_id).long()
                self.lengths += (ends.cumsum(-1) - ends == 0).sum(-1).tolist()


# ---- TRL, imported only where one of these is made
def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word per id, and an end token that no model here has: responses have the full length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)} | {"<end>": vocab}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="t0", unk_token="t0", padding_side="left"
    )


def _words(ids: Tensor) -> str:
    return " ".join(f"t{i}" for i in ids.tolist())


def _arguments(setting: Setting, folder: str) -> dict[str, Any]:
    """What both of TRL's trainers are told: float32, no recomputation, nothing logged or saved."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "max_grad_norm": CLIP,
        "max_steps": UPDATES,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "beta": 1.0,  # KL(student || teacher)
        "temperature": 1.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class _TRL:
    """One of TRL's trainers, by its own training step, gradient clipping and optimizer.

    What its `train` does beside them (loading data, callbacks, logs) is left out, in its favour.
    """

    def __init__(self, setting: Setting) -> None:
        self.student, self.teacher = pair(setting)
        self.tokenizer = _tokenizer(setting.vocab)
        self._folder = tempfile.TemporaryDirectory()
        self.trainer: Any = None
        self.inputs: Any = None
        self.count: Tensor | None = None  # target tokens of the batch, as TRL's loop counts them

    def _made(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=UPDATES)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()

    def step(self) -> None:
        """Make one update."""
        trainer = self.trainer
        trainer.training_step(trainer.model, copy.copy(self.inputs), self.count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()

    def _loss(self, inputs: dict[str, Any]) -> tuple[float, Gradients]:
        value = self.trainer.compute_loss(self.trainer.model, inputs)
        value.backward()
        return float(value.detach()), _taken(self.trainer.model)


class TRLDistillation(_TRL):
    """TRL's DistillationTrainer, which samples its own responses."""

    def __init__(self, batch: Batch, setting: Setting) -> None:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        super().__init__(setting)
        told = _arguments(setting, self._folder.name) | {"max_completion_length": setting.new, "top_k": 0}
        self._made(
            DistillationTrainer(
                model=self.student,
                teacher_model=self.teacher,
                args=DistillationConfig(**told),
                train_dataset=Dataset.from_dict({"prompt": ["t1 t2"]}),
                processing_class=self.tokenizer,
            )
        )
        self.use(batch, setting.new)

    def use(self, batch: Batch, new: int) -> None:
        """Train on these prompts from now on."""
        prompts = zip(batch["input_ids"], batch["prompt_length"], strict=True)
        self.inputs = [{"prompt": _words(ids[:length])} for ids, length in prompts]
        self.trainer.generation_config.max_new_tokens = new
        self.trainer.generation_kwargs["max_new_tokens"] = new

    def scored(self, batch: Batch) -> tuple[float, Gradients]:
        """Return loss and gradient on responses of equal length."""
        prompt, prompt_mask = left_padded(batch, "prompt_length")
        ids, mask = left_padded(batch, "length")
        told = {"prompt_ids": prompt, "prompt_mask": prompt_mask}
        told |= {"completion_ids": ids[:, prompt.shape[1] :], "completion_mask": mask[:, prompt.shape[1] :]}
        return self._loss({**told, "num_items_in_batch": told["completion_mask"].sum()})


class TRLGKD(_TRL):
    """TRL's GKDTrainer at one `lmbda`: 1 samples every batch, 0 takes the texts' own responses."""

    def __init__(self, batch: Batch, setting: Setting, lmbda: float) -> None:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        super().__init__(setting)
        told = _arguments(setting, self._folder.name) | {"max_new_tokens": setting.new, "lmbda": lmbda}
        self._made(
            GKDTrainer(
                model=self.student,
                teacher_model=self.teacher,
                args=GKDConfig(**told),
                data_collator=lambda rows: rows,  # the batches are made here
                train_dataset=Dataset.from_dict({"prompt": ["t1 t2"], "completion": [" t3"]}),
                processing_class=self.tokenizer,
            )
        )
        self.use(batch, setting.new)

    def use(self, batch: Batch, new: int) -> None:
        """Train on these texts from now on."""
        prompts, prompt_mask = left_padded(batch, "prompt_length")
        self.inputs = self._labelled(batch) | {"prompts": prompts, "prompt_attention_mask": prompt_mask}
        self.count = torch.tensor(batch.size * new)
        self.trainer.generation_config.max_new_tokens = new
        self.trainer.generation_kwargs["max_new_tokens"] = new

    def _labelled(self, batch: Batch) -> dict[str, Tensor]:
        ids, mask = left_padded(batch, "length")
        new = (batch["length"] - batch["prompt_length"])[:, None]
        response = torch.arange(ids.shape[1]) >= ids.shape[1] - new
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~response, -100)}

    def scored(self, batch: Batch) -> tuple[float, Gradients]:
        """Return loss and gradient on these responses."""
        return self._loss(self._labelled(batch))
