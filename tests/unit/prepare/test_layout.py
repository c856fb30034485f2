"""The rules of a layout: each has one message, which every verb that needs the rule gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megamask.config import Config
from megamask.config.load import build_config, load_config
from megamask.errors import ConfigError
from megamask.plan.fit import check_free
from megamask.plan.hardware import GIB
from megamask.plan.workload import Workload
from megamask.prepare.layout import Layout, check_positions, evaluated_length
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import prunable
from megamask.weights.shapes import read_shape

REPO = Path(__file__).resolve().parents[3]
TINY = read_architecture(REPO / "configs" / "models" / "tiny-llama.json")  # hidden 64, ffn 128


def parallel(**settings: object) -> Config:
    return build_config({"parallel": settings})


def check_rows(pattern: str, tp: int, exclude: Sequence[str] = ()) -> None:
    modules = prunable(TINY, ["*"], exclude)
    Layout(tp).check_rows(TINY, dict.fromkeys(modules, Pattern.parse(pattern)))


def test_the_launched_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp.*--nproc-per-node 3"):
        Layout.launched(parallel(tp=3))
    with pytest.raises(ConfigError, match="sequence_parallel"):
        Layout.launched(parallel(sequence_parallel=True))
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)
    assert Layout.launched(parallel(tp=3, sequence_parallel=True)) == Layout(3, 2, True)
    with pytest.raises(ConfigError, match="number of processes, here 6"):
        Layout.launched(parallel(tp=4))


@pytest.mark.parametrize(
    ("pattern", "tp", "where"),
    [
        ("2:7", 1, r"self_attn\.q_proj, here 64\."),
        ("1:64", 2, r"self_attn\.o_proj, here 32 after splitting over parallel\.tp=2\."),
        ("1:32", 4, r"self_attn\.o_proj, here 16 after splitting over parallel\.tp=4\."),
    ],
)
def test_a_row_that_m_does_not_divide(pattern: str, tp: int, where: str) -> None:
    said = (
        rf"pattern = '{pattern}': M must divide in_features of model\.layers\.0\.{where} "
        "Choose another pattern, for this layer alone with pattern_overrides, a smaller parallel.tp"
    )
    with pytest.raises(ConfigError, match=said):
        check_rows(pattern, tp)


@pytest.mark.parametrize(
    ("pattern", "tp", "exclude"),
    [("1:64", 1, []), ("1:32", 2, []), ("1:64", 2, ["*o_proj"]), ("1:32", 4, ["*o_proj"])],
)
def test_rows_that_fit(pattern: str, tp: int, exclude: list[str]) -> None:
    """Of the row-parallel linears o_proj has 64 inputs and down_proj 128; what stays dense is not
    looked at.
    """
    check_rows(pattern, tp, exclude)


def test_a_dense_linear_may_have_any_rows_in_every_verb() -> None:
    """SmolLM2-135M: 576 inputs are groups of 9, the 1,536 of down_proj are not."""
    arch = read_shape("smollm2-135m")
    for exclude, fits in (([], False), (["*.down_proj"], True)):
        config = load_config(None, ["pattern=3:9", f"model.exclude={exclude}"])

        def learn(config: Config = config, exclude: Sequence[str] = exclude) -> None:
            modules = prunable(arch, config.model.include, exclude)
            Layout.launched(config).check_linears(
                config, arch, dict.fromkeys(modules, Pattern(3, 9))
            )

        def plan(config: Config = config) -> None:
            Workload(config, arch).check()

        def before_loading(config: Config = config) -> None:
            check_free(config, arch, 1, 70 * GIB, "GPU")

        said = []
        for check in (learn, plan, before_loading):
            if fits:
                check()
            else:
                with pytest.raises(ConfigError, match="mlp.down_proj, here 1536") as refused:
                    check()
                said.append(str(refused.value))
        assert len(set(said)) <= 1


@pytest.mark.parametrize("key", ["data.seq_length", "evaluate.window", "calibration.seq_length"])
def test_sequence_parallel_divides_every_length(key: str) -> None:
    layout = Layout(4, sequence_parallel=True)
    for length in (62, 64):
        config = load_config(None, [f"{key}={length}"])
        if length % 4:
            with pytest.raises(ConfigError, match=f"{key} = 62: a multiple of parallel.tp=4"):
                layout.check_lengths(config, [key])
        else:
            layout.check_lengths(config, [key])
        Layout(4).check_lengths(config, [key])


def test_a_protocol_brings_its_windows_with_it() -> None:
    """The window of a published protocol is checked in the place of ``evaluate.window``."""
    plain = load_config(None, ["evaluate.window=63"])
    assert evaluated_length(plain) == "evaluate.window"
    config = load_config(None, ["evaluate.window=63", "evaluate.protocol=wikitext2-2048"])
    key = evaluated_length(config)
    Layout(4, sequence_parallel=True).check_lengths(config, [key])
    said = r"evaluate\.protocol = 'wikitext2-2048': its windows have 2,048 tokens, not "
    with pytest.raises(ConfigError, match=said + r"a multiple of parallel\.tp=3"):
        Layout(3, sequence_parallel=True).check_lengths(config, [key])
    with pytest.raises(ConfigError, match=said + "at most 128, the positions"):
        check_positions(config, TINY, (key,))


@pytest.mark.parametrize("key", ["data.seq_length", "evaluate.window"])
def test_learning_and_its_plan_check_both_lengths(key: str) -> None:
    settings = ["parallel.tp=2", "parallel.sequence_parallel=true", f"{key}=63"]
    config = load_config(None, settings)
    with pytest.raises(ConfigError, match=f"{key} = 63"):
        Layout.planned(config, 1).check_samples(config)
    with pytest.raises(ConfigError, match=f"{key} = 63"):
        Workload(config, read_shape("llama2-7b")).check()


def test_more_replicas_than_layers() -> None:
    """The tiny model has two layers of four Megatron linears each."""
    modules = prunable(TINY, ["*"], [])
    config = load_config(None, ["learn.optimizer.distributed=true"])
    Layout(1, 8).check_owners(config, TINY, modules)
    with pytest.raises(ConfigError, match="here 9 and 8"):
        Layout(1, 9).check_owners(config, TINY, modules)
    few = [name for name in modules if name.endswith("o_proj")]
    with pytest.raises(ConfigError, match="here 3 and 2"):
        Layout(1, 3).check_owners(config, TINY, few)
    Layout(1, 9).check_owners(load_config(None, []), TINY, modules)


def test_no_sequence_is_longer_than_the_positions_of_the_model() -> None:
    config = build_config({"data": {"seq_length": 128}, "evaluate": {"window": 129}})
    check_positions(config, TINY, ("data.seq_length",))
    with pytest.raises(ConfigError, match=r"evaluate\.window = 129: at most 128, the positions"):
        check_positions(config, TINY, ("data.seq_length", "evaluate.window"))
    with pytest.raises(ConfigError, match=r"data\.seq_length = 256: at most 128"):
        Workload(build_config({}), TINY).check()
