"""What is trained stands in YAML: every config that comes with the package loads, the published ones say where each
value is from, and what can not be meant is refused with its key."""

import dataclasses
import re

import pytest
import yaml

from latentmem.core.presets import PAPER_PIECE
from latentmem.train.config import CONFIGS, OBJECTIVES, OF_USE, Config, load

NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
ATTENTION_AND_MLP = ("q_proj", "v_proj", "k_proj", "up_proj", "down_proj", "gate_proj")
PUBLISHED = {  # model, N, rank; M+ has 10,240 slots and 2,560 retrieved ones, all of them slots before its last stage
    "paper-llama2-7b": ("meta-llama/Llama-2-7b-hf", 7680, 8),
    "paper-llama3-8b": ("meta-llama/Meta-Llama-3-8B", 12800, 16),
    "mplus-llama3.1-8b": ("meta-llama/Llama-3.1-8B", 10240 + 2560, 16),
}
SMALL = """
data:
  - {path: texts}
  - {path: more, weight: 2}
memory: {N: 64, K: 16}
texts: {shortest: 4, longest: 16}
"""


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def written(name):
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


# --- those that come with the package ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_by_its_name_and_by_its_path(name):
    found = load(name)
    assert found == load(CONFIGS / f"{name}.yaml")
    assert found.data and set(found.objectives) <= set(OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
def test_no_source_is_a_place_on_somebodys_machine(name):
    for source in load(name).data:
        assert not source.path.startswith(("/", "~", "..")) and "\\" not in source.path


def test_the_published_models_and_the_packaged_one_have_a_config():
    assert {*PUBLISHED, "smollm2-135m"} <= set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name):
    model, N, r = PUBLISHED[name]
    found = load(name)
    assert (found.model, found.memory.preset, found.memory.N, found.memory.K) == (model, "paper", N, 256)
    assert (found.lora.r, found.lora.alpha, found.lora.dropout) == (r, 32.0, 0.1)
    assert found.lora.target_modules == ATTENTION_AND_MLP
    assert (found.texts.shortest, found.texts.longest) == (16, PAPER_PIECE) and found.memory.birth == "full"
    width = 256 if name == "mplus-llama3.1-8b" else 0
    assert found.retriever.sizes == {"width": width, "hidden": 2 * width} and not found.retriever.alone


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rate_is_the_released_one_for_eight_gpus(name):
    base = 4.6e-5 if name == "mplus-llama3.1-8b" else 4.6e-6
    steps = load(name).steps
    assert steps.lr == pytest.approx(8 * steps.episodes * base) and steps.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_three_objectives_of_the_paper_are_trained(name):
    assert set(load(name).objectives) == {"new_knowledge", "continuous", "forgetting"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ages_are_bounded_by_the_config_and_not_by_the_memory(name):
    found = load(name)
    assert (1 - found.memory.K / found.memory.N) ** found.texts.oldest >= found.texts.least_left


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_value_says_where_it_is_from(name):
    values = [line for line in written(name).splitlines() if re.match(r"\s*(- )?\w+: *[^\s#]", line)]
    assert len(values) > 40
    for line in values:
        assert re.search(r"  # \S+ \S+", line), line


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_value_is_left_to_a_default(name):
    found = yaml.safe_load(written(name))
    assert set(found) == {field.name for field in dataclasses.fields(Config)}
    for key in ("memory", "lora", "retriever", "texts", "steps", "watch"):
        fields = {field.name for field in dataclasses.fields(getattr(load(name), key))}
        assert set(found[key]) == fields - set(OF_USE), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_quotations_are_short(name):
    for quotation in re.findall(r'"([^"]*)"', re.sub(r"\n\s*#", " ", written(name))):
        assert len(quotation.split()) < 25, quotation


# --- changes ----------------------------------------------------------------------------------------------------------


def test_a_change_reaches_a_key_inside_others(small):
    found = load(small, ["memory.K=32", "steps.lr=2e-4", "texts.rows=3"])
    assert (found.memory.K, found.memory.N, found.steps.lr, found.texts.rows) == (32, 64, 2e-4, 3)
    assert load(small, ["watch.titles=[Kenya, Teacher]"]).watch.titles == ("Kenya", "Teacher")


def test_a_change_reaches_an_item_of_a_list_by_its_number(small):
    assert [source.weight for source in load(small, ["data.1.weight=5"]).data] == [1.0, 5.0]
    assert load("paper-llama2-7b", ["data.0.subset=realnewslike"]).data[0].subset == "realnewslike"


def test_a_change_can_make_a_section_that_the_file_has_not(small):
    assert load(small, ["lora.r=4"]).lora.r == 4
    assert load(small, ["objectives={forgetting: 1}"]).objectives == {"forgetting": 1.0}


def test_later_changes_win(small):
    assert load(small, ["seed=1", "seed=2"]).seed == 2


def test_a_change_can_take_a_value_away(small):
    assert load(small, ["data.0.hub=owner/name", "data.0.hub=null"]).data[0].hub is None


def test_whole_numbers_are_taken_for_numbers_and_written_powers_too(small):
    assert load(small, ["steps.clip=2"]).steps.clip == 2.0
    assert load(small, ["steps.lr=1e-3"]).steps.lr == 1e-3  # YAML takes it for text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("memory.M=4", r"memory has no key M; its keys are N, K, preset"),
        ("memry.N=4", r"the config has no key memry"),
        ("data.0.weigth=2", r"data\.0 has no key weigth"),
        ("data.7.weight=2", r"there are 2 items, and '7' is none of their numbers"),
        ("data.first.weight=2", r"'first' is none of their numbers"),
        ("memory.N.more=1", r"'more' has nothing above it"),
        ("memory.N=many", r"memory\.N: a whole number was expected, got 'many'"),
        ("memory.N=64.5", r"memory\.N: a whole number was expected, got 64\.5"),
        ("memory.N=true", r"memory\.N: a whole number was expected, got True"),
        ("steps.lr=fast", r"steps\.lr: a number was expected, got 'fast'"),
        ("steps.lr=true", r"steps\.lr: a number was expected, got True"),
        ("checkpointing=1", r"checkpointing: true or false was expected, got 1"),
        ("model=7", r"model: text was expected, got 7"),
        ("lora.target_modules=q_proj", r"lora\.target_modules: a list was expected, got 'q_proj'"),
        ("lora.target_modules=[q_proj, 3]", r"lora\.target_modules\.1: text was expected, got 3"),
        ("memory=large", r"memory: keys and values were expected, got 'large'"),
        ("data.0={weight: 1}", r"data\.0: .*path"),
        ("objectives.recite=1", r"objectives: 'recite' is none of new_knowledge"),
        ("objectives={questions: 1, forgetting: -0.5}", r"objectives\.forgetting must not be negative"),
        ("objectives={}", r"objectives: give at least one"),
        ("objectives={forgetting: 0}", r"objectives: the weights are all 0"),
        ("memory.K=65", r"memory\.K, .*, must lie between 1 and the capacity N: got K=65, N=64"),
        ("memory.preset=other", r"memory\.preset must be one of exact, paper"),
        ("memory.seed=1", r"memory\.seed is for a memory in use; leave it out"),
        ("memory.longterm={R: 4}", r"memory\.longterm is for a memory in use; leave it out"),
        ("memory.birth=half", r"memory\.birth must be empty or full"),
        ("texts.near=1.5", r"texts\.near is a share between 0 and 1, got 1\.5"),
        ("memory.restarts=[1, -1]", r"memory\.restarts must not be negative, got \[1, -1\]"),
        ("memory.compressions=[2, 0]", r"memory\.compressions must be at least 1, got \[2, 0\]"),
        ("memory.compressions=2", r"memory\.compressions: a list was expected, got 2"),
        ("adapters=7", r"adapters: text was expected, got 7"),
        ("texts.longest=17", r"texts\.longest=17 is more than one update reads, 16 tokens"),
        ("texts.shortest=17", r"texts: shortest=17 must not exceed longest=16"),
        ("data=[]", r"data: give at least one source"),
        ("data.0.kind=poems", r"data\.0\.kind must be one of text, questions"),
        ("retriever.heads=2", r"retriever has no key heads; its keys are width, hidden, weight, lr, alone"),
        ("retriever.width=-1", r"retriever\.width and retriever\.hidden must not be negative"),
        ("retriever.weight=0", r"retriever\.weight must be above 0, got 0"),
        ("retriever.lr=0", r"retriever\.lr must be above 0, got 0"),
        ("retriever.alone=true", r"retriever\.alone needs a retriever\.width above 0"),
        ("steps.betas=[0.9]", r"steps\.betas are two numbers"),
        ("steps.write=0", r"steps\.write must be above 0, got 0"),
        ("steps.unrelated=0", r"steps\.unrelated must be above 0"),
        ("sharding=zero", r"sharding must be none or fsdp2"),
        ("steps.total", r"--set takes key=value"),
        ("=3", r"--set takes key=value"),
        ("seed=[1", r"--set seed=\[1: the value is no YAML"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_key(small, change, named):
    with pytest.raises(ValueError, match=named):
        load(small, [change])


@pytest.mark.parametrize("change", ["memory.compression=2", "memory.compressions=[1, 2]"])
def test_the_preset_paper_does_not_compress(small, change):
    with pytest.raises(ValueError, match=r"memory\.compressions? is for the preset '?exact"):
        load(small, ["memory.preset=paper", change])
    assert load(small, ["memory.preset=paper", "memory.compressions=[1]"]).memory.drawn == (1,)


def test_the_smallest_compression_says_how_long_a_text_may_be(small):
    several = ["memory.compressions=[4, 2, 3]"]
    assert load(small, [*several, "texts.longest=32"]).texts.longest == 32
    with pytest.raises(ValueError, match=r"texts\.longest=33 is more than one update reads, 32 tokens"):
        load(small, [*several, "texts.longest=33"])


def test_a_pool_is_begun_anew_in_equal_parts_each_with_its_number(small):
    began = load(small, ["memory.restarts=[1, 2, 0, 3]", "steps.total=18"]).began
    parts = ([0, 1, 2, 3, 4], [5, 5, 7, 7], [9, 9, 9, 9, 9], [14, 14, 14, 17])
    assert [began(step) for step in range(18)] == [first for part in parts for first in part]
    assert (began(18), began(30)) == (17, 29)  # beyond the end the last part goes on
    assert {load(small, ["steps.total=18"]).began(step) for step in range(18)} == {0}
    with pytest.raises(ValueError, match=r"memory\.restarts has 3 numbers, and the run 2 steps"):
        load(small, ["memory.restarts=[1, 2, 0]", "steps.total=2"])


def test_trained_adapters_are_gone_on_from_without_dropout(small):
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 with adapters"):
        load(small, ["adapters=auto", "lora.dropout=0.1"])
    assert load(small, ["adapters=auto"]).adapters == "auto"
    assert load(small, ["adapters=auto", "adapters=null", "lora.dropout=0.1"]).adapters is None


def test_a_file_that_is_not_there_is_refused_with_the_names_of_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml: No such file.*one of .*paper-llama2-7b.*smollm2-135m"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match="Give a YAML file"):
        load(tmp_path)


def test_chat_is_refused_where_weights_are_sharded(small):
    sharded = ["sharding=fsdp2", "watch.probe=0"]
    with pytest.raises(ValueError, match=r"objectives\.chat must be 0 with sharding"):
        load(small, [*sharded, "objectives={chat: 1, recall: 1}"])
    load(small, [*sharded, "objectives={chat: 0, recall: 1}"])
    load(small, ["objectives={chat: 1}"])


@pytest.mark.parametrize("content", [b"memory: {N: 4", b"a: b: c", b"\xff\xfe\x00"])
def test_what_is_no_yaml_is_refused(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.yaml is no YAML"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("content", ["", "- a list", "words"])
def test_a_file_without_keys_is_refused(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml: keys and values were expected"):
        load(tmp_path / "bad.yaml")
