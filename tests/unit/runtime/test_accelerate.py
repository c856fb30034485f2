"""Which linears of a model get 2:4 kernels, and that the model computes the same with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import GPT2Config, GPT2LMHeadModel

import megamask
from megamask.errors import ArgumentError, ArtifactError
from megamask.runtime.accelerate import (
    ALREADY,
    NOT_24,
    _as_passes,
    _beside,
    accelerate_on,
)
from megamask.runtime.speed_table import SpeedTable
from megamask.storage import write_json
from tests.unit.masks.test_apply import tiny_model
from tests.unit.runtime.cpu_kernels import FACTS, CpuDevice, products_on_a_cpu, prune, row

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SLOW = {"sparse_ms": 4.0, "speed_up": (0.45, 0.5, 0.55)}
TABLE = SpeedTable(FACTS, {1: 1}, [row((128, 64), 1), row((64, 128), 1), row((64, 64), 1, **SLOW)])


def pruned(but: str = "lm_head", **changes: Any) -> nn.Module:
    model = tiny_model(**{**SIZES, **changes}).to(torch.bfloat16).eval()
    prune(model, but)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(14).view(2, 7)).logits
    return found


def test_linears_that_are_faster_change_and_the_model_computes_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = pruned(but="layers.1.mlp.up_proj")  # a layer that was kept dense
    prune(model, but="model")  # the head is 2:4 too, and no row of the table has its shape
    dense = logits(model)
    done = {one.name: one for one in accelerate_on(model, CpuDevice(), TABLE, None)}
    said = capsys.readouterr().out
    modules = dict(model.named_modules())
    assert set(done) == {name for name, one in modules.items() if isinstance(one, nn.Linear)}
    for name, one in done.items():
        kind = name.rpartition(".")[2]
        weight: Any = modules[name].weight
        was: type[Any] = type(weight)
        if kind in ("gate_proj", "down_proj") or name == "model.layers.0.mlp.up_proj":
            assert one.kernel == "cutlass" and one.why.startswith("cutlass is 2.00 times as fast")
            assert was is SparseSemiStructuredTensorCUTLASS and not weight.requires_grad
            assert one.bytes == one.dense_bytes * 9 / 16
            continue
        assert one.kernel is None and was is nn.Parameter
        assert one.bytes == one.dense_bytes
        expected = {
            "up_proj": NOT_24,
            "q_proj": "no gain: dense is 2.00 times as fast (cutlass)",
            "o_proj": "no gain: dense is 2.00 times as fast (cutlass)",
            "k_proj": "not measured: 32 x 64 bf16 with 1 tokens",
            "v_proj": "not measured: 32 x 64 bf16 with 1 tokens",
            "lm_head": "cutlass takes multiples of 32 rows and 64 columns",  # 50 words
        }[kind]
        assert one.why == expected
    with products_on_a_cpu():
        # Additions have another order than in the dense product; bf16 keeps 8 bits.
        torch.testing.assert_close(logits(model), dense, rtol=2**-6, atol=2**-8)
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if "|" in line}
    assert " 2 |" in rows["model.layers.*.mlp.down_proj"] and "cutlass" in said
    assert "5 of 15 linears use a 2:4 kernel; their weights take 0.1 MB" in said

    # The second call changes nothing, and says so.
    again = {one.name: one for one in accelerate_on(model, CpuDevice(), TABLE, None, quiet=True)}
    assert capsys.readouterr().out == ""
    for name, one in again.items():
        assert one.kernel == done[name].kernel
        assert one.why == (ALREADY if one.kernel else done[name].why)


def test_another_weight_shows_in_the_logits() -> None:
    """The comparison above would notice a converted weight that holds other numbers."""
    model = pruned()
    dense = logits(model)
    accelerate_on(model, CpuDevice(), TABLE, None, quiet=True)
    weight: Any = model.get_submodule("model.layers.0.mlp.down_proj").weight
    weight.packed.mul_(1.5)
    with products_on_a_cpu(), pytest.raises(AssertionError):
        torch.testing.assert_close(logits(model), dense, rtol=2**-6, atol=2**-8)


def test_shapes_are_measured_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.runtime.accelerate.ROUNDS", 1)
    model = pruned()
    with products_on_a_cpu():
        done = accelerate_on(model, CpuDevice(), None, {1: 1}, quiet=True)
    told = {one.name.rpartition(".")[2]: one.why for one in done}
    assert "cutlass" in told["up_proj"] and "cutlass" in told["k_proj"]
    assert told["lm_head"] == NOT_24  # whether a kernel is faster on a CPU says nothing


def test_a_conversion_that_fails_leaves_the_linear_dense() -> None:
    def fails(weight: Tensor) -> Tensor:
        raise RuntimeError("out of something")

    for convert, why in (
        (fails, "not possible: out of something"),
        (lambda weight: weight + 1, "not possible: the converted weight holds other numbers"),
    ):
        model = pruned()
        before = logits(model)
        done = accelerate_on(model, CpuDevice(convert=convert), TABLE, None, quiet=True)
        assert {one.why for one in done if one.name.endswith("up_proj")} == {why}
        assert not any(one.kernel for one in done) and torch.equal(logits(model), before)


def other_forward() -> nn.Module:
    class Half(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    model = nn.Sequential(Half(64, 64), nn.Linear(64, 64)).bfloat16()
    prune(model)
    return model


def not_finite() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    prune(model)
    model.get_parameter("0.weight").data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (other_forward, "its class, Half, multiplies in a way of its own"),
        (not_finite, "its weights are not finite"),
    ],
)
def test_linears_that_stay_dense_whatever_the_times(model: Any, why: str) -> None:
    done = accelerate_on(model(), CpuDevice(), SpeedTable(FACTS, {1: 1}, [row((64, 64), 1)]), None)
    assert [one.kernel for one in done] == [None, "cutlass"] and done[0].why == why


def conv1d() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: tiny_model(**SIZES).bfloat16(), "has no linear whose weights are 2:4"),
        (lambda: nn.Linear(64, 64).bfloat16(), "has no linear whose weights are 2:4"),
        (lambda: nn.Embedding(4, 4), "has no linear whose weights are 2:4"),
        (lambda: pruned().float(), "14 of 15: fp32: 2:4 kernels take bf16 and fp16"),
        (
            lambda: pruned(hidden_size=48, intermediate_size=80),
            "14 of 15: cutlass takes multiples of 32 rows and 64 columns",
        ),
        (lambda: pruned().to("meta"), "15 of 15: a linear whose weight is on the meta device"),
        (conv1d, "4 of 5: its class, Conv1D, multiplies in a way of its own"),
    ],
)
def test_a_model_that_cannot_gain_is_refused_and_stays(model: Any, said: str) -> None:
    made = model()
    before = {name: (one, one._version) for name, one in made.named_parameters()}
    with pytest.raises(ArtifactError) as found:
        accelerate_on(made, CpuDevice(), TABLE, None)
    assert said in str(found.value), str(found.value)
    assert before == {name: (one, one._version) for name, one in made.named_parameters()}


def test_a_shared_weight_stays_dense() -> None:
    model = pruned(but="nothing", vocab_size=64, tie_word_embeddings=True)
    (head,) = [
        one
        for one in accelerate_on(model, CpuDevice(), TABLE, None, quiet=True)
        if one.name == "lm_head"
    ]
    assert head.why == "shares its weight with another module"


def test_without_a_gpu_the_need_is_told() -> None:
    """On a machine with a GPU, a model on the CPU is refused for its place."""
    with pytest.raises(ArtifactError) as found:
        megamask.accelerate(pruned(), measure=True)
    assert "CUDA device" in str(found.value)
    if not torch.cuda.is_available():
        for word in ("compute capability 8.0", "PyTorch built with CUDA", torch.__version__):
            assert word in str(found.value)


@pytest.mark.parametrize(
    "tokens", [0, -1, True, {}, {0: 1}, {1: 0}, {1: 1.5}, {"1": 1}, {1: True}, 2**21, [1], "1"]
)
def test_tokens_that_are_no_passes_are_refused(tokens: Any) -> None:
    with pytest.raises(ArgumentError, match="accelerate: tokens"):
        _as_passes(tokens)


def test_arguments() -> None:
    assert _as_passes(None) is None and _as_passes(4) == {4: 1} and _as_passes({2: 3}) == {2: 3}
    with pytest.raises(ArgumentError, match="a table is read, or measure=True measures"):
        megamask.accelerate(pruned(), "speed.json", measure=True)


def test_a_table_is_found_beside_the_folder_of_the_model(tmp_path: Path) -> None:
    model: Any = pruned()
    model.config.name_or_path = str(tmp_path / "export")
    with pytest.raises(ArgumentError) as found:
        _beside(model)
    assert str(tmp_path / "speed.json") in str(found.value) and "measure=True" in str(found.value)
    write_json(tmp_path / "speed.json", TABLE.as_json())
    assert _beside(model) == tmp_path / "speed.json"
    (tmp_path / "export").mkdir()
    write_json(tmp_path / "export" / "speed.json", TABLE.as_json())
    assert _beside(model) == tmp_path / "export" / "speed.json"
