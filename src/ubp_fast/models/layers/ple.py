"""Progressive layered extraction: shared and own experts per task, mixed by gates, in two levels.

Level 1 mixes experts of the profile per task and once for all; level 2 does so again on those mixtures; each task ends
in its tower. Profile [B, E] -> one tensor of logits [B, n] per task.

Source: Tang et al. 2020 (RecSys), constants of docs/winner.md 4.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.layers.dropout import RowSequential, dropout
from ubp_fast.models.layers.linear import Linear


@dataclass(frozen=True)
class PLEConfig:
    """Experts, gates and towers."""

    shared_experts: int = 4  # per level; docs/winner.md 4.5
    task_experts: int = 4  # per task and level; docs/winner.md 4.5
    expert_hidden: int = 256  # columns; docs/winner.md 4.5
    expert_width: int = 128  # columns an expert returns; docs/winner.md 4.5
    expert_dropout: float = 0.01  # share dropped inside an expert; docs/winner.md 4.5
    tower_hidden: int = 128  # columns; docs/winner.md 4.5
    tower_dropout: float = 0.1  # share dropped inside a tower; docs/winner.md 4.5


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """As `nn.Linear` starts: uniform in +-1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class ExpertBank(nn.Module):
    """G groups of K experts, each Linear - ReLU - dropout - Linear, as two products: [B, G, in] -> [B, G, K, out]."""

    def __init__(self, groups: int, experts: int, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.experts = dropout, experts
        self.hidden_weight = _uniform(groups, inputs, experts * hidden, fan_in=inputs)
        self.hidden_bias = _uniform(groups, experts * hidden, fan_in=inputs)
        self.out_weight = _uniform(groups * experts, hidden, outputs, fan_in=hidden)
        self.out_bias = _uniform(groups, experts, outputs, fan_in=hidden)

    def forward(self, inputs: Tensor, first_view: int = 0) -> Tensor:
        size, groups, _ = inputs.shape
        hidden = torch.einsum("bgi,gih->bgh", inputs, self.hidden_weight) + self.hidden_bias
        hidden = dropout(functional.relu(hidden), self.dropout, self.training, first_view)
        hidden = hidden.reshape(size, groups * self.experts, -1)
        outputs = torch.einsum("bkh,kho->bko", hidden, self.out_weight)
        return outputs.reshape(size, groups, self.experts, -1) + self.out_bias


class ExtractionLevel(nn.Module):
    """One level: experts of each task and shared ones, mixed by softmax gates.

    Args:
        tasks: number of tasks N.
        gate_inputs: columns of what the gates read.
        inputs: columns of what the experts read.
        has_shared_gate: return the mixture of all experts as well (every level but the last).
        config: sizes.
    """

    def __init__(self, tasks: int, gate_inputs: int, inputs: int, has_shared_gate: bool, config: PLEConfig) -> None:
        super().__init__()
        sizes = (inputs, config.expert_hidden, config.expert_width, config.expert_dropout)
        self.own = ExpertBank(tasks, config.task_experts, *sizes)
        self.shared = ExpertBank(1, config.shared_experts, *sizes)
        choices = config.shared_experts + config.task_experts
        self.gate_weight = _uniform(tasks, gate_inputs, choices, fan_in=gate_inputs)
        self.gate_bias = _uniform(tasks, choices, fan_in=gate_inputs)
        everything = tasks * config.task_experts + config.shared_experts
        self.shared_gate = Linear(gate_inputs, everything) if has_shared_gate else None

    def forward(
        self, task_inputs: Tensor, shared_inputs: Tensor, gate_inputs: Tensor, first_view: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mixes the experts.

        Args:
            task_inputs: [B, N, inputs].
            shared_inputs: [B, inputs].
            gate_inputs: [B, N, gate_inputs].
            first_view: number of the first row in a step that several processes share.

        Returns:
            Task mixtures [B, N, expert_width], the shared mixture [B, expert_width] or None, and the task gates
            [B, N, shared + own experts], each summing to 1.
        """
        own, shared = self.own(task_inputs, first_view), self.shared(shared_inputs[:, None], first_view)
        tasks = own.shape[1]
        pool = torch.cat([shared.expand(-1, tasks, -1, -1), own], dim=2)
        gates = torch.einsum("bni,nik->bnk", gate_inputs, self.gate_weight) + self.gate_bias
        gates = gates.float().softmax(dim=2)
        mixed = torch.einsum("bnk,bnko->bno", gates.to(pool.dtype), pool)
        if self.shared_gate is None:
            return mixed, None, gates
        everything = torch.cat([shared.flatten(1, 2), own.flatten(1, 2)], dim=1)
        # The shared gate reads the same input as the task gates, which is one for all tasks on this level.
        weights = self.shared_gate(gate_inputs[:, 0]).float().softmax(dim=1)
        return mixed, torch.einsum("bk,bko->bo", weights.to(everything.dtype), everything), gates


class PLE(nn.Module):
    """Two levels and one tower per task.

    Args:
        inputs: columns E of the profile.
        outputs: logits per task, in the order of the tasks.
        config: sizes.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], config: PLEConfig) -> None:
        super().__init__()
        self.names = tuple(outputs)
        width = config.expert_width
        self.first = ExtractionLevel(len(outputs), inputs, inputs, True, config)
        self.second = ExtractionLevel(len(outputs), width, width, False, config)
        self.towers = nn.ModuleDict(
            {
                name: RowSequential(
                    Linear(width, config.tower_hidden),
                    nn.ReLU(),
                    nn.Dropout(config.tower_dropout),
                    Linear(config.tower_hidden, count),
                )
                for name, count in outputs.items()
            }
        )

    def forward(self, profile: Tensor, first_view: int = 0) -> dict[str, Tensor]:
        """[B, E] -> logits [B, n] per task; `first_view`: number of the first row in a step that processes share."""
        per_task = profile[:, None].expand(-1, len(self.names), -1)
        mixed, shared, _ = self.first(per_task, profile, per_task, first_view)
        assert shared is not None
        mixed, _, _ = self.second(mixed, shared, mixed, first_view)
        return {name: self.towers[name](mixed[:, index], first_view) for index, name in enumerate(self.names)}
