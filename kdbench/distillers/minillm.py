"""Policy-gradient distillation: the student's own responses, rewarded by the teacher's log-probabilities.

Source: Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543, sec. 2 and algorithm 1; the defaults are
those of its code, https://github.com/microsoft/LMOps/tree/main/minillm. A response y is sampled from the
mixture (1 - alpha) q_old + alpha p of student and teacher; several updates of the student q on it descend

    L        = L_pg + L_single + lm_coef L_lm
    L_pg     = mean over tokens of max(-A_t rho_t, -A_t clip(rho_t, 1 - clip, 1 + clip))
    rho_t    = w_t q(y_t) / q_old(y_t)
    w_t      = q_old(y_t) / ((1 - alpha) q_old(y_t) + alpha p(y_t))
    A_t      = R_t / (tokens from t to the end), whitened
    R_t      = r_t + gamma R_{t+1}
    r_t      = clip((log p(y_t) - log q_old(y_t)) / reward_scaling, -reward_clip, reward_clip)
    L_single = mean over tokens of KL(q || p) over the whole vocabulary
    L_lm     = (1 - kd_ratio) cross-entropy + kd_ratio KL(p || q), on the board's extra set "lm" if it has one

where q(y_t) stands for the probability of y_t given the prompt and the tokens before it.
Differs from the code: advantages are whitened over the real tokens of one optimizer step on all processes;
the code does so for each micro-batch and counts padding (`whiten`, `whiten_padding`). `length_norm` acts; in
the code it only changes what is logged. L_lm holds KL(p || q), in the code the cross-entropy of the same
gradient. No second, unmixed response is sampled just to log a reverse KL. AdamW is the board's unless `betas`
(in the code 0.9, 0.95) and `weight_decay` (1e-6, on norms and biases too) are set.
Differs from the paper, as its code does: r_t is in the return of token t; returns are discounted, scaled and
whitened; L_single has no w_t; L_lm has a teacher. The paper's form is return_from = "t+1", gamma = 1,
reward_scaling = 1, whiten = "off", weight_single_step = true, kd_ratio = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.clock import phase
from kdbench.distiller import (
    Batch,
    Distiller,
    Group,
    Step,
    Store,
    gather_targets,
    scatter_targets,
    target_mask,
    token_mean,
)
from kdbench.losses import by_position, cross_entropy, forward_kl, reverse_kl, token_log_prob
from kdbench.predict import predict
from kdbench.rollout import evaluating, rollout


class MiniLLM(Distiller):
    """Reverse KL by policy gradient on teacher-mixed samples, with inner epochs over a store of rollouts."""

    @dataclass
    class Config:
        """Settings; the defaults are MiniLLM's GPT-2 scripts."""

        max_new_tokens: int | None = None  # tokens sampled per response at most; None: the board's
        teacher_mix: float = 0.2  # alpha, the teacher's share in the distribution that is sampled
        importance_weights: bool = True  # w_t corrects for that share; off: 1
        gamma: float = 0.95  # discount of the return per token
        reward_scaling: float = 0.5  # rewards are divided by it
        reward_clip: float = 100.0  # largest reward, after scaling
        return_from: Literal["t", "t+1"] = "t"  # the first reward that a token's return sums
        length_norm: bool = True  # a return is divided by the number of tokens it may sum
        whiten: Literal["update", "micro_batch", "off"] = "update"  # to mean 0, variance 1 over
        whiten_padding: bool = False  # padding up to max_new_tokens counts as advantages of 0
        clip: float = 0.2  # rho_t beyond 1 +- clip gives no further gain
        rollout_batches: int = 1  # batches of prompts sampled before updating
        inner_epochs: int = 4  # passes over them, each of rollout_batches updates
        single_step: bool = True  # L_single
        weight_single_step: bool = False  # multiply L_single's tokens by w_t, as the paper does
        lm_coef: float = 1.0  # weight of L_lm; without an extra set "lm" there is none
        kd_ratio: float = 0.5  # the teacher's share in L_lm
        betas: tuple[float, float] | None = None  # AdamW; None: the board's
        weight_decay: float | None = None  # AdamW; None: the board's

        def __post_init__(self) -> None:
            """Refuse values out of range."""
            for name in ("teacher_mix", "gamma", "kd_ratio"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} = {getattr(self, name)} must lie between 0 and 1")
            counts = ("max_new_tokens", "rollout_batches", "inner_epochs")
            for name in (*counts, "reward_scaling", "reward_clip", "clip"):
                value = getattr(self, name)
                if value is not None and value <= 0:
                    raise ValueError(f"{name} = {value} must be above 0")
            if self.lm_coef < 0:
                raise ValueError(f"lm_coef = {self.lm_coef} must be at least 0")

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(cfg, student, teacher)
        self.rollouts = Store()
        self.state["rows"] = 0  # in the stores of all processes

    def breaks(self) -> Mapping[str, str]:
        """Whitening by micro-batch makes an update depend on how its batch was cut."""
        if self.cfg.whiten == "micro_batch":
            return {"micro_batch": "advantages are whitened over each micro-batch (whiten = 'micro_batch')"}
        return {}

    def groups(self) -> dict[str, Group]:
        """Return the student's parameters."""
        (student,) = super().groups().values()
        return {"student": replace(student, betas=self.cfg.betas, weight_decay=self.cfg.weight_decay)}

    def train_step(self, batch: Batch, step: Step) -> None:
        """Sample responses into the store; once it is full, update on its rows in shuffled inner epochs."""
        cfg, device = self.cfg, batch["input_ids"].device
        mix = (self.teacher, cfg.teacher_mix) if cfg.teacher_mix else None
        sampled = rollout(self.student, batch, step, cfg.max_new_tokens, mix=mix)
        self.rollouts.add(self.scored(sampled, step).replace(slot=batch["row"] + self.state["rows"]))
        self.state["rows"] += round(float(step.all_sum(torch.tensor(float(batch.size), device=device))))
        filled = self.rollouts.batches()
        if len(filled) < cfg.rollout_batches:
            return
        own, total = Batch.cat(filled).to(device), int(self.state["rows"])
        self.rollouts.clear()
        self.state["rows"] = 0
        for epoch in range(cfg.inner_epochs):
            order = torch.randperm(total, generator=step.rng(f"inner epoch {epoch}"))  # one order for all
            place = order.argsort()[own["slot"].cpu()]  # of each own row in the shuffled whole
            for part in torch.arange(total).tensor_split(len(filled)):
                inside = torch.isin(place, part).nonzero()[:, 0]
                self.update(own.rows(inside[place[inside].argsort()]), step)

    def update(self, rows: Batch, step: Step) -> None:
        """Take one optimizer step on rows of the store, beside the next pretraining text if there is any."""
        if self.cfg.whiten == "update":
            rows = rows.replace(advantage=self.whitened(rows, step, step.all_sum))
        text = step.extra("lm") if self.cfg.lm_coef else None
        parts = {"rollout": rows} if text is None else {"rollout": rows, "lm": text}
        step.update("student", self.objective, parts)

    @torch.no_grad()
    def scored(self, sampled: Batch, step: Step) -> Batch:
        """Return rollouts with what stays fixed over the inner epochs.

        New fields, each [B, T-1] and 0 where there is no target: `old_log_prob` (nats), `importance_weight`,
        `reward`, and `advantage` before whitening.
        """
        cfg, parts = self.cfg, []
        alpha = cfg.teacher_mix if cfg.importance_weights else 0.0
        with phase("rollout"), evaluating(self.student, self.teacher):
            for start in range(0, max(sampled.size, 1), step.rollout_batch):
                part = sampled.rows(slice(start, start + step.rollout_batch))
                old = token_log_prob(predict(self.student, part))
                gain = token_log_prob(predict(self.teacher, part)) - old
                reward = (gain / cfg.reward_scaling).clamp(-cfg.reward_clip, cfg.reward_clip)
                reward = scatter_targets(reward, part)
                weight = 1 / ((1 - alpha) + alpha * gain.clamp(-60, 60).exp())  # float32 ends at e^88
                parts.append(
                    part.replace(
                        old_log_prob=scatter_targets(old, part),
                        importance_weight=scatter_targets(weight, part),
                        reward=reward,
                        advantage=self.advantage(reward, part),
                    )
                )
        return Batch.cat(parts)

    def advantage(self, reward: Tensor, batch: Batch) -> Tensor:
        """Return the length-normalised returns [B, T-1] of `reward` [B, T-1], 0 where there is no target."""
        column = torch.arange(reward.shape[1], device=reward.device)
        left = batch["length"][:, None] - 1 - column  # tokens from this one to the end of the response
        returns, after = torch.zeros_like(reward), reward.new_zeros(len(reward))
        for j in reversed(range(reward.shape[1])):
            now = reward[:, j] + self.cfg.gamma * after
            returns[:, j] = now if self.cfg.return_from == "t" else after
            after = now
        if self.cfg.length_norm:
            summed = left if self.cfg.return_from == "t" else left - 1
            returns = returns / summed.clamp(min=1)
        return returns * target_mask(batch)

    def whitened(self, rows: Batch, step: Step, over_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `advantage` [B, T-1] with mean 0 and population variance 1 over `rows`.

        `over_rows` sums over processes, or leaves a sum as it is. With `whiten_padding` mean and variance are
        those of a [B, max_new_tokens] matrix that is 0 beyond the responses.
        """
        value = rows["advantage"]
        real = target_mask(rows).to(value)
        zeros = torch.zeros_like(real.sum())  # how many there are beyond the responses
        if self.cfg.whiten_padding:
            zeros = rows.size * (self.cfg.max_new_tokens or step.max_new_tokens) - real.sum()

        total, count, zeros = over_rows(torch.stack([value.sum(), real.sum() + zeros, zeros]))
        mean = total / count.clamp(min=1)
        squares = over_rows(((value - mean).square() * real).sum()) + zeros * mean.square()
        whitened: Tensor = (value - mean) / (squares / count.clamp(min=1) + 1e-8).sqrt() * real
        return whitened

    def objective(self, parts: Mapping[str, Batch], step: Step) -> Tensor:
        """Return L of the module's docstring for the rows of `rollout` and, if there are any, of `lm`."""
        loss = self.policy_loss(parts["rollout"], step)
        if "lm" in parts:
            loss = loss + self.cfg.lm_coef * self.text_loss(parts["lm"], step)
        return loss

    def policy_loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_pg + L_single on rollouts with the fields of `scored`."""
        cfg = self.cfg
        advantage = batch["advantage"]
        if cfg.whiten == "micro_batch":
            advantage = self.whitened(batch, step, lambda own: own)
        gain, weight = gather_targets(advantage, batch), gather_targets(batch["importance_weight"], batch)
        old = gather_targets(batch["old_log_prob"], batch)
        teacher = []
        if cfg.single_step:
            with torch.no_grad():
                teacher = [predict(self.teacher, batch)]

        def terms(
            q: Tensor, y: Tensor, a: Tensor, w: Tensor, q_old: Tensor, *p: Tensor
        ) -> tuple[Tensor, ...]:
            ratio = w * (token_log_prob(q, y) - q_old).exp()
            clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
            policy = torch.maximum(-a * ratio, -a * clipped)
            outside = (ratio != clipped).to(ratio.dtype)
            if not p:
                return policy, policy, outside
            kl = reverse_kl(q, p[0])
            single = w * kl if cfg.weight_single_step else kl
            return policy + single, policy, outside, single

        q = predict(self.student, batch)
        loss, policy, outside, *single = by_position(terms, q, q.targets, gain, weight, old, *teacher)
        step.log(
            policy=token_mean(policy, batch),
            reward=token_mean(gather_targets(batch["reward"], batch), batch),
            clipped_share=token_mean(outside, batch),
        )
        for kl in single:
            step.log(single_step=token_mean(kl, batch))
        return token_mean(loss, batch)

    def text_loss(self, batch: Batch, step: Step) -> Tensor:
        """Return L_lm on pretraining text."""
        q, ratio = predict(self.student, batch), self.cfg.kd_ratio
        if not ratio:
            loss = token_mean(cross_entropy(q), batch)
            step.log(lm_ce=loss)
            return loss
        with torch.no_grad():
            p = predict(self.teacher, batch)

        def terms(q: Tensor, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ce, kl = cross_entropy(q, y), forward_kl(q, p)
            return (1 - ratio) * ce + ratio * kl, ce, kl

        both, ce, kl = by_position(terms, q, p, q.targets)
        step.log(lm_ce=token_mean(ce, batch), lm_kl=token_mean(kl, batch))
        return token_mean(both, batch)
