"""Our LoRA layer against PEFT's, against hand sums, and one client against a stack of them."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from fedgen_edge import leaves
from fedgen_edge.adapters.lora import AdaptedLayer, Lora, inject, merge
from fedgen_edge.config import Adapter
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

Model = TypeVar("Model", bound=nn.Module)
CLIENTS, ROWS = 3, 2


class Case(NamedTuple):
    """A layer, and one client's input."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear": Case(lambda: nn.Linear(5, 4), (ROWS, 5)),
    "linear-of-positions": Case(lambda: nn.Linear(5, 4), (ROWS, 3, 5)),
    "conv1d": Case(lambda: Conv1D(4, 5), (ROWS, 3, 5)),
    "conv2d-1x1": Case(lambda: nn.Conv2d(3, 4, 1), (ROWS, 3, 5, 6)),
    "conv2d-3x3": Case(lambda: nn.Conv2d(3, 4, 3), (ROWS, 3, 5, 6)),
    "conv2d-strided": Case(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (ROWS, 3, 5, 6)),
    "conv2d-same": Case(lambda: nn.Conv2d(3, 4, 3, padding="same"), (ROWS, 3, 5, 6)),
    "embedding": Case(lambda: nn.Embedding(7, 4), (ROWS, 3)),
}
each_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def filled(model: Model) -> Model:
    """The model with weights that are always the same."""
    rng = generator("weights")
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=rng)
    return model.eval()


def llama() -> LlamaForCausalLM:
    return filled(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=19,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
            )
        )
    )


def gpt2() -> GPT2LMHeadModel:
    return filled(
        GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    )


def adapted(case: Case, **settings: object) -> tuple[One, Lora]:
    model = filled(One(case.layer()))
    return model, inject(model, Adapter(target_modules=("layer",), **settings))  # pyright: ignore[reportArgumentType]


def factors(lora: Lora, *key: int | str) -> Leaves:
    """An adapter whose update is not zero."""
    rng = generator("factors", *key)
    return {k: torch.randn(shape, generator=rng) for k, shape in lora.shapes().items()}


def inputs(case: Case, clients: int = 1) -> Tensor:
    rng = generator("inputs")
    shape = (clients * case.shape[0], *case.shape[1:])
    if case is CASES["embedding"]:
        return torch.randint(7, shape, generator=rng)
    return torch.randn(shape, generator=rng)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- the same as PEFT


@each_layer
@pytest.mark.parametrize("rslora", [False, True])
def test_our_layer_gives_what_pefts_layer_gives(case: Case, rslora: bool) -> None:
    model, lora = adapted(case, rank=2, alpha=3.0, rslora=rslora)
    own, x = factors(lora), inputs(case)
    plain = filled(One(case.layer()))
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=["layer"],
        fan_in_fan_out=isinstance(plain.layer, Conv1D),
    )
    theirs = LoraModel(plain, config, "default")
    state = theirs.state_dict()
    for name, leaf in own.items():
        path = f"model.{name}.default"
        state[path if path in state else f"{path}.weight"].copy_(leaf)
    with lora.bind(own):
        close(model(x), theirs(x))


# ---- one and many


@each_layer
def test_stacked_clients_match_clients_one_by_one(case: Case) -> None:
    model, lora = adapted(case, rank=2)
    own, x = [factors(lora, c) for c in range(CLIENTS)], inputs(case, CLIENTS)
    many = leaves.stack(own)
    with lora.bind(many):
        stacked = model(x)
    alone = []
    for client, part in zip(own, x.split(ROWS), strict=True):
        with lora.bind(client):
            alone.append(model(part))
    close(stacked, torch.cat(alone), 1e-5)


@each_layer
def test_gradients_of_a_stack_are_the_stack_of_gradients(case: Case) -> None:
    model, lora = adapted(case, rank=2)
    own, x = [factors(lora, c) for c in range(CLIENTS)], inputs(case, CLIENTS)
    many = leaves.stack(own)
    stacked = slopes(model, lora, many, x)
    parts = zip(own, x.split(ROWS), strict=True)
    alone = leaves.stack([slopes(model, lora, client, part) for client, part in parts])
    for name, slope in alone.items():
        assert slope.abs().max() > 0.1
        close(stacked[name], slope, 1e-4)


def slopes(model: nn.Module, lora: Lora, own: Leaves, x: Tensor) -> Leaves:
    """Gradient of the squared outputs' sum: no two clients share a term of it."""
    now = {k: v.clone().requires_grad_() for k, v in own.items()}
    with lora.bind(now):
        return dict(
            zip(now, torch.autograd.grad(model(x).square().sum(), now.values()), strict=True)
        )


def test_a_stack_goes_through_a_whole_model_as_its_clients_do() -> None:
    # Every linear layer and the embedding at once: rows stay with their client to the end.
    model = llama()
    lora = inject(model, Adapter(rank=2, target_modules=(r".*(_proj|embed_tokens)",)))
    own = [factors(lora, c) for c in range(CLIENTS)]
    ids = torch.randint(19, (CLIENTS * ROWS, 6), generator=generator("ids"))
    with lora.bind(leaves.stack(own)):
        stacked = model(ids).logits
    for client, part, logits in zip(own, ids.split(ROWS), stacked.split(ROWS), strict=True):
        with lora.bind(client):
            close(logits, model(part).logits, 1e-5)


@each_layer
def test_padded_ranks_change_nothing_and_have_no_gradient(case: Case) -> None:
    # A zero row of A meets a zero column of B: each one's gradient is a multiple of the other.
    model, lora = adapted(case, rank=2)
    narrow, x = factors(lora), inputs(case)
    wide_model, wide_lora = adapted(case, rank=3, alpha=24.0)  # 24 / 3 = 16 / 2
    wide = {name: padded(leaf, axis=int(name.endswith("_B"))) for name, leaf in narrow.items()}
    with lora.bind(narrow), wide_lora.bind(wide):
        close(wide_model(x), model(x), 1e-5)
    for name, slope in slopes(wide_model, wide_lora, wide, x).items():
        extra = slope[2] if name.endswith("_A") else slope[:, 2]
        assert not extra.any()


def padded(leaf: Tensor, axis: int) -> Tensor:
    """One more row (of A) or column (of B), of zeros."""
    return torch.cat([leaf, torch.zeros_like(leaf.narrow(axis, 0, 1))], axis)


# ---- by hand


EYE = torch.eye(2)
FACTORS = (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_the_update_is_scale_times_b_a(kind: str) -> None:
    # B A = [[3,6],[4,8]], alpha / rank = 2: the update is [[6,12],[8,16]], and W = I.
    # x = [1,1]: W x = [1,1], the update's [18,24]: [19,25] together.
    # An embedding's row of token 1 is [0,1] + 2 * 2 * [3,4] = [12,17].
    layer, x, out = {
        "linear": (nn.Linear(2, 2, bias=False), torch.ones(1, 2), [[19.0, 25.0]]),
        "conv1d": (Conv1D(2, 2), torch.ones(1, 2), [[19.0, 25.0]]),
        "conv2d": (nn.Conv2d(2, 2, 1, bias=False), torch.ones(1, 2, 1, 1), [[[[19.0]], [[25.0]]]]),
        "embedding": (nn.Embedding(2, 2), torch.tensor([1]), [[12.0, 17.0]]),
    }[kind]
    with torch.no_grad():
        layer.weight.copy_(EYE.reshape(layer.weight.shape))
    model = One(layer)
    lora = inject(model, Adapter(rank=1, alpha=2.0, target_modules=("layer",)))
    own = {k: f.reshape(lora.shapes()[k]) for k, f in zip(lora.shapes(), FACTORS, strict=True)}
    with lora.bind(own):
        close(model(x), torch.tensor(out))
    merge(model, lora, own)
    assert model.layer is layer
    close(model(x), torch.tensor(out))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_is_applied_once(rslora: bool, scale: float) -> None:
    # alpha = 8, rank = 4: 8 / 4 = 2, or 8 / sqrt(4) = 4. With A = B = I and W = 0: y = scale * x.
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    model = One(layer)
    lora = inject(model, Adapter(rank=4, alpha=8.0, rslora=rslora, target_modules=("layer",)))
    own = {name: torch.eye(4) for name in lora.shapes()}
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with lora.bind(own):
        close(model(x), scale * x)


# ---- merging


@each_layer
def test_merged_equals_unmerged(case: Case) -> None:
    model, lora = adapted(case, rank=2)
    own, x = factors(lora), inputs(case)
    with lora.bind(own):
        unmerged = model(x)
    merge(model, lora, own)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    close(model(x), unmerged, 1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_merged_model_gives_the_logits_of_the_adapted_one(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    before = {name for name, _ in model.named_parameters()}
    lora = inject(model, Adapter(rank=2, alpha=2.0, target_modules=("all-linear",)))
    own = leaves.scale(factors(lora), 0.3)
    ids = torch.randint(19, (2, 6), generator=generator("ids"))
    with lora.bind(own):
        unmerged = model(ids).logits
    merge(model, lora, own)
    assert {name for name, _ in model.named_parameters()} == before
    close(model(ids).logits, unmerged, 1e-5)


# ---- the backbone stays as it was


@each_layer
def test_a_fresh_adapter_changes_nothing(case: Case) -> None:
    model, lora = adapted(case, rank=2)
    x = inputs(case)
    fresh = lora.init(generator("fresh"))
    with lora.bind(fresh):
        assert torch.equal(model(x), filled(One(case.layer()))(x))
    assert {k: tuple(v.shape) for k, v in fresh.items()} == lora.shapes()
    zero = [name for name, leaf in fresh.items() if not leaf.any()]
    assert len(zero) == 1


def test_a_fresh_a_is_uniform_within_one_over_the_root_of_its_inputs() -> None:
    # PEFT's kaiming_uniform_(a=sqrt(5)): bound = sqrt(6 / (1 + 5) / 400) = 1 / 20. Of 400 * 400
    # numbers the largest misses the bound by 1 % with a chance of 0.99^160000 = 0; a uniform
    # number's variance is bound^2 / 3, its estimate's relative error sqrt(0.8 / 160000) = 0.0022.
    lora = inject(One(nn.Linear(400, 400)), Adapter(rank=400, target_modules=("layer",)))
    a = lora.init(generator(0))["layer.lora_A"]
    assert 0.99 / 20 < a.abs().max() <= 1 / 20
    assert abs(float(a.var()) / (1 / 20**2 / 3) - 1) < 5 * 0.0022


def test_the_same_generator_makes_the_same_adapter() -> None:
    lora = inject(llama(), Adapter(target_modules=("q_proj",), rank=2))
    one, same, other = (lora.init(generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    drawn = [k for k in one if k.endswith("lora_A")]
    assert not any(torch.equal(one[k], other[k]) for k in drawn)
    assert not torch.equal(one[drawn[0]], one[drawn[1]])


def test_the_backbones_weights_are_shared_frozen_and_never_copied() -> None:
    model = llama()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    lora = inject(model, Adapter(rank=2, target_modules=("all-linear",)))
    with lora.bind(leaves.stack([factors(lora, c) for c in range(CLIENTS)])):
        model(torch.zeros(CLIENTS, 4, dtype=torch.int64))
        now = {n.replace(".base.", "."): p for n, p in model.named_parameters()}
        assert {name: p.data_ptr() for name, p in now.items()} == before
    assert not any(p.requires_grad for p in now.values())


def test_out_of_its_context_the_model_is_the_backbone_again() -> None:
    model, lora = adapted(CASES["linear"], rank=2)
    x = inputs(CASES["linear"])
    backbone = filled(One(CASES["linear"].layer()))(x)
    with pytest.raises(ZeroDivisionError), lora.bind(factors(lora)):  # noqa: PT012
        assert not torch.equal(model(x), backbone)
        raise ZeroDivisionError
    assert torch.equal(model(x), backbone)
    with lora.bind({}):
        assert torch.equal(model(x), backbone)


# ---- which layers


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "v_proj"],
        ["self_attn.o_proj", "embed_tokens"],
        ["model.layers.1.mlp.up_proj"],
        ["lm_head", "k_proj"],
        r".*layers\.0\.(self_attn|mlp)\.\w+_proj",
        r".*\.[qv]_proj",
        "all-linear",
    ],
)
def test_targets_of_a_llama_mean_what_they_mean_to_peft(targets: list[str] | str) -> None:
    same_layers(llama, targets)


@pytest.mark.parametrize(
    "targets",
    [["c_attn"], ["c_proj"], ["attn.c_proj", "wte"], r".*h\.1\.mlp\.c_\w+", "all-linear"],
)
def test_targets_of_a_gpt2_mean_what_they_mean_to_peft(targets: list[str] | str) -> None:
    same_layers(gpt2, targets)


def same_layers(make: Callable[[], nn.Module], targets: list[str] | str) -> None:
    ours = (targets,) if isinstance(targets, str) else tuple(targets)
    lora = inject(make(), Adapter(rank=2, target_modules=ours))
    assert set(lora.layers) == adapted_by_peft(make(), targets)
    assert set(lora.layers) == adapted_by_peft(make(), list(lora.targets))  # as it is written


def adapted_by_peft(model: nn.Module, targets: list[str] | str) -> set[str]:
    turned = isinstance(model, GPT2LMHeadModel)
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=turned)
    wrapped = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    named = wrapped.base_model.model.named_modules()  # pyright: ignore[reportCallIssue]
    return {name for name, module in named if isinstance(module, LoraLayer)}


def test_a_default_that_matches_nothing_beside_others_is_passed_over() -> None:
    lora = inject(llama(), Adapter(rank=2), default=["v_proj", "fc1"])
    assert lora.targets == ("v_proj",)


def test_falcons_own_linear_layer_is_adapted_as_peft_adapts_it() -> None:
    layer, x = FalconLinear(5, 4), torch.randn(ROWS, 5)
    close(layer(x), F.linear(x, layer.weight, layer.bias))  # so it may be taken for a Linear
    shape = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, plain = (filled(FalconForCausalLM(FalconConfig(**shape))) for _ in range(2))
    lora = inject(model, Adapter(rank=2, alpha=4.0, target_modules=("query_key_value", "dense")))
    adapter, tokens = factors(lora), torch.tensor([[3, 5, 7]])
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value", "dense"])
    theirs = get_peft_model(plain, config)
    state = theirs.state_dict()
    for name, leaf in adapter.items():
        state[f"base_model.model.{name}.default.weight"].copy_(leaf)
    with lora.bind(adapter):
        close(model(tokens).logits, theirs(tokens).logits, 1e-5)


class Router(nn.Linear):
    """A subclass of Linear that computes something else, as Llama 4's does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Mixture(nn.Module):
    """Two layers, a router, and experts in one tensor: 16 + 4 + 16 and 2 x 16 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.router = Router(4, 1, bias=False)
        self.experts = nn.Module()
        self.experts.weight = nn.Parameter(torch.ones(2, 4, 4))


def test_all_linear_passes_over_routers_and_tells_of_experts() -> None:
    lora = inject(Mixture(), Adapter(rank=1, target_modules=("all-linear",)))
    assert set(lora.layers) == {"up", "down"}
    assert lora.experts == pytest.approx(32 / (16 + 4 + 16 + 32))
    assert inject(Mixture(), Adapter(rank=1, target_modules=("up",))).experts == 0


def test_a_router_that_is_named_is_refused_with_layers_that_can_be_adapted() -> None:
    with pytest.raises(ConfigError, match=r"router is a Router, which cannot .* are down, up$"):
        inject(Mixture(), Adapter(rank=1, target_modules=("up", "router")))


def test_the_default_targets_are_taken_where_the_settings_name_none() -> None:
    lora = inject(llama(), Adapter(rank=2), default=["v_proj"])
    assert set(lora.layers) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert lora.targets == ("v_proj",)


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # v_proj of one key-value head maps 8 to 4: rank 4 is the most.
        ({"rank": 5, "target_modules": ("v_proj",)}, "adapter.rank=5 is above 4"),
        ({"target_modules": ("q_porj",)}, "match no layer: .*k_proj, .*q_proj.*all-linear"),
        ({"target_modules": ("q_proj", "vproj")}, r"'vproj'\]: vproj match no layer: .*v_proj"),
        ({"target_modules": ("proj", "q_proj", "mlp.up")}, "proj, mlp.up match no layer"),
        ({"target_modules": (r".*nothing",)}, "match no layer: .*q_proj"),
        ({"target_modules": ("(q_proj",)}, "is no regular expression"),
        ({"target_modules": ("input_layernorm",)}, "is a LlamaRMSNorm, .*Linear.* are .*q_proj"),
        ({"target_modules": ("mlp",)}, "model.layers.0.mlp is a LlamaMLP"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_model_alone(
    settings: dict[str, object], said: str
) -> None:
    model = llama()
    with pytest.raises(ConfigError, match=said) as caught:
        inject(model, Adapter(**settings))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


def test_a_rank_may_be_the_layers_smaller_side() -> None:
    lora = inject(llama(), Adapter(rank=4, target_modules=("v_proj",)))
    assert lora.shapes()["model.layers.0.self_attn.v_proj.lora_A"] == (4, 8)


def test_a_rank_may_be_above_the_side_of_a_layer_beside_larger_ones() -> None:
    lora = inject(llama(), Adapter(rank=5, target_modules=("q_proj", "v_proj")))
    assert lora.shapes()["model.layers.0.self_attn.q_proj.lora_B"] == (8, 5)
    assert lora.shapes()["model.layers.0.self_attn.v_proj.lora_B"] == (4, 5)


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="grouped Conv2d"):
        inject(One(nn.Conv2d(4, 4, 3, groups=2)), Adapter(rank=2, target_modules=("layer",)))
