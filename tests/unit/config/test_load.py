"""Settings: layering, YAML scalars, presets, and errors that name the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from megamask.config import describe, load_config, run_paths
from megamask.config.tree import Config
from megamask.errors import ConfigError
from tests.fuzz.mutations import patience


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    """They are the preset ``best``: what a recipe that says nothing about learning gets."""
    config = load_config()
    assert (config.pattern, config.dtype, config.learn.steps, config.learn.optimizer.lr) == (
        "2:4",
        "bf16",
        2000,
        None,
    )
    sampling = config.learn.sampling
    assert (config.learn.method, sampling.initial_noise, sampling.tau) == (
        "subset",
        False,
        (1.0, 0.05),
    )
    assert config == load_config(None, ["learn.preset=best"])


def test_a_later_layer_wins(tmp_path: Path) -> None:
    """Defaults < preset < recipe < override, each for the keys it names and no others."""
    path = recipe(
        tmp_path, "learn: {preset: maskllm, global_batch: 64, optimizer: {weight_decay: 0.2}}"
    )
    config = load_config(path, ["learn.global_batch=32", "learn.sampling.mode=hard"])
    assert config.learn.optimizer.lr == 5e-4  # preset over default
    assert config.learn.optimizer.weight_decay == 0.2  # recipe over preset
    assert config.learn.global_batch == 32  # override over recipe
    assert config.learn.sampling.mode == "hard"  # override over preset
    assert config.learn.sampling.annealed_by == 1.0  # default
    assert load_config(path).learn.global_batch == 64


def test_a_preset_from_the_command_line_stays_below_the_recipe(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path, "learn: {global_batch: 64}"), ["learn.preset=maskllm"])
    assert (config.learn.global_batch, config.learn.optimizer.lr) == (64, 5e-4)


def test_recompute_is_a_switch_or_a_part() -> None:
    found = [
        load_config(None, [f"parallel.recompute={text}"]).parallel.recompute
        for text in ("true", "false", "mlp")
    ]
    assert found == [True, False, "mlp"]
    with pytest.raises(
        ConfigError, match="parallel.recompute = 'attention': Input should be False, True or 'mlp'"
    ):
        load_config(None, ["parallel.recompute=attention"])


def test_the_last_of_two_overrides_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (["data.blend={code: 1}"], {"code": 1}),
        (["data.blend={}"], {}),  # equal weights
        (["data.blend.code=1"], {"web": 0.5, "code": 1}),
        (["data.blend={code: 1}", "data.blend.web=2"], {"code": 1, "web": 2}),
        (["data.blend.web=2", "data.blend={code: 1}"], {"code": 1}),
        (["data={blend: {code: 1}}"], {"web": 0.5, "code": 1}),  # a section is merged
    ],
)
def test_a_mapping_on_the_command_line_takes_the_place_of_the_recipes(
    tmp_path: Path, words: list[str], blend: dict[str, float]
) -> None:
    domains = "{web: {kind: stdlib}, code: {kind: stdlib}}"
    path = recipe(tmp_path, f"data: {{domains: {domains}, blend: {{web: .5, code: .5}}}}")
    config = load_config(path, words)
    assert config.data.blend == blend and list(config.data.domains) == ["web", "code"]


def test_an_entry_of_a_mapping_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    """A limit of the recipe's domain would cut text of which the user never said so."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data: {domains: {a: {kind: text, path: x, max_bytes: 9, heldout: 0.3}}}\n"
        "learn: {monitor: {evaluate_every: 7, evaluate_windows: 3}}\n"
    )
    config = load_config(
        recipe, ["data.domains.a={kind: text, path: y}", "learn.monitor={evaluate_every: 5}"]
    )
    domain = config.data.domains["a"]
    assert (str(domain.path), domain.max_bytes, domain.heldout) == ("y", None, 0.05)
    monitor = config.learn.monitor  # a section
    assert (monitor.evaluate_every, monitor.evaluate_windows) == (5, 3)
    changed = load_config(recipe, ["data.domains.a.path=y"]).data.domains["a"]
    assert (str(changed.path), changed.max_bytes) == ("y", 9)


def test_other_mappings_are_replaced_too(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "data: {domains: {web: {kind: stdlib, heldout: .5}}}\nevaluate: {masks: {a: x}}\n"
        "pattern_overrides: {'*.o_proj': '4:8'}",
    )
    mine = "data.domains={mine: {kind: pydocs}}"
    config = load_config(path, [mine, "evaluate.masks={}", "pattern_overrides={}"])
    assert list(config.data.domains) == ["mine"] and config.evaluate.masks == {}
    assert config.pattern_overrides == {}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("learn: {steps: 3}\nlearn: {micro_batch: 2}", "learn"),
        ("data:\n  domains:\n    web: {kind: stdlib}\n    web: {kind: pydocs}", "web"),
        ("learn: {steps: 3, steps: 3}", "steps"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, key: str) -> None:
    """PyYAML takes the last, and the settings of the first are lost without a word."""
    with pytest.raises(ConfigError, match=f"has the key '{key}' twice"):
        load_config(recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (
            "data: {domains: {web: {kind: stdlib, heldot: 3}}}",
            "Did you mean data.domains.web.heldout?",
        ),
        ("data: {domains: {web: {kind: stdlib, xyzzy: 3}}}", "data.domains.web has: kind, "),
        ("learn.steps: 100", "A recipe is nested: write steps below learn:."),
        ("learn.optimizer.lr: 1", "write lr below learn: optimizer:."),
    ],
)
def test_an_unknown_key_names_what_is_near(tmp_path: Path, text: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="no such setting") as caught:
        load_config(recipe(tmp_path, text))
    assert fix in str(caught.value)


@pytest.mark.parametrize("section", ["learn", "recover"])
def test_more_samples_than_an_index_holds_are_refused(section: str) -> None:
    words = [f"{section}.steps=10000000", f"{section}.global_batch=1048576"]
    with pytest.raises(ConfigError, match=rf"{section}\.steps = .*100,000,000 samples in all"):
        load_config(None, words)


def test_preset_maskllm_holds_the_values_of_the_paper() -> None:
    """MaskLLM, Table 7 (LLaMA-2 7B) and appendix A, copied by hand from the paper."""
    learn = load_config(None, ["learn.preset=maskllm"]).learn
    assert (learn.method, learn.sampling.initial_noise) == ("categorical", True)
    assert (learn.optimizer.warmup_steps, learn.optimizer.epsilon) == (0, (1e-8, 0))
    assert learn.steps == 2000
    assert learn.global_batch == 256
    assert (learn.optimizer.lr, learn.optimizer.weight_decay) == (0.0005, 0.1)
    assert learn.sampling.logit_std == 0.01 and learn.sampling.initial_noise
    assert learn.sampling.kappa == (100, 500)
    assert learn.sampling.tau == (4, 0.05)
    assert (learn.prior.mask, learn.prior.strength) == ("sparsegpt", 3)
    assert learn.weight_norm == (0.00001, 0.00001)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "12:30"])
def test_a_pattern_stays_text(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 12:30 as 750, in base 60."""
    assert load_config(recipe(tmp_path, f"pattern: {text}")).pattern == text
    assert load_config(None, [f"pattern={text}"]).pattern == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2e-4", 2e-4), ("0.5", 0.5), (".5", 0.5), ("1", 1.0)],
)
def test_a_number_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    assert (
        load_config(recipe(tmp_path, f"learn: {{optimizer: {{lr: {text}}}}}")).learn.optimizer.lr
        == value
    )
    assert load_config(None, [f"learn.optimizer.lr={text}"]).learn.optimizer.lr == value


@pytest.mark.parametrize("path", ["/data/a #2", "#1/run", "runs/a#b", "runs/x #", "'a #b'"])
def test_nothing_is_a_comment_on_the_command_line(path: str) -> None:
    """A path was cut there without a word, so that stages wrote into another folder."""
    assert str(load_config(None, [f"run_dir={path}"]).run_dir) == path.strip("'")
    for text in ("{a: 1} # x", "[1] #", '"a" #b'):
        with pytest.raises(ConfigError, match="a YAML value"):
            load_config(None, [f"data.blend={text}"])
    with pytest.raises(ConfigError, match="learn.steps = '100 # x'"):
        load_config(None, ["learn.steps=100 # x"])


def test_a_leading_zero_is_no_octal_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 0123 as 83. The name of an account keeps its zeros."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("launch: {account: 00123, partition: 010}\nseed: 0123\n")
    config = load_config(
        recipe, ["launch.time=060", "learn.steps=0100", "learn.weight_norm=[01, 0]"]
    )
    launch = config.launch
    assert (launch.account, launch.partition, launch.time) == ("00123", "010", "060")
    assert (config.seed, config.learn.steps, config.learn.weight_norm) == (123, 100, (1.0, 0.0))
    assert load_config(recipe, ["seed=0"]).seed == 0


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        None,
        [
            "learn.sampling.tau=[2, 0.1]",
            "learn.prior.mask=null",
            "model.exclude=['*.down_proj']",
            "data.domains.code.kind=stdlib",
            "device=cpu",
        ],
    )
    assert config.learn.sampling.tau == (2, 0.1) and config.learn.prior.mask is None
    assert config.model.exclude == ["*.down_proj"] and config.data.domains["code"].kind == "stdlib"


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("learn.stepz=3", "learn.stepz", "Did you mean learn.steps?"),
        ("patern=2:4", "patern", "Did you mean pattern?"),
        ("steps=3", "steps", "Did you mean learn.steps or recover.steps?"),
        (
            "learn.optimizer.learning_rates=3",
            "learn.optimizer.learning_rates",
            "learn.optimizer has: kind,",
        ),
        ("learn.steps=0", "learn.steps", "whole number from 1 to"),
        ("learn.steps=many", "learn.steps", "whole number"),
        ("dtype=fp16", "dtype", "'bf16' or 'fp32'"),
        ("learn.preset=maskllmm", "learn.preset", "'maskllm'"),
        ("learn.sampling.tau=[4, 0]", "learn.sampling.tau", "number from 1e-09"),
        ("data.domains.code.kind=wikipedia", "data.domains.code.kind", "'stdlib'"),
        ("learn=3", "learn", "LearnSection"),
        ("learn.steps", "learn.steps", "key.sub=value"),
        ("=3", "=3", "key.sub=value"),
        ("seed=[1", "seed", "YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_fix(override: str, key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.key == key and fix in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "learn: [1", "just words"])
def test_a_recipe_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load_config(recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ("[x]", "[*B, *B, *B, *B, *B, *B, *B, *B, *B]"),
        ("{x: y}", "{k1: *B, k2: *B, k3: *B, k4: *B, k5: *B, k6: *B, k7: *B, k8: *B, k9: *B}"),
        ("{x: y}", "{<<: [*B, *B, *B, *B, *B, *B, *B, *B, *B], k: 1}"),  # expands while it is built
    ],
)
def test_a_text_that_expands_without_end(tmp_path: Path, first: str, more: str) -> None:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {more.replace('B', f'a{n - 1}')}" for n in range(1, 10)]
    for text, said in (("\n".join(lines), "20,000 values"), ("a: &a {<<: *a}", "16 levels")):
        with pytest.raises(ConfigError, match=said), patience():
            load_config(recipe(tmp_path, text))


def test_aliases_and_merge_keys(tmp_path: Path) -> None:
    text = "learn: {steps: &s 7, global_batch: *s, optimizer: {<<: {lr: 0.5, clip: 2}, clip: 3}}"
    learn = load_config(recipe(tmp_path, text)).learn
    assert (learn.steps, learn.global_batch) == (7, 7)
    assert (learn.optimizer.lr, learn.optimizer.clip) == (0.5, 3)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_an_empty_recipe_and_an_empty_section_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "")) == Config()


def test_settings_are_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.learn.steps = 3  # type: ignore[misc]


def test_the_quickstart_learns_by_the_preset_best() -> None:
    """And a setting on the command line, or another method, still wins."""
    quickstart = Path(__file__).parents[3] / "configs" / "recipes" / "quickstart.yaml"
    learn = load_config(quickstart, ["learn.optimizer.lr=5e-4"]).learn
    assert (learn.method, learn.sampling.initial_noise, learn.sampling.tau) == (
        "subset",
        False,
        (1.0, 0.05),
    )
    assert (learn.prior.mask, learn.weight_norm, learn.optimizer.lr) == (
        "sparsegpt",
        (1e-5, 0),
        5e-4,
    )
    maskpro = load_config(quickstart, ["learn.method=maskpro"]).learn
    assert (maskpro.sampling.mode, maskpro.sampling.initial_noise) == ("hard", False)


def test_presets_are_not_changed_by_reading() -> None:
    load_config(
        None, ["learn.preset=maskllm", "learn.optimizer.lr=1.0", "learn.sampling.tau=[1, 1]"]
    )
    assert load_config(None, ["learn.preset=maskllm"]).learn.optimizer.lr == 5e-4


def test_the_resolved_settings_can_be_read_back() -> None:
    config = load_config(None, ["learn.preset=maskllm", "data.domains.code.kind=stdlib"])
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_keys_are_dotted() -> None:
    keys = [leaf.key for leaf in describe.leaves()]
    assert {"seed", "learn.steps", "learn.optimizer.lr"} <= set(keys) and len(keys) == len(
        set(keys)
    )


def test_paths_follow_the_run_directory_unless_set(tmp_path: Path) -> None:
    paths = run_paths(load_config(None, [f"run_dir={tmp_path}"]))
    assert (
        paths.hf == tmp_path / "hf"
        and paths.mask("learned") == tmp_path / "masks" / "learned.safetensors"
    )
    assert paths.updated_weights("sparsegpt_update").parent == tmp_path
    elsewhere = run_paths(load_config(None, ["model.hf=/models/a", "export.out=/out/b"]))
    assert (elsewhere.hf, elsewhere.export) == (Path("/models/a"), Path("/out/b"))
