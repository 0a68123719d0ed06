"""How near two tasks are, as their prompts show it: what predicts whether a source helps a target.

Shapes: m prompt tokens, W numbers each (for a deep prompt 2 L d), H width of the encoder, L layers, F width
of their feed-forward parts.

    e_concat    cosine of the two prompts, flattened
    e_avg       cosine of their mean tokens
    e_pairwise  mean cosine over all m x m pairs of tokens
    on          overlap of activated neurons: cosine of the two sets of feed-forward units that are above 0 at
                the first token
    semantic    cosine of the two tasks' mean sentence representations

Source: semantic is PANDA's metric (Zhong et al. 2024, https://arxiv.org/abs/2208.10160), rebuilt from its
public code, whose dump keeps each task's own texts under its own prompt; `on` and the forms of prompt cosine
of Su et al. 2022, https://arxiv.org/abs/2111.06719, sec. 5; e_avg and e_pairwise of SPoT (Vu et al. 2022,
https://arxiv.org/abs/2110.07904, sec. 4).
Differs: sentences are represented by the last state of the first token for every kind of task, where PANDA's
code has the pooler for some and states for others; activations are averaged over texts of the task itself and
then set against 0, in Su et al. they are those of the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from kdbench.distiller import Batch
from kdbench.errors import UserError
from kdbench.prompted import PromptedEncoder
from kdbench.prompts import SoftPrompt
from kdbench.rollout import evaluating

Metric = Literal["semantic", "e_avg", "e_concat", "e_pairwise", "on"]
Representation = Literal["cls_hidden", "pooler", "mean_tokens"]
METRICS: tuple[str, ...] = get_args(Metric)
REPRESENTATIONS: tuple[str, ...] = get_args(Representation)


# ---------------------------------------------------------------------------------------------------- prompts
def e_concat(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two prompts [m, W] as vectors of m W numbers. Raises: ValueError: two lengths."""
    _check_shapes(one, other)
    return float(cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def e_avg(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the mean tokens of two prompts [m, W], [n, W]."""
    return float(cosine_similarity(one.double().mean(0), other.double().mean(0), dim=0))


def e_pairwise(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine of all pairs of tokens of two prompts [m, W], [n, W]."""
    return float((normalize(one.double(), dim=1) @ normalize(other.double(), dim=1).T).mean())


def overlap(one: Tensor, other: Tensor) -> float:
    """Return |A and B| / sqrt(|A| |B|) of two sets of units, bool of one shape; 0 where one is empty.

    Also the cosine of two tables of rates in [0, 1].
    """
    return float(cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def _check_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"prompts of shapes {list(one.shape)} and {list(other.shape)} cannot be compared")


# ------------------------------------------------------------------------------------------------- signatures
def signature(model: PromptedEncoder, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return means over texts read with the model's own prompt, dropout off, in float64.

    `cls_hidden`, `pooler`, `mean_tokens` [H]: sentence representations. `activation` [L, F]: what goes into
    the feed-forward layers' outputs at the first token, `active` [L, F] the share of texts where it is above
    0. A choice between sentences counts as that many texts; `mean_tokens` is over a text's own tokens.

    Without a pooler there is no `pooler`.

    Raises: ValueError without a text.
    """
    # rows of a shallow prompt stand before the text in every layer
    start = model.prompt.length if isinstance(model.prompt, SoftPrompt) else 0
    pools = getattr(model.encoder, "pooler", None) is not None
    sums: dict[str, Tensor] = {}
    count = 0
    with evaluating(model), _activations(model.encoder) as heard:
        for batch in batches:
            heard.clear()
            states = model.states(batch)
            length = batch["choice_length"].flatten() if "choice_length" in batch else batch["length"]
            kept = length > 0
            real = (torch.arange(states.shape[1], device=states.device) < length[:, None])[..., None]
            mean = states.double().masked_fill(~real, 0.0).sum(1) / length.clamp(min=1)[:, None]
            first = torch.stack([layer[:, start] for layer in heard], 1).double() if heard else None
            found = {"cls_hidden": states[:, 0], "mean_tokens": mean}
            if pools:
                found["pooler"] = model.pooled(states)
            if first is not None:
                found |= {"activation": first, "active": (first > 0).double()}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value[kept].double().sum(0)
            count += int(kept.sum())
    if not count:
        raise ValueError("a signature needs at least one text")
    return {name: total / count for name, total in sums.items()}


@contextmanager
def _activations(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect [B, T, F], the activated units of each layer, in the order of the layers.

    They are what goes into the second linear layer of a feed-forward part: of the module whose input is
    `intermediate_size` wide.
    """
    config: Any = encoder.config
    shape = (getattr(config, "intermediate_size", None), config.hidden_size)
    seconds = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.Linear) and (module.in_features, module.out_features) == shape
    ]
    if len(seconds) != config.num_hidden_layers:  # another architecture, or both widths are equal
        seconds = []
    heard: list[Tensor] = []
    hooks = [one.register_forward_pre_hook(lambda _, args: heard.append(args[0])) for one in seconds]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------- similarities
def semantic(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], representation: str = "cls_hidden"
) -> float:
    """Return the cosine of two tasks' mean representations. Raises: UserError for one that they lack."""
    if representation not in one or representation not in other:
        known = ", ".join(sorted(one))
        raise UserError(f"representation = '{representation}': this encoder has none; there are {known}")
    return float(cosine_similarity(one[representation].double(), other[representation].double(), dim=0))


def neurons(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    layers: int = 0,
    by_text: bool = False,
) -> float:
    """Return the overlap of the units that two tasks activate.

    Args: `layers`: only as many, the top ones; 0: all; `by_text`: compare how often a unit is active instead
    of whether its mean activation is above 0.

    Raises: UserError where the activations of one are not known.
    """
    name = "active" if by_text else "activation"
    if name not in one or name not in other:
        raise UserError("metric = 'on': the units that a task activates are not known for this encoder")
    a, b = one[name][-layers:], other[name][-layers:]  # -0: all
    return overlap(a, b) if by_text else overlap(a > 0, b > 0)


def similarity(
    source: PromptedEncoder,
    target: PromptedEncoder,
    metric: str,
    representation: str = "cls_hidden",
    inputs: str = "own",
    layers: int = 0,
    by_text: bool = False,
) -> float:
    """Return the predicted transferability of a source to a target, in [-1, 1].

    Args: `inputs`: the texts of the signatures, by the name that they have in it: each task's own, or a
    common set of texts; `layers` and `by_text`: of `on`, as in `neurons`.

    Raises: ValueError for a metric that does not exist, UserError for one that needs what a model lacks.
    """
    if metric not in METRICS:
        raise ValueError(f"metric = '{metric}' is none of {', '.join(METRICS)}")
    if metric.startswith("e_"):
        form: Callable[[Tensor, Tensor], float] = {
            "e_avg": e_avg, "e_concat": e_concat, "e_pairwise": e_pairwise
        }[metric]  # fmt: skip
        return form(table_of(source), table_of(target))
    one, other = texts_of(source, inputs), texts_of(target, inputs)
    return (
        semantic(one, other, representation) if metric == "semantic" else neurons(one, other, layers, by_text)
    )


def table_of(model: PromptedEncoder) -> Tensor:
    """Return the model's prompt tokens, [m, W]. Raises: ValueError for a model without a prompt."""
    if model.prompt is None:
        raise ValueError("a model without a prompt has nothing to transfer")
    return model.prompt.table().detach()


def texts_of(model: PromptedEncoder, inputs: str) -> dict[str, Tensor]:
    """Return the model's signature on the texts `inputs`. Raises: UserError where it has none."""
    start = f"{inputs}."
    found = {n.removeprefix(start): v for n, v in model.signature.items() if n.startswith(start)}
    if not found:
        known = sorted({name.partition(".")[0] for name in model.signature})
        raise UserError(
            f"inputs = '{inputs}': a model has no signature on these texts, "
            f"but on {', '.join(known) or 'none'}"
        )
    return found
