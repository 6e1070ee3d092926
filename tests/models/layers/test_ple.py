"""Experts and gates against loops."""

from __future__ import annotations

import torch
from support.small_models import untouched_parameters
from torch import nn

from ubp_fast.models.layers.ple import PLE, ExpertBank, ExtractionLevel, PLEConfig

SMALL = PLEConfig(2, 3, 8, 6, 0.0, 5, 0.0)


def test_expert_bank_is_many_small_networks() -> None:
    torch.manual_seed(0)
    bank = ExpertBank(groups=2, experts=3, inputs=4, hidden=5, outputs=6, dropout=0.0)
    inputs = torch.randn(7, 2, 4)
    outputs = bank(inputs)
    assert outputs.shape == (7, 2, 3, 6)
    for group in range(2):
        for expert in range(3):
            part = slice(expert * 5, expert * 5 + 5)
            hidden = inputs[:, group] @ bank.hidden_weight[group][:, part] + bank.hidden_bias[group, part]
            expected = torch.relu(hidden) @ bank.out_weight[group * 3 + expert] + bank.out_bias[group, expert]
            torch.testing.assert_close(outputs[:, group, expert], expected)


def test_level_mixes_shared_and_own_experts() -> None:
    torch.manual_seed(0)
    level = ExtractionLevel(tasks=2, gate_inputs=4, inputs=4, has_shared_gate=True, config=SMALL)
    inputs = torch.randn(9, 4)
    per_task = inputs[:, None].expand(-1, 2, -1)
    mixed, shared, gates = level(per_task, inputs, per_task)
    assert gates.shape == (9, 2, 5)
    torch.testing.assert_close(gates.sum(2), torch.ones(9, 2))
    own_experts, shared_experts = level.own(per_task), level.shared(inputs[:, None])[:, 0]
    for task in range(2):
        experts = torch.cat([shared_experts, own_experts[:, task]], dim=1)
        logits = inputs @ level.gate_weight[task] + level.gate_bias[task]
        torch.testing.assert_close(gates[:, task], logits.softmax(1))
        torch.testing.assert_close(mixed[:, task], (gates[:, task, :, None] * experts).sum(1))
    everything = torch.cat([shared_experts, own_experts[:, 0], own_experts[:, 1]], dim=1)
    weights = level.shared_gate(inputs).softmax(1)
    torch.testing.assert_close(shared, (weights[:, :, None] * everything).sum(1))


def test_own_experts_of_one_task_do_not_serve_another() -> None:
    torch.manual_seed(0)
    level = ExtractionLevel(tasks=2, gate_inputs=4, inputs=4, has_shared_gate=False, config=SMALL)
    inputs = torch.randn(3, 2, 4)
    mixed, shared, _ = level(inputs, inputs[:, 0], inputs)
    assert shared is None
    mixed[:, 0].sum().backward()
    assert level.own.out_weight.grad[:3].abs().sum() > 0
    assert level.own.out_weight.grad[3:].abs().sum() == 0


def test_logits_have_the_shape_of_their_labels_and_all_parameters_learn() -> None:
    torch.manual_seed(0)
    model = PLE(12, {"churn": 1, "buy_sku": 7}, SMALL)
    logits = model(torch.randn(11, 12))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"churn": (11, 1), "buy_sku": (11, 7)}
    sum(value.square().sum() for value in logits.values()).backward()
    assert not untouched_parameters(model)


def test_winner_size() -> None:
    outputs = dict.fromkeys(("churn", "add"), 1) | dict.fromkeys("abcdef", 100)
    with torch.device("meta"):
        model = PLE(256, outputs, PLEConfig())
    experts = [part for level in (model.first, model.second) for part in (level.own, level.shared)]
    counted = sum(value.numel() for part in experts for value in part.parameters())
    twin = [[256, 256, 128], [128, 256, 128]]
    expected = 36 * sum(
        sum(value.numel() for value in nn.Sequential(nn.Linear(a, b), nn.Linear(b, c)).parameters()) for a, b, c in twin
    )
    assert counted == expected == 5_925_888
