"""The parts of an experiment, one frozen dataclass each, checked when built; import them from `federated.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "EngineConfig",
    "GateConfig",
    "ModelConfig",
    "PartitionConfig",
    "RoundConfig",
    "SelectionConfig",
    "ServerOptimizerConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "MAX_PARAMS",
    "WITHOUT_FACTORS",
    "STRICT",
]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown keys, NaN and infinity are refused everywhere."""

DataName = Literal["airlines", "reviews", "newsgroups", "shakespeare", "files", "table", "hub", "synthetic"]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

WITHOUT_FACTORS = ("ia3", "layernorm", "head", "full", "prompt", "prefix")
"""Kinds of adapter whose tensors average as they are; the others are forms of LoRA."""

MAX_PARAMS = 10_000_000
"""Parameters that are sensible to train and send whole, unless somebody says otherwise."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The frozen base model.

    Args:
        source: a folder (looked up from the working directory, then from the app folder), a hub name,
            ``asset:NAME`` (fetched by ``fedpeft assets fetch``) or ``tiny:bert|gpt2|llama|sensor`` (small random
            weights made on the spot).
        gguf_file: file name inside ``source`` when the weights are GGUF.
        dtype: dtype of the frozen weights.
        revision: hub revision.
        quantization: of the frozen linear layers, made after loading: ``int8`` (a quarter of float32), ``nf4`` (about a
            seventh; needs the ``quant`` extra) or ``none``. A quantised base has a fingerprint of its own.
    """

    source: str = "tiny:bert"
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """The trainable adapter.

    Args:
        kind: ``lora``; ``lora_xs``, which trains a small core between frozen factors; or without factors, and so
            without rank and alpha: ``ia3`` (scaled keys, values and feed-forwards), ``layernorm`` (norms' weights and
            biases), ``head`` (the task head alone), ``full`` (every parameter of a small model), ``prompt`` (a soft
            prompt) or ``prefix`` (keys and values in front of each attention layer's own).
        rank: LoRA's r.
        alpha: ``lora_alpha``; the effective update is ``alpha / rank * B @ A``.
        use_rslora: scale by ``alpha / sqrt(rank)``.
        dropout: LoRA dropout in [0, 1).
        target_modules: for LoRA and IA3: module name suffixes, or ``"all-linear"``, or ``"auto"`` (query and value
            projections; for IA3 key and value projections and the ends of feed-forwards).
        train_head: whether the task head travels with the adapter or stays frozen.
        dtype: dtype of the trainable tensors on a device.
        core_init: where the frozen factors around a core come from: the leading directions of the layer itself
            (``svd``), or ``random`` ones; ``lora`` has no core.
        client_ranks: ranks that simulated clients declare, given out in turn in the order of their names; each trains
            at the smaller of its own and ``rank``. Empty: all train at ``rank``. Real clients say it in their own file.
        virtual_tokens: length of a soft prompt or a prefix.
        max_params: refuse to train a model of more parameters as ``full``; more than 130 million do not fit a packet.
    """

    kind: Literal["lora", "lora_xs", "ia3", "layernorm", "head", "full", "prompt", "prefix"] = "lora"
    rank: Count = 8
    alpha: Positive = 16.0
    use_rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    train_head: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    core_init: Literal["svd", "random"] = "svd"
    client_ranks: tuple[Count, ...] = ()
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    max_params: Annotated[int, Field(ge=0, le=130_000_000)] = MAX_PARAMS

    @model_validator(mode="after")
    def _only_of_lora(self) -> Self:
        given = {"use_rslora": self.use_rslora, "dropout": self.dropout, "client_ranks": list(self.client_ranks)}
        for key, value in given.items():
            if value and self.kind in WITHOUT_FACTORS:
                raise ValueError(f"{key} = {value}: only adapters of kind lora have it, found kind {self.kind}")
        if self.target_modules != "auto" and self.kind in WITHOUT_FACTORS and self.kind != "ia3":
            raise ValueError(f"target_modules: {self.kind} chooses what it trains; only lora and ia3 take targets")
        return self


@dataclass(frozen=True, config=STRICT)
class TaskConfig:
    """What is learnt.

    Args:
        name: kind of task.
        labels: class names in order (classification and sensor); empty for language modelling.
        head: ``"mean_pool"`` or the architecture's ``"stock"`` head.
        max_length: longest sequence in tokens (or time steps).
        chat: causal LM: rows hold ``messages`` and go through the tokenizer's chat template; loss on answers only.
    """

    name: Literal["sequence_classification", "causal_lm", "sensor"] = "sequence_classification"
    labels: tuple[str, ...] = ()
    head: Literal["mean_pool", "stock"] = "mean_pool"
    max_length: Annotated[int, Field(ge=2, le=32768)] = 64
    chat: bool = False


@dataclass(frozen=True, config=STRICT)
class PartitionConfig:
    """How examples are divided among simulated clients.

    Args:
        kind: ``natural`` keeps the data's own clients; the others pool and divide anew.
        num_clients: clients to make; ``natural`` ignores it, but for synthetic data, which has none of its own.
        alpha: Dirichlet concentration; small is skewed.
        classes_per_client: for ``pathological``.
    """

    kind: Literal["natural", "iid", "dirichlet", "pathological"] = "natural"
    num_clients: Count = 10
    alpha: Positive = 0.5
    classes_per_client: Count = 2


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where examples come from.

    Args:
        name: a bundled set, ``files`` (one file per client in the folder ``path``), ``table`` (one file with a
            client column), ``hub`` (a data set on the hub) or ``synthetic``.
        path: file or folder for ``files`` and ``table``; the data set's name for ``hub``.
        client_column: column that names the client (``table``, ``hub``).
        text_column: column with the text.
        label_column: column with the label.
        partition: how rows become clients; a kind's name alone is enough.
        test_fraction: share of each client's rows held out for evaluation.
        max_train_per_client: at most this many training rows each; 0 keeps all.
        max_test_per_client: at most this many held-out rows each; 0 keeps all.
        max_clients: at most this many clients (the first by name); 0 keeps all.
        min_per_client: natural clients with fewer rows are left out, and named.
        seed: seeds split and partition, so that a split outlives the run's seed.
    """

    name: DataName = "synthetic"
    path: str | None = None
    client_column: str = "client"
    text_column: str = "text"
    label_column: str = "label"
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_train_per_client: Annotated[int, Field(ge=0)] = 0
    max_test_per_client: Annotated[int, Field(ge=0)] = 0
    max_clients: Annotated[int, Field(ge=0)] = 0
    min_per_client: Count = 2
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("partition", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """One client's local training.

    Args:
        optimizer: ``adamw`` or ``sgd``.
        learning_rate: step size.
        momentum: for ``sgd``.
        weight_decay: decoupled for AdamW.
        scheduler: name of a class in `torch.optim.lr_scheduler`, or ``none``; stepped once per optimizer step.
        scheduler_args: its keyword arguments; the text ``"total"`` stands for the number of local steps.
        batch_size: examples per forward pass.
        gradient_accumulation: forward passes per optimizer step.
        epochs: passes over the local data; ignored when ``steps`` is positive.
        steps: optimizer steps; 0 means use ``epochs``.
        max_grad_norm: L2 bound on the gradient; 0 means none.
        precision: ``auto`` is bf16 autocast where the processor has it in hardware, else float32.
        device: ``auto``, ``cpu``, ``cuda`` ...
        proximal_mu: FedProx: adds ``mu / 2 * ||w - w_global||^2``.
        eval_batch_size: examples per forward pass in evaluation.
        evaluate_after: evaluate the locally trained adapter too.
        threads: torch threads per client; 0 leaves torch's choice.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 2e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    scheduler: str = "none"
    scheduler_args: Mapping[str, Any] = Field(default_factory=dict)
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    epochs: Positive = 1.0
    steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: NonNegative = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    proximal_mu: NonNegative = 0.0
    eval_batch_size: Count = 64
    evaluate_after: bool = False
    threads: Annotated[int, Field(ge=0)] = 1


@dataclass(frozen=True, config=STRICT)
class ServerOptimizerConfig:
    """How the global adapter moves along the pseudo-gradient ``-mean_delta`` (Reddi et al. 2021).

    Args:
        name: ``sgd`` with learning rate 1 is plain averaging.
        learning_rate: server step size.
        momentum: for ``momentum``.
        beta1: first moment (adam, yogi, adagrad).
        beta2: second moment (adam, yogi).
        tau: adaptivity, added to the root of the second moment.
    """

    name: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3


@dataclass(frozen=True, config=STRICT)
class StrategyConfig:
    """What the server does with updates.

    Args:
        rule: name of an aggregation rule (``fedit``).
        weighted: weight updates by their number of examples, or count each client once.
        server_optimizer: how the global adapter moves.
        options: further settings of the rule, by name; each rule says which it takes.
    """

    rule: str = "fedit"
    weighted: bool = True
    options: Mapping[str, str | bool | int | float] = Field(default_factory=dict)
    server_optimizer: ServerOptimizerConfig = Field(default_factory=ServerOptimizerConfig)


@dataclass(frozen=True, config=STRICT)
class SelectionConfig:
    """Who takes part in a round.

    Args:
        policy: ``uniform``, ``by_examples`` (more often, the more examples a client has), ``round_robin`` (everybody in
            turn) or ``availability`` (more often, the better a client answered of late).
        fraction: share of the clients, at least one; buffered rounds take all.
        fraction_evaluate: share that measures the last adapter at the end, at least one, whatever the policy.
        min_clients: clients that must be connected before the first round starts.
        wait: seconds to wait for them.
    """

    policy: Literal["uniform", "by_examples", "round_robin", "availability"] = "uniform"
    fraction: Fraction = 1.0
    fraction_evaluate: Fraction = 1.0
    min_clients: Count = 1
    wait: Positive = 60.0


@dataclass(frozen=True, config=STRICT)
class RoundConfig:
    """When a round is over.

    Args:
        mode: ``sync`` (a cohort, and an end for all of it) or ``buffered`` (a version for every so many good updates).
        buffer: ``buffered``: good updates that make a version.
        concurrency: ``buffered``: clients that train at the same time, at most.
        staleness: ``buffered``: an update that started tau versions ago weighs ``1 / (1 + tau)^a`` (``polynomial``), or
            as if it were fresh (``constant``).
        staleness_exponent: ``a`` of ``polynomial``.
        max_staleness: ``buffered``: refuse an update that started more versions ago.
        quorum: ``sync``: share of the cohort whose updates must be good, else the global version stays as it is.
        deadline: seconds until missing replies are counted as late.
        poll_interval: seconds between looks for replies.
        max_norm: refuse an update whose L2 norm is larger; 0 means no bound.
        max_examples: refuse an update that claims more training examples: a claim is a weight in the mean.
        evaluate_every: clients measure the adapter that they received in rounds 1, 1 + n, 1 + 2n ...; 0 never. The last
            adapter is measured at the end in any case.
    """

    mode: Literal["sync", "buffered"] = "sync"
    buffer: Count = 4
    concurrency: Count = 8
    staleness: Literal["constant", "polynomial"] = "polynomial"
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    max_staleness: Annotated[int, Field(ge=0)] = 20
    quorum: Fraction = 0.5
    deadline: Positive = 3600.0
    poll_interval: Positive = 0.05
    max_norm: NonNegative = 0.0
    max_examples: Count = 1_000_000
    evaluate_every: Annotated[int, Field(ge=0)] = 1


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """Where simulated clients run.

    Args:
        name: ``inprocess`` (one base model in memory, forked workers), ``ray`` (Flower's own engine) or
            ``deployment`` (devices, through a SuperLink; ``fedpeft run submit`` sets it).
        workers: processes; 0 takes one per core, 1 is sequential in this process (in-process engine).
        address: of a Ray cluster, ``host:port`` or ``auto``; empty: a Ray of the run's own, on this machine.
        shuffle_arrivals: seeds a random order of replies (in-process; for tests); -1 keeps the natural order.
    """

    name: Literal["inprocess", "ray", "deployment"] = "inprocess"
    workers: Annotated[int, Field(ge=0)] = 0
    address: Annotated[str, Field(pattern=r"^(auto|[A-Za-z0-9.-]+:[0-9]{1,5}|\[[0-9A-Fa-f:]+\]:[0-9]{1,5}|)$")] = ""
    shuffle_arrivals: Annotated[int, Field(ge=-1)] = -1

    @model_validator(mode="after")
    def _cluster_is_rays(self) -> Self:
        if self.address and self.name != "ray":
            raise ValueError(f"engine.address: a cluster is for engine=ray, found engine.name = {self.name}")
        if self.address and self.workers:
            raise ValueError("engine.workers: a cluster has one worker for each of its processors; leave it at 0")
        return self


@dataclass(frozen=True, config=STRICT)
class GateConfig:
    """Whether a run promotes what it measured well.

    Args:
        enabled: promote a version to ``channel`` once clients measured it, if it is not worse than what is there.
        channel: that moves.
        metric: pooled over the clients' held-out examples: ``loss``, ``accuracy``, ``macro_f1``, ``perplexity`` ...
        min_improvement: by which the version must be better; 0: not worse.
        unprotected: do so under ``privacy`` too, although no account covers which version is chosen; it is stamped.
    """

    enabled: bool = False
    channel: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] = "canary"
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] = "loss"
    min_improvement: float = 0.0
    unprotected: bool = False


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """Where metrics go besides the run folder's JSON lines.

    Args:
        tensorboard: also write TensorBoard event files (needs the ``tensorboard`` extra).
        mlflow: also write to MLflow (needs the ``mlflow`` extra).
        mlflow_uri: of its tracking store; empty: files in ``mlruns`` in the run's folder.
        progress: show the live display; it falls back to plain lines where there is no terminal.
        log_format: of the server's log lines: ``text``, or ``json`` with one object a line, which says rounds too.
    """

    tensorboard: bool = False
    mlflow: bool = False
    mlflow_uri: str = ""
    progress: bool = True
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _names_a_store_that_is_used(self) -> Self:
        if self.mlflow_uri and not self.mlflow:
            raise ValueError("mlflow_uri is given, and mlflow is false: say tracking.mlflow=true too")
        return self
