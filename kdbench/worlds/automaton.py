"""Automata as torch modules with the ordinary causal-LM interface.

The state is what the key-value cache holds, so that a row's state follows it through `batch_select_indices`;
masked tokens leave it alone, so left padding changes nothing.
Differs: there is no head apart from the trunk (no `get_output_embeddings`), so the model is always run whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kdbench.distiller import Batch
from kdbench.worlds.tables import END, Array, Automaton, World


@dataclass
class AutomatonConfig:
    """What callers ask of a model's config."""

    vocab_size: int
    eos_token_id: int = END


class AutomatonLM(nn.Module):
    """The language model of an automaton; logits are its log-probabilities, in `dtype`."""

    def __init__(self, automaton: Automaton, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = AutomatonConfig(automaton.log_prob.shape[1])
        # the next state's *row offset* in the flattened table, so that a step is one addition and one look-up
        offsets = torch.from_numpy(automaton.next_state).long() * self.config.vocab_size
        self.register_buffer("next_offset", offsets.flatten(), persistent=False)
        self.next_offset: Tensor
        self.log_prob = nn.Parameter(torch.from_numpy(automaton.log_prob).to(dtype), requires_grad=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] of ids [B, T]; positions are ignored.

        `attention_mask` [B, past + T] is 0 at padding. A cache gets the states, as keys [B, 1, T, 1].
        """
        count = input_ids.shape[1]
        state = torch.zeros_like(input_ids[:, 0])
        if past_key_values is not None and past_key_values.get_seq_length():
            layer: Any = past_key_values.layers[0]
            state = layer.keys[:, 0, -1, 0]
        real = None if attention_mask is None else attention_mask[:, -count:].bool()
        visited = []
        for t, token in enumerate(input_ids.unbind(1)):
            following = self.next_offset[state + token]
            state = following if real is None else torch.where(real[:, t], following, state)
            visited.append(state)
        states = torch.stack(visited, dim=1)
        if past_key_values is not None:
            past_key_values.update(states[:, None, :, None], states.new_zeros(*states.shape, 0)[:, None], 0)
        logits = embedding(states // self.config.vocab_size, self.log_prob)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def prompt_batch(world: World, prompts: Array, first_id: int = 0) -> Batch:
    """Return prompts [N] (indices into `world.prompts`) as a batch; example ids count from `first_id`."""
    lengths = torch.tensor([len(prompt) for prompt in world.prompts])
    ids = torch.tensor([(*p, *[END] * (int(lengths.max()) - len(p))) for p in world.prompts])
    at = torch.from_numpy(prompts)
    return Batch(
        {
            "example_id": torch.arange(first_id, first_id + len(at)),
            "input_ids": ids[at],
            "prompt_length": lengths[at],
            "length": lengths[at],
        }
    )
