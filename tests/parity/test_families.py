"""Every family: logits and perplexity through Megatron equal those of transformers at TP 1, TP 2
and TP 2 with sequence parallel, the tensors come back bit for bit, and wrong readings show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask.model.build import build_model, masked_linears, model_rules
from megamask.model.checkpoint import fill_from_hf, save_sharded, sharded_state
from megamask.parallel.mesh import start
from megamask.weights import channel_orders
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.channel_orders import ChannelOrders, reordered
from megamask.weights.file_layout import file_layout
from megamask.weights.hf_files import open_checked, write_hf
from tests.parallel.ranks import meet_again, run_ranks
from tests.parity.megatron import (
    LOGITS,
    Output,
    check_streamed,
    hf_tensors,
    output,
    output_of_weights,
    settings,
    transformers_output,
)
from tests.parity.variants import LENGTH, VARIANTS, VOCAB, make

NAMES = list(VARIANTS)
# Saved at TP 2 and read at TP 1: tensors of every kind that Llama does not have.
SAVED = ("olmo2", "gemma3", "gpt_neox parallel", "phi3", "gpt2", "qwen2_moe")
# Tensors that lie in other ways in the files, biases, norms in other places, shared KV heads.
# Orders of their channels are not built.
NOT_REORDERED = ("mixtral", "qwen2_moe", "qwen3_moe", "gemma3 with images")
REORDERED = ("qwen2 tied", "phi3", "granite", "gpt_neox parallel", "gemma3", "gpt2")
GRADIENT = 5e-5  # of the largest; fp32 rounding gives 1e-5 at most in the backward pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: make(root / str(seed), variant, seed)
        for seed, (name, variant) in enumerate(VARIANTS.items())
    }


@pytest.fixture(scope="module")
def tokens_NS() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tokens_NS: torch.Tensor) -> dict[str, Output]:
    return {name: transformers_output(folder, tokens_NS) for name, folder in folders.items()}


def outputs(
    rank: int, folders: dict[str, Path], tokens_NS: torch.Tensor, tp: int, splits: tuple[bool, ...]
) -> list[dict[str, Output]]:
    """Outputs of every model, without and with sequence parallel as ``splits`` says. The first
    models are also turned back into HF tensors, which must be those of the files; what convert
    writes of them must be what Megatron would save; and at TP 2 some are saved.
    """
    found = []
    for split in splits:
        config = settings(tp, sequence_parallel=split)
        one = {}
        with start(config) as mesh:
            for name, folder in folders.items():
                arch = read_architecture(folder)
                with open_checked(folder) as reader:
                    model = build_model(config, arch, mesh)
                    fill_from_hf(model, arch, mesh, reader)
                    text = [one for one in reader.names() if not reader.layout.is_other(one)]
                    stored = {tensor: reader.tensor(tensor) for tensor in text}
                if not split:
                    back = {}
                    parameters = dict(model.named_parameters())
                    for rule in model_rules(arch, tp):
                        shards = mesh.gather_over_tp(parameters[rule.megatron])
                        back.update(rule.to_hf(rule.join(shards)))
                    assert same(back, stored), name
                    check_streamed(model, arch, mesh, folder)
                    if tp > 1 and name in SAVED:
                        note = {"fingerprint": "", "dtype": "float32", "padded_vocab": VOCAB + 1}
                        files = [folder / "config.json"]
                        save_sharded(sharded_state(model), folder / "saved", mesh, note, files)
                one[name] = output(model, arch, mesh, tokens_NS)
        found.append(one)
        if tp > 1:
            meet_again()
    return found


def same(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bits."""
    return found.keys() == stored.keys() and all(
        found[name].dtype == stored[name].dtype and torch.equal(found[name], stored[name])
        for name in stored
    )


def check(found: dict[str, Output], expected: dict[str, Output]) -> None:
    for name, one in found.items():
        print(f"{name}: logits differ by {one.distance(expected[name]):.1e} of their scale")
    wrong = [name for name, one in found.items() if not one.agrees(expected[name])]
    assert not wrong


def test_outputs_are_those_of_transformers_at_tp_1(
    folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    check(outputs(0, folders, tokens_NS, 1, (False,))[0], expected)


def test_outputs_are_those_of_transformers_at_tp_2(
    folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    for plain, split in run_ranks(outputs, 2, folders, tokens_NS, 2, (False, True)):
        check(plain, expected)
        check(split, expected)


def test_weights_that_tp_2_saved_are_read_at_tp_1_and_come_back(
    folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    missing = [name for name in SAVED if not (folders[name] / "saved").exists()]
    if missing:  # this test alone
        run_ranks(outputs, 2, {name: folders[name] for name in SAVED}, tokens_NS, 2, (False,))
    for name in SAVED:
        weights = folders[name] / "saved"
        assert output_of_weights(0, weights, tokens_NS, 1).agrees(expected[name]), name
        with open_checked(folders[name]) as reader:
            stored = {tensor: reader.tensor(tensor) for tensor in reader.names()}
        assert same(hf_tensors(weights), stored), name


Gradients = dict[str, dict[str, torch.Tensor]]


def gradients(
    rank: int, folders: dict[str, Path], tokens_NS: torch.Tensor, tp: int, recompute: bool | str
) -> Gradients:
    """d mean cross entropy / d weight of every linear, by HF name."""
    config = settings(tp, sequence_parallel=tp > 1, recompute=recompute)
    found: Gradients = {}
    with start(config) as mesh:
        for name, folder in folders.items():
            arch = read_architecture(folder)
            with open_checked(folder) as reader:
                model = build_model(config, arch, mesh)
                fill_from_hf(model, arch, mesh, reader)
            linears = masked_linears(model)
            for linear in linears.values():
                linear.weight.requires_grad_(True)
            model.token_losses(tokens_NS, tokens_NS.roll(-1, 1))[:, :-1].mean().backward()
            found[name] = {}
            for rule in model_rules(arch, tp):
                if rule.is_linear:
                    gradient = linears[rule.megatron.removesuffix(".weight")].weight.grad
                    assert gradient is not None
                    found[name] |= rule.to_hf(rule.join(mesh.gather_over_tp(gradient)))
    return found


def gradients_of_transformers(folder: Path, tokens_NS: torch.Tensor) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = model(tokens_NS).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_NS[:, 1:].flatten()).backward()
    parameters = dict(model.named_parameters())
    layout = file_layout(read_architecture(folder)).of_files(parameters)
    found = {
        layout.ours(name): parameter.grad
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }
    for name in [one for one in found if ".experts." in one]:  # held together in memory
        found |= of_experts(name, found.pop(name))
    return found


def of_experts(name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the linears in the file of experts that are held together, by either name
    that a family gives them.
    """
    stem, _, leaf = name.rpartition(".")
    stems = (stem, stem.replace(".mlp.", ".block_sparse_moe."))
    kinds = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3"))}
    spellings = kinds.get(leaf, (("down_proj", "w2"),))
    return {
        f"{there}.{expert}.{spelled}.weight": part
        for expert, whole in enumerate(gradient)
        for names, part in zip(spellings, whole.chunk(len(spellings)), strict=True)
        for there, spelled in zip(stems, names, strict=True)
    }


@pytest.mark.nightly
def test_gradients_are_those_of_transformers_with_and_without_recomputation(
    folders: dict[str, Path], tokens_NS: torch.Tensor
) -> None:
    plain = gradients(0, folders, tokens_NS, 1, False)
    for name, folder in folders.items():
        theirs = gradients_of_transformers(folder, tokens_NS)
        for linear, gradient in plain[name].items():
            other = theirs[linear]
            other = other.t() if name == "gpt2" else other
            assert float((gradient - other).abs().max() / other.abs().max()) < GRADIENT, linear
            assert float((gradient - 1.001 * other).abs().max() / other.abs().max()) > GRADIENT
    modes: tuple[bool | str, ...] = ("mlp", True)
    for recompute in modes:
        again = gradients(0, folders, tokens_NS, 1, recompute)
        assert all(same(again[name], plain[name]) for name in folders)
        for ranks in run_ranks(gradients, 2, folders, tokens_NS, 2, recompute):
            for name, found in ranks.items():
                for linear, gradient in found.items():
                    other = plain[name][linear]
                    assert float((gradient - other).abs().max() / other.abs().max()) < GRADIENT


@pytest.mark.parametrize("name", NAMES)
def test_wrong_readings_show(
    name: str, folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    config, arch = settings(1), read_architecture(folders[name])
    with start(config) as mesh, open_checked(folders[name]) as reader:
        for what, change in VARIANTS[name].wrong.items():
            wrong = change(arch)
            assert wrong != arch
            model = build_model(config, wrong, mesh)
            fill_from_hf(model, arch, mesh, reader)
            found = output(model, wrong, mesh, tokens_NS)
            distance = found.distance(expected[name])
            print(f"{name}, {what}: {distance:.1e}")
            assert distance > 5 * LOGITS and not found.agrees(expected[name]), what


def random_orders(arch: Architecture) -> ChannelOrders:
    """Every kind of channels in another order, in every layer and KV head."""
    draws = torch.Generator().manual_seed(3)

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=draws)

    heads = range(arch.kv_heads)
    return ChannelOrders(
        shuffled(arch.hidden),
        {layer: shuffled(arch.ffn) for layer in range(arch.num_layers)},
        {
            layer: torch.stack([shuffled(arch.head_dim) for _ in heads])
            for layer in range(arch.num_layers)
        },
    )


def reordered_output(folder: Path, tokens_NS: torch.Tensor, out: Path) -> Output:
    """Of transformers, for the model with its channels shuffled."""
    arch = read_architecture(folder)
    with open_checked(folder) as reader:
        tensors = reordered(reader, arch, random_orders(arch))
        write_hf(out, tensors, folder, layout=file_layout(arch))
    with open_checked(out) as after, open_checked(folder) as before:
        for name in after.names():
            ours, theirs = after.tensor(name), before.tensor(name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), name
    return transformers_output(out, tokens_NS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=[pytest.mark.nightly] * (one not in REORDERED))
        for one in NAMES
        if one not in NOT_REORDERED
    ],
)
def test_a_reordered_model_computes_the_same(
    name: str,
    folders: dict[str, Path],
    tokens_NS: torch.Tensor,
    expected: dict[str, Output],
    tmp_path: Path,
) -> None:
    found = reordered_output(folders[name], tokens_NS, tmp_path / "out")
    print(f"{name}: logits differ by {found.distance(expected[name]):.1e} of their scale")
    assert found.agrees(expected[name])


@pytest.mark.parametrize("name", ["qwen2 tied", "phi3", "gpt_neox parallel", "gpt2"])
def test_rotated_values_compute_the_same(
    name: str,
    folders: dict[str, Path],
    tokens_NS: torch.Tensor,
    expected: dict[str, Output],
    tmp_path: Path,
) -> None:
    """On top of another order of channels. A matrix that is not orthogonal shows."""
    arch, folder = read_architecture(folders[name]), folders[name]
    draws = torch.Generator().manual_seed(4)
    shape = (arch.num_layers, arch.kv_heads, arch.head_dim, arch.head_dim)
    free = torch.randn(shape, generator=draws, dtype=torch.float64)
    for matrices, is_orthogonal in ((torch.linalg.qr(free).Q, True), (free, False)):
        orders = replace(random_orders(arch), rotation=dict(enumerate(matrices)))
        with open_checked(folder) as reader:
            tensors = reordered(reader, arch, orders)
            write_hf(tmp_path / "out", tensors, folder, layout=file_layout(arch))
        found = transformers_output(tmp_path / "out", tokens_NS)
        print(f"{name}: logits differ by {found.distance(expected[name]):.1e} of their scale")
        assert found.agrees(expected[name]) == is_orthogonal
        assert is_orthogonal or found.distance(expected[name]) > 5 * LOGITS


@pytest.mark.parametrize(
    "module",
    ["input_layernorm", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"],
)
def test_rows_that_keep_their_place_show(
    module: str,
    folders: dict[str, Path],
    tokens_NS: torch.Tensor,
    expected: dict[str, Output],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = channel_orders.CHANNELS[module][1]
    monkeypatch.setitem(channel_orders.CHANNELS, module, (lambda *given: None, columns))
    found = reordered_output(folders["granite"], tokens_NS, tmp_path / "out")
    assert found.distance(expected["granite"]) > 5 * LOGITS
