"""apply_masks on a model as its users hold it: compiled, wrapped, adapted, offloaded, quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import megamask
from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.held_model import layers_root, plain_names
from megamask.sparsity.pattern import Pattern
from megamask.weights.fingerprint import fingerprint_model, fingerprints_model, model_linears
from tests.unit.masks.test_apply import tiny_model

P24 = Pattern(2, 4)
Wrap = Callable[[Any], nn.Module]


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return tiny_model(num_hidden_layers=2).to(torch.bfloat16)


@pytest.fixture(scope="module")
def path(dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of all linears but those of the second layer's MLP, which stays dense."""
    file = tmp_path_factory.mktemp("masks") / "m.safetensors"
    linears = model_linears(dense)
    masks = {
        name: P24.best(linear.weight.abs())
        for name, linear in linears.items()
        if "layers.1.mlp" not in name
    }
    found = fingerprints_model(dense)
    assert found.exact == fingerprint_model(dense) and len(found.float16) == 1
    save_masks(
        file,
        masks,
        "2:4",
        fingerprint=found.exact,
        method="magnitude",
        float16_fingerprints=found.float16,
    )
    return file


class Adapted(nn.Module):
    """The structure of a linear under LoRA in PEFT, which keeps the frozen linear beside it."""

    def __init__(self, base_layer: nn.Linear, merged: bool = False) -> None:
        super().__init__()
        rank, wide = 4, {"dtype": base_layer.weight.dtype}
        self.base_layer, self.merged = base_layer, merged
        narrow = nn.Linear(base_layer.in_features, rank, bias=False, **wide)
        self.lora_A = nn.ModuleDict({"default": narrow})
        widening = nn.Linear(rank, base_layer.out_features, bias=False, **wide)
        self.lora_B = nn.ModuleDict({"default": widening})
        nn.init.ones_(widening.weight)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


class Holder(nn.Module):
    """A module that holds others under given names."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)


def with_adapters(model: LlamaForCausalLM, merged: bool = False) -> nn.Module:
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj = Adapted(attention.q_proj, merged)
        attention.v_proj = Adapted(attention.v_proj, merged)
    return Holder(base_model=Holder(model=model))


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model)
    wrapped: nn.Module = found
    return wrapped


def with_compiled_layers(model: LlamaForCausalLM) -> nn.Module:
    model.model.layers[1] = compiled(model.model.layers[1])
    return model


def with_checkpointing(model: LlamaForCausalLM) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


def in_a_larger_model(model: LlamaForCausalLM) -> nn.Module:
    """A tower of images with layers of the same names and shapes, and the text model."""
    tower = tiny_model(seed=5, num_hidden_layers=3).to(torch.bfloat16)
    return Holder(
        vision_tower=tower.model,
        projector=nn.Linear(32, 32),
        language_model=model.model,
        lm_head=model.lm_head,
    )


def classifier(model: LlamaForCausalLM) -> nn.Module:
    other = LlamaForSequenceClassification(model.config).to(torch.bfloat16)
    other.model = model.model
    return other


def with_device_map(model: LlamaForCausalLM) -> nn.Module:
    from accelerate import dispatch_model

    found: nn.Module = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return found


HELD: dict[str, Wrap] = {
    "plain": lambda model: model,
    "without its head": lambda model: model.model,
    "compiled": compiled,
    "compiled layers": with_compiled_layers,
    "compiled twice": lambda model: compiled(nn.DataParallel(compiled(model))),
    "DataParallel": nn.DataParallel,
    "checkpointed": with_checkpointing,
    "adapters": with_adapters,
    "adapters, compiled": lambda model: compiled(with_adapters(model)),
    "larger model": in_a_larger_model,
    "value head": lambda model: Holder(pretrained_model=model, v_head=nn.Linear(32, 1)),
    "classifier": classifier,
    "device map": with_device_map,
    "fp32": lambda model: model.float(),
    "fp64": lambda model: model.double(),
    "fp16": lambda model: model.half(),
    "by way of fp16": lambda model: model.half().float(),
}


def expect_masked(model: nn.Module, path: Path, dense: LlamaForCausalLM) -> None:
    masks, held, seen = load_masks(path), plain_names(model), 0
    for name, tensor in dense.model.named_parameters():
        module = name.removesuffix(".weight")
        ours = next(
            held[plain]
            for plain in held
            if f".{plain}".endswith(f".{module}") and "vision" not in plain
        )
        assert isinstance(ours.weight, torch.Tensor)
        expected = tensor.to(ours.weight.dtype)
        if f"model.{module}" in masks:
            seen += 1
            expected = expected.masked_fill(~masks[f"model.{module}"], 0.0)
            assert not torch.equal(expected, tensor.to(expected.dtype))
        assert torch.equal(ours.weight, expected), name
    assert seen == len(masks) == 11


@pytest.mark.parametrize("wrap", HELD)
def test_masks_go_onto_the_weights_however_the_model_is_held(
    dense: LlamaForCausalLM, path: Path, wrap: str
) -> None:
    model = HELD[wrap](copy.deepcopy(dense))
    dense = copy.deepcopy(dense).half() if "fp16" in wrap else dense
    others = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if "lora" in name or "vision" in name or "head" in name
    }
    assert megamask.apply_masks(model, path) is model
    expect_masked(model, path, dense)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in others.items())
    megamask.apply_masks(model, path)  # a second time changes nothing and is no other base model
    expect_masked(model, path, dense)


@pytest.mark.parametrize("wrap", HELD)
def test_other_weights_are_refused_however_the_model_is_held(path: Path, wrap: str) -> None:
    model = HELD[wrap](tiny_model(seed=3, num_hidden_layers=2).to(torch.bfloat16))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ArtifactError, match="another base model than this") as caught:
        megamask.apply_masks(model, path)
    assert type(model).__name__ in str(caught.value)
    assert all(torch.equal(parameter, before[n]) for n, parameter in model.named_parameters())


def test_one_changed_weight_of_a_layer_without_masks_is_another_model(
    dense: LlamaForCausalLM, path: Path
) -> None:
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ArtifactError, match="another base model"):
        megamask.apply_masks(with_adapters(model), path)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    file = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(dense: LlamaForCausalLM, path: Path, one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(dense))
    megamask.apply_masks(model, path)
    expect_masked(model, path, dense)


def test_a_sharded_model_is_refused_by_name(
    dense: LlamaForCausalLM, path: Path, one_process: None
) -> None:
    """Also while its weights are gathered, as after a forward pass: what is written into them is
    lost when they are divided again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model: Any = fully_shard(copy.deepcopy(dense), mesh=mesh)
    with pytest.raises(ArtifactError, match=r"DTensor.*before it is wrapped or sharded"):
        megamask.apply_masks(model, path)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert type(model.model.layers[0].mlp.up_proj.weight.data) is torch.Tensor
    for check in (True, False):
        with pytest.raises(ArtifactError, match=r"fully_shard\) divides.*before it is wrapped"):
            megamask.apply_masks(model, path, check_fingerprint=check)
    head = copy.deepcopy(dense)
    fully_shard(head.lm_head, mesh=mesh)  # no mask belongs there
    megamask.apply_masks(head, path)
    expect_masked(head, path, dense)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_masks_go_onto_the_summoned_weights_of_fsdp(
    dense: LlamaForCausalLM, path: Path, one_process: None, use_orig_params: bool
) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    model = Fsdp(
        copy.deepcopy(dense), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    if not use_orig_params:  # with it, one process holds its weights whole
        with pytest.raises(ArtifactError, match=r"FSDP divides.*Or apply .*summon_full_params"):
            megamask.apply_masks(model, path)
    with Fsdp.summon_full_params(model):
        megamask.apply_masks(model, path)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    with Fsdp.summon_full_params(model):
        expect_masked(model, path, dense)


class Linear8bitLt(nn.Linear):
    """The structure of a linear of bitsandbytes: int8 in the place of the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


class QuantLinear(nn.Module):
    """The structure of a linear of GPTQ and AWQ: packed words, and no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int32))


def torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    held = nn.Sequential(linear)
    quantize_(held, Int8WeightOnlyConfig())
    return held[0]


def parametrized(linear: nn.Linear) -> nn.Module:
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


def pruned(linear: nn.Linear) -> nn.Module:
    prune.identity(linear, "weight")
    return linear


def of_inference(linear: nn.Linear) -> nn.Module:
    with torch.inference_mode():
        linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (Linear8bitLt, r"quantized \(Linear8bitLt, int8\).*without quantization_config"),
        (QuantLinear, r"quantized \(QuantLinear, packed\)"),
        (torchao, r"quantized \(Int8Tensor"),
        (lambda linear: linear.to(torch.float8_e4m3fn), r"quantized \(Linear, float8_e4m3fn\)"),
        (lambda linear: linear.to("meta"), "on the meta device.*run the verb export"),
        (parametrized, "remove_parametrizations"),
        (pruned, r"torch\.nn\.utils\.prune\.remove"),
        (of_inference, r"outside torch\.inference_mode"),
        (lambda linear: nn.Embedding(64, 32), "is a Embedding and no linear"),
    ],
)
def test_what_is_in_the_way_is_named(
    dense: LlamaForCausalLM, path: Path, replace: Callable[[Any], nn.Module], message: str
) -> None:
    model = copy.deepcopy(dense)
    layer = model.model.layers[0].mlp
    layer.up_proj = replace(layer.up_proj)
    for check in (True, False):
        with pytest.raises(ArtifactError, match=f"layers.0.mlp.up_proj.*{message}"):
            megamask.apply_masks(model, path, check_fingerprint=check)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (Linear8bitLt, "is quantized or divided"),
        (torchao, "is quantized or divided"),
        (lambda linear: linear.to(torch.float8_e4m3fn), "is quantized or divided"),
        (lambda linear: linear.to("meta"), "is offloaded or on the meta device"),
    ],
)
def test_weights_that_are_not_at_hand_have_no_fingerprint(
    dense: LlamaForCausalLM, replace: Callable[[Any], nn.Module], message: str
) -> None:
    model = copy.deepcopy(dense)
    layer = model.model.layers[0].mlp
    layer.up_proj = replace(layer.up_proj)
    with pytest.raises(ArgumentError, match=f"layers.0.mlp.up_proj {message}.*Load it without"):
        fingerprint_model(model)


def test_an_offloaded_model_is_refused_by_name(dense: LlamaForCausalLM, path: Path) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(copy.deepcopy(dense), torch.device("cpu"))
    with pytest.raises(ArtifactError, match=r"offloaded to CPU or disk.*verb export"):
        megamask.apply_masks(model, path)
    with pytest.raises(ArgumentError, match="offloaded or on the meta"):
        fingerprint_model(model)


def test_a_merged_adapter_is_named(dense: LlamaForCausalLM, path: Path) -> None:
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.raises(ArtifactError, match=r"merged into .*q_proj.*unmerge_adapter"):
        megamask.apply_masks(with_adapters(model, merged=True), path)


def test_a_half_precision_model_is_told_the_dtype_that_helps(
    dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Mask files of version 0.1.0 hold no fingerprints of copies in fp16."""
    masks = {name: P24.best(one.weight.abs()) for name, one in model_linears(dense).items()}
    file = tmp_path / "m.safetensors"
    save_masks(file, masks, P24, fingerprint=fingerprint_model(dense), method="magnitude")
    model = copy.deepcopy(dense).half()
    with pytest.raises(ArtifactError, match=r"in float16.*Load the model with dtype=torch\.bfloat"):
        megamask.apply_masks(model, file)
    megamask.apply_masks(copy.deepcopy(dense), file)


def test_shared_weights_need_one_mask(dense: LlamaForCausalLM, path: Path) -> None:
    model = copy.deepcopy(dense)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight  # the second has no mask
    with pytest.raises(ArtifactError, match=r"layers\.0.*layers\.1.*share a weight"):
        megamask.apply_masks(model, path, check_fingerprint=False)


def test_a_plain_mapping_is_applied(dense: LlamaForCausalLM, path: Path) -> None:
    model = compiled(copy.deepcopy(dense))
    megamask.apply_masks(model, dict(load_masks(path)))
    expect_masked(model, path, dense)
    two = Holder(vision=copy.deepcopy(dense).model, text=copy.deepcopy(dense).model)
    with pytest.raises(ArtifactError, match="fits several parts of the model: 'text.' and 'vision"):
        megamask.apply_masks(two, dict(load_masks(path)))


def test_two_copies_of_the_base_are_refused_before_and_after_one_is_pruned(
    dense: LlamaForCausalLM, path: Path
) -> None:
    holder = Holder(actor=copy.deepcopy(dense), ref=copy.deepcopy(dense))
    for pruned in (None, holder.ref):
        if pruned is not None:
            megamask.apply_masks(pruned, path)
        before = {name: parameter.clone() for name, parameter in holder.named_parameters()}
        with pytest.raises(ArtifactError, match=r"several parts.*'actor\.model\.' and 'ref\."):
            megamask.apply_masks(holder, path)
        assert all(torch.equal(now, before[name]) for name, now in holder.named_parameters())
    # without a fingerprint, the part that cannot be written may be the one that is meant
    one = Holder(a=copy.deepcopy(dense).to("meta"), b=copy.deepcopy(dense))
    with pytest.raises(ArtifactError, match=r"several parts.*'a\.model\.' and 'b\."):
        megamask.apply_masks(one, path, check_fingerprint=False)


@pytest.mark.parametrize("first", ["another model", "on the meta device"])
def test_a_part_that_sorts_first_is_left_alone_at_every_call(
    dense: LlamaForCausalLM, path: Path, first: str
) -> None:
    """A second call finds no dense base: the part with zeros in all pruned places is the one."""
    tower = tiny_model(seed=5, num_hidden_layers=2).to(torch.bfloat16)
    before = copy.deepcopy(tower).model
    if first == "on the meta device":
        tower.to("meta")
    language_model = copy.deepcopy(dense).model
    model = Holder(a=tower.model, language_model=language_model)
    for _ in range(2):
        megamask.apply_masks(model, path)
        text = copy.deepcopy(dense)
        megamask.apply_masks(text, path)
        expected = dict(text.model.named_parameters())
        held = dict(language_model.named_parameters())
        assert all(torch.equal(held[name], expected[name]) for name in expected)
        if first == "another model":
            now = dict(tower.model.named_parameters())
            assert all(torch.equal(now[name], one) for name, one in before.named_parameters())
    with torch.no_grad():
        language_model.layers[0].mlp.up_proj.weight.add_(1)
    refused = "meta device" if "meta" in first else "another base model"
    with pytest.raises(ArtifactError, match=refused):
        megamask.apply_masks(model, path)


def test_a_fingerprint_of_the_whole_model_leaves_the_choice_to_the_names(
    dense: LlamaForCausalLM, tmp_path: Path
) -> None:
    """A recipe of one's own may cover the linears of all parts, under their names in the whole."""
    first = copy.deepcopy(dense).model
    model = Holder(a=first, b=copy.deepcopy(dense).model)
    masks = {
        name: P24.best(linear.weight.abs())
        for name, linear in model_linears(model).items()
        if name.startswith("b.")
    }
    found = fingerprints_model(model)
    file = tmp_path / "m.safetensors"
    save_masks(file, masks, "2:4", fingerprint=found.exact, method="mine")
    before = {name: one.clone() for name, one in first.named_parameters()}
    megamask.apply_masks(model, file)
    assert all(torch.equal(now, before[name]) for name, now in first.named_parameters())
    for name, linear in model_linears(model).items():
        assert name not in masks or not linear.weight[~masks[name]].any()


def test_names_that_are_not_there_are_told_with_their_likes(path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    message = r"of its 11 linears the GPT2LMHeadModel has 0; the nearest name is .*Conv1D"
    with pytest.raises(ArtifactError, match=message):
        megamask.apply_masks(model, path)
    short = LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_dict()))
    with pytest.raises(ArtifactError, match=r"of its 11 linears the LlamaForCausalLM has 7"):
        megamask.apply_masks(short, path)


def test_the_root_of_names() -> None:
    def root(*names: str) -> str:
        return layers_root(dict.fromkeys(names))

    assert root("model.layers.0.mlp.up_proj", "model.layers.11.q") == "model."
    assert root("model.decoder.layers.0.fc1") == "model.decoder."
    assert root("layers.0.a") == "" == root("a") == root("0.a", "model.layers.0.b")
