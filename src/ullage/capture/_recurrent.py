"""Run recurrent layers op by op as a CPU does.

C++ chooses by the backend, which is Meta for a fake tensor, and reads the lengths of packed sequences, which fake tensors don't have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ullage._torch import onednn_is_on

Hidden = tuple[Tensor, ...]


def takes_onednn(x: Tensor, hx: Any, weights: Any, bias: bool) -> bool:
    """Would `at::lstm` run oneDNN's op on real tensors like these (`use_mkldnn`, aten/native/RNN.cpp)?"""
    if not (torch.backends.mkldnn.is_available() and onednn_is_on()) or x.numel() == 0:
        return False
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in (x, *hx, *weights)):
        return False
    if hx[0].shape[2] != hx[1].shape[2]:  # a projection
        return False
    if x.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if x.dtype is torch.float16:
        return not torch.is_grad_enabled() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return x.dtype is torch.float32


def dense_lstm(
    x: Tensor,
    hx: Any,
    weights: Any,
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
    batch_first: bool,
) -> Any:
    """Run the ops of `at::lstm` on a CPU: one oneDNN op per layer and direction (aten/native/mkldnn/RNN.cpp)."""
    directions = 2 if both else 1
    per = 4 if bias else 2
    h0, c0 = hx
    hidden = h0.shape[2]
    if batch_first:
        x = x.transpose(0, 1)
    x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
    hs, cs = [], []
    for layer in range(layers):
        outs = []
        for d in range(directions):
            k = layer * directions + d
            w = list(weights[k * per : (k + 1) * per])
            if not bias:
                w += [torch.zeros(w[0].shape[0], dtype=w[0].dtype)] * 2
            out, h, c, _ = torch.ops.aten.mkldnn_rnn_layer(
                x, *w, h0[k], c0[k], d == 1, [], 2, hidden, layers, bias, both, batch_first, train
            )
            outs.append(out)
            hs.append(h)
            cs.append(c)
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    if batch_first:
        x = x.transpose(0, 1)
    return x, torch.stack(hs), torch.stack(cs)


def packed(
    kind: str,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    weights: Any,
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
) -> Any:
    """Run the ops on packed sequences: cells unrolled over time, the input's part of all gates first (aten/native/RNN.cpp)."""
    sizes, directions = batch_sizes.tolist(), 2 if both else 1
    per = len(weights) // (layers * directions)
    states = hx if isinstance(hx, tuple | list) else (hx,)
    before: list[Hidden] = list(zip(*(s.unbind(0) for s in states), strict=True))
    after: list[Hidden] = []
    for layer in range(layers):
        outs = []
        for d in range(directions):
            k = layer * directions + d
            run = _backwards if d else _forwards
            out, last = run(data, sizes, before[k], _Cell(kind, weights[k * per : (k + 1) * per], bias))
            outs.append(out)
            after.append(last)
        data = outs[0] if directions == 1 else torch.cat(outs, -1)
        if dropout and train and layer < layers - 1:
            data = torch.dropout(data, dropout, True)
    return data, *(torch.stack(parts) for parts in zip(*after, strict=True))


class Pack(torch.autograd.Function):
    """The ops of `at::_pack_padded_sequence` and its backward."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Return the rows of sequences sorted by length, and the number of sequences at each time."""
        ends, rows = lengths.tolist(), len(lengths)
        by_time = given.transpose(0, 1) if batch_first else given
        steps, first, sizes = [], 0, list[int]()
        for i, end in enumerate(reversed(ends)):
            if end > first:
                part = by_time.narrow(0, first, end - first).narrow(1, 0, rows - i)
                steps.append(part.contiguous().view(-1, *given.shape[2:]))
                sizes += [rows - i] * (end - first)
                first = end
        counts = torch.tensor(sizes)
        ctx.save_for_backward(counts)
        ctx.mark_non_differentiable(counts)
        ctx.shape, ctx.batch_first = by_time.shape, batch_first
        return torch.cat(steps), counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        """Write the gradient to the places that were not padding."""
        (counts,) = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        offset = 0
        for i, size in enumerate(counts.tolist()):
            out[i].narrow(0, 0, size).copy_(grad.narrow(0, offset, size))
            offset += size
        return (out.transpose(0, 1) if ctx.batch_first else out), None, None


def padded(data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor, Tensor]:
    """Run the ops of `at::_pad_packed_sequence` (aten/native/PackedSequence.cpp); return the padded tensor and the lengths."""
    sizes = batch_sizes.tolist()
    steps, rows = len(sizes), sizes[0]
    out = torch.full((max(steps, length), rows, *data.shape[1:]), value, dtype=data.dtype, device=data.device)
    offset = first = 0
    for i, size in enumerate([*sizes, 0]):
        before = sizes[i - 1] if i else size
        if i and size != before:
            n = before * (i - first)
            part = data.narrow(0, offset, n).view(i - first, before, *data.shape[1:])
            out.narrow(0, first, i - first).narrow(1, 0, before).copy_(part)
            offset, first = offset + n, i
    lengths = torch.tensor([sum(size > row for size in sizes) for row in range(rows)])
    return (out.transpose(0, 1) if batch_first else out), lengths


class _Cell:
    """One step of an LSTM, a GRU or a plain RNN."""

    def __init__(self, kind: str, weights: Sequence[Tensor], bias: bool) -> None:
        self.ih, self.hh = weights[:2]
        self.bias_ih: Tensor | None = weights[2] if bias else None
        self.bias_hh: Tensor | None = weights[3] if bias else None
        self.projection = weights[-1] if len(weights) in (3, 5) else None
        self.step: Callable[[Tensor, Hidden], Hidden] = {"lstm": self._lstm, "gru": self._gru}.get(kind, self._plain)
        self.activation = torch.relu if kind == "rnn_relu" else torch.tanh

    def inputs(self, data: Tensor) -> Tensor:
        return linear(data, self.ih, self.bias_ih)

    def _lstm(self, given: Tensor, hidden: Hidden) -> Hidden:
        gates = linear(hidden[0], self.hh, self.bias_hh).add_(given)
        into, forget, cell, out = gates.unsafe_chunk(4, 1)
        into, forget, cell, out = into.sigmoid_(), forget.sigmoid_(), cell.tanh_(), out.sigmoid_()
        c = (forget * hidden[1]).add_(into * cell)
        h = out * c.tanh()
        return (h if self.projection is None else h.matmul(self.projection.t())), c

    def _gru(self, given: Tensor, hidden: Hidden) -> Hidden:
        from_input = given.unsafe_chunk(3, 1)
        from_hidden = linear(hidden[0], self.hh, self.bias_hh).unsafe_chunk(3, 1)
        reset = from_hidden[0].add_(from_input[0]).sigmoid_()
        into = from_hidden[1].add_(from_input[1]).sigmoid_()
        new = from_input[2].add(from_hidden[2].mul_(reset)).tanh_()
        return ((hidden[0] - new).mul_(into).add_(new),)

    def _plain(self, given: Tensor, hidden: Hidden) -> Hidden:
        return (self.activation(linear(hidden[0], self.hh, self.bias_hh).add_(given)),)


def _each(run: Callable[..., Tensor], *hidden: Any) -> Hidden:
    """Run on hidden states and cells, cells first as in C++: GCC evaluates `make_tuple(h, c)` from the right."""
    return tuple(run(*same) for same in reversed(list(zip(*hidden, strict=True))))[::-1]


def _rows(hidden: Hidden, first: int, last: int) -> Hidden:
    return _each(lambda h: h.narrow(0, first, last - first), hidden)


def _joined(parts: Sequence[Hidden]) -> Hidden:
    return _each(lambda *same: torch.cat(same), *parts)


def _forwards(data: Tensor, sizes: list[int], hidden: Hidden, cell: _Cell) -> tuple[Tensor, Hidden]:
    given, at, last = cell.inputs(data), 0, sizes[0]
    ended: list[Hidden] = []
    outs = []
    for size in sizes:  # sequences are sorted by length, so the ones that end here are the last rows
        # before the cell, as in C++: the order of nodes decides the order of gradients
        step = given.narrow(0, at, size)
        if size < last:
            ended.append(_rows(hidden, size, last))
            hidden = _rows(hidden, 0, size)
            last = size
        hidden = cell.step(step, hidden)
        outs.append(hidden[0])
        at += size
    return torch.cat(outs), _joined([hidden, *reversed(ended)])


def _backwards(data: Tensor, sizes: list[int], start: Hidden, cell: _Cell) -> tuple[Tensor, Hidden]:
    given, at, last = cell.inputs(data), data.shape[0], sizes[-1]
    hidden = _rows(start, 0, last)
    outs = []
    for size in reversed(sizes):
        if size > last:
            hidden = _joined([hidden, _rows(start, last, size)])
            last = size
        at -= size
        hidden = cell.step(given.narrow(0, at, size), hidden)
        outs.append(hidden[0])
    return torch.cat(outs[::-1]), hidden
