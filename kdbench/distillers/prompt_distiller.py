"""Few-shot distillation from a prompt-tuned teacher on labelled and its pre-trained self on unlabelled texts.

Source: Prompt-Distiller (few-shot knowledge distillation for prompt-based learners with dual contrastive
learning, ICASSP 2023), eq. 1 to 8; no code was published. T is the prompt-tuned teacher, T' the same model
before tuning, S the student, X the labelled and Xu the unlabelled texts, p_M the distribution over label
words at the mask, and pbar_M the mean of the distributions that probes read off M's inner layers:

    L        = L_MLM(X) + lam1 (L_KD(X) + L_KD(Xu)) + lam2 (L_CPD(X) + L_CPD(Xu))
    L_KD     = distance of p_S to p_T on X, to p_T' on Xu                     (kd_form)
    g(i, m)  = pbar_T(x_m) . pbar_S(x_i)                                      (T' on Xu)
    L_CPD    = -log exp g(i, i) / (exp g(i, i) + sum_m exp g(i, m))           ("infonce", "cross")

over negatives m of other classes: the labels on X, the zero-shot answers of T' on Xu. Teachers, and probes
at the first weights of S, are run before training: a step costs one forward of S over both texts.

Differs: the paper leaves much open; each choice is a setting.
- eq. 3 divides probabilities by the temperature, which only scales the term: `kd_form` "literal". The default
  softens the logits of both models and is 0 for equal ones.
- eq. 5 sums over all pairs of layers, which is the product of means, for it is bilinear: the same number.
- eq. 6 and 7 have no logarithm, and none but negatives in the denominator: `cpd_form` "literal". There both
  factors are those of the negative's own text: `cpd_pairs` "same_sample", for which S reads the negatives.
  Such a loss asks for disagreement on them, so neither is the default.
- Number and pool of negatives, and architecture and training of the probes, are not given.
- The probes of a bank share the step that is kept, the first with the best mean dev accuracy; step 0, before
  any update, is no candidate. The clip of `training.grad_clip` is that of the bank's joint gradient; betas,
  eps and no_decay are the board's.
- Probes trained anew (`probe_refresh_every`) keep the label rows of the initial decoder and the moments of
  their optimizer.
- `aux_hidden` matches states at the mask alone, not at every position.
- An anchor without any negative adds 0 to a mean that still counts it; `skipped_anchors` counts them.
- Dropout is off, unless the training setting `student_dropout` brings the student's back. Caches, probes
  and their training never have it.
- The log has the value of each term, not the norm of its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdbench.classify import classified
from kdbench.distiller import Batch, Data, Distiller, Group, Parts, Step, Store, example_mean, freeze
from kdbench.distillers._classes import Form, cross_entropy, distilled, with_cache
from kdbench.distillers._prompted import (
    PtLoss,
    above_zero,
    at_least,
    joined,
    needs_of,
    read_of,
    vocabulary_cross_entropy,
)
from kdbench.probes import ProbeBank, ProbeKind
from kdbench.rollout import evaluating
from kdbench.streams import stream_seed, uniform

CpdForm = Literal["literal", "log", "infonce"]
TEACHERS = {"pretrained": ("pretrained",), "tuned": ("teacher",), "both": ("teacher", "pretrained")}
CHUNK = 64  # texts that the student reads at once when its probes are trained anew


class PromptDistiller(Distiller):
    """Prompt-tuning, soft labels of two teachers, and contrast of what probes read in their inner layers."""

    head = "masked_lm"
    needs = needs_of("teacher", "pretrained")
    prepare_reads = (
        "contrast",
        "unlabeled",
        "unlabeled_teacher",
        "pretrained_probes",
        "probe",
        "probe_steps",
        "probe_lr",
        "probe_weight_decay",
        "aux_hidden",
    )

    @dataclass
    class Config:
        """Names as in the paper: `alpha` is the temperature.

        Ablations: `lam2 = 0` and `contrast = false` are the same one, without contrast (the second trains no
        probes either); `unlabeled = false` is the one without unlabelled texts.
        """

        alpha: float = 10.0  # temperature of the distillation terms, above 0
        lam1: float = 0.2  # weight of L_KD on X and on Xu
        lam2: float = 0.2  # weight of L_CPD on X and on Xu
        kd_form: Form = "hinton_t2"  # literal, hinton, or hinton times alpha^2
        cpd_form: CpdForm = "infonce"
        cpd_pairs: Literal["cross", "same_sample"] = "cross"  # whose pbar_S a negative's teacher vector meets
        negatives: int = 8  # per anchor, drawn from the whole set without replacement; 0: all
        contrast: bool = True  # whether there are probes at all
        unlabeled: bool = True  # whether Xu is used at all
        unlabeled_per_step: int = 1  # batches of Xu per step
        unlabeled_teacher: Literal["pretrained", "tuned", "both"] = "pretrained"  # both: mean of their terms
        probe: ProbeKind = "head_copy"
        probe_steps: int = 300  # updates of each bank on the whole of X; the best on dev is kept
        probe_lr: float = 1e-3
        probe_weight_decay: float = 0.01
        probe_refresh_every: int = 0  # updates of the student after which its probes train on; 0: never
        pretrained_probes: Literal["own", "tuned"] = "own"  # tuned: T' is read by the probes of T
        pt_loss: PtLoss = "label_words"  # the N label words, or the whole vocabulary
        # a negative control: TinyBERT's distance of hidden states, at the mask, layers m L_T / L_S
        aux_hidden: Literal["none", "tinybert"] = "none"
        aux_weight: float = 1.0

        def __post_init__(self) -> None:
            above_zero(alpha=self.alpha, probe_lr=self.probe_lr)
            at_least(lam1=self.lam1, lam2=self.lam2, negatives=self.negatives, aux_weight=self.aux_weight)
            at_least(probe_weight_decay=self.probe_weight_decay, probe_refresh_every=self.probe_refresh_every)
            for name in ("unlabeled_per_step", "probe_steps"):
                if not getattr(self, name) >= 1:
                    raise ValueError(f"{name} = {getattr(self, name)} is under 1")
            if self.probe not in get_args(ProbeKind):
                raise ValueError(f"probe = '{self.probe}' is none of {', '.join(get_args(ProbeKind))}")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module, pretrained: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.pretrained = freeze(pretrained)
        self.unlabeled_teachers = TEACHERS[cfg.unlabeled_teacher] if cfg.unlabeled else ()
        self.classes = classes_of(student)
        self.probed = self._probed()  # roles with a bank
        for role in self.probed:
            bank = ProbeBank(getattr(self, role), self.classes, cfg.probe)
            setattr(self, f"{role}_probes", bank.eval())
        self.contrasts = bool(self.probed) and cfg.lam2 > 0
        self.labeled_pool, self.unlabeled_pool, self.dev_rows = Store(), Store(), Store()
        self.fit = self._fit() if cfg.aux_hidden == "tinybert" else None

    def _probed(self) -> tuple[str, ...]:
        """The roles that have probes of their own; none where a model has no inner layer.

        Raises: ValueError where the probes of T do not fit T'.
        """
        if not self.cfg.contrast:
            return ()
        reads_pretrained = "pretrained" in self.unlabeled_teachers
        own = reads_pretrained and self.cfg.pretrained_probes == "own"
        roles = ("teacher", "pretrained", "student") if own else ("teacher", "student")
        flat = [role for role in roles if depth(getattr(self, role)) < 2]
        if flat:
            warnings.warn(
                f"prompt_distiller: one layer in {' and '.join(flat)} is none to probe: no contrastive terms",
                stacklevel=3,
            )
            return ()
        shapes = {(depth(model), width(model)) for model in (self.teacher, self.pretrained)}
        if reads_pretrained and not own and len(shapes) > 1:
            raise ValueError("pretrained_probes = 'tuned' needs a pretrained of the teacher's shape")
        return roles

    def _fit(self) -> nn.Linear:
        """The map of student states to the width of the teacher's.

        Raises: ValueError where the student's layers do not divide the teacher's.
        """
        for model in (self.teacher, *(getattr(self, role) for role in self.unlabeled_teachers)):
            if depth(model) % depth(self.student) or width(model) != width(self.teacher):
                raise ValueError(
                    f"aux_hidden = 'tinybert': {depth(model)} layers of width {width(model)} fit neither the "
                    f"student's {depth(self.student)} layers nor the teacher's width {width(self.teacher)}"
                )
        return nn.Linear(width(self.student), width(self.teacher)).to(next(self.student.parameters()).dtype)

    def bank(self, role: str) -> ProbeBank:
        """Return the probes that read the states of `role`."""
        found: ProbeBank = getattr(self, f"{role if role in self.probed else 'teacher'}_probes")
        return found

    def train(self, mode: bool = True) -> PromptDistiller:
        """Set the student's mode alone: the rest stays in eval mode, and is large."""
        self.student.train(mode)
        return self

    def groups(self) -> dict[str, Group]:
        """Return the student's parameters, and those of each bank of probes."""
        student = list(self.student.named_parameters(prefix="student"))
        if self.fit is not None:
            student += list(self.fit.named_parameters(prefix="fit"))
        found = {"student": Group([(name, param) for name, param in student if param.requires_grad])}
        for role in self.probed if self.cfg.probe != "frozen_head" else ():
            found[f"{role}_probes"] = Group(
                list(self.bank(role).named_parameters(prefix=f"{role}_probes")),
                lr=self.cfg.probe_lr,
                weight_decay=self.cfg.probe_weight_decay,
                schedule="constant",
                warmup_steps=0,
            )
        return found

    def measures(self) -> Mapping[str, float]:
        """Return dev accuracy of each probe (`probe_accuracy/<role>/<layer>`) and the share of each pseudo
        label on Xu (`pseudo_label/<role>/<class>`), in %.
        """
        found: dict[str, float] = {}
        for role, values in self.state.get("probe_accuracy", {}).items():
            found |= {f"probe_accuracy/{role}/{layer}": value for layer, value in enumerate(values, start=1)}
        for role, values in self.state.get("pseudo_label", {}).items():
            found |= {f"pseudo_label/{role}/{label}": value for label, value in enumerate(values)}
        return found

    # ---- before training
    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Train the probes on X, then cache what teachers and probes say of X and Xu in their rows."""
        train = list(data.batches("train"))
        if self.probed:
            dev = list(data.batches("dev"))
            for role in self.probed:
                model = getattr(self, role)
                self.bank(role).set_label_words(model, train[0].of(role)["verbalizer_ids"][0])
                self._train_probes(role, train, dev, step)
            self.dev_rows.add(Batch.cat([batch.of("student") for batch in dev]).to(self._device))
        made = {"train": self._cached(train, ("teacher",))}
        if self.cfg.unlabeled:
            made["unlabeled"] = self._cached(list(data.batches("unlabeled")), self.unlabeled_teachers)
            self.state["pseudo_label"] = {
                role: self._shares(labels_of(made["unlabeled"], "unlabeled", role))
                for role in self.unlabeled_teachers
            }
        if self.probed:
            self.labeled_pool.add(made["train"].to(self._device))
            if self.cfg.unlabeled:
                self.unlabeled_pool.add(made["unlabeled"].to(self._device))
        return made

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    def _cached(self, batches: list[Batch], roles: tuple[str, ...]) -> Batch:
        """The student's rows with what each of `roles` says of them."""

        def told(batch: Batch) -> dict[str, Tensor]:
            fields = {}
            for role in roles:
                model = getattr(self, role)
                with evaluating(model):
                    seen = classified(model, batch.of(role))
                fields[f"{role}_logits"] = seen.logits
                if self.probed:
                    fields[f"{role}_mean_probe"] = self.bank(role).mean(seen.states[:, 1:-1])
                if self.fit is not None:
                    fields[f"{role}_states"] = seen.states[:, :: depth(model) // depth(self.student)]
            return fields

        return with_cache(batches, told)

    def _train_probes(self, role: str, train: list[Batch], dev: list[Batch], step: Step) -> None:
        """Train the bank of `role` on the states of all of X at once; keep its best step on dev."""
        bank, (states, labels) = self.bank(role), self._inner(role, train)
        dev_states, dev_labels = self._inner(role, dev)
        # all texts in one row: a bank's full batch is small, and is never cut
        whole = Batch({"states": states[None], "class_label": labels[None]})
        best, kept = accuracy(bank, dev_states, dev_labels), {}
        for number in range(self.cfg.probe_steps if self.cfg.probe != "frozen_head" else 0):
            step.update(f"{role}_probes", probe_loss(bank), whole)
            now = accuracy(bank, dev_states, dev_labels)
            if number == 0 or now.mean() > best.mean():
                best, kept = now, {name: value.clone() for name, value in bank.state_dict().items()}
        if kept:
            bank.load_state_dict(kept)
        self.state.setdefault("probe_accuracy", {})[role] = best.tolist()

    def _shares(self, labels: Tensor) -> list[float]:
        """The share of each class, in %."""
        shares: list[float] = (100 * labels.bincount(minlength=self.classes) / len(labels)).tolist()
        return shares

    def _inner(self, role: str, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """States of the inner layers at the mask, [R, L - 1, H], and class labels [R]."""
        model = getattr(self, role)
        with evaluating(model):
            states = [classified(model, batch.of(role)).states[:, 1:-1] for batch in batches]
        return torch.cat(states), torch.cat([batch["class_label"] for batch in batches])

    # ---- training
    def train_step(self, batch: Batch, step: Step) -> None:
        """Update the student once on a labelled and an unlabelled batch, each anchor with its negatives."""
        every = self.cfg.probe_refresh_every
        if every and self.probed and step.index > 1 and (step.index - 1) % every == 0:
            train, dev = (chunks(store.batches()[0]) for store in (self.labeled_pool, self.dev_rows))
            self._train_probes("student", train, dev, step)
        parts = {"labeled": batch}
        if self.cfg.unlabeled and (self.cfg.lam1 > 0 or self.contrasts or self.fit is not None):
            parts["unlabeled"] = self._unlabeled(step)
        if self.contrasts:
            parts = {name: self._with_negatives(name, part, step) for name, part in parts.items()}
        step.update("student", self.student_loss, parts)

    def _unlabeled(self, step: Step) -> Batch:
        drawn = [step.extra("unlabeled") for _ in range(self.cfg.unlabeled_per_step)]
        found = [batch for batch in drawn if batch is not None]
        if not found:
            raise ValueError(
                "prompt_distiller: the board has no extra set 'unlabeled'; or set unlabeled = false"
            )
        return Batch.cat(found)

    def _roles(self, name: str) -> tuple[str, ...]:
        """The teachers of a part."""
        return ("teacher",) if name == "labeled" else self.unlabeled_teachers

    def _with_negatives(self, name: str, part: Batch, step: Step) -> Batch:
        """Attach to each anchor what its loss reads of its negatives, drawn by its own keys alone."""
        pool = (self.labeled_pool if name == "labeled" else self.unlabeled_pool).batches()[0]
        fields: dict[str, Tensor] = {}
        for role in self._roles(name):
            eligible = labels_of(part, name, role)[:, None] != labels_of(pool, name, role)
            seed = stream_seed(step.seed, f"negatives/{name}/{role}")
            keys = uniform(seed, part["example_id"][:, None], step.visit, pool["example_id"])
            index, valid = draw_negatives(keys, eligible, self.cfg.negatives)
            fields[f"{role}_negatives"] = pool[f"{role}_mean_probe"][index]
            fields[f"{role}_valid"] = valid
            if self.cfg.cpd_pairs == "same_sample":
                fields |= {f"{role}_negative_{field}": pool[field][index] for field in read_of(part)}
            step.count("skipped_anchors", float((~valid.any(-1)).sum()))
        return part.replace(**fields)

    def student_loss(self, parts: Parts, step: Step) -> Tensor:
        """Return L, nats per example; the log has each weighted term."""
        cfg, views = self.cfg, [(name, role) for name in parts for role in self._roles(name)]
        texts, same_sample = list(parts.values()), self.contrasts and cfg.cpd_pairs == "same_sample"
        if same_sample:
            texts += [negative_texts(parts[name], role) for name, role in views]
        sizes = [text.size for text in texts]
        seen, labelled = classified(self.student, joined(texts)), parts["labeled"]
        logits, states, first = seen.logits, seen.states, slice(labelled.size)
        if cfg.pt_loss == "full_vocab":
            assert seen.whole is not None
            ce = vocabulary_cross_entropy(seen.whole[first], labelled)
        else:
            ce = cross_entropy(logits[first], labelled["class_label"])

        def of_views(rows: Tensor) -> Tensor:
            """The student's rows of each view: those of a part come again for its second teacher."""
            if len(views) == len(parts):
                return rows[: sum(sizes[: len(parts)])]
            own = dict(zip(parts, rows.split(sizes), strict=False))
            return torch.cat([own[name] for name, _ in views])

        told = [view(parts[name], role) for name, role in views]
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.contrasts:
            pbar = self.bank("student").mean(states[:, 1:-1])
            if same_sample:
                read = zip(told, pbar.split(sizes)[len(parts) :], strict=True)
                told = [one.replace(student=rows.view_as(one["negatives"])) for one, rows in read]
        teacher = Batch.cat(told)
        if cfg.lam1 > 0:
            terms["kd"] = cfg.lam1, distilled(of_views(logits), teacher["logits"], cfg.alpha, cfg.kd_form)
        if self.contrasts:
            own = of_views(pbar)[:, None]
            student = torch.cat([own, teacher["student"]], 1) if same_sample else own
            g = torch.cat([teacher["mean_probe"][:, None], teacher["negatives"]], 1) * student
            terms["cpd"] = cfg.lam2, contrastive(g.sum(-1), teacher["valid"], cfg.cpd_form)
        if self.fit is not None:
            apart = self.fit(of_views(states)) - teacher["states"]
            terms["aux"] = cfg.aux_weight, apart.square().mean(-1).sum(-1)

        def means(values: Tensor, weight: float, term: str) -> list[Tensor]:
            """The weighted mean of each view, which is logged."""
            rows, found = values.split([one.size for one in told]), []
            for (name, _), own in zip(views, rows, strict=True):
                found.append(weight / len(self._roles(name)) * example_mean(own, parts[name]))
                step.log(**{f"{term}_{name}": found[-1]})
            return found

        loss = example_mean(ce, labelled)
        step.log(mlm=loss)
        for term, (weight, values) in terms.items():
            for value in means(values, weight, term):
                loss = loss + value
        if self.contrasts:
            means(1.0 - teacher["valid"].any(-1).to(ce.dtype), 1.0, "skipped")
        return loss


def contrastive(g: Tensor, valid: Tensor, form: CpdForm) -> Tensor:
    """Return L_CPD of each anchor, [B], 0 where no negative is valid.

    Args: `g` [B, 1 + M] are products, the anchor's own first; `valid` [B, M] says which negatives count. With
    f = exp g of the anchor's own and s the sum of exp g over the negatives:

        literal  -f / s        log  -log (f / s)        infonce  -log (f / (f + s))
    """
    if form == "infonce":
        own = torch.ones_like(valid[:, :1])
        return g.masked_fill(~torch.cat([own, valid], 1), -torch.inf).logsumexp(-1) - g[:, 0]
    some = valid.any(-1)
    total = g[:, 1:].masked_fill(~valid & some[:, None], -torch.inf).logsumexp(-1)
    values = total - g[:, 0] if form == "log" else -(g[:, 0] - total).exp()
    return values.masked_fill(~some, 0.0)


def draw_negatives(keys: Tensor, eligible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the pool rows of each anchor's negatives, [B, M], and which of them are any, [B, M].

    Args: `keys` [B, P] in [0, 1) are random, `eligible` [B, P] says which rows of the pool may be drawn: the
    `count` with the least keys are, without replacement, or all where `count` is 0 or larger.
    """
    rows = eligible.shape[1]
    if count == 0 or count >= rows:
        return torch.arange(rows, device=keys.device).expand_as(eligible), eligible
    least = keys.masked_fill(~eligible, 2.0).topk(count, largest=False)
    return least.indices, least.values < 1


VIEW = ("logits", "mean_probe", "negatives", "valid", "states")


def view(part: Batch, role: str) -> Batch:
    """Return what one teacher told of the rows of a part."""
    return Batch({name: part[f"{role}_{name}"] for name in VIEW if f"{role}_{name}" in part})


def negative_texts(part: Batch, role: str) -> Batch:
    """Return the student's fields of all negatives, anchor by anchor, B x M rows."""
    return Batch({field: part[f"{role}_negative_{field}"].flatten(0, 1) for field in read_of(part)})


def labels_of(rows: Batch, name: str, role: str) -> Tensor:
    """Return the labels that tell negatives, [B]: the gold ones on X, a teacher's own answers on Xu."""
    return rows["class_label"] if name == "labeled" else rows[f"{role}_logits"].argmax(-1)


def probe_loss(bank: ProbeBank) -> Callable[[Batch, Step], Tensor]:
    """Return the cross-entropy of all probes, a mean over layers, for texts that stand in one row."""

    def loss(batch: Batch, step: Step) -> Tensor:
        logits = bank.logits(batch["states"].flatten(0, 1))
        labels = batch["class_label"].flatten()[:, None].expand(-1, bank.layers)
        ce = cross_entropy(logits.flatten(0, 1), labels.flatten())
        return example_mean(ce.view(len(batch["states"]), -1).mean(-1), batch)

    return loss


@torch.no_grad()
def accuracy(bank: ProbeBank, states: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy of each probe, [L - 1], in %."""
    return 100 * (bank.logits(states).argmax(-1) == labels[:, None]).double().mean(0)


def chunks(rows: Batch) -> list[Batch]:
    """Return the rows in batches of a size that one forward holds."""
    return [rows.rows(slice(start, start + CHUNK)) for start in range(0, rows.size, CHUNK)]


def depth(model: Any) -> int:
    """Return the number of layers."""
    return int(model.config.num_hidden_layers)


def width(model: Any) -> int:
    """Return the width of the states."""
    return int(model.config.hidden_size)


def classes_of(model: Any) -> int:
    """Return the number of classes."""
    return int(model.config.num_labels)
