"""The recipe: what loads, what is refused and in which words, and which values need a reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from truthward.errors import UserError
from truthward.reasons import missing_reasons, require_reasons
from truthward.recipe import Recipe, exact_div, load_recipe, settings

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
TABLES = {n: f.default for n, f in Recipe.model_fields.items() if isinstance(f.default, BaseModel)}
KEYS = {
    "": [k for k in Recipe.model_fields if k not in TABLES],
    **{n: list(type(t).model_fields) for n, t in TABLES.items()},
}


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str, why: str = "") -> Recipe:
        (tmp_path / "my.toml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "my.toml", list(overrides), why)

    return load


def refusal(load, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_is_named_after_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert set(recipe.stages) == {"base", "sft", "constitution", "reward", "dpo", "ppo"}
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("name", ["laptop", "cluster-8b", "cluster-8b-full", "cluster-70b"])
def test_the_serious_recipes_give_a_reason_for_every_choice(name):
    recipe = load_recipe(f"recipes/{name}.toml")
    assert recipe.unexplained == "stop"
    assert missing_reasons(recipe) == []


def test_an_empty_file_is_the_default_recipe(load):
    assert load("") == Recipe(name="my")


@pytest.mark.parametrize("name", ["lptop.toml", "nothing-like-it.toml"])
def test_a_missing_recipe_says_so_and_names_one_that_is_near(name):
    message = refusal(load_recipe, f"recipes/{name}")
    assert "no such recipe" in message
    assert ("did you mean recipes/laptop.toml" in message) == (name == "lptop.toml")


@pytest.mark.parametrize("content", [b"seed = ", b"seed = 1\nseed = 2", b"# \xff", b"[sft"])
def test_what_is_not_toml_is_one_clear_error(tmp_path, content):
    (tmp_path / "bad.toml").write_bytes(content)
    assert "bad.toml: not valid TOML" in refusal(load_recipe, tmp_path / "bad.toml")


# ------------------------------------------------------------------------------------------------------ wrong content


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("sed = 3", "sed", "seed"),
        ("[pppo]", "pppo", "ppo"),
        ("[ppo]\nkl_coeff = 0.1", "ppo.kl_coeff", "ppo.kl_coef"),
        ("[sft]\nlr_rate = 1", "sft.lr_rate", "sft.learning_rate"),
        ("[evals]\nmodel = []", "evals.model", "evals.models"),
        ("[sft.whi]\ndata = 'x'", "sft.whi", "sft.why"),
        ("[sft.why]\nepochz = 'x'", "sft.why.epochz", "epochs"),
        ("[why]\nsede = 'x'", "why.sede", "seed"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_nearest_right_one(load, text, unknown, near):
    message = refusal(load, text)
    assert f"my.toml: unknown key {unknown}\n" in message
    assert "did you mean" in message
    assert near in message.split("did you mean")[1]


def test_an_unknown_key_like_no_other_lists_those_there_are(load):
    assert "keys are: why, base, dtype, threads" in refusal(load, "[model]\nqqqq = 1")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed = '17'", "seed"),
        ("seed = 1.0", "seed"),
        ("seed = -1", "seed"),
        ("[sft]\nbatch_size = true", "sft.batch_size"),
        ("[sft]\nlearning_rate = '1e-4'", "sft.learning_rate"),
        ("[sft]\ndata = 'one.jsonl'", "sft.data"),
        ("[sft]\ndata = []", "sft.data"),
        ("[sft]\nepochs = nan", "sft.epochs"),
        ("[sft]\nepochs = inf", "sft.epochs"),
        ("[dpo]\nbeta = 0", "dpo.beta"),
        ("[ppo]\nkl_coef = inf", "ppo.kl_coef"),
        ("[ppo]\nparent = 'sftt'", "ppo.parent"),
        ("stages = ['base', 'sfft']", "stages.1"),
        ("sft = 3", "sft"),
        ("[sft]\nwhy = 'because'", "sft.why"),
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_refused_by_its_key(load, text, key):
    assert f"my.toml: {key} = " in refusal(load, text)


def test_a_seed_that_a_generator_cannot_take_is_refused_at_once(load):
    """NumPy takes 32 bits; without this a run would stop in its second stage."""
    assert load(f"seed = {2**32 - 1}").seed == 2**32 - 1
    assert "seed" in refusal(load, f"seed = {2**32}")


def test_all_faults_are_told_at_once(load):
    message = refusal(load, "sed = 1\n[ppo]\nkl_coeff = 1\niterations = 0")
    assert all(key in message for key in ("sed", "ppo.kl_coeff", "ppo.iterations"))


# ----------------------------------------------------------------------------------------------- values that must agree


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[sft]\npacking = false\nbatch_size = 12", "sft.batch_size, sft.micro_batch_size"),
        ("[reward]\nbatch_size = 9\nmicro_batch_size = 2", "reward.batch_size"),
        ("[dpo]\nmicro_batch_size = 3", "dpo.batch_size"),
        ("[launch]\nranks = 3", "launch.ranks"),
        ("[ppo]\nrollouts = 7", "ppo.rollouts, ppo.minibatches"),
        ("[ppo]\nrollouts = 24\nmicro_batch_size = 5", "ppo.micro_batch_size"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_their_keys(load, text, keys):
    message = refusal(load, text)
    assert keys in message
    assert "is not a multiple of" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("offload = 'optimizer'", "launch.offload: only ZeRO keeps something in the host's memory"),
        ("zero = 2\noffload = 'all'", "launch.offload: weights stay where they are below stage 3"),
        ("hosts = 2", "launch.rendezvous: where do the hosts meet?"),
        ("zero = 4", "launch.zero"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(load, text, message):
    assert message in refusal(load, f"[launch]\n{text}")


def test_ranks_of_all_hosts_share_a_batch(load):
    assert (
        load("[launch]\nhosts = 2\nrendezvous = 'a:29500'\n[dpo]\nbatch_size = 16\nmicro_batch_size = 8").launch.world == 2
    )


def test_a_micro_batch_over_the_batch_is_the_batch(load):
    assert load("[sft]\nbatch_size = 2\nmicro_batch_size = 64").sft.batch_size == 2


@given(st.integers(1, 500), st.integers(1, 50))
def test_exact_division_divides_or_raises(total, part):
    if total % part:
        with pytest.raises(UserError, match=f"{total} is not a multiple of {part}"):
            exact_div(total, part, "keys")
    else:
        assert exact_div(total, part, "keys") * part == total


@pytest.mark.parametrize(
    ("text", "stage", "needs"),
    [
        ("stages = ['sft', 'base']", "sft", "base"),
        ("stages = ['base', 'dpo']", "dpo", "sft"),
        ("stages = ['base', 'sft', 'dpo']", "dpo", "constitution"),
        ("stages = ['base', 'sft', 'reward', 'constitution']", "reward", "constitution"),
        ("stages = ['base', 'sft', 'ppo']", "ppo", "reward"),
        ("[sft]\nparent = 'sft'", "sft", "sft"),
    ],
)
def test_a_stage_before_what_it_needs_is_refused(load, text, stage, needs):
    assert f"stage {stage} needs {needs}, which does not come before it" in refusal(load, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_url = 'http://x/v1'\nmodel = 'm'\nmethods = ['contrast']", "can only choose"),
        ("base_url = 'http://x/v1'", "which of the server's models judges?"),
    ],
)
def test_a_server_that_cannot_judge_as_asked_is_refused(load, text, message):
    assert message in refusal(load, f"[judge]\n{text}")


def test_without_the_preference_model_ppo_needs_no_reward_stage(load):
    assert load("stages = ['base', 'sft', 'ppo']\n[ppo]\nrewards = ['mine.py:short']").ppo.rewards == ["mine.py:short"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("advantage = 'rloo'", "rloo compares the answers to a prompt, and group_size is 1"),
        ("advantage = 'grpo'", "group_size = 4"),
        ("group_size = 3", "ppo.rollouts, ppo.group_size: 32 is not a multiple of 3"),
        ("rewards = ['a.py:f', 'reward']\nreward_weights = [1.0]", "2 rewards have 1 weights"),
        ("rewards = ['a.py:f', 'a.py:f']", "named twice"),
        ("dual_clip = 1.0", "ppo.dual_clip: it bounds ratios above 1"),
        ("ptx_coef = 0.1", "ptx_coef and ptx_data go together"),
        ("ptx_data = ['d.jsonl']", "ptx_coef and ptx_data go together"),
        ("top_p = 0.9", "unknown key ppo.top_p"),
        ("rewards = []", "ppo.rewards"),
        ("advantage = 'reinforce'", "ppo.advantage"),
        ("clip_range = 1.0", "ppo.clip_range"),
    ],
)
def test_values_of_ppo_that_do_not_go_together_are_refused(load, text, message):
    """Row 4: top_p among them, as it would bias the ratio."""
    assert message in refusal(load, f"[ppo]\n{text}")


@pytest.mark.parametrize(
    "text",
    [
        "advantage = 'rloo'\ngroup_size = 4",
        "rewards = ['a.py:f', 'reward']\nreward_weights = [1.0, -0.5]",
        "dual_clip = 3.0",
        "ptx_coef = 0.1\nptx_data = ['d.jsonl']",
        "tune = 'full'",
    ],
)
def test_values_of_ppo_that_do_are_taken(load, text):
    assert load(f"[ppo]\n{text}").ppo


def test_a_preference_model_of_full_weights_cannot_share_ppos_base(load):
    message = refusal(load, "[reward]\ntune = 'full'")
    assert "must be an adapter" in message
    assert load("[reward]\ntune = 'full'\n[ppo]\nrewards = ['mine.py:short']")


@pytest.mark.parametrize("parent", ["constitution", "reward"])
def test_a_parent_must_be_a_stage_that_makes_a_chat_model(load, parent):
    assert "dpo.parent" in refusal(load, f"[dpo]\nparent = '{parent}'")


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("[ppo]\nparent = 'sft'", True),
        ("[ppo]\nparent = 'dpo'", True),
        ("[ppo]\nparent = 'dpo'\n[dpo]\nparent = 'base'", False),
        ("[ppo]\nparent = 'dpo'\n[dpo]\ntune = 'full'", False),
        ("[ppo]\nparent = 'base'", False),
        ("[ppo]\nparent = 'base'\n[reward]\nparent = 'base'", True),
    ],
)
def test_ppo_starts_from_the_reward_models_base_or_from_an_adapter_on_it(load, text, fine):
    if fine:
        assert load(text).ppo.parent
    else:
        assert "differ in their base" in refusal(load, text)


# --------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("seed=3", "", "seed", 3),
        ("ppo.kl_coef=2e-2", "ppo", "kl_coef", 0.02),
        ("sft.packing=false", "sft", "packing", False),
        ("evals.gate=warn", "evals", "gate", "warn"),
        ('evals.gate="warn"', "evals", "gate", "warn"),
        ("runs=/some/where", "", "runs", "/some/where"),
        ('sft.data=["a.jsonl", "b.jsonl"]', "sft", "data", ["a.jsonl", "b.jsonl"]),
        ("launch.deepspeed=a=b.json", "launch", "deepspeed", "a=b.json"),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(load, override, table, key, value):
    recipe = load("seed = 1\n[ppo]\nkl_coef = 0.5", override)
    got = getattr(getattr(recipe, table) if table else recipe, key)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("override", ["seed", "=3", " =3", "--seed"])
def test_an_override_without_key_or_value_is_refused(load, override):
    assert f"{override}: an override is key=value" in refusal(load, "", override)


@pytest.mark.parametrize("override", ["seed.x=1", "ppo.parnet=dpo", "ppo.iterations=two", "sft..epochs=1", "sft=1"])
def test_an_override_is_checked_like_the_file(load, override):
    assert refusal(load, "seed = 1", override)


# ----------------------------------------------------------------------------------------------------------- reasons


def test_a_changed_value_and_a_named_source_of_data_need_a_reason(load):
    text = "[sft]\nepochs = 2\nbatch_size = 16\ndata = ['data/demonstrations.jsonl']\n[launch]\nranks = 2"
    assert missing_reasons(load(text)) == ["sft.data", "sft.epochs", "launch.ranks"]
    assert missing_reasons(load(text + "\n[sft.why]\nepochs = 'x'\ndata = ' '")) == ["sft.data", "launch.ranks"]


def test_a_missing_reason_stops_and_says_where_to_write_it(load):
    message = refusal(lambda: require_reasons(load("[ppo]\nkl_coef = 0.1"), "my.toml"))
    assert message.startswith("my.toml: no reason is given for ppo.kl_coef\n")
    assert "under [ppo.why]: kl_coef" in message
    assert "under [why]: seed" in refusal(lambda: require_reasons(load("seed = 1"), "my.toml"))


def test_why_gives_every_override_its_reason(load):
    recipe = load("[ppo]\n[ppo.why]\nkl_coef = 'old'", "ppo.kl_coef=0.1", "seed=1", why="to see what it does")
    assert require_reasons(recipe, "my.toml") == []
    assert (recipe.ppo.why["kl_coef"], recipe.why["seed"]) == ("to see what it does",) * 2
    assert missing_reasons(load("", "seed=1")) == ["seed"]


@pytest.mark.parametrize(("text", "override"), [("why = 'x'", "seed=1"), ("[sft]\nwhy = 'x'", "sft.epochs=2")])
def test_why_that_is_no_table_is_refused_with_a_reason_for_an_override_too(load, text, override):
    assert "why" in refusal(load, text, override, why="to see")


def test_warn_relaxes_reasons_to_a_list(load):
    assert require_reasons(load("unexplained = 'warn'\n[ppo]\nkl_coef = 0.1"), "my.toml") == ["unexplained", "ppo.kl_coef"]


def test_reasons_are_kept_apart_from_settings(load):
    recipe = load("[ppo]\nkl_coef = 0.1\n[ppo.why]\nkl_coef = 'x'")
    assert recipe.model_dump()["ppo"]["why"] == {"kl_coef": "x"}
    assert "why" not in settings(recipe, "ppo")


# --------------------------------------------------------------------------------------------------------- any input

WORDS = st.sampled_from(["", "x", "base", "sft", "dpo", "ppo", "block", "lora", "data/truth/dev", 'q"\\', "é\n"])
VALUES = st.recursive(
    st.integers(-3, 99) | st.floats(allow_nan=True) | st.booleans() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def trees(draw) -> dict:
    """Mostly right keys with mostly wrong values, so that every check is reached."""
    tree = draw(st.dictionaries(st.sampled_from(KEYS[""]) | WORDS, VALUES, max_size=2))
    for table in draw(st.lists(st.sampled_from(sorted(TABLES)), max_size=3, unique=True)):
        default = TABLES[table].model_dump()
        keys = draw(st.lists(st.sampled_from(KEYS[table]) | WORDS, max_size=3, unique=True))
        tree[table] = {k: draw(VALUES if default.get(k) is None else st.just(default[k]) | VALUES) for k in keys}
    return tree


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


@given(trees(), st.lists(st.text(max_size=8) | st.sampled_from(["seed=1", "ppo.kl_coef=x", "why=1"]), max_size=2))
def test_any_tree_and_overrides_give_a_recipe_or_a_user_error(tmp_path_factory, tree, overrides):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("".join(f"{json.dumps(k)} = {toml(v)}\n" for k, v in tree.items()), encoding="utf-8")
    try:
        recipe = load_recipe(path, overrides, "why")
    except UserError as error:
        assert error.what
    else:
        assert isinstance(recipe, Recipe)
        assert isinstance(missing_reasons(recipe), list)
