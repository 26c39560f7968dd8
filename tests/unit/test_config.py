"""The schema: what is refused, in which words, and that a configuration crosses the network unchanged."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.config import ExperimentConfig, TaskConfig, experiment_from
from federated.errors import ConfigError

LEAST: dict[str, Any] = {"task": {"labels": ["cold", "warm"]}}


def make(**changes: Any) -> ExperimentConfig:
    return experiment_from({**LEAST, **changes})


def refused(value: Any) -> str:
    """The one line that a faulty configuration gives."""
    with pytest.raises(ConfigError) as caught:
        experiment_from(value)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 1000
    return text


WRONG = [
    ("rounds", 0, "greater than or equal to 1"),
    ("rounds", 2.5, "valid integer"),
    ("rounds", "many", "valid integer"),
    ("rounds", None, "valid integer"),
    ("seed", -1, "greater than or equal to 0"),
    ("name", 5, "valid string"),
    ("resume", "perhaps", "valid boolean"),
    ("model.source", 5, "valid string"),
    ("model.dtype", "float16", "'float32' or 'bfloat16'"),
    ("adapter.kind", "adalora", "'lora'"),
    ("adapter.virtual_tokens", 0, "greater than or equal to 1"),
    ("adapter.max_params", 2_000_000_000, "less than or equal to 130000000"),
    ("adapter.rank", 0, "greater than or equal to 1"),
    ("adapter.alpha", 0, "greater than 0"),
    ("adapter.alpha", math.nan, "finite number"),
    ("adapter.dropout", 1.0, "less than 1"),
    ("adapter.dropout", -0.1, "greater than or equal to 0"),
    ("adapter.target_modules", 5, "'auto' or 'all-linear'"),
    ("adapter.target_modules", "query", "'auto' or 'all-linear'"),
    ("adapter.dtype", "int8", "'float32', 'bfloat16' or 'float16'"),
    ("task.name", "poetry", "'sequence_classification', 'causal_lm' or 'sensor'"),
    ("task.max_length", 1, "greater than or equal to 2"),
    ("task.max_length", 32769, "less than or equal to 32768"),
    ("data.name", "secret", "'airlines'"),
    ("data.test_fraction", 0, "greater than 0"),
    ("data.test_fraction", 1, "less than 1"),
    ("data.max_clients", -1, "greater than or equal to 0"),
    ("data.partition.kind", "random", "'natural', 'iid', 'dirichlet' or 'pathological'"),
    ("data.partition.num_clients", 0, "greater than or equal to 1"),
    ("data.partition.alpha", -1, "greater than 0"),
    ("train.optimizer", "lion", "'adamw' or 'sgd'"),
    ("train.learning_rate", 0, "greater than 0"),
    ("train.learning_rate", math.inf, "finite number"),
    ("train.momentum", 1, "less than 1"),
    ("train.weight_decay", -1e-9, "greater than or equal to 0"),
    ("train.batch_size", 0, "greater than or equal to 1"),
    ("train.epochs", 0, "greater than 0"),
    ("train.steps", -1, "greater than or equal to 0"),
    ("train.max_grad_norm", -1, "greater than or equal to 0"),
    ("train.precision", "float8", "'auto', 'float32', 'bfloat16' or 'float16'"),
    ("train.threads", -1, "greater than or equal to 0"),
    ("strategy.server_optimizer.name", "lamb", "'sgd', 'momentum', 'adam', 'yogi' or 'adagrad'"),
    ("strategy.server_optimizer.beta2", 1.0, "less than 1"),
    ("strategy.server_optimizer.tau", 0.0, "greater than 0"),
    ("selection.fraction", 0, "greater than 0"),
    ("selection.fraction", 1.01, "less than or equal to 1"),
    ("selection.fraction_evaluate", 0, "greater than 0"),
    ("selection.fraction_evaluate", 1.01, "less than or equal to 1"),
    ("selection.min_clients", 0, "greater than or equal to 1"),
    ("round.quorum", 1.5, "less than or equal to 1"),
    ("round.deadline", 0, "greater than 0"),
    ("round.max_norm", -1, "greater than or equal to 0"),
    ("round.max_examples", 0, "greater than or equal to 1"),
    ("engine.name", "spark", "'inprocess', 'ray' or 'deployment'"),
    ("engine.workers", -1, "greater than or equal to 0"),
    ("engine.shuffle_arrivals", -2, "greater than or equal to -1"),
    ("tracking.progress", "loud", "valid boolean"),
]


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``, beside the labels that every configuration needs."""
    head, _, rest = key.partition(".")
    inner = nested_part(rest, value) if rest else value
    if head == "task":
        return {"task": {**LEAST["task"], **inner}}
    return {**LEAST, head: inner}


def nested_part(key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    return {head: nested_part(rest, value) if rest else value}


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    text = refused(nested(key, value))
    assert text.startswith(f"{key} = {value!r}: ")
    assert allowed in text


SHAPES = [
    ("task.labels", "cold", "expected a list, such as [bad,good]"),
    ("task.labels", "cold,warm", "expected a list, such as [bad,good]"),
    ("task.labels", None, "expected a list, such as [bad,good]"),
    ("task.labels", {"cold": 0}, "expected a list, such as [bad,good]"),
    ("adapter.target_modules", "query", "Input should be 'auto' or 'all-linear', or a list, such as [query,value]"),
    (
        "adapter.target_modules",
        {"a": 1},
        "found a mapping, expected 'auto' or 'all-linear', or a list, such as [query,value]",
    ),
    ("train.scheduler_args", 0.9, "expected a mapping, such as {gamma: 0.9}"),
    ("train.scheduler_args", [0.9], "expected a mapping, such as {gamma: 0.9}"),
    ("name", ["a"], "found a list, expected one text"),
    ("rounds", [3], "found a list, expected one whole number"),
    ("rounds", {}, "found a mapping, expected one whole number"),
    ("adapter.alpha", [16.0], "found a list, expected one number"),
    ("resume", [], "found a list, expected true or false"),
    ("model.gguf_file", ["a.gguf"], "found a list, expected one text"),
    ("task.name", ["sensor"], "found a list, expected 'sequence_classification', 'causal_lm' or 'sensor'"),
    (
        "model",
        None,
        "expected a section: model.KEY, where KEY is one of source, gguf_file, dtype, revision, quantization",
    ),
    (
        "tracking",
        [1],
        "expected a section: tracking.KEY, where KEY is one of tensorboard, mlflow, mlflow_uri, progress, log_format",
    ),
    (
        "data.partition",
        ["iid"],
        "expected a section: data.partition.KEY, where KEY is one of kind, num_clients, alpha, classes_per_client",
    ),
]


@pytest.mark.parametrize(("key", "value", "expected"), SHAPES, ids=[f"{key}={value}" for key, value, _ in SHAPES])
def test_a_list_or_mapping_where_another_shape_belongs(key: str, value: Any, expected: str) -> None:
    assert refused(nested(key, value)) == f"{key} = {value!r}: {expected}"


def _keys(plain: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [f"{prefix}{key}" for key in plain]
    return inner + [
        name for key, value in plain.items() if isinstance(value, dict) for name in _keys(value, f"{prefix}{key}.")
    ]


@pytest.mark.parametrize("key", _keys(make().to_dict()))
@pytest.mark.parametrize("value", ["bad", 5, [["x"]], {"odd": {}}], ids=["text", "number", "list", "mapping"])
def test_no_shape_of_any_key_is_answered_in_a_foreign_library_s_words(key: str, value: Any) -> None:
    if key == "data.partition" and value == "bad":
        return  # a kind alone stands for its section
    try:
        experiment_from(LEAST | {key: value} if key == "task" else nested(key, value))
    except ConfigError as error:
        assert not re.search("tuple|dictionary|instance of|valid list", str(error))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([["cold"], "warm"], "task.labels.0 = ['cold']: found a list, expected one text"),
        (["cold", {"warm": 1}], "task.labels.1 = {'warm': 1}: found a mapping, expected one text"),
    ],
)
def test_an_element_of_another_shape_is_named(value: list[Any], expected: str) -> None:
    assert refused({"task": {"labels": value}}) == expected


def test_a_list_of_wrong_modules_says_what_is_wrong_with_the_list() -> None:
    assert refused(nested("adapter.target_modules", ["query", 5])).startswith("adapter.target_modules.1 = 5: ")


@pytest.mark.parametrize(
    "key", ["rnk", "adapter.rnk", "data.partition.kinds", "strategy.server_optimizer.lr", "_target_", "task.labels2"]
)
def test_an_unknown_key_is_named(key: str) -> None:
    assert refused(nested(key, 1)) == f"{key} = 1: unknown key"


def test_several_faults_are_counted() -> None:
    assert refused({**LEAST, "rounds": 0, "seed": -1, "name": 5}).endswith("(and 2 more)")


@pytest.mark.parametrize(("text", "found"), [("{", "Invalid JSON"), ("5", "config = 5: "), ("null", "config = None: ")])
def test_json_that_is_no_configuration(text: str, found: str) -> None:
    assert found in refused(text)


@pytest.mark.parametrize("odd", ["two\nlines", "tab\there", "\x1b[31mred", "x" * 5000, "\u2028"])
def test_hostile_keys_and_values_stay_in_one_short_line(odd: str) -> None:
    assert "unknown key" in refused({**LEAST, odd: 1})
    assert "rounds = " in refused({**LEAST, "rounds": odd})
    assert "adapter" in refused({**LEAST, "adapter": {odd: 1}})


def test_a_key_that_is_no_text() -> None:
    assert "Keys should be strings" in refused({**LEAST, 5: 1})


@pytest.mark.parametrize("labels", [[], ["only"]])
@pytest.mark.parametrize("task", ["sequence_classification", "sensor"])
def test_labels_are_needed_where_there_are_classes(task: str, labels: list[str]) -> None:
    text = refused({"task": {"name": task, "labels": labels}})
    assert text == f"task.labels: {task} needs at least two labels, found {labels}"


def test_language_modelling_needs_no_labels() -> None:
    assert experiment_from({"task": {"name": "causal_lm"}}).task.labels == ()


@pytest.mark.parametrize("name", ["files", "table", "hub"])
@pytest.mark.parametrize("path", [None, ""])
def test_data_that_needs_a_path_says_so(name: str, path: str | None) -> None:
    text = refused({**LEAST, "data": {"name": name, "path": path}})
    assert text == f"data.path: data={name} needs a path, found none"


@pytest.mark.parametrize("bad", [math.nan, math.inf, object(), {1, 2}, b"bytes"], ids=lambda bad: type(bad).__name__)
def test_free_arguments_must_be_plain_data(bad: Any) -> None:
    assert refused(nested("train.scheduler_args", {"gamma": bad})).startswith(
        "train: a value cannot be written as JSON"
    )


def test_text_that_is_no_unicode_is_refused() -> None:
    assert "cannot be written as JSON" in refused({**LEAST, "name": "\ud800"})


def test_a_partition_s_kind_alone_is_enough() -> None:
    assert make(data={"partition": "dirichlet"}) == make(data={"partition": {"kind": "dirichlet"}})


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().seed = 5  # type: ignore[misc]


def test_a_section_checks_itself() -> None:
    with pytest.raises(ValueError, match="max_length"):
        TaskConfig(max_length=0)


def test_clients_are_not_told_the_server_s_places() -> None:
    places = {"registry": "postgresql://user:password@host/db", "registry_blobs": "s3://secret-bucket"}
    config = make(run_dir="/srv/runs/secret", **places, resume=True, seed=7)
    sent = config.for_clients()
    assert (sent.run_dir, sent.registry, sent.resume) == ("", "", False)
    assert "password" not in sent.to_json()
    assert "/srv/runs" not in sent.to_json()
    assert "secret-bucket" not in sent.to_json()
    assert dataclasses.replace(sent, run_dir=config.run_dir, **places, resume=True) == config


def test_a_registry_with_a_url_needs_a_place_for_its_bytes() -> None:
    with pytest.raises(ConfigError, match="give registry_blobs= a folder or an fsspec URL"):
        make(registry="postgresql://host/db")


def test_json_is_one_line_and_independent_of_the_order_of_keys() -> None:
    text = make(seed=3, rounds=2).to_json()
    assert "\n" not in text
    assert text == make(rounds=2, seed=3).to_json()


def test_plain_data_holds_lists_and_scalars_only() -> None:
    plain = make(adapter={"target_modules": ["query"]}).to_dict()
    assert plain["adapter"]["target_modules"] == ["query"]
    assert json.loads(json.dumps(plain)) == plain
    assert experiment_from(plain) == make(adapter={"target_modules": ["query"]})


def test_the_digest_names_every_value() -> None:
    digests = {make(**change).digest for change in ({}, {"seed": 1}, {"rounds": 9}, {"train": {"epochs": 2}})}
    assert len(digests) == 4
    assert make().digest == make().digest


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
POSITIVE = st.floats(1e-6, 1e6)
SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | TEXT
PLAIN = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))
CONFIGS = st.fixed_dictionaries(
    {"task": st.fixed_dictionaries({"labels": st.lists(TEXT, min_size=2, max_size=4)})},
    optional={
        "name": TEXT,
        "rounds": st.integers(1, 10**6),
        "seed": st.integers(0, 2**62),
        "run_dir": TEXT,
        "registry": TEXT,
        "resume": st.booleans(),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 512),
                "alpha": POSITIVE,
                "target_modules": st.sampled_from(["auto", "all-linear"]) | st.lists(TEXT, max_size=3),
            },
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"learning_rate": POSITIVE, "scheduler_args": st.dictionaries(TEXT, PLAIN, max_size=3)}
        ),
        "data": st.fixed_dictionaries(
            {}, optional={"partition": st.sampled_from(["iid", "natural"]), "test_fraction": st.floats(0.01, 0.99)}
        ),
    },
)


@settings(max_examples=80, deadline=None)
@given(CONFIGS)
def test_a_configuration_crosses_the_network_unchanged(value: dict[str, Any]) -> None:
    config = experiment_from(value)
    back = experiment_from(config.to_json())
    assert back == config
    assert back.digest == config.digest
    assert experiment_from(config.to_dict()) == config


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(["task", "rounds", "model", "adapter", "odd"]) | TEXT, PLAIN, max_size=4))
def test_whatever_is_given_becomes_a_configuration_or_one_line(value: dict[str, Any]) -> None:
    try:
        experiment_from(value)
    except ConfigError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"example": {"enabled": True, "noise_multiplier": 1.0}}, "adapter": {"dropout": 0.1}},
         r"adapter\.dropout = 0\.1: with privacy\.example"),
        ({"privacy": {"example": {"clip_norm": 1e-45}}}, r"privacy\.example\.clip_norm"),
        ({"privacy": {"client": {"clip_norm": 1e300}}}, r"privacy\.client\.clip_norm"),
        ({"privacy": {"client": {"noise_multiplier": 1e-200}}}, r"privacy\.client\.noise_multiplier = 1e-200: exp"),
        ({"privacy": {"client": {"quantile_noise": 1e-200}}}, r"privacy\.client\.quantile_noise = 1e-200"),
        ({"privacy": {"example": {"noise_multiplier": 1e160}}}, r"privacy\.example\.noise_multiplier"),
    ],
)  # fmt: skip
def test_privacy_that_rounding_or_masks_would_undo_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment_from({"task": {"labels": ["a", "b"]}, **changes})


@pytest.mark.parametrize("name", ["", "..", "../up", "/etc", "a b", "-x", "x" * 101, "a..b"])
def test_an_adapter_s_name_is_no_path(name: str) -> None:
    if name:
        with pytest.raises(ConfigError, match="adapter_id: expected 1 to 100 letters"):
            make(adapter_id=name)
    made = make(name=name).adapter_name
    assert make(adapter_id=made).adapter_name == made


def test_an_adapter_s_name_is_made_from_the_experiment_s() -> None:
    assert [make(name=name).adapter_name for name in ("airlines", "my run!", "../..", "")] == [
        "airlines",
        "my-run",
        "unnamed",
        "unnamed",
    ]
