"""Pooling by the last hidden state of a one-layer LSTM, on packed rows.

    i, f, u, o = W x_t + V h_(t-1) + b;   c_t = sigm(f) c_(t-1) + sigm(i) tanh(u);   h_t = sigm(o) tanh(c_t)

Sequences are sorted by length, so that step t advances the first n_t of them; nothing is padded. W x of all events is
one product, and so is the gradient of V. Elsewhere than on a CPU PyTorch's own LSTM runs on the same packed rows.
[T, width] -> [B, width]. Source: Hochreiter and Schmidhuber 1997.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ubp_fast.events.schema import UserError
from ubp_fast.kernels.transforms import direct
from ubp_fast.models.layers.linear import linear, product, product_over_rows
from ubp_fast.sequences.batch import SequenceBatch


class LastStatePooling(nn.Module):
    """The last hidden state of a one-layer LSTM over each sequence, zeros for empty ones: [T, width] -> [B, width].

    Equals `nn.LSTM` on a PackedSequence, whose backward on a CPU clears a tensor of all T rows in each step.

    Args:
        width: columns.
        own_on: types of devices whose rows our own steps compute; one step is many launches on a GPU.
    """

    def __init__(self, width: int, own_on: tuple[str, ...] = ("cpu",)) -> None:
        super().__init__()
        self.cell, self.own_on = nn.LSTMCell(width, width), own_on

    def forward(self, rows: Tensor, batch: SequenceBatch) -> Tensor:
        lengths = batch.lengths()
        by_length = lengths.argsort(descending=True, stable=True)
        rank = torch.empty_like(by_length)
        rank[by_length] = torch.arange(len(by_length), device=rows.device)
        segments = batch.segments()
        position = lengths[segments] - 1 - batch.steps_to_end()
        # Time-major order: all first events, longest sequence first, then all second events, ...
        order = (position * len(lengths) + rank[segments]).argsort()
        # An LSTM sums over hundreds of steps, which bfloat16 does not survive; what enters each step does.
        if rows.device.type in self.own_on:
            inputs = linear(rows[order], self.cell.weight_ih, self.cell.bias_ih + self.cell.bias_hh).float()
            with torch.autocast(rows.device.type, enabled=False):
                states = _direct(inputs, self.cell.weight_hh, position, len(lengths))[0]
        else:
            with torch.autocast(rows.device.type, enabled=False):
                states = self._of_library(rows[order].float(), _active(batch))
            states = functional.pad(states, (0, 0, 0, len(lengths) - len(states)))
        return states[rank]

    def _of_library(self, rows: Tensor, active: tuple[int, ...]) -> Tensor:
        """Rows float32 [T, width] time-major and how many each step has -> [n_0, width]."""
        start = rows.new_zeros(1, active[0], rows.shape[1])
        weights = [self.cell.weight_ih, self.cell.weight_hh, self.cell.bias_ih, self.cell.bias_hh]
        with warnings.catch_warnings():  # the weights lie apart: cuDNN copies them, two matrices of the width
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            _, states, _ = torch._VF.lstm(
                rows, torch.tensor(active), (start, start), weights, True, 1, 0.0, self.training, False
            )
        return states[0]


def _active(batch: SequenceBatch) -> tuple[int, ...]:
    active = batch.counts.active
    if active is None:
        raise UserError(
            "LastStatePooling: a batch of fixed sizes must be pooled by 'last' or 'mean', got 'lstm': its steps follow"
            " from the lengths; set cuda_graph=false"
        )
    return active


@torch.library.custom_op(
    "ubp_fast::last_states",
    mutates_args=(),
    schema="(Tensor inputs, Tensor weight, Tensor position, SymInt sequences)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(inputs, weight, position, sequences):
    """inputs [T, 4 * width] time-major, V [4 * width, width], the step of each event, in any order.

    Gives the last states [B, width], longest sequence first, and what backward needs of every event.
    """
    gates = inputs.clone(memory_format=torch.contiguous_format)
    states, memories, squashed = (inputs.new_empty(len(inputs), weight.shape[1]) for _ in range(3))
    last = inputs.new_zeros(sequences, weight.shape[1])
    begin = before = 0
    for count in torch.bincount(position).tolist():
        now, then = slice(begin, begin + count), slice(before, before + count)
        if begin:
            gates[now] += product(states[then], weight)
        enter, keep, update, leave = gates[now].chunk(4, dim=1)
        for gate in (enter, keep, leave):
            gate.sigmoid_()
        torch.mul(enter, update.tanh_(), out=memories[now])
        if begin:
            memories[now].addcmul_(keep, memories[then])
        torch.tanh(memories[now], out=squashed[now])
        torch.mul(leave, squashed[now], out=states[now])
        last[:count] = states[now]
        begin, before = begin + count, begin
    return last, gates, states, memories, squashed


@torch.library.custom_op(
    "ubp_fast::last_states_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor weight, Tensor position, Tensor gates, Tensor states, Tensor memories,"
    " Tensor squashed) -> (Tensor, Tensor)",
)
def _backward_op(grad_output, weight, position, gates, states, memories, squashed):
    """Gradients of inputs and weight."""
    active = torch.bincount(position).tolist()
    grad_gates = torch.empty_like(gates)
    grad_state, grad_memory = grad_output.clone(), torch.zeros_like(grad_output)
    end = len(gates)
    for step in reversed(range(len(active))):
        count = active[step]
        begin = end - count
        now = slice(begin, end)
        old = memories[begin - active[step - 1] :][:count] if step else torch.zeros_like(memories[now])
        _cell_backward(gates[now], squashed[now], old, grad_state[:count], grad_memory[:count], grad_gates[now])
        if step:
            # What goes on to the step before; sequences that end there start with the gradient of the result.
            grad_state[:count] = product(grad_gates[now], weight.t())
        end = begin
    earlier = [part[:count] for part, count in zip(states.split(active), active[1:], strict=False)]
    return grad_gates, product_over_rows(grad_gates[active[0] :], torch.cat([states[:0], *earlier]))


@_op.register_fake
def _fake(inputs, weight, position, sequences):
    last = inputs.new_empty(sequences, weight.shape[1])
    of_events = [inputs.new_empty(inputs.shape[0], weight.shape[1]) for _ in range(3)]
    return last, torch.empty_like(inputs, memory_format=torch.contiguous_format), *of_events


@_backward_op.register_fake
def _fake_backward(grad_output, weight, position, gates, *_):
    return torch.empty_like(gates), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, weight, position, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight, position, *output[1:])


@once_differentiable
def _backward(ctx, grad_output, *_):
    return *_backward_op(grad_output, *ctx.saved_tensors), None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_direct = direct(_op)


def _cell_backward(
    gates: Tensor, squashed: Tensor, old: Tensor, grad_state: Tensor, grad_memory: Tensor, grad_gates: Tensor
) -> None:
    """One step back: fills grad_gates [n, 4 * width], and grad_memory becomes that of the step before."""
    enter, keep, update, leave = gates.chunk(4, dim=1)
    to_enter, to_keep, to_update, to_leave = grad_gates.chunk(4, dim=1)
    grad_memory += torch.ops.aten.tanh_backward(grad_state * leave, squashed)
    to_leave.copy_(torch.ops.aten.sigmoid_backward(grad_state * squashed, leave))
    to_enter.copy_(torch.ops.aten.sigmoid_backward(grad_memory * update, enter))
    to_update.copy_(torch.ops.aten.tanh_backward(grad_memory * enter, update))
    to_keep.copy_(torch.ops.aten.sigmoid_backward(grad_memory * old, keep))
    grad_memory *= keep
