"""Text generation learnt from a tuned teacher on labelled prompts and its earlier self on unlabelled ones.

An extension of this project: Prompt-Distiller classifies texts, and leaves generation open in its sec. 4. T
(`tuned`) is the teacher after fine-tuning on the labelled set X, T' (`pretrained`) the teacher before, S the
student, z its logits and a the temperature. Of the unlabelled set Xu the prompts alone are used:

    L         = CE(X) + lam1 [KD(X; T) + KD(Xu; T')] + lam2 [CPD(X; T) + CPD(Xu; T')]
    CE        = -log q of the reference response, a token mean as KD
    KD        = a^2 KL(softmax(z_T / a) || softmax(z_S / a))
    pbar_M(i) = mean of softmax(head(norm(state))) over layers 1..L - 1 of M and the response positions of i
    g(i, m)   = pbar_T(m) . pbar_S(i)
    CPD       = mean over i of -log exp g(i, i) / (exp g(i, i) + sum_m exp g(i, m))

over negatives m that are other examples of the same set. Rows without contrast are lam2 = 0, rows without Xu
`unlabeled` = false; lam1 = lam2 = 0 is SFT, update for update.

Source: the idea is that of Prompt-Distiller (few-shot knowledge distillation for prompt-based learners with
dual contrastive learning, ICASSP 2023), eq. 2 to 8; the lens is the logit lens (nostalgebraist 2020,
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
Differs: all that follows.
- The label words at a mask become the whole vocabulary at every response position.
- Responses to Xu are sampled: once by T' before training, or by S at each visit (`unlabeled_response`). Then
  the teacher's vector of the anchor is that of the sampled response, and negatives are still texts of T'.
- A probe is the model's final norm and head as they are now, read at an inner layer; nothing is trained. The
  contrast sends no gradient into this norm and head, as into a frozen probe: it moves the layers below.
- There are no classes: any other example may be a negative. Those of the whole set are drawn from, and a draw
  depends on seed, set, visit and example alone.
- CPD is the form "infonce", "cross" of prompt_distiller, for the printed one rewards disagreement.
- Teachers' vectors pbar_T are computed once and kept in half precision, rows x V numbers of two bytes in
  memory and in each checkpoint. As pbar_S sums to 1, g is off by at most the largest rounding of an entry,
  2^-11 of it.
- The teachers' logits are too many to keep: both teachers run in each step where lam1 > 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kdbench import losses
from kdbench.distiller import (
    Batch,
    Data,
    Distiller,
    Parts,
    Step,
    Store,
    example_mean,
    freeze,
    target_mask,
    token_mean,
)
from kdbench.losses import cross_entropy, forward_kl
from kdbench.predict import CausalLM, Prediction, predict
from kdbench.rollout import evaluating, rollout
from kdbench.streams import stream_seed, uniform

NO_SET = "prompt_distiller_lm: the board has no extra set 'unlabeled'; or set unlabeled = false"
TEACHERS = {"labeled": "tuned", "unlabeled": "pretrained"}  # the teacher of each part of a batch


class PromptDistillerLM(Distiller):
    """Cross-entropy, soft labels of two teachers, and contrast of what the lens reads in inner layers."""

    prepare_reads = ("lam1", "lam2", "unlabeled", "unlabeled_response", "max_new_tokens")

    @dataclass
    class Config:
        """Names as in Prompt-Distiller: `alpha` is the temperature."""

        lam1: float = 0.2  # weight of KD on X and on Xu
        lam2: float = 0.2  # weight of CPD on X and on Xu
        alpha: float = 1.0  # temperature of KD, above 0
        kd_form: Literal["hinton", "hinton_t2"] = "hinton_t2"  # hinton: without the factor alpha^2
        negatives: int = 8  # per anchor, drawn without replacement; all others where there are fewer
        probe: Literal["lens"] = "lens"
        unlabeled: bool = True  # whether Xu is used at all
        unlabeled_response: Literal["teacher", "student"] = "teacher"  # who writes the responses to Xu
        max_new_tokens: int | None = None  # the longest response to a prompt of Xu; None: the board's

        def __post_init__(self) -> None:
            for name in ("lam1", "lam2"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} = {getattr(self, name)} is under 0")
            if not self.alpha > 0:
                raise ValueError(f"alpha = {self.alpha} is not above 0")
            for name in ("negatives", "max_new_tokens"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"{name} = {value} is under 1")

    def __init__(self, cfg: Config, student: nn.Module, tuned: nn.Module, pretrained: nn.Module) -> None:
        """Raises: ValueError where there is contrast and a model's final norm cannot be found."""
        super().__init__(cfg, student)
        self.tuned, self.pretrained = freeze(tuned), freeze(pretrained)
        self.factor = cfg.alpha**2 if cfg.kd_form == "hinton_t2" else 1.0
        self.lenses = self._lenses()
        self.contrasts = bool(self.lenses)
        self.labeled_pool, self.unlabeled_pool = Store(), Store()

    def _lenses(self) -> dict[str, Lens]:
        """The lens of each role that has one; none without contrast, or where a model has no inner layer."""
        if self.cfg.lam2 == 0:
            return {}
        roles = ("student", "tuned", "pretrained") if self.cfg.unlabeled else ("student", "tuned")
        lenses = {role: find_lens(getattr(self, role), role) for role in roles}
        if flat := [role for role, lens in lenses.items() if not lens.layers]:
            warnings.warn(
                f"prompt_distiller_lm: one layer in {' and '.join(flat)} is none to probe: no contrast",
                stacklevel=3,
            )
            return {}
        return lenses

    # ---- before training
    def prepare(self, data: Data, step: Step) -> Mapping[str, Batch]:
        """Let T' answer the prompts of Xu, and cache what the lens reads in T on X and in T' on Xu.

        Raises: ValueError where the board has no extra set `unlabeled`, but the settings need one.
        """
        made = {}
        if self.contrasts:
            made["train"] = self._cached("labeled", data.batches("train"))
        if self._reads_unlabeled and (self.contrasts or self.cfg.unlabeled_response == "teacher"):
            try:
                prompts = list(data.batches("unlabeled"))
            except ValueError as error:
                raise ValueError(NO_SET) from error
            written = (rollout(self.pretrained, batch, step, self.cfg.max_new_tokens) for batch in prompts)
            made["unlabeled"] = self._cached("unlabeled", written)
        return made

    @property
    def _reads_unlabeled(self) -> bool:
        return self.cfg.unlabeled and (self.cfg.lam1 > 0 or self.contrasts)

    def _pool(self, name: str) -> Store:
        return self.labeled_pool if name == "labeled" else self.unlabeled_pool

    def _cached(self, name: str, batches: Iterable[Batch]) -> Batch:
        """Return the rows of all batches with their places in the pool, which is filled."""
        rows, means, role = [], [], TEACHERS[name]
        teacher = getattr(self, role)
        for batch in batches:
            if self.contrasts:
                with evaluating(teacher):
                    _, states = read(teacher, batch, self.lenses[role])
                    means.append(lens_mean(teacher, self.lenses[role], states, batch).half())
            rows.append(batch.to("cpu"))
        joined = Batch.cat(rows)
        if not self.contrasts:
            return joined
        pool = Batch({"example_id": joined["example_id"].to(means[0].device), "mean": torch.cat(means)})
        self._pool(name).add(pool)
        return joined.replace(pool_row=torch.arange(joined.size))

    # ---- training
    def train_step(self, batch: Batch, step: Step) -> None:
        """Update the student once, on a labelled batch and on answered prompts of Xu."""
        parts = {"labeled": batch}
        if self._reads_unlabeled:
            drawn = step.extra("unlabeled")
            if drawn is None:
                raise ValueError(NO_SET)
            if self.cfg.unlabeled_response == "student":
                drawn = rollout(self.student, drawn, step, self.cfg.max_new_tokens)
            parts["unlabeled"] = drawn
        step.update("student", self.student_loss, parts)

    def student_loss(self, parts: Parts, step: Step) -> Tensor:
        """Return L, nats; the log has each weighted term."""
        terms: dict[str, Tensor] = {}
        for name, part in parts.items():
            q, states = read(self.student, part, self.lenses.get("student"))
            if name == "labeled":
                terms["ce"] = token_mean(cross_entropy(q), part)
            if part.size:  # a process may have an empty share of the rows
                terms |= self._of_teacher(name, part, q, states, step)
        step.log(**terms)
        return torch.stack(list(terms.values())).sum()

    def _of_teacher(
        self, name: str, part: Batch, q: Prediction, states: Tensor, step: Step
    ) -> dict[str, Tensor]:
        """The weighted terms of one part and its teacher."""
        cfg, role, terms = self.cfg, TEACHERS[name], {}
        teacher, lens = getattr(self, role), self.lenses.get(role)
        cached = name == "labeled" or cfg.unlabeled_response == "teacher"
        if cfg.lam1 > 0 or (self.contrasts and not cached):
            with torch.no_grad():
                p, seen = read(teacher, part, None if cached else lens)
        if cfg.lam1 > 0:
            kd = forward_kl(q.tempered(cfg.alpha), p.tempered(cfg.alpha))
            terms[f"kd_{name}"] = cfg.lam1 * self.factor * token_mean(kd, part)
        if self.contrasts:
            pool, seed = self._pool(name).batches()[0], stream_seed(step.seed, f"negatives/{name}")
            ids = part["example_id"], pool["example_id"]
            index, valid = draw_negatives(seed, step.visit, *ids, cfg.negatives)
            pbar, other = lens_mean(self.student, self.lenses["student"], states, part), pool["mean"][index]
            if cached:
                own = pool["mean"][part["pool_row"]]
            else:
                with torch.no_grad():
                    own = lens_mean(teacher, self.lenses[role], seen, part)
            # products and sums, for autocast would round a matrix product
            positive, negative = (own.to(pbar.dtype) * pbar).sum(-1), other.to(pbar.dtype) * pbar[:, None]
            values = infonce(positive, negative.sum(-1), valid)
            terms[f"cpd_{name}"] = cfg.lam2 * example_mean(values, part)
        return terms


# ------------------------------------------------------------------------------------ contrast
def infonce(positive: Tensor, negative: Tensor, valid: Tensor) -> Tensor:
    """Return -log exp g / (exp g + sum_m exp g_m) of each anchor, [B], 0 without negatives.

    Args: `positive` [B] and `negative` [B, M] are the products g; `valid` [B, M] says which negatives count.
    """
    scores = torch.cat([positive[:, None], negative.masked_fill(~valid, -torch.inf)], dim=1)
    return scores.logsumexp(-1) - positive


def draw_negatives(seed: int, visit: int, anchors: Tensor, pool: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return pool rows of each anchor's negatives, [B, M], and which of them are any, [B, M].

    Args: `anchors` [B] and `pool` [P] are example ids. M = min(count, P) rows of other examples are drawn
    without replacement, by keys of (seed, visit, anchor, pool row's example) alone.
    """
    row: Any = pool
    keys = uniform(seed, anchors[:, None], visit, row).masked_fill(anchors[:, None] == pool, 2.0)
    least = keys.topk(min(count, len(pool)), largest=False)
    return least.indices, least.values < 1


# ------------------------------------------------------------------------------------ the lens
@dataclass(frozen=True)
class Lens:
    """The names of a model's layers 1..L - 1 and of the norm between its last layer and its head."""

    layers: tuple[str, ...]
    norm: str


def read(model: nn.Module, batch: Batch, lens: Lens | None) -> tuple[Prediction, Tensor]:
    """Return next-token distributions at the N target positions, and the states of the inner layers there,
    [L - 1, N, H], from one forward; no states without a lens.
    """
    if lens is None or not batch.size:
        return predict(model, batch), torch.zeros(0)
    CausalLM(model)  # may try the model, so before anything listens
    found: list[Tensor] = []
    layers = [model.get_submodule(name) for name in lens.layers]
    handles = [layer.register_forward_hook(lambda *call: found.append(_tensor(call[2]))) for layer in layers]
    try:
        q = predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return q, torch.stack([q.at_targets(states) for states in found])


def lens_logits(model: nn.Module, lens: Lens, states: Tensor) -> Tensor:
    """Return logits [..., V] that the model's norm and head, as they are, read off inner states [..., H].

    Gradients flow to the states alone. In float32 at least.
    """
    any_model: Any = model
    norm, head = _fixed(model.get_submodule(lens.norm)), _fixed(any_model.get_output_embeddings())
    logits = head(norm(states))[..., : CausalLM(model).vocab]
    return logits if logits.dtype == torch.float64 else logits.float()


def _fixed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function whose weights are constants."""
    weights = {name: param.detach() for name, param in module.named_parameters()}
    return lambda x: functional_call(module, weights, (x,))


def lens_mean(model: nn.Module, lens: Lens, states: Tensor, batch: Batch) -> Tensor:
    """Return pbar [B, V]: the distributions that the lens reads off `states` [L - 1, N, H], averaged over
    layers and over each row's target positions; 0 for a row without any.

    At most `losses.CHUNK_ELEMENTS` logits exist at once: chunks are computed again in the backward pass.
    """
    mask, flat = target_mask(batch), states.flatten(0, 1)
    owner = torch.arange(batch.size, device=mask.device)[:, None] == mask.nonzero()[:, 0]  # [B, N]
    exact = torch.promote_types(states.dtype, torch.float32)
    share = owner.to(exact) / (len(states) * mask.sum(1, keepdim=True).clamp(min=1))
    share = share.repeat(1, len(states))

    def part(start: int, stop: int) -> Tensor:
        p = lens_logits(model, lens, flat[start:stop]).softmax(-1)
        with torch.autocast(p.device.type, enabled=False):
            return share[:, start:stop].to(p.dtype) @ p

    rows = max(1, losses.CHUNK_ELEMENTS // CausalLM(model).vocab)
    if len(flat) <= rows:
        return part(0, len(flat))
    total = torch.zeros((), dtype=exact, device=flat.device)
    for start in range(0, len(flat), rows):
        stop = min(start + rows, len(flat))
        # without gradients this is a plain call
        total = total + checkpoint(part, start, stop, use_reentrant=False, preserve_rng_state=False)
    return total


def find_lens(model: nn.Module, role: str = "model") -> Lens:
    """Return where the lens of a causal language model is, found by running it once on a probe.

    The layers are a list of modules of which each takes what the one before it gives; the norm is the module
    that takes what the last layer gives, and whose result is what the head reads.
    Raises: ValueError where there is no such norm, or the logits are not the head of its result.
    """
    view = CausalLM(model)
    lens = _traced(model) if view.split else None
    if lens is None:
        raise ValueError(
            f"prompt_distiller_lm: {type(model).__name__} ({role}) has no norm between a list of layers and "
            "its head that a lens can use; lam2 = 0 does without contrast"
        )
    return lens


def _traced(model: Any) -> Lens | None:
    runs: dict[str, tuple[Tensor, Tensor]] = {}  # what each module was given and gave, where of one shape

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
            given, made = _tensor(args or list(named.values())), _tensor(output)
            if given is not None and made is not None and given.shape == made.shape:
                runs[name] = given, made

        return hook

    ids = torch.arange(4, device=next(model.parameters()).device)[None] % CausalLM(model).vocab
    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
    ]
    try:
        with evaluating(model):
            whole = model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    lists = [(name, len(m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name, count in lists:
        layers = [f"{name}.{number}" for number in range(count)]
        if not layers or any(layer not in runs for layer in layers):
            continue
        if not all(torch.equal(runs[one][1], runs[after][0]) for one, after in pairwise(layers)):
            continue
        last = runs[layers[-1]][1]
        for norm, (given, _) in runs.items():
            lens = Lens(tuple(layers[:-1]), norm)
            if norm not in layers and torch.equal(given, last) and _explains(model, lens, last, whole.logits):
                return lens
    return None


def _explains(model: nn.Module, lens: Lens, last: Tensor, logits: Tensor) -> bool:
    """Whether the lens, set on the last layer, gives the model's logits, each position on its own."""
    try:
        with evaluating(model):
            found = lens_logits(model, lens, last[0])
    except (TypeError, RuntimeError):
        return False
    wanted = logits[0, :, : found.shape[-1]].to(found.dtype)
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def _tensor(value: Any) -> Any:
    """The tensor, or the first thing of a tuple where that is one, else None."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None
