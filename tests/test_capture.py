"""The step on fake tensors: exact bytes by hand, and what it must not miss."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ullage as ul
from tests.small import tiny
from tests.zoo import workload
from ullage.capture import Session
from ullage.capture._outputs import KnownOutputs, argument_key
from ullage.capture._trace import spec_of
from ullage.cost._made import make_tensor
from ullage.mechanisms import KEEP, RECOMPUTE
from ullage.planner.model._model import model_of
from ullage.planner.study._prepare import study
from ullage.planner.study._study import Study

RNG_STATE_BYTES = 5056  # a unit holds one from entry to exit, to see whether it drew


def test_bytes_by_hand() -> None:
    """A chain of two tanh layers on (8, 16) floats: 512 bytes a tensor."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w).tanh().tanh().sum()

    profile = ul.profile(ul.Workload(Chain(), torch.ones(8, 16)), costs="roofline")
    measured = ul.measure(ul.Workload(Chain(), torch.ones(8, 16)), steps=1)
    assert [profile.first_step_peak_bytes, profile.later_step_peak_bytes] == measured.step_peaks[:2]
    assert profile.start_bytes == 512 + 64  # the batch and w
    # The peak is in backward of the second tanh: both tanh outputs and the gradient it makes; the gradient it gets is a
    # scalar that is expanded (4 bytes), and the loss is held (4 bytes). The product went when the first tanh was done.
    assert profile.peak_bytes == 512 + 64 + 3 * 512 + 4 + 4
    assert (profile.phase, profile.op) == ("backward", "aten.tanh_backward.default")


@pytest.mark.parametrize("name", ["gpt", "resnet", "moe", "lstm", "unet"])
def test_known_outputs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(work: ul.Workload) -> tuple[object, ...]:
        torch.manual_seed(0)
        session = Session(work)
        session.run(steps=2)
        t = session.trace
        rows = [(s.nbytes, s.birth, s.death, s.position, s.category) for s in t.storages]
        return t.signature, t.phase, t.stack, t.source, rows, [repr(s) for s in session.signatures]

    fast = trace(workload(name))
    monkeypatch.setattr(
        KnownOutputs, "offset", lambda self, known, args: None
    )  # nothing is known: each op asks its fake kernel
    assert trace(workload(name)) == fast


def test_a_made_output_is_as_the_constructor_makes_it() -> None:
    mode, device = FakeTensorMode(), torch.device("cpu")
    mode._allow_unsafe_data_ptr_access = False
    known = KnownOutputs(mode)
    metas = [torch.empty(2, 3, device="meta") for _ in range(3)]
    wanted = FakeTensor(mode, torch.empty(2, 3, device="meta"), device)
    for made in (known._fake(m, device) for m in metas):  # the first by the constructor itself
        assert type(made) is FakeTensor and vars(made) == vars(wanted)
        assert torch._C._dispatch_keys(made) == torch._C._dispatch_keys(wanted)
        with pytest.raises(RuntimeError, match="data pointer"):
            made.data_ptr()


def test_argument_keys_tell_numbers_apart() -> None:
    assert len({argument_key(v) for v in (1, 1.0, True)}) == 3
    assert argument_key([torch.ones(2, 3)]) == argument_key((torch.zeros(2, 3),))
    assert argument_key(torch.ones(2, 3)) != argument_key(torch.ones(3, 2).t())


@functools.cache
def _studied(name: str) -> Study:
    return study(workload(name), None, "roofline")


@pytest.mark.parametrize("name", ["gpt", "resnet", "moe", "unet"])
def test_the_composed_model_is_the_executed_step(name: str) -> None:
    """Any mixed assignment: the peak composed from homogeneous captures is that of running it."""
    s = _studied(name)
    model = model_of(s)
    draw = random.Random(0)
    for _ in range(8):
        choice = [draw.randrange(len(o)) for o in model.options]
        assignment = {f: model.options[u][c].option for u, (f, c) in enumerate(zip(model.units, choice, strict=True))}
        executed = s.execute(assignment).peak_with_update
        assert abs(model.peak(choice) - executed) <= 64 + RNG_STATE_BYTES * len(model.units)


def test_replays_are_counted_to_their_unit() -> None:
    s = _studied("gpt")
    first, later = s.capture_fresh({u.fqn: RECOMPUTE if u.block else KEEP for u in s.units})
    for capture in (first, later):
        trace, stacks = capture.session.trace, capture.session.tracker.stacks
        again = [i for i in range(capture.ops.start, capture.ops.stop) if trace.recomputed[i]]
        owners = {stacks[trace.stack[i]][0] for i in again}
        assert owners == {f"blocks.{k}" for k in range(4)}
        assert all(trace.phase[i] == "backward" for i in again)


def test_a_shared_remainder_between_blocks_is_no_unit() -> None:
    """T5 calls one dropout before and after its blocks."""
    assert not [u.fqn for u in _studied("t5").units if "dropout" in u.fqn]


def test_a_single_block_of_a_class_that_repeats_elsewhere_is_a_unit() -> None:
    """The middle of a U-Net is in no list of blocks, and may be small."""
    mid = next(u for u in _studied("unet").units if u.fqn == "mid")
    assert mid.block and mid.class_name == "ConvBlock"


def test_a_container_of_torchs_is_no_block_for_its_class() -> None:
    """Blocks that are `nn.Sequential` do not make a head of that class one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x).sum()

    s = study(ul.Workload(Model(), torch.ones(4, 8)), None, "roofline")
    assert [u.fqn for u in s.units if u.block] == ["blocks.0", "blocks.1"]


def test_forward_without_backward_leaves_nothing_behind() -> None:
    """Factories build under fake tensors; a second build sees nothing of the first."""
    made = []

    def factory() -> ul.Workload:
        made.append(1)
        work = tiny()
        return ul.Workload(work.model, work.batch, loss=work.loss, optimizer=work.optimizer)

    work = ul.Workload.from_factory(factory)
    one, two = (ul.profile(work, costs="roofline") for _ in range(2))
    assert one == two and len(made) >= 2
    assert one.peak_bytes == ul.profile(tiny(), costs="roofline").peak_bytes


def test_specs_keep_lazy_bits_and_plain_ones_keep_their_saved_text() -> None:
    x = torch.zeros(2, 3, dtype=torch.cfloat)
    plain, conj, neg = spec_of(x), spec_of(x.conj()), spec_of(x.conj().imag)
    assert repr(plain) == "TensorSpec(shape=(2, 3), stride=(3, 1), dtype=torch.complex64, device='cpu')"
    assert (conj.conj, conj.neg, neg.conj, neg.neg) == (True, False, False, True)
    assert repr(conj) == repr(plain)[:-1] + ", conj=True)"
    for spec in (plain, conj, neg):
        assert spec_of(make_tensor(spec, 1)) == spec


@pytest.mark.parametrize("op", [torch.bmm, lambda a, b: torch.einsum("fbd,fde->fbe", a, b)])
def test_conjugated_arguments_of_complex_kernels_are_predicted_exactly(op: Any) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return x + op(x.to(torch.cfloat), self.w).real

    net = nn.Sequential(Complex(), Complex())
    w = ul.Workload(net, torch.randn(3, 16, 8), loss=lambda o, b: o.square().mean())
    plan = ul.plan(w, policy="every_block")
    assert ul.measure(w, plan).peak_bytes == plan.predicted.peak_bytes
    assert ul.measure(w, None).peak_bytes == plan.baseline.peak_bytes
