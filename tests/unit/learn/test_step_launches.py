"""What a learning step asks of a device beside the model's forward and backward passes: kernels,
waits of the host, new memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamask.learn.gumbel import GradientLearner
from megamask.learn.maskpro.policy_gradient import MaskPro
from megamask.learn.maskpro.samples import Reused
from megamask.learn.metrics import mask_stats
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.parallel.mask_context import Measured
from megamask.parallel.mesh import Mesh
from tests.unit.learn.one_rank import tiny_config, tiny_masked_model, tiny_plan

# Calls that make the host wait for a device (numpy, which the CPU's kernels ask for, refuses a
# tensor of a device), and operators that start no kernel.
WAITS = {"tolist", "item", "cpu", "nonzero", "__float__", "__int__", "__bool__", "__index__"}
NO_KERNELS = {"detach", "view", "_unsafe_view", "select", "slice", "split", "split_with_sizes"}
NO_KERNELS |= {"unbind", "unsqueeze", "_record_function_enter_new", "_record_function_exit"}
# A layer of the tiny model has 12,288 weights and 3,072 groups in its smallest linear.
LARGE = 512


@dataclass
class Asked:
    """What a step asked for: kernels and new memory of more than ``LARGE`` bytes outside of forward
    and backward passes, and waits anywhere.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    memory: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    is_inside: bool = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Leave out kernels and memory of the block."""
        self.is_inside = True
        try:
            yield
        finally:
            self.is_inside = False


class Kernels(TorchDispatchMode):
    """Counts operators and the memory that they make."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":  # a wait that Python does not name
            self.asked.waits.append(name)
        elif not self.asked.is_inside:
            self.asked.kernels[name] += name not in NO_KERNELS
            before = {addressed(one) for one in tree_leaves((args, kwargs))}
            fresh = {addressed(one) for one in tree_leaves(found)} - before
            self.asked.memory[name] += sum(size > LARGE for _, size in fresh)
        return found


def addressed(value: Any) -> tuple[int, int]:
    """Address and bytes of a tensor's storage; zeros of anything else."""
    if not isinstance(value, torch.Tensor):
        return 0, 0
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Waits(TorchFunctionMode):
    """Counts the calls of Python that make the host wait."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS:
            before = len(self.asked.waits)
            found = func(*args, **(kwargs or {}))
            self.asked.waits[before:] = [name]  # in the place of what it called
            return found
        return func(*args, **(kwargs or {}))


def asked_by(layers: int, **learn: Any) -> Asked:
    """What the third step of a model asks for."""
    config, asked = tiny_config(learn), Asked()
    with tiny_masked_model(config, layers) as (mesh, masked_model):
        learner: Any = GradientLearner(config, mesh, masked_model)
        statistics, plan = MaskStatistics(masked_model, mesh), tiny_plan(config, mesh)
        run = learner._forward_backward

        def passes(*arguments: Any) -> Any:
            with asked.inside():
                return run(*arguments)

        learner._forward_backward = passes
        for step in range(2):
            statistics(learner.step(step, plan).first_draw)
        with Kernels(asked), Waits(asked):
            statistics(learner.step(2, plan).first_draw)
    asked.kernels, asked.memory = +asked.kernels, +asked.memory
    return asked


@pytest.fixture(scope="module")
def small() -> Asked:
    return asked_by(layers=1)


@pytest.fixture(scope="module")
def large() -> Asked:
    return asked_by(layers=3)


def test_a_step_starts_as_many_kernels_for_any_number_of_layers(small: Asked, large: Asked) -> None:
    assert large.kernels == small.kernels
    assert sum(large.kernels.values()) <= 40
    assert large.kernels["_foreach_norm"] == large.kernels["_fused_adamw_"] == 1
    assert large.kernels["_foreach_sub_"] == large.kernels["_foreach_copy_"] == 1


def test_the_host_waits_once_before_the_update_and_once_after_it(
    small: Asked, large: Asked
) -> None:
    assert small.waits == large.waits == ["tolist", "tolist"]


@pytest.mark.parametrize("baseline", ["tracker", "leave_one_out", "hard_mask"])
def test_maskpro_waits_once_for_the_losses_of_all_micro_batches(baseline: str) -> None:
    """Also where losses under the initial masks are found, as in this first step."""
    masks = 1 if baseline == "tracker" else 2
    learn = {"micro_batch": 1, "maskpro": {"baseline": baseline, "masks": masks, "samples": 8}}
    config, asked = tiny_config({"method": "maskpro", **learn}), Asked()
    with tiny_masked_model(config, layers=1) as (mesh, masked_model):
        plan = tiny_plan(config, mesh)
        plan = replace(plan, dataset=Reused(plan.dataset, 8, seed=0))
        learner = MaskPro(config, mesh, masked_model)
        with Kernels(asked), Waits(asked):
            learner.step(0, plan)
    assert plan.accumulations == 4 and asked.waits == ["tolist"]


def test_a_step_makes_no_memory_beside_its_passes(large: Asked) -> None:
    assert not large.memory


def test_kernels_waits_and_memory_of_each_layer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics as they were: two comparisons a linear, three waits."""

    def each(self: MaskStatistics, first_draw: dict[int, Measured]) -> None:
        counts = [(one.hard_codes != one.hard_codes + 1).sum() for one in first_draw.values()]
        assert all(count > 0 for count in counts)

    monkeypatch.setattr(MaskStatistics, "__call__", each)
    found = asked_by(layers=1)
    assert found.kernels["ne"] == 4 and found.memory["ne"] == 4
    assert found.waits[0] == "tolist" and len(found.waits) == 5


@pytest.mark.parametrize("piece", [7, 1 << 23])
def test_flips_are_counted_as_by_hand(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_stats, "PIECE", piece)
    noise = torch.Generator().manual_seed(0)
    with tiny_masked_model(tiny_config()) as (mesh, masked_model):
        statistics = MaskStatistics(masked_model, mesh)
        initial = {one.parameter_id: one.hard_codes() for one in masked_model.linears.values()}
        kept, before = statistics.initial, initial
        assert kept is not None
        for step in range(4):
            draw = {
                key: Measured(
                    torch.zeros(()),
                    torch.tensor(0.5 * codes.numel(), dtype=torch.float64),
                    torch.where(torch.rand(codes.shape, generator=noise) < 0.3, 255 - codes, codes),
                )
                for key, codes in before.items()
            }
            if step == 2:
                statistics.forget_latest()
            found, codes_now = statistics(draw), {key: one.hard_codes for key, one in draw.items()}
            assert found.max_prob == 0.5
            assert found.flip_rate == (None if step == 2 else share(codes_now, before))
            assert found.prior_difference == share(codes_now, initial) > 0
            before = codes_now
        whole = torch.cat([codes.flatten() for codes in initial.values()])
        assert torch.equal(kept, whole)


def share(codes: dict[int, torch.Tensor], others: dict[int, torch.Tensor]) -> float:
    differing = sum(int((one != others[key]).sum()) for key, one in codes.items())
    return differing / sum(one.numel() for one in codes.values())


def test_without_flip_tracking_the_probability_alone_is_measured() -> None:
    with tiny_masked_model(tiny_config()) as (mesh, masked_model):
        statistics = MaskStatistics(masked_model, mesh, track_flips=False)
        groups = sum(one[:, 0].numel() for one in masked_model.mask_logits)
        empty, half = torch.empty(0), torch.tensor(groups / 2, dtype=torch.float64)
        found = statistics({1: Measured(torch.zeros(()), half, empty)})
        assert (found.max_prob, found.flip_rate, found.prior_difference) == (0.5, None, None)


def test_a_batch_goes_to_cuda_from_pinned_memory_without_a_wait() -> None:
    calls: list[Any] = []

    class Tokens:
        def pin_memory(self) -> Tokens:
            calls.append("pinned")
            return self

        def to(self, device: torch.device, **options: bool) -> Tokens:
            calls.append((device.type, options))
            return self

    tokens: Any = Tokens()
    for device in ("cuda", "cpu"):
        here: Any = SimpleNamespace(device=torch.device(device))
        assert Mesh.on_device(here, tokens) is tokens
    assert calls == ["pinned", ("cuda", {"non_blocking": True}), ("cpu", {})]
