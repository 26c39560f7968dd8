"""Every method against one example at a time, under everything that training does; and what is refused."""

import contextlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from federated.errors import PrivacyError
from federated.privacy.per_sample import chosen_method, coverage, per_sample
from tests.unit.privacy.reference import LABELS, LM, SERIES, STOCK, Case, assert_equal_gradients

torch.set_num_threads(1)

MODELS = {
    "bert": ("bert", LABELS),
    "bert-stock": ("bert", STOCK),
    "llama": ("llama", LM),
    "llama-labels": ("llama", LABELS),
    "gpt2": ("gpt2", LM),
    "gpt2-stock": ("gpt2", STOCK),
    "sensor": ("sensor", SERIES),
}
KINDS = {
    "qv": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "target_modules": "all-linear"},
    "ffa": {"groups": ("factor_b", "dense")},
    "a-only": {"groups": ("factor_a",)},
    "lora_xs": {"kind": "lora_xs"},
    "ia3": {"kind": "ia3"},
    "layernorm": {"kind": "layernorm"},
    "prompt": {"kind": "prompt"},
    "head": {"kind": "head"},
    "full": {"kind": "full"},
}
IMPOSSIBLE = {("bert-stock", "prompt"), ("gpt2-stock", "prompt"), ("sensor", "prompt"), ("sensor", "layernorm")}
IMPOSSIBLE |= {("llama", "head"), ("gpt2", "head")}
IMPOSSIBLE |= {("gpt2", "qv"), ("gpt2", "rslora"), ("bert-stock", "rslora"), ("llama-labels", "a-only")}  # as others
CASES = [(model, kind) for model in MODELS for kind in KINDS if (model, kind) not in IMPOSSIBLE]


def case_of(model, kind, **options):
    name, task = MODELS[model]
    return Case(name, task, **KINDS[kind], **options)


def found_by(method, case):
    with per_sample(method, case.model, case.parameters) as made:
        made.gradients(case.loss, case.batch)  # the second call must know nothing of the first
        return made.gradients(case.loss, case.batch)


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_fused_gradients(model, kind):
    case = case_of(model, kind)
    assert chosen_method("auto", case.model, case.parameters) == "fused"
    assert_equal_gradients(found_by("fused", case), case.truth())


@pytest.mark.parametrize(
    ("model", "kind"),
    [("bert", "all-linear"), ("bert-stock", "ffa"), ("bert", "layernorm"), ("llama", "rslora"), ("llama", "layernorm"),
     ("llama-labels", "head"), ("gpt2", "all-linear"), ("gpt2-stock", "lora_xs"), ("sensor", "full")],
)  # fmt: skip
def test_gradients_by_opacus(model, kind):
    case = case_of(model, kind)
    assert_equal_gradients(found_by("hooks", case), case.truth())


@pytest.mark.parametrize(
    ("model", "kind"),
    [("bert", "qv"), ("bert", "prompt"), ("bert", "full"), ("bert-stock", "ia3"), ("llama-labels", "rslora"),
     ("llama-labels", "full"), ("gpt2-stock", "layernorm"), ("gpt2-stock", "ia3"), ("sensor", "lora_xs")],
)  # fmt: skip
def test_gradients_by_vmap(model, kind):
    case = case_of(model, kind)
    assert_equal_gradients(found_by("vmap", case), case.truth())


@pytest.mark.parametrize("method", ["fused", "vmap", "hooks"])
def test_float64_stays(method):
    model, parameters, loss, batch, _ = plain_case("good")
    model.double()
    with per_sample(method, model, parameters) as made:
        found = made.gradients(loss, {"x": batch["x"].double()})
    assert {one.dtype for one in found.values()} == {torch.float64}


def _checkpointed(case, *, reentrant):
    """Recompute each layer in the backward pass; gives the list that a forward of a layer adds to."""
    backbone, runs = case.model.backbone, []
    for layer in getattr(backbone, "layers", None) or backbone.encoder.layer:

        def again(*inputs, layer=layer, **named):
            def forward(*inputs):
                runs.append(1)
                return type(layer).forward(layer, *inputs, **named)

            return checkpoint(forward, *inputs, use_reentrant=reentrant)

        layer.forward = again
    backbone.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return runs


@pytest.mark.parametrize("kind", ["all-linear", "layernorm", "ia3"])
@pytest.mark.parametrize("model", ["bert", "llama-labels"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_fused_is_exact_under_gradient_checkpointing(model, kind, reentrant):
    case = case_of(model, kind)
    expected = case.truth()
    runs = _checkpointed(case, reentrant=reentrant)
    assert_equal_gradients(found_by("fused", case), expected)
    assert len(runs) == 2 * 2 * 2  # layers, batches, and each of them again


def test_opacus_refuses_checkpointing_that_is_not_reentrant():
    case = case_of("bert", "qv")
    _checkpointed(case, reentrant=False)
    with pytest.raises(PrivacyError, match="Opacus"):
        found_by("hooks", case)


@pytest.mark.parametrize("kind", ["all-linear", "layernorm", "ia3", "head", "prompt", "full"])
@pytest.mark.parametrize("model", ["bert", "llama-labels"])
def test_fused_under_bfloat16_autocast(model, kind):
    case = case_of(model, kind)
    expected = case.truth()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model_output = case.loss(case.model, case.batch)
    plain = case.loss
    with per_sample("fused", case.model, case.parameters) as made:

        def loss(model, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = plain(model, batch)
            torch.testing.assert_close(losses, model_output, rtol=2e-2, atol=2e-2)
            return losses

        found = made.gradients(loss, case.batch)
    assert {one.dtype for one in found.values()} == {torch.float32}
    flat = [torch.cat([one[name].flatten(1) for name in expected], dim=1) for one in (found, expected)]
    gap = (flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)
    assert float(gap.max()) < 0.06, gap


def test_dropout_stays():
    case = case_of("bert", "qv", dropout=0.5)
    case.adapter.set_dropout(True)
    torch.manual_seed(1)
    first = found_by("fused", case)
    torch.manual_seed(2)
    second = found_by("fused", case)
    assert not torch.equal(*(torch.cat([t.flatten() for t in one.values()]) for one in (first, second)))


# What is left behind


def snapshot(case):
    return {
        name: (
            module.training,
            {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_")},
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            {key: id(value) for key, value in module._parameters.items()},
        )
        for name, module in case.model.named_modules()
    }


def assert_untouched(case, before=None):
    assert before is None or snapshot(case) == before
    for parameter in case.model.parameters():
        assert parameter.grad is None
        assert not {"grad_sample", "_forward_counter", "_current_grad_sample"} & set(vars(parameter))
    assert not [module for module in case.model.modules() if "forward" in vars(module)]
    assert not [module for module in case.model.modules() if {"activations", "max_batch_len"} & set(vars(module))]


@pytest.mark.parametrize("method", ["fused", "hooks", "vmap"])
@pytest.mark.parametrize("failing", [False, True])
def test_nothing_stays_behind(method, failing):
    case = case_of("bert", "all-linear")
    attention, before = case.model.backbone.config._attn_implementation, snapshot(case)
    logits = case.model(**{k: v for k, v in case.batch.items() if k != "labels"})

    def loss(model, batch):
        losses = case.loss(model, batch)
        if failing:
            raise KeyError("on the way")
        return losses

    with contextlib.suppress(KeyError), per_sample(method, case.model, case.parameters) as made:
        made.gradients(loss, case.batch)
    assert_untouched(case, before)
    assert case.model.backbone.config._attn_implementation == attention
    assert torch.equal(case.model(**{k: v for k, v in case.batch.items() if k != "labels"}), logits)


@pytest.mark.parametrize("method", ["fused", "hooks"])
def test_a_failed_batch_does_not_reach_the_next(method):
    case = case_of("bert", "qv")
    expected = case.truth()

    def broken(model, batch):
        case.loss(model, batch).sum().backward(inputs=list(case.parameters.values())[:2])
        raise KeyError("half way")

    if method == "fused":
        with per_sample(method, case.model, case.parameters) as made:
            with pytest.raises(KeyError):
                made.gradients(broken, case.batch)
            assert_equal_gradients(made.gradients(case.loss, case.batch), expected)
    with pytest.raises(KeyError), per_sample(method, case.model, case.parameters) as made:
        made.gradients(broken, case.batch)
    assert_untouched(case)
    assert_equal_gradients(found_by(method, case), expected)


# What is refused


class Plain(nn.Module):
    """Two layers; ``way`` says what is done with the first."""

    def __init__(self, way="good"):
        super().__init__()
        self.first, self.second, self.way = nn.Linear(3, 4), nn.Linear(4, 1), way
        self.loose = nn.Parameter(torch.ones(4)) if way == "loose" else None
        if way == "tied":
            self.other = Other(self.first.weight)

    def forward(self, x):
        hidden = self.first(x) if self.way != "around" else nn.functional.linear(x, self.first.weight, self.first.bias)
        if self.way == "both":
            hidden = hidden + nn.functional.linear(x, self.first.weight)
        if self.way == "twice":
            hidden = hidden + self.first(x**2)
        if self.way == "flat":
            hidden = self.first(x.flatten(0, 1)).view(*x.shape[:2], 4)
        if self.way == "turned":
            hidden = self.first(x.transpose(0, 1)).transpose(0, 1)
        if self.way == "loose":
            hidden = hidden * self.loose
        if self.way == "unused":
            hidden = x @ torch.ones(3, 4)
        return self.second(torch.tanh(hidden)).sum((1, 2))


class Other(nn.Module):
    """Holds another layer's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def plain_case(way, count=5):
    torch.manual_seed(0)
    model = Plain(way)
    parameters = {name: one for name, one in model.named_parameters() if "other" not in name}
    batch = {"x": torch.randn(count, 7, 3)}

    def loss(model, batch):
        return model(batch["x"]) ** 2

    truth = {name: [] for name in parameters}
    for x in batch["x"]:
        grads = torch.autograd.grad(loss(model, {"x": x[None]}).sum(), list(parameters.values()), allow_unused=True)
        for (name, one), grad in zip(parameters.items(), grads, strict=True):
            truth[name].append(torch.zeros_like(one) if grad is None else grad)
    return model, parameters, loss, batch, {name: torch.stack(one) for name, one in truth.items()}


@pytest.mark.parametrize("way", ["good", "twice", "unused"])
@pytest.mark.parametrize("method", ["fused", "hooks", "vmap"])
def test_plain_models(way, method):
    model, parameters, loss, batch, truth = plain_case(way)
    with per_sample(method, model, parameters) as made:
        assert_equal_gradients(made.gradients(loss, batch), truth)


@pytest.mark.parametrize("way", ["around", "both", "flat", "turned"])
def test_fused_refuses_what_it_cannot_account_for(way):
    model, parameters, loss, batch, truth = plain_case(way)
    with pytest.raises(PrivacyError, match="vmap") as refused, per_sample("fused", model, parameters) as made:
        made.gradients(loss, batch)
    assert "first" in str(refused.value)
    assert all(one.grad is None for one in parameters.values())
    with per_sample("vmap", model, parameters) as made:
        assert_equal_gradients(made.gradients(loss, batch), truth)


def test_opacus_rows_that_are_no_examples_are_refused():
    model, parameters, loss, batch, _ = plain_case("flat")
    with pytest.raises(PrivacyError, match="no gradient of each of"), per_sample("hooks", model, parameters) as made:
        made.gradients(loss, batch)


def test_an_error_inside_of_opacus_is_refused():
    model, parameters, loss, batch, _ = plain_case("good")

    def failing(model, batch):
        losses = loss(model, batch)
        losses.register_hook(lambda gradient: gradient.missing)
        return losses

    refused = pytest.raises(PrivacyError, match=r"Opacus cannot take this model's gradients \(AttributeError\)")
    with refused, per_sample("hooks", model, parameters) as made:
        made.gradients(failing, batch)


def test_opacus_around_its_hooks_is_refused():
    model, parameters, loss, batch, _ = plain_case("around")
    with pytest.raises(PrivacyError, match="no gradient of each"), per_sample("hooks", model, parameters) as made:
        made.gradients(loss, batch)


def test_names_of_what_is_not_covered():
    model, parameters, *_ = plain_case("loose")
    assert coverage("fused", model, parameters) == coverage("hooks", model, parameters) == ("loose",)
    assert coverage("vmap", model, parameters) == ()
    assert chosen_method("auto", model, parameters) == "vmap"
    tied, parameters, *_ = plain_case("tied")
    assert coverage("fused", tied, parameters) == coverage("hooks", tied, parameters) == ("first.weight",)


def test_a_tensor_of_no_model_is_refused_by_name():
    model, parameters, *_ = plain_case("good")
    parameters["stranger"] = nn.Parameter(torch.zeros(2))
    for method in ("auto", "fused", "hooks", "vmap"):
        with pytest.raises(PrivacyError, match=r"stranger cannot be trained .* \(1 of 5 trained tensors\)"):
            chosen_method(method, model, parameters)
    assert coverage("hooks", model, parameters) == ("stranger",)


@pytest.mark.parametrize("method", ["fused", "hooks"])
def test_a_method_that_is_asked_for_is_not_replaced(method):
    model, parameters, *_ = plain_case("loose")
    refused = pytest.raises(PrivacyError, match=f"loose cannot be trained .*per_sample = {method}")
    with refused, per_sample(method, model, parameters):
        raise AssertionError("opened")


def test_whatever_else_is_trainable_is_refused():
    model, parameters, *_ = plain_case("good")
    del parameters["second.bias"]
    with pytest.raises(PrivacyError, match=r"second.bias is trainable and would not be protected"):
        chosen_method("auto", model, parameters)


def test_a_forward_that_somebody_replaced_is_not_trusted():
    model, parameters, *_ = plain_case("good")
    model.first.forward = lambda x: x @ torch.ones(3, 4)
    assert coverage("fused", model, parameters) == coverage("hooks", model, parameters)
    assert coverage("fused", model, parameters) == ("first.bias", "first.weight")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(5, 3, sparse=True),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.Conv1d(3, 3, 1),
        nn.BatchNorm1d(3),
        nn.Bilinear(2, 2, 2),
        nn.GRU(2, 2),
    ],
)
def test_other_layers_are_not_covered(layer):
    parameters = dict(layer.named_parameters())
    assert coverage("fused", layer, parameters) == tuple(sorted(parameters))


@pytest.mark.parametrize("state", ["off", "two", "merged"])
def test_scaled_layers_in_another_state_are_not_covered(state):
    case = case_of("bert", "ia3")
    layer = next(one for one in case.model.modules() if hasattr(one, "ia3_l"))
    if state == "off":
        layer._disable_adapters = True
    elif state == "merged":
        layer.merged_adapters = ["default"]
    else:
        layer.ia3_l["more"] = nn.Parameter(torch.ones(4), requires_grad=False)
        layer._active_adapter = ["default", "more"]
    assert len(coverage("fused", case.model, case.parameters)) == 1


def test_language_models_do_not_run_under_vmap():
    case = case_of("llama", "qv")
    with pytest.raises(PrivacyError, match=r"does not run under torch.func.vmap"):
        found_by("vmap", case)


def test_without_opacus_the_method_says_so(monkeypatch):
    case = case_of("bert", "qv")
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(PrivacyError, match=r"pip install federated-peft\[privacy\]"):
        found_by("hooks", case)
    assert chosen_method("auto", case.model, case.parameters) == "fused"
    assert_equal_gradients(found_by("auto", case), case.truth())


class TestNorms:
    """Layers that no tiny model has."""

    @pytest.mark.parametrize(
        "layer",
        [nn.RMSNorm(3, eps=1e-6), nn.LayerNorm(3, bias=False), nn.LayerNorm((7, 3)), nn.LayerNorm(3), nn.Linear(3, 3)],
    )
    def test_alone(self, layer):
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in layer.parameters():
                tensor.uniform_(-1, 1)
        batch, parameters = {"x": torch.randn(4, 7, 3)}, dict(layer.named_parameters())

        def loss(model, batch):
            return (model(batch["x"]) ** 3).sum((1, 2))

        def alone(x):
            return torch.autograd.grad(loss(layer, {"x": x[None]}).sum(), list(parameters.values()))

        rows = [alone(x) for x in batch["x"]]
        truth = {name: torch.stack([row[at] for row in rows]) for at, name in enumerate(parameters)}
        with per_sample("fused", layer, parameters) as made:
            assert_equal_gradients(made.gradients(loss, batch), truth)

    @pytest.mark.parametrize("kept", ["weight", "bias"])
    @pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Linear(3, 3)])
    def test_half_frozen(self, layer, kept):
        layer = type(layer)(3) if isinstance(layer, nn.LayerNorm) else nn.Linear(3, 3)
        for name, tensor in layer.named_parameters():
            tensor.requires_grad_(name == kept)
        batch = {"x": torch.randn(4, 7, 3)}

        def loss(model, batch):
            return (model(batch["x"]) ** 3).sum((1, 2))

        with per_sample("fused", layer, {kept: layer.get_parameter(kept)}) as made:
            found = made.gradients(loss, batch)[kept].sum(0)
        (expected,) = torch.autograd.grad(loss(layer, batch).sum(), [layer.get_parameter(kept)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_half_precision_norms_are_summed_in_float32(self):
        layer = nn.LayerNorm(3).to(torch.bfloat16)
        batch = {"x": torch.randn(4, 7, 3, dtype=torch.bfloat16)}
        with per_sample("fused", layer, dict(layer.named_parameters())) as made:
            found = made.gradients(lambda model, batch: model(batch["x"]).float().sum((1, 2)), batch)
        assert {one.dtype for one in found.values()} == {torch.float32}
        assert layer(batch["x"]).dtype == torch.bfloat16

    def test_padding_of_an_embedding_has_no_gradient(self):
        layer = nn.Embedding(5, 3, padding_idx=1)
        batch = {"ids": torch.tensor([[1, 2], [3, 3]])}
        with per_sample("fused", layer, dict(layer.named_parameters())) as made:
            found = made.gradients(lambda model, batch: model(batch["ids"]).sum((1, 2)), batch)["weight"]
        assert found.sum(-1).tolist() == [[0, 0, 3, 0, 0], [0, 0, 0, 6, 0]]


@pytest.mark.parametrize("method", ["fused", "hooks"])
@pytest.mark.parametrize("count", [4, 5])
def test_steps_in_time_never_pass_for_examples(method, count):
    """A layer that has time first sees as many rows as there are steps: also where that is the size of the batch."""

    class TimeFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.q(x.transpose(0, 1)).transpose(0, 1).pow(2).sum((1, 2))

    model = TimeFirst()
    with (
        per_sample(method, model, {"q": model.q.weight}) as made,
        pytest.raises(PrivacyError, match=r"rows where the batch has|set privacy\.example\.per_sample"),
    ):
        made.gradients(lambda one, batch: one(batch["x"]), {"x": torch.randn(4, count, 3)})


def test_a_batch_as_long_as_its_examples_has_the_same_gradients():
    case = case_of("bert", "qv")
    length = case.batch["input_ids"].shape[1]
    batch = {name: torch.cat([one] * length)[:length] for name, one in case.batch.items()}
    assert len(batch["input_ids"]) == batch["input_ids"].shape[1]
    truth = case.truth()
    with per_sample("fused", case.model, case.parameters) as made:
        found = made.gradients(case.loss, batch)
    count = len(case.batch["input_ids"])
    for name, one in found.items():
        assert len(one) == length
        wanted = torch.stack([truth[name][row % count] for row in range(length)])
        torch.testing.assert_close(one, wanted.to(one.dtype), rtol=1e-4, atol=1e-6)
