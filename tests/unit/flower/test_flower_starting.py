"""A federation starts from a version that is there already: an adapter that peft made, or where another run ended."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model

from federated.adapters.tiny import tiny_model
from federated.aggregation import RULES, make_rule
from federated.config import ExperimentConfig, PrivacyConfig, TaskConfig
from federated.config.privacy import ClientPrivacyConfig
from federated.errors import BaseMismatch, ConfigError, VersionNotFound
from federated.flower import DeltaStrategy, handle_query, handle_train, open_session, simulate
from federated.flower.central import train_centrally
from federated.flower.imports import import_peft
from federated.flower.starting import start_of
from federated.manifest import VersionManifest, sha256_hex
from federated.registry import Registry
from federated.residual import product_of
from federated.state import AdapterState, from_raw, to_raw
from federated.wire import decode_tensors, encode_tensors

PROPERTIES = {name: make_rule(name, {}).properties for name in sorted(RULES)}
RULES_FOR_THREE = [
    name for name, one in PROPERTIES.items() if one.adapter == "lora" and not one.personal and one.min_updates <= 3
]
"""With one adapter for all, of which three clients are enough."""


def client_app() -> ClientApp:
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What peft saves of a random adapter of rank 4 on tiny:bert."""
    made: Path = tmp_path_factory.mktemp("peft") / "folder"
    model, _ = tiny_model("bert")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's
        get_peft_model(model, config).save_pretrained(made)
    return made


@pytest.fixture
def config(real_config: ExperimentConfig, tmp_path: Path) -> ExperimentConfig:
    """A run that fits that folder, in a registry of its own."""
    adapter = replace(real_config.adapter, rank=4, alpha=6.0)
    return replace(
        real_config,
        adapter=adapter,
        rounds=1,
        registry=str(tmp_path / "registry"),
        run_dir=str(tmp_path / "run"),
        engine=replace(real_config.engine, workers=1),
        tracking=replace(real_config.tracking, progress=False),
    )


@pytest.fixture
def registry(config: ExperimentConfig, folder: Path) -> Iterator[Registry]:
    """With the imported folder as its only version, tagged ``brought``."""
    with Registry.open(config.registry) as opened:
        opened.tag(import_peft(opened, folder, config).version_id, "brought")
        yield opened


def state_of(registry: Registry, name: str) -> AdapterState:
    manifest = registry.get(name).manifest
    return AdapterState(manifest.spec, from_raw(decode_tensors(registry.weights(name))))


def products(state: AdapterState) -> dict[str, torch.Tensor]:
    return {name: one.left @ one.right for name, one in product_of(state).items()}


def publish(registry: Registry, state: AdapterState, **fields: Any) -> str:
    """Another version with these tensors; fields of the imported one's record, changed."""
    weights = encode_tensors(to_raw(state.tensors))
    changed = {"weights_digest": sha256_hex(weights), "spec": state.spec, "run_id": "other", **fields}
    manifest: VersionManifest = replace(registry.get("brought").manifest, **changed)
    return registry.publish(manifest, weights)


def test_round_1_goes_on_from_an_imported_adapter(config: ExperimentConfig, registry: Registry) -> None:
    brought = registry.get("brought")
    summary = simulate(replace(config, start_from="brought", rounds=2), client_app())
    lineage = registry.lineage(summary.version_id)
    assert [one.version_id for one in lineage[3:]] == [brought.version_id]
    assert [one.number for one in lineage] == [2, 1, 0, 1]
    first = lineage[2]
    assert first.manifest.weights_digest == brought.manifest.weights_digest
    assert first.manifest.release_counter == brought.manifest.release_counter + 1
    moved = products(state_of(registry, summary.version_id))
    before = products(state_of(registry, "brought"))
    for name, product in before.items():
        assert 0 < float((moved[name] - product).norm()) < 0.5 * float(product.norm())
    assert registry.verify() == []
    assert summary.report.is_file()


@pytest.mark.parametrize("rule", RULES_FOR_THREE)
def test_no_rule_loses_what_it_started_from(rule: str, config: ExperimentConfig, registry: Registry) -> None:
    """With steps of nearly nothing, what is published after a round is what was brought."""
    train = replace(config.train, learning_rate=1e-9, optimizer="sgd")
    changed = replace(config, train=train, start_from="brought")
    options = {"threshold": 1.0} if rule == "florist" else {}  # by default it cuts what has little energy
    strategy = replace(config.strategy, rule=rule, weighted=not PROPERTIES[rule].robust, options=options)
    summary = simulate(replace(changed, strategy=strategy), client_app())
    after, before = (products(state_of(registry, name)) for name in (summary.version_id, "brought"))
    for name, product in before.items():
        torch.testing.assert_close(after[name], product, rtol=0, atol=1e-4 * float(product.abs().max()))


def test_a_resumed_run_keeps_its_start(config: ExperimentConfig, registry: Registry) -> None:
    """``latest`` means another version by then."""
    config = replace(config, start_from="latest")
    first = simulate(config, client_app())
    resumed = replace(config, run_dir=str(first.run_dir), resume=True, rounds=2)
    lineage = registry.lineage(simulate(resumed, client_app()).version_id)
    assert [one.number for one in lineage] == [2, 1, 0, 1]


def test_central_training_starts_from_it_too(config: ExperimentConfig, registry: Registry) -> None:
    summary = train_centrally(replace(config, start_from="brought"))
    lineage = registry.lineage(summary.version_id)
    assert lineage[1].manifest.weights_digest == registry.get("brought").manifest.weights_digest
    assert lineage[2].version_id == registry.get("brought").version_id


def test_a_server_app_of_one_s_own(config: ExperimentConfig, registry: Registry) -> None:
    strategy = DeltaStrategy.from_config(replace(config, start_from="brought"), registry=registry)
    assert strategy.server.parent == registry.get("brought").version_id
    found = strategy.initial_arrays().to_torch_state_dict()
    assert all(torch.equal(found[name], one) for name, one in state_of(registry, "brought").tensors.items())
    fresh = DeltaStrategy.from_config(config, registry=registry)
    assert fresh.server.parent is None
    with pytest.raises(ConfigError, match="there is no registry to find it in"):
        DeltaStrategy.from_config(replace(config, start_from="brought"))


def test_clients_are_not_told(config: ExperimentConfig) -> None:
    assert replace(config, start_from="brought").for_clients() == config.for_clients()


def refused(config: ExperimentConfig, registry: Registry, match: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=match):
        start_of(replace(config, start_from=config.start_from or "brought"), registry)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 8}, r"start_from = brought \(\w{12}\) .*adapter.rank is 4 there and 8 here; set it to that"),
        ({"alpha": 8.0}, r"adapter.alpha is 6.0 there and 8.0 here"),
        ({"use_rslora": True}, "adapter.use_rslora is False there and True here"),
        ({"dtype": "bfloat16"}, "adapter.dtype is F32 there and BF16 here"),
        ({"target_modules": ("query",)}, r"it trains \['encoder.layer.0.attention.self.value'.* and not \[\]"),
        ({"target_modules": "all-linear"}, r"it trains \[\] besides and not \['encoder"),
        ({"kind": "lora_xs"}, "adapter.kind is lora there and lora_xs here"),
        ({"train_head": False}, "adapter.train_head is true there"),
    ],
)
def test_another_adapter_is_refused(
    config: ExperimentConfig, registry: Registry, changes: dict[str, Any], match: str
) -> None:
    refused(replace(config, adapter=replace(config.adapter, **changes)), registry, match)


def test_another_task_is_refused(config: ExperimentConfig, registry: Registry) -> None:
    turned = replace(config, task=replace(config.task, labels=("warm", "cold")))
    refused(turned, registry, r"answers with labels \['cold', 'warm'\]; set task.labels to these, in this order")
    stock = replace(config, task=replace(config.task, head="stock"))
    refused(stock, registry, "task.head is mean_pool for 2 labels there, stock for 2 here")


def test_another_base_is_refused(config: ExperimentConfig, registry: Registry) -> None:
    other = replace(config, model=replace(config.model, source="tiny:gpt2"))
    refused(other, registry, "set model.source to the base that it was made for", BaseMismatch)


def test_versions_that_cannot_be_a_start(config: ExperimentConfig, registry: Registry) -> None:
    state = state_of(registry, "brought")
    head = replace(state.spec.head, kind="stock") if state.spec.head else None
    modules = state.spec.modules
    grown = replace(state.spec, modules=(replace(modules[0], rank=2), *modules[1:]))
    for fields, match in (
        ({"servable": False}, "is not whole: its clients hold the rest"),
        ({"spec": replace(state.spec, head=None)}, "it has no head; choose the task"),
        ({"spec": replace(state.spec, head=head)}, "task.head is stock"),
        ({"spec": grown}, "its layers have ranks 2 to 4, and clients train one rank; write it with registry export"),
        (
            {"spec": replace(state.spec, modules=(replace(modules[0], d_in=9), *modules[1:]))},
            "its layers are other ones",
        ),
        ({"spec": replace(state.spec, trained=("x",))}, r"it trains \['x'\]"),
    ):
        version_id = publish(registry, state, **fields)
        refused(replace(config, start_from=version_id), registry, match)
    refused(replace(config, start_from="nothing"), registry, "nothing", VersionNotFound)


def test_tensors_that_are_not_what_the_record_says(config: ExperimentConfig, registry: Registry) -> None:
    state = state_of(registry, "brought")
    less = replace(state, tensors=dict(list(state.tensors.items())[1:]))
    refused(replace(config, start_from=publish(registry, less)), registry, "its tensors are not those that its record")


def test_a_frozen_head_needs_its_seed(config: ExperimentConfig, registry: Registry) -> None:
    frozen = replace(config, adapter=replace(config.adapter, train_head=False), seed=5)
    session = open_session(frozen)
    version_id = publish(registry, session.initial)
    assert start_of(replace(frozen, start_from=version_id), registry).parent == version_id
    refused(replace(frozen, start_from=version_id, seed=6), registry, "was made from seed 5; set seed=5")


def test_a_trained_head_comes_along_whatever_the_seed(config: ExperimentConfig, registry: Registry) -> None:
    found = start_of(replace(config, start_from="brought", seed=9), registry).adapter
    assert torch.equal(found.tensors["classifier.weight"], state_of(registry, "brought").tensors["classifier.weight"])
    assert found.spec.head is not None
    assert found.spec.head.seed == 9


def test_a_language_model_has_no_head(config: ExperimentConfig, registry: Registry, tmp_path: Path) -> None:
    text = replace(config, model=replace(config.model, source="tiny:llama"), task=TaskConfig(name="causal_lm"))
    session = open_session(text)
    with Registry.open(tmp_path / "llama") as other:
        weights = encode_tensors(to_raw(session.initial.tensors))
        fields = {"weights_digest": sha256_hex(weights), "spec": session.initial.spec, "task": {}, "base": {}}
        base_digest = session.adapter.base.base_digest
        other.publish(replace(registry.get("brought").manifest, base_digest=base_digest, **fields), weights)
        assert start_of(replace(text, start_from="latest"), other).adapter.spec.head is None


def test_an_account_of_privacy_covers_no_earlier_training(config: ExperimentConfig, registry: Registry) -> None:
    client = ClientPrivacyConfig(enabled=True, noise_multiplier=1.0)
    private = replace(config, privacy=PrivacyConfig(client=client))
    assert start_of(replace(private, start_from="brought"), registry).parent
    trained = publish(registry, state_of(registry, "brought"), method="fedit + sgd")
    refused(
        replace(private, start_from=trained), registry, "made from data by fedit [+] sgd, of which this run's account"
    )


def test_a_registry_must_be_named(config: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="start_from = brought: say with registry= which registry"):
        simulate(replace(config, registry="", start_from="brought"), client_app())
