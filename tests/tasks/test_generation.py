"""Generation is transformers' own, with the adapter as PEFT has it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedgen_edge.config import Evaluation, Settings, from_table
from fedgen_edge.errors import AdapterError, ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.generation import Decoding, encode_chat, is_chat_data
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Leaves

GREEDY = Decoding(max_new_tokens=20, temperature=0.0)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def settings_for(path: Path | str) -> Settings:
    return from_table({"backbone": {"path": str(path), "precision": "float32"}})


def build(path: Path | str, *, full: bool = False) -> Language:
    return language.build(settings_for(path), full=full, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def task(backbone: str) -> Language:
    return build(backbone)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone, whose tokenizer has a chat template."""
    folder, tiny = tmp_path_factory.mktemp("chat"), pretrained._make_tiny()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def random_adapter(task: Language) -> Leaves:
    """An adapter whose update is not zero."""
    rng = generator("test")
    return {k: torch.randn(v.shape, generator=rng) for k, v in task.init(rng).items()}


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_that_of_transformers_with_pefts_adapter(
    task: Language, penalty: float, tmp_path: Path
) -> None:
    adapter, folder = random_adapter(task), task.loaded.folder
    task.model.save(tmp_path / "adapter", adapter, settings_for(folder), {})
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    ids = torch.tensor([task.encode(["One day"])[0][:-1]])
    expected = tuned.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=20,
        repetition_penalty=penalty,
    )[0]
    text = task.generate(adapter, "One day", replace(GREEDY, repetition_penalty=penalty), 0)
    assert text == task.loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert text != task.generate({}, "One day", GREEDY, 0)


def test_a_full_models_greedy_text_is_that_of_its_weights(tmp_path: Path) -> None:
    task, other = build("tiny", full=True), build("tiny")
    before = task.generate(task.model.get_backbone_leaves(), "One day", GREEDY, 0)
    assert before == other.generate({}, "One day", GREEDY, 0)
    weights = {k: v + 0.1 for k, v in task.model.get_backbone_leaves().items()}
    task.model.save(tmp_path / "model", weights, settings_for("tiny"), {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([task.encode(["One day"])[0][:-1]])
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)[0]
    decoded = task.loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert task.generate(weights, "One day", GREEDY, 0) == decoded
    assert task.generate(task.model.get_backbone_leaves(), "One day", GREEDY, 0) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda w: w.update(more=torch.ones(2)), "has another weight, more"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            "norm.weight is .3., this",
        ),
        (lambda w: w["model.norm.weight"].fill_(math.nan), "model.norm.weight is not finite"),
    ],
)
def test_a_full_model_that_is_not_this_backbones_is_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], line: str
) -> None:
    task = build("tiny", full=True)
    task.model.save(tmp_path / "model", task.model.get_backbone_leaves(), settings_for("tiny"), {})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(AdapterError, match=line):
        task.model.load(tmp_path / "model")


def test_a_seed_gives_one_text_and_leaves_the_global_random_numbers(task: Language) -> None:
    decoding, state = Decoding(max_new_tokens=24), torch.get_rng_state()
    texts = [task.generate({}, "One day", decoding, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("One day") for text in texts)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_from_one_token_is_greedy(task: Language, narrow: dict[str, float]) -> None:
    # the most probable token alone is left to be drawn
    decoding = replace(Decoding(max_new_tokens=20, temperature=1.0), **narrow)
    assert task.generate({}, "One day", decoding, 3) == task.generate({}, "One day", GREEDY, 0)


def test_an_end_mark_of_the_generation_config_ends_the_text(task: Language) -> None:
    longer = task.generate({}, "One day", GREEDY, 0)
    model, ids = task.module.model, task.encode([longer])[0][1:-1]
    third = ids[len(task.encode(["One day"])[0]) :][0]  # one after the first new token
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[third, before.eos_token_id])
    try:
        shorter = task.generate({}, "One day", GREEDY, 0)
    finally:
        model.generation_config = before
    assert longer.startswith(shorter)
    assert len(shorter) < len(longer)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "max_length": 9},
        {"return_dict_in_generate": True, "min_new_tokens": 50},
        {"penalty_alpha": 0.6, "top_k": 4},  # whose code transformers fetches from the hub
    ],
)
def test_a_generation_config_does_not_change_what_is_asked_for(
    task: Language, asked: dict[str, Any]
) -> None:
    before = task.module.model.generation_config
    expected = task.generate({}, "One day", GREEDY, 0)
    task.module.model.generation_config = GenerationConfig(**asked)
    try:
        assert task.generate({}, "One day", GREEDY, 0) == expected
    finally:
        task.module.model.generation_config = before


def test_a_prompt_that_leaves_no_room_is_refused(task: Language) -> None:
    most = task.module.model.config.max_position_embeddings
    room = most - len(task.encode(["One day"])[0][:-1])
    with pytest.raises(ConfigError, match=rf"{room + 1} tokens after a prompt of .* above {most}"):
        task.generate({}, "One day", Decoding(max_new_tokens=room + 1), 0)


def test_a_runs_samples_may_fill_the_context_to_the_last_token() -> None:
    table = {"backbone": {"path": "tiny"}}
    room = 512 - 1 - len("One day")  # tiny reads 512 tokens: a start mark, and a token a byte
    for tokens in (room, room + 1):
        evaluation = {"prompts": ["One day"], "sample_tokens": tokens}
        settings = from_table({**table, "evaluation": evaluation})
        if tokens > room:
            with pytest.raises(ConfigError, match=r"evaluation\.sample_tokens=\d+ after a prompt"):
                language.build(settings, full=False, device=torch.device("cpu"))
        else:
            language.build(settings, full=False, device=torch.device("cpu"))


def test_a_chats_prompt_is_what_the_chat_template_makes_of_it(chat_folder: Path) -> None:
    task = build(chat_folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    page = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    ids = encode_chat(task.loaded.tokenizer, "Who are you?")
    assert ids == tokenizer(page, add_special_tokens=False)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
    prompt = torch.tensor([ids])
    whole = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20)
    answer = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    assert task.generate({}, "Who are you?", GREEDY, 0, chat=True) == answer


def test_a_chat_without_a_template_is_refused(task: Language) -> None:
    with pytest.raises(ConfigError, match=r"--chat: .* has no chat template: leave --chat out"):
        task.generate({}, "One day", GREEDY, 0, chat=True)


def test_a_chat_template_that_fails_is_one_line(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ConfigError, match=r"template fails \(no system message\): say --no-chat"):
        encode_chat(tokenizer, "One day")
    assert not is_chat_data(tokenizer, ["One day"])


def test_texts_written_by_the_chat_template_are_chats_and_plain_ones_are_not(
    chat_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False)
    assert is_chat_data(tokenizer, [chat, chat, "A plain text."])
    assert not is_chat_data(tokenizer, [chat, "A plain text.", "Another."])
    assert not is_chat_data(tokenizer, [])
    assert not is_chat_data(AutoTokenizer.from_pretrained(pretrained._make_tiny()), [chat])


def test_the_start_mark_of_a_template_is_no_sign_of_a_chat(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    start = tokenizer.bos_token
    tokenizer.chat_template = (
        start + "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    assert is_chat_data(tokenizer, ["[INST] hi [/INST] yo"])
    tokenizer.chat_template = start + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not is_chat_data(tokenizer, [f"a plain {start} text"])


def test_a_runs_samples_go_on_with_each_prompt(task: Language) -> None:
    plan = Evaluation(prompts=("One day", "The"), sample_tokens=3)
    samples = [*task.samples({}, plan, 5)]
    assert [sample.prompt for sample in samples] == ["One day", "The"]
    assert [s.text for s in samples] == [
        task.generate({}, prompt, Decoding(3), 5) for prompt in plan.prompts
    ]
