"""Every registered method keeps the laws of `kdbench.checks`; each law catches a method that breaks it."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path

import pytest

from kdbench import checks, registry
from kdbench.errors import UserError

METHODS = registry.names("distillers")
PLUGINS = sorted(str(path) for path in (Path(__file__).parent / "plugins").glob("*.py"))
QUICK = {"prompt_distiller": {"probe_steps": 3}}  # settings that shorten what a method prepares


@functools.cache
def laws_of(method: str) -> dict[str, checks.Law]:
    """All laws of a method, those that the others stand on tried once; where one of these fails, it alone."""
    return {law.name: law for law in checks.check(method, QUICK.get(method))}


@pytest.mark.parametrize("law", list(checks.LAWS))
@pytest.mark.parametrize("method", [*METHODS, *PLUGINS], ids=registry.stem)
def test_method_keeps_law(method: str, law: str) -> None:
    found = laws_of(method)
    result = found.get(law) or next(iter(found.values()))
    assert result.status == "pass", checks.render([result])


# ----------------------------------------------------------- settings that break a law and say so
FAST = [law for law in checks.LAWS if law != "processes"]
DROPOUT = {"micro_batch", "deterministic", "order"}


@pytest.mark.parametrize(
    ("method", "settings", "training", "not_claimed", "hold"),
    [
        ("minillm", {"rollout_batches": 2, "inner_epochs": 1}, {}, set(), {"order", "resume", "budget"}),
        ("minillm", {"whiten": "micro_batch"}, {}, {"micro_batch"}, {"order", "deterministic", "repeatable"}),
        ("gkd", {"student_fraction": 0.5}, {}, set(), {"rollouts", "resume"}),
        ("seqkd", {"variant": "hard"}, {}, set(), {"targets", "order"}),
        ("promptkd", {"teacher_dropout": True}, {}, {*DROPOUT, "frozen_eval"}, {"frozen", "resume"}),
        ("panda", {"positions": "all"}, {}, {"micro_batch"}, {"order", "padding", "deterministic", "frozen"}),
        ("panda", {"teacher_train_mode": True}, {}, {*DROPOUT, "frozen_eval"}, {"frozen", "resume"}),
        ("panda_late", {"teacher_train_mode": True}, {}, {*DROPOUT, "frozen_eval"}, {"repeatable"}),
        ("panda", {"inputs": "target"}, {}, set(), {"resume", "micro_batch"}),
        ("panda", {}, {"student_dropout": True}, DROPOUT, {"frozen_eval", "resume"}),
        ("panda", {"prompt": "shallow", "prompt_length": 3}, {}, set(), {"targets", "padding"}),
        ("pt", {"reparameterize": 4}, {}, set(), {"isolated", "saved"}),
        ("sft", {}, {"student_dropout": True}, DROPOUT, {"repeatable", "resume"}),
        ("sft", {}, {"mean": "micro_batch"}, {"micro_batch"}, {"order", "deterministic", "repeatable"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_settings_break_what_they_declare(
    method: str,
    settings: dict[str, object],
    training: dict[str, object],
    not_claimed: set[str],
    hold: set[str],
) -> None:
    tried = sorted(not_claimed | hold)
    laws = {law.name: law for law in checks.check(method, settings, training=training, only=tried)}
    told = checks.render(list(laws.values()))
    assert {name for name, law in laws.items() if law.status == "not claimed"} == not_claimed, told
    assert {name for name, law in laws.items() if law.status == "pass"} == hold, told
    assert all(law.reason for law in laws.values() if law.status == "not claimed")


def test_two_processes_average_dropout_and_micro_batch_means_apart() -> None:
    for training in ({"student_dropout": True}, {"mean": "micro_batch"}):
        (law,) = checks.check("sft", training=training, only=["processes"])
        assert (law.status, law.reason) == ("not claimed", "follows from micro_batch")


# ----------------------------------------------------------------------- methods that break a law
HEAD = '''
"""A method that is wrong on purpose."""

import random
from dataclasses import dataclass

import torch
from torch import nn

from kdbench.distiller import Batch, Distiller, Group, Store, example_mean, target_mask, token_mean
from kdbench.losses import cross_entropy, forward_kl
from kdbench.predict import predict
from kdbench.rollout import rollout


class Wrong(Distiller):
'''

PLAIN = """
def loss(self, batch, step):
    return token_mean(cross_entropy(predict(self.student, batch)), batch)
"""

CLASSES_HEAD = '''
"""A method that is wrong on purpose."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kdbench.classify import all_states, class_logits, classified
from kdbench.distiller import Batch, Distiller, Group, Store, example_mean


class Wrong(Distiller):
'''

CLASSES_PLAIN = """
head = "{head}"
needs = ("example_id", "class_label", {needs})

def values(self, batch):
    return cross_entropy(class_logits(self.student, batch), batch["class_label"], reduction="none")

def soft(self, batch, p):
    return cross_entropy(class_logits(self.student, batch), p.softmax(-1), reduction="none")

def loss(self, batch, step):
    return example_mean(self.values(batch), batch)
"""
NEEDS = {
    "masked_lm": ("input_ids", "length", "mask_index", "verbalizer_ids"),
    "sequence": ("input_ids", "length", "segment_ids"),
}


def plugin(folder: Path, body: str, *, init: str = "", plain: bool = True, head: str = "causal_lm") -> str:
    """Write a method with these members and return its path; `init` follows the constructor of the base."""
    parts = [PLAIN] if plain else []
    if head != "causal_lm":
        needs = [prefix + name for prefix in ("", "teacher.") for name in NEEDS[head]]
        parts = [CLASSES_PLAIN.format(head=head, needs=", ".join(map(repr, needs)))]
    if init:
        above = "def __init__(self, cfg, student, teacher):\n    super().__init__(cfg, student, teacher)\n"
        parts.append(above + textwrap.indent(textwrap.dedent(init), "    "))
    parts.append(textwrap.dedent(body))
    path = folder / "wrong.py"
    above = HEAD if head == "causal_lm" else CLASSES_HEAD
    path.write_text(above + textwrap.indent("\n".join(parts), "    "))
    return str(path)


BROKEN: dict[str, tuple[set[str], dict[str, str]]] = {
    "loss_averaged_per_micro_batch": (
        {"micro_batch"},
        {
            "body": """
            def loss(self, batch, step):
                return cross_entropy(predict(self.student, batch)).mean()
            """
        },
    ),
    "end_of_sequence_dropped_with_padding": (
        {"targets"},
        {
            "body": """
            def loss(self, batch, step):
                q = predict(self.student, batch)
                return token_mean(cross_entropy(q) * (q.targets != 0), batch)
            """
        },
    ),
    "loss_sees_padding": (
        {"padding"},
        {
            "body": """
            def loss(self, batch, step):
                q = predict(self.student, batch)
                mask = target_mask(batch)
                past = (~mask & (batch["input_ids"][:, 1:] > 0)).sum(1)
                return token_mean(cross_entropy(q) * (1 + past.repeat_interleave(mask.sum(1))), batch)
            """
        },
    ),
    "rows_weighed_by_their_place": (
        {"order"},
        {
            "body": """
            couples_examples = True

            def loss(self, batch, step):
                place = torch.arange(1.0, batch.size + 1, dtype=torch.float64)
                weight = place.repeat_interleave(target_mask(batch).sum(1))
                return token_mean(cross_entropy(predict(self.student, batch)) * weight, batch)
            """
        },
    ),
    "rollouts_from_the_global_stream": (
        {"rollouts"},
        {
            "body": """
            def train_step(self, batch, step):
                ids, start = batch["input_ids"], batch["prompt_length"]
                ids = torch.cat([ids, ids.new_zeros(len(ids), 4)], 1)
                sampled = torch.randint(1, 50, (len(ids), 4))
                ids = ids.scatter(1, start[:, None] + torch.arange(4), sampled)
                step.update("student", self.loss, batch.replace(input_ids=ids, length=start + 4))
            """
        },
    ),
    "noise_in_the_loss": (
        {"deterministic", "order"},
        {
            "body": """
            def loss(self, batch, step):
                values = cross_entropy(predict(self.student, batch))
                return token_mean(values * torch.rand_like(values), batch)
            """
        },
    ),
    "numbers_from_an_unseeded_stream": (
        {"repeatable", "resume", "deterministic", "micro_batch", "order", "padding", "rollouts"},
        {
            "body": """
            def loss(self, batch, step):
                return random.random() * token_mean(cross_entropy(predict(self.student, batch)), batch)
            """
        },
    ),
    "gradient_into_another_group": (
        {"isolated"},
        {
            "init": "self.scale = nn.Parameter(torch.ones(()))",
            "body": """
            def groups(self):
                return {
                    "student": Group(self.student.named_parameters(prefix="student")),
                    "scale": Group([("scale", self.scale)]),
                }

            def train_step(self, batch, step):
                step.update("scale", self.scaled, batch)
                self.scale.grad = None
                step.update("student", self.scaled, batch)
                self.scale.grad = None

            def scaled(self, batch, step):
                self.scale.requires_grad_(True)
                return self.scale * token_mean(cross_entropy(predict(self.student, batch)), batch)
            """,
        },
    ),
    "weights_changed_by_hand": (
        {"isolated"},
        {
            "body": """
            def train_step(self, batch, step):
                step.update("student", self.loss, batch)
                with torch.no_grad():
                    self.student.transformer.ln_f.weight.mul_(0.9)
            """
        },
    ),
    "gradient_made_by_hand": (
        {"isolated"},
        {
            "body": """
            def train_step(self, batch, step):
                self.loss(batch.rows([0]), step).backward()
                step.update("student", self.loss, batch)
            """
        },
    ),
    "teacher_changed": (
        {"frozen", "resume"},
        {
            "body": """
            def train_step(self, batch, step):
                step.update("student", self.loss, batch)
                with torch.no_grad():
                    self.teacher.transformer.ln_f.weight.mul_(0.9)
            """
        },
    ),
    "teacher_in_train_mode": (
        {"frozen_eval", "deterministic", "micro_batch", "order"},
        {
            "body": """
            def loss(self, batch, step):
                self.teacher.train()
                with torch.no_grad():
                    p = predict(self.teacher, batch)
                return token_mean(forward_kl(predict(self.student, batch), p), batch)
            """
        },
    ),
    "parameter_in_no_group": (
        {"groups"},
        {
            "init": "self.extra = nn.Linear(3, 3)",
            "body": """
            def groups(self):
                return {"student": Group(self.student.named_parameters())}
            """,
        },
    ),
    "parameter_in_two_groups": (
        {"groups"},
        {
            "body": """
            def groups(self):
                return {name: Group(list(self.student.named_parameters())) for name in ("student", "twice")}
            """
        },
    ),
    "module_hidden_in_a_list": ({"groups"}, {"init": "self.probes = [nn.Linear(3, 3)]", "body": ""}),
    "no_group_for_the_student": (
        {"groups"},
        {"body": "def groups(self):\n    return {'model': Group(self.student.named_parameters())}"},
    ),
    "student_never_updated": (
        {"moves", "repeatable", "budget"},
        {"body": "def train_step(self, batch, step):\n    self.loss(batch, step)"},
    ),
    "group_never_updated": (
        {"moves"},
        {
            "init": "self.probe = nn.Linear(3, 3)",
            "body": """
            def groups(self):
                return {
                    "student": Group(self.student.named_parameters(prefix="student")),
                    "probe": Group(self.probe.named_parameters(prefix="probe")),
                }
            """,
        },
    ),
    "counter_that_is_not_saved": (
        {"resume"},
        {
            "init": "self.visits = 0",
            "body": """
            def train_step(self, batch, step):
                self.visits += 1
                step.update("student", lambda b, s: self.loss(b, s) / self.visits, batch)
            """,
        },
    ),
    "rows_kept_in_a_list": (
        {"resume"},
        {
            "init": "self.kept = []",
            "body": """
            def train_step(self, batch, step):
                self.kept.append(batch)
                step.update("student", self.loss, self.kept[0])
            """,
        },
    ),
    "iterator_that_is_not_saved": (
        {"resume"},
        {
            "init": "self.weights = iter(range(1, 1000))",
            "body": """
            def train_step(self, batch, step):
                weight = next(self.weights)
                step.update("student", lambda b, s: weight * self.loss(b, s), batch)
            """,
        },
    ),
    "half_of_the_batch": (
        {"budget"},
        {
            "body": """
            def train_step(self, batch, step):
                step.update("student", self.loss, batch.rows([0, 1]))
            """
        },
    ),
    "predictor_with_a_hook": (
        {"saved"},
        {
            "init": "self.student.register_forward_hook(lambda m, i, o: type(o)(logits=2 * o.logits))",
            "body": "",
        },
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_law_catches(name: str, tmp_path: Path) -> None:
    expected, parts = BROKEN[name]
    laws = checks.check(plugin(tmp_path, **parts), only=FAST)
    assert {law.name for law in laws if law.status == "fail"} == expected, checks.render(laws)


BROKEN_CLASSES: dict[str, tuple[list[str], set[str], dict[str, str]]] = {
    "nothing": (["masked_lm", "sequence"], set(), {"body": ""}),
    "loss_averaged_per_micro_batch": (
        ["masked_lm", "sequence"],
        {"micro_batch"},
        {
            "body": """
            def loss(self, batch, step):
                return self.values(batch).mean()
            """
        },
    ),
    "padding_is_attended_to": (
        ["masked_lm", "sequence"],
        {"padding"},
        {
            "body": """
            def values(self, batch):
                ids = batch["input_ids"]
                out = self.student(input_ids=ids, attention_mask=(ids != 0).long()).logits
                if "mask_index" in batch:
                    out = out[torch.arange(len(out)), batch["mask_index"]].gather(1, batch["verbalizer_ids"])
                return cross_entropy(out, batch["class_label"], reduction="none")
            """
        },
    ),
    "states_averaged_over_padding": (
        ["masked_lm"],
        {"micro_batch"},  # each is as wide as its longest row
        {
            "body": """
            def loss(self, batch, step):
                states = all_states(self.student, batch)[1].square().mean((1, 2))
                return example_mean(self.values(batch) + states, batch)
            """
        },
    ),
    "padding_of_the_teacher_is_read": (
        ["sequence"],
        {"padding"},
        {
            "body": """
            def loss(self, batch, step):
                beyond = (batch["teacher.input_ids"] > 1).sum(1)
                return example_mean(self.values(batch) * beyond, batch)
            """
        },
    ),
    "negatives_are_the_rows_beside": (
        ["masked_lm", "sequence"],
        {"micro_batch", "order"},
        {
            "body": """
            def loss(self, batch, step):
                states = classified(self.student, batch).states[:, -1]
                like = (states * states.roll(1, 0).detach()).mean(1)
                return example_mean(self.values(batch) + like, batch)
            """
        },
    ),
    "teacher_in_train_mode": (
        ["masked_lm", "sequence"],
        {"frozen_eval", "deterministic", "micro_batch", "order"},
        {
            "body": """
            def loss(self, batch, step):
                self.teacher.train()
                with torch.no_grad():
                    p = class_logits(self.teacher, batch.of("teacher"))
                return example_mean(self.soft(batch, p), batch)
            """
        },
    ),
    "cache_in_an_attribute": (
        ["masked_lm", "sequence"],
        {"resume"},
        {
            "init": "self.cache = {}",
            "body": """
            def prepare(self, data, step):
                for rows in data.batches("train"):
                    with torch.no_grad():
                        p = class_logits(self.teacher, rows.of("teacher"))
                    self.cache.update(zip(rows["example_id"].tolist(), p))

            def loss(self, batch, step):
                p = torch.stack([self.cache[i] for i in batch["example_id"].tolist()])
                return example_mean(self.soft(batch, p), batch)
            """,
        },
    ),
    "cache_in_a_buffer_of_another_shape": (
        ["masked_lm"],
        {"resume"},
        {
            "init": "self.register_buffer('cache', torch.zeros(1))",
            "body": """
            def prepare(self, data, step):
                with torch.no_grad():
                    found = [class_logits(self.teacher, rows.of("teacher")) for rows in data.batches("train")]
                self.cache = torch.cat(found)
            """,
        },
    ),
    "cache_that_depends_on_its_batch": (
        ["masked_lm"],
        {"rollouts"},
        {
            "body": """
            def prepare(self, data, step):
                found = []
                for rows in data.batches("train"):
                    with torch.no_grad():
                        p = class_logits(self.teacher, rows.of("teacher"))
                    found.append(rows.replace(p=p - p.mean()))
                return {"train": Batch.cat(found)}

            def loss(self, batch, step):
                return example_mean(self.soft(batch, batch["p"] * class_logits(self.student, batch)), batch)
            """
        },
    ),
    "student_updated_in_prepare": (
        ["masked_lm", "sequence"],
        {"fields"},
        {
            "body": """
            def prepare(self, data, step):
                step.update("student", self.loss, next(data.batches("train")))
            """
        },
    ),
    "student_changed_in_prepare": (
        ["masked_lm"],
        {"isolated"},
        {
            "body": """
            def prepare(self, data, step):
                with torch.no_grad():
                    next(self.student.parameters()).mul_(0.9)
            """
        },
    ),
    "probe_set_while_the_student_trains": (
        ["sequence"],
        {"isolated"},
        {
            "init": "self.probe = nn.Linear(3, 3)",
            "body": """
            def groups(self):
                return {
                    "student": Group(self.student.named_parameters(prefix="student")),
                    "probe": Group(self.probe.named_parameters(prefix="probe")),
                }

            def train_step(self, batch, step):
                step.update("probe", self.probed, batch)
                with torch.no_grad():
                    self.probe.weight.mul_(0.9)
                step.update("student", self.loss, batch)

            def probed(self, batch, step):
                logits = self.probe(class_logits(self.student, batch).detach())
                return example_mean(cross_entropy(logits, batch["class_label"], reduction="none"), batch)
            """,
        },
    ),
    "mask_of_another_model": (
        ["masked_lm"],
        {"targets"},
        {
            "body": """
            def loss(self, batch, step):
                place = torch.minimum(batch["teacher.mask_index"], batch["length"] - 1)
                return example_mean(self.values(batch.replace(mask_index=place)), batch)
            """
        },
    ),
    "second_token_classified": (
        ["sequence"],
        {"targets"},
        {
            "body": """
            def values(self, batch):
                logits = self.student.classifier(all_states(self.student, batch)[-1][:, 1])
                return cross_entropy(logits, batch["class_label"], reduction="none")
            """
        },
    ),
}


ENCODER_HEAD = '''
"""A method that is wrong on purpose."""

from dataclasses import dataclass

import torch
from torch import nn

from kdbench.distiller import Batch, freeze
from kdbench.distillers._transfer import PromptConfig, PromptTuned, counted, prompted, task_losses, unit_mean


class Wrong(PromptTuned):
    @dataclass
    class Config(PromptConfig):
        pass

    def __init__(self, cfg, student, sources: nn.ModuleList, target):
        super().__init__(cfg, prompted(student, cfg))
        self.sources, self.target = freeze(sources), freeze(target)

    def values(self, batch):
        return task_losses(self.student(batch), batch, self.student.task_format)
'''

BROKEN_ENCODERS: dict[str, tuple[set[str], str]] = {
    "labelled_tokens_counted_by_the_piece": (
        {"micro_batch"},
        """
        def loss(self, batch, step):
            return self.values(batch).mean() * batch.size / batch.totals.examples
        """,
    ),
    "first_token_not_read": (
        {"targets"},
        """
        def loss(self, batch, step):
            if "labels" in batch:
                return super().loss(batch, step)
            logits = self.student.head(self.student.states(batch)[:, 1])
            return unit_mean(task_losses(logits, batch, "classes"), batch)
        """,
    ),
    "padding_seen": (
        {"padding"},
        """
        def loss(self, batch, step):
            ids = batch["input_ids"]
            beyond = torch.arange(ids.shape[1]) >= batch["length"][:, None]
            seen = 1.0 + ((ids > 0) & beyond).sum(1)
            return unit_mean(self.values(batch) * (1.0 if "labels" in batch else seen), batch)
        """,
    ),
    "dropout_of_another_role": (
        {"frozen_eval", "deterministic", "micro_batch", "order"},
        """
        def loss(self, batch, step):
            self.target.train()
            with torch.no_grad():
                gap = self.target(batch).mean()
            self.target.eval()
            return super().loss(batch, step) * (1 + gap)
        """,
    ),
    "source_changed": (
        {"frozen", "resume"},
        """
        def train_step(self, batch, step):
            super().train_step(batch, step)
            with torch.no_grad():
                self.sources[1].prompt.vectors.mul_(0.9)
        """,
    ),
    "field_of_no_batch": (
        {"fields"},
        """
        def loss(self, batch, step):
            return super().loss(batch, step) + 0 * batch["word_index"].sum()
        """,
    ),
}


@pytest.mark.parametrize("name", BROKEN_ENCODERS)
def test_law_catches_behind_a_prompt(name: str, tmp_path: Path) -> None:
    expected, body = BROKEN_ENCODERS[name]
    laws = checks.check(encoder_plugin(tmp_path, body), only=FAST)
    assert {law.name for law in laws if law.status == "fail"} == expected, checks.render(laws)


def encoder_plugin(folder: Path, body: str) -> str:
    path = folder / "wrong.py"
    path.write_text(ENCODER_HEAD + "\n" + textwrap.indent(textwrap.dedent(body), "    "))
    return str(path)


def test_other_roles_stand_on_the_students_encoder(tmp_path: Path) -> None:
    body = """
    def prepare(self, data, step):
        assert len(self.sources) > 1
        models = [*self.sources, self.target]
        assert all(model.encoder is self.student.encoder for model in models)
        assert all(model.prompt.length == self.cfg.prompt_length for model in models)
        assert len({float(model.prompt.vectors.sum()) for model in models}) == len(models)
        assert all("own.cls_hidden" in model.signature for model in models)
        assert self.student.task_format in ("classes", "tokens")
    """
    laws = checks.check(encoder_plugin(tmp_path, body), {"prompt_length": 5}, only=["fields"])
    assert [law.status for law in laws] == ["pass"], checks.render(laws)


def test_both_formats_are_tried(tmp_path: Path) -> None:
    """A law that breaks on labelled tokens alone is named, and so is one on classes alone."""
    for field in ("labels", "class_label"):
        body = f"""
        def loss(self, batch, step):
            if {field!r} in batch:
                raise ValueError("here")
            return super().loss(batch, step)
        """
        laws = checks.check(encoder_plugin(tmp_path, body), only=["order"])
        assert [(law.name, law.status) for law in laws] == [("fields", "fail")]
        assert laws[0].reason.startswith("ValueError: here (wrong.py:")


def test_what_a_setting_breaks_is_told() -> None:
    for settings, told in (
        ({"positions": "all"}, {"micro_batch": "logits at padding are compared (positions)"}),
        (
            {"teacher_train_mode": True},
            {
                "micro_batch": "the teacher's dropout masks follow the cut (teacher_train_mode)",
                "frozen_eval": "the teacher's dropout is on (teacher_train_mode)",
            },
        ),
    ):
        for law in checks.check("panda", settings, only=list(told)):
            assert law.status == "not claimed"
            assert law.reason.startswith(told[law.name])


@pytest.mark.parametrize("head", ["masked_lm", "sequence"])
def test_a_teacher_that_reads_the_students_ids_fails(head: str, tmp_path: Path) -> None:
    """The likeliest slip of one who comes from shared vocabularies: `batch` for `batch.of("teacher")`."""
    body = """
            def loss(self, batch, step):
                with torch.no_grad():
                    p = class_logits(self.teacher, batch)
                return example_mean(self.soft(batch, p), batch)
            """
    laws = checks.check(plugin(tmp_path, body=body, head=head), only=FAST)
    assert [law.name for law in laws] == ["fields"], checks.render(laws)
    assert "index out of range" in laws[0].reason


@pytest.mark.parametrize(
    ("name", "head"), [(name, head) for name, (heads, _, _) in BROKEN_CLASSES.items() for head in heads]
)
def test_law_catches_in_other_heads(name: str, head: str, tmp_path: Path) -> None:
    _, expected, parts = BROKEN_CLASSES[name]
    laws = checks.check(plugin(tmp_path, **parts, head=head), only=FAST)
    assert {law.name for law in laws if law.status == "fail"} == expected, checks.render(laws)


def test_probes_may_be_set_in_prepare_to_the_best_of_several(tmp_path: Path) -> None:
    init = "self.probe = nn.Linear(3, 3)"
    body = """
    def groups(self):
        return {
            "student": Group(self.student.named_parameters(prefix="student")),
            "probe": Group(self.probe.named_parameters(prefix="probe")),
        }

    def prepare(self, data, step):
        rows = Batch.cat(list(data.batches("train")))
        for number in range(3):
            step.update("probe", self.probed, rows)
            if number == 1:
                best = {name: value.clone() for name, value in self.probe.state_dict().items()}
        self.probe.load_state_dict(best)

    def probed(self, batch, step):
        logits = self.probe(class_logits(self.teacher, batch.of("teacher")))
        return example_mean(cross_entropy(logits, batch["class_label"], reduction="none"), batch)
    """
    laws = checks.check(plugin(tmp_path, body, init=init, head="sequence"), only=FAST)
    assert {law.status for law in laws} == {"pass"}, checks.render(laws)


def test_rows_of_every_set_have_the_fields_needed(tmp_path: Path) -> None:
    body = """
    def prepare(self, data, step):
        for name, least in (("train", 0), ("dev", 0), ("unlabeled", -1)):
            rows = Batch.cat(list(data.batches(name)))
            assert sorted(rows) == sorted({"example_id", *self.needs}), sorted(rows)
            assert len(set(rows["example_id"].tolist())) == rows.size
            assert rows["class_label"].min() == least
            for role in ("student", "teacher"):
                own = rows.of(role)
                place = torch.arange(rows.size), own["mask_index"]
                mask = getattr(self, role).config.mask_token_id
                assert (own["input_ids"][place] == mask).all()
                assert ((own["input_ids"] == mask).sum(1) == 1).all()
                assert (own["mask_index"] > 0).all() and (own["mask_index"] < own["length"] - 1).all()
            assert not torch.equal(rows["length"], rows["teacher.length"])
    """
    laws = checks.check(plugin(tmp_path, body, head="masked_lm"), only=["fields"])
    assert {law.status for law in laws} == {"pass"}, checks.render(laws)


def test_models_may_share_the_students_tokenizer() -> None:
    settings = {"mode": "full"}
    with pytest.raises(UserError, match="was given vocabularies of 90 and 45 tokens"):
        checks.check("tinybert_ft", settings, only=["roles"])
    laws = checks.check("tinybert_ft", settings, only=FAST, shared_tokenizer=True)
    assert {law.status for law in laws} == {"pass"}, checks.render(laws)


def test_processes_catches_sums_of_one_process(tmp_path: Path) -> None:
    body = """
    def train_step(self, batch, step):
        own = batch.counts().tokens
        step.update("student", lambda b, s: own * self.loss(b, s), batch)
    """
    (law,) = checks.check(plugin(tmp_path, body), only=["processes"])
    assert law.status == "fail"
    assert law.reason.startswith("5 rows on 2 processes: update 1, the gradient of 'student' differs by ")


def test_examples_that_are_coupled_meet_over_processes(tmp_path: Path) -> None:
    body = """
    couples_examples = True

    def loss(self, batch, step):
        q, rows = predict(self.student, batch), target_mask(batch).sum(1)
        each = torch.stack([part.mean() for part in cross_entropy(q).split(rows.tolist())])
        return torch.logsumexp(each[:, None] - each[None], 0).sum() + example_mean(each, batch)
    """
    laws = checks.check(plugin(tmp_path, body), only=["processes", "micro_batch", "order", "budget"])
    assert {law.status for law in laws} == {"pass"}, checks.render(laws)


def test_failure_of_a_process_is_told_with_its_line(tmp_path: Path) -> None:
    body = """
    def train_step(self, batch, step):
        step.update("student", self.loss, batch)
        if batch.size == 2:
            raise OSError("two rows")
    """
    (law,) = checks.check(plugin(tmp_path, body), only=["processes"])
    assert law.reason == "in process 1 of 2: OSError: two rows (wrong.py:25)"


# ---------------------------------------------------------------------------- what the check says
@pytest.mark.parametrize(
    ("body", "law", "reason"),
    [
        ("needs = ('example_id', 'label')", "roles", "needs label; batches of causal_lm hold example_id, "),
        ("head = 'sound'", "roles", "checks know no models with the head 'sound'. Known: causal_lm"),
        (
            "def __init__(self, cfg, student):\n    raise OSError('no\\n file')",
            "roles",
            "OSError: no file (wrong.py:18)",
        ),
        (
            "def train_step(self, batch, step):\n    batch['label']",
            "fields",
            "KeyError: 'label' (wrong.py:22)",
        ),
        (
            "def prepare(self, data, step):\n    return {'dev': next(data.batches('dev'))}",
            "fields",
            "prepare may return rows of train, lm, unlabeled, not of dev",
        ),
        (
            "def prepare(self, data, step):\n"
            "    step.update('student', self.loss, next(data.batches('train')))",
            "fields",
            "ValueError: prepare may not update the group 'student': the budget counts its updates (wrong.",
        ),
        (
            "def breaks(self):\n    return {'order': 'it says so'}",
            "order",
            "declared broken (it says so), but it holds",
        ),
    ],
)
def test_reason_names_what_is_wrong(body: str, law: str, reason: str, tmp_path: Path) -> None:
    laws = checks.check(plugin(tmp_path, body, plain="__init__" not in body), only=["order"])
    assert [(found.name, found.status) for found in laws] == [(law, "fail")]
    assert laws[0].reason.startswith(reason)


def test_counter_is_named(tmp_path: Path) -> None:
    (law,) = checks.check(plugin(tmp_path, **BROKEN["counter_that_is_not_saved"][1]), only=["resume"])
    assert law.reason.startswith("a kill after visit 1 loses self.visits; ")


def test_wrong_input_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no law 'micro_bacth'. Did you mean 'micro_batch'"):
        checks.check("sft", only=["micro_bacth"])
    with pytest.raises(UserError, match="no method 'sftt'"):
        checks.check("sftt")
    with pytest.raises(UserError, match="no setting 'kd_ration'. Did you mean 'kd_ratio'"):
        checks.check("kd", {"kd_ration": 1.0})
    with pytest.raises(UserError, match="breaks..: no law 'microbatch'"):
        checks.check(plugin(tmp_path, "def breaks(self):\n    return {'microbatch': 'so'}"))


def test_lines_are_aligned() -> None:
    laws = [
        checks.Law("roles", "pass", "", 0.04),
        checks.Law("micro_batch", "not claimed", "dropout masks follow the cut", 12.34),
    ]
    assert checks.render(laws).splitlines() == [
        "roles        pass           0.0 s",
        "micro_batch  not claimed   12.3 s  dropout masks follow the cut",
    ]
