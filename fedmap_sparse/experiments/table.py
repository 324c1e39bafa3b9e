"""Every option of an experiment: its default, the group it stands in, its meaning and range.

What follows from several options together is in `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmap_sparse import codec, schedule
from fedmap_sparse.experiments import attacks, criteria, data, models, partition, presets
from fedmap_sparse.experiments.options import option
from fedmap_sparse.federated import robust, server_optim

WIRE = (*codec.DTYPES, "int8")
PRUNED = ("schedule", tuple(kind for kind in schedule.KINDS if kind != "dense"))
GRADUAL = ("schedule", ("iterative", "cubic", "adaptive"))
REGULAR = ("schedule", ("iterative", "cubic"))
BOUNDED = ("aggregator", ("trimmed", "krum"))
SERVER_STEP = ("server_optimizer", ("fedavgm", "fedadam"))


@dataclass(frozen=True, kw_only=True)
class Table:
    """The options as fields, unchecked; see `Config`."""

    name: str = option("fedmap", "run", "name of the run; letters, digits, '.', '_' and '-'")
    out: str | None = option(None, "run", "output folder", default_text="runs/NAME")
    seed: int = option(
        0,
        "run",
        "of all that is random: weights, partition, order of samples, cohorts, dropouts",
        least=0,
        most=2**64 - 1,
    )
    data_seed: int | None = option(
        None,
        "run",
        "of partition, hold-outs and label noise",
        least=0,
        most=2**64 - 1,
        default_text="seed",
    )
    model_seed: int | None = option(
        None, "run", "of the initial weights", least=0, most=2**64 - 1, default_text="seed"
    )
    threads: int | None = option(
        None,
        "run",
        "threads of torch and of the kernels, in each process",
        least=1,
        most=1024,
        default_text="1; torch's choice on a GPU or with a model from Python",
    )
    processes: int | None = option(
        None,
        "run",
        "clients that train at once, if the run is long enough to gain; results are the same",
        least=1,
        most=1024,
        default_text="torch's threads / threads",
    )
    device: str = option("cpu", "run", "where to train: cpu, cuda, cuda:1, ...")
    tensorboard: bool = option(
        False, "run", "write OUT/tensorboard too; wants the extra of that name"
    )
    baseline: bool = option(True, "run", "run dense FedAvg too, with the same seeds")

    dataset: str | None = option(
        None,
        "data and model",
        f"one of {', '.join(data.NAMES)}, or the path of an .npz file; fashion-mnist is the full "
        "set where it is found, else the subset shipped with the package",
        default_text="fashion-mnist-subset",
    )
    data: str | None = option(
        None,
        "data and model",
        "folder with Fashion-MNIST's four IDX files, or with CIFAR's binary archive; without "
        "dataset= it means fashion-mnist",
        default_text="Debian's folder, if there",
    )
    model: str = option("cnn", "data and model", "the network", choices=tuple(models.MODELS))
    layout: str | None = option(
        None,
        "data and model",
        "of images in memory, which changes speed and rounding",
        choices=("nchw", "nhwc"),
        default_text="what the model is faster on",
    )

    clients: int = option(10, "federation", "number of clients", least=1)
    participation: float = option(
        1.0, "federation", "share of the clients in each round's cohort", above=0, most=1
    )
    dropout: float = option(
        0.0, "federation", "probability that a client does not answer", least=0, below=1
    )
    min_updates: int = option(
        1, "federation", "usable updates without which a round is drawn again", least=1
    )
    attempts: int = option(
        5, "federation", "draws of one round before the run fails", least=1, most=1000
    )
    partition: str = option(
        "iid",
        "federation",
        "how clients share the data; groups: a client for each group of the data",
        choices=(*partition.PARTITIONS, partition.GROUPS),
    )
    alpha: float | None = option(
        None,
        "federation",
        "concentration: a small one gives each class to few clients",
        above=0,
        needs=("partition", ("dirichlet",)),
        fill=0.5,
    )
    shards: int | None = option(
        None,
        "federation",
        "shards of classes a client",
        least=1,
        needs=("partition", ("pathological",)),
        fill=2,
    )
    holdout: float = option(
        0.0,
        "federation",
        "share of its samples that each client holds out, to measure the global model on",
        least=0,
        most=0.5,
    )
    label_noise: float = option(
        0.0,
        "federation",
        "share of each client's training samples whose label is another one, drawn at random",
        least=0,
        most=1,
    )
    sampling: str = option(
        "uniform",
        "federation",
        "how a cohort is drawn; samples: in proportion to them, and updates then count alike",
        choices=("uniform", "samples"),
    )
    stragglers: float = option(
        0.0,
        "federation",
        "probability that a client does a part of its local steps only",
        least=0,
        most=1,
    )
    straggler_steps: float = option(
        0.5, "federation", "the part that a straggler does; one step at least", above=0, most=1
    )
    server_optimizer: str = option(
        "fedavg",
        "federation",
        "what the server does with the mean of the updates",
        choices=tuple(server_optim.KINDS),
    )
    server_lr: float | None = option(
        None,
        "federation",
        "the server's learning rate",
        above=0,
        needs=SERVER_STEP,
        fill={"fedavgm": 1.0, "fedadam": 0.01},
    )
    server_momentum: float | None = option(
        None,
        "federation",
        "decay of the server's first moment",
        least=0,
        below=1,
        needs=SERVER_STEP,
        fill=0.9,
    )

    dtype: str = option(
        "float32",
        "messages",
        "of values on the wire; the server adopts what clients decode",
        choices=WIRE,
    )
    uplink_dtype: str | None = option(
        None,
        "messages",
        "of values in updates; with int8 a client makes its error good in its next update",
        choices=WIRE,
        default_text="dtype",
    )
    delta: bool = option(
        False, "messages", "updates carry differences from the broadcast: better in few bits"
    )
    coding: str = option(
        "entropy",
        "messages",
        "entropy-code masks and values, of both arms, where that is smaller, or leave them raw",
        choices=("entropy", "raw"),
    )

    rounds: int = option(20, "training", "rounds of each arm", least=1)
    local_epochs: int = option(
        1, "training", "epochs of local training in a client's round", least=1
    )
    batch_size: int = option(32, "training", "samples a step", least=1)
    optimizer: str = option("sgd", "training", "of the clients", choices=("sgd", "adamw"))
    lr: float | None = option(
        None,
        "training",
        "learning rate of the first round",
        above=0,
        needs=("optimizer", ("sgd", "adamw")),
        fill={"sgd": 0.05, "adamw": 0.001},
    )
    lr_decay: float = option(
        1.0, "training", "factor on the learning rate after each round", above=0, most=1
    )
    lr_schedule: str = option(
        "decay",
        "training",
        "decay: by lr_decay a round; cosine: to 0 at the end",
        choices=("decay", "cosine"),
    )
    warmup: int = option(
        0, "training", "rounds over which the learning rate rises to lr first", least=0
    )
    momentum: float | None = option(
        None,
        "training",
        "of local steps",
        least=0,
        below=1,
        needs=("optimizer", ("sgd",)),
        fill=0.9,
    )
    weight_decay: float = option(0.0, "training", "of local steps, as in torch", least=0)
    prox_mu: float = option(0.0, "training", "FedProx's proximal term; 0 is off", least=0)
    keep_optimizer: bool = option(
        False, "training", "clients keep the optimizer's state from round to round"
    )
    graphs: bool = option(
        False,
        "training",
        "capture a local step in a CUDA graph, once for each mask, and replay it; with device=cuda "
        "alone, without prox_mu and keep_optimizer",
    )

    method: str = option(
        "fedmap",
        "pruning",
        "options that go together, for FedMap and what it is compared with (docs: baselines)",
        choices=tuple(presets.METHODS),
    )
    schedule: str = option(
        "iterative", "pruning", "how sparsity grows to its target", choices=tuple(schedule.KINDS)
    )
    target: float | None = option(
        None,
        "pruning",
        "final sparsity: the share of prunable weights that are removed",
        least=0,
        most=1,
        needs=PRUNED,
        fill=0.9,
    )
    prune_start: int | None = option(
        None,
        "pruning",
        "first round that prunes, counted from 0 (oneshot: the only one)",
        least=0,
        needs=PRUNED,
        default_text="a tenth of the rounds",
    )
    prune_end: int | None = option(
        None,
        "pruning",
        "last round that prunes; adaptive may end below the target",
        least=0,
        needs=GRADUAL,
        default_text="six tenths of the rounds; eight with schedule=adaptive",
    )
    prune_every: int | None = option(
        None, "pruning", "rounds from one pruning to the next", least=1, needs=REGULAR, fill=1
    )
    settled: float | None = option(
        None,
        "pruning",
        "share of the first round's training loss that it must come down to before any pruning",
        above=0,
        most=1,
        needs=("schedule", ("adaptive",)),
        fill=0.6,
    )
    margin: float | None = option(
        None,
        "pruning",
        "how far above its lowest before a pruning the training loss may be for the next one",
        least=0,
        needs=("schedule", ("adaptive",)),
        fill=0.1,
    )
    criterion: str | None = option(
        None,
        "pruning",
        "what weights are ranked by; fan_in is magnitude × sqrt(inputs of an output)",
        choices=(*criteria.CRITERIA, "snip"),
        needs=PRUNED,
        fill="magnitude",
    )
    min_layer_density: float | None = option(
        None,
        "pruning",
        "share of each layer's weights that stay in any case; at most 1 - target",
        least=0,
        most=1,
        needs=PRUNED,
        fill=0.0,
    )
    regrow: float | None = option(
        None,
        "pruning",
        "share of each layer's weights that a client exchanges; falls to 0 at half of the rounds",
        least=0,
        most=1,
        needs=("method", ("feddst",)),
        fill=0.2,
    )
    regrow_every: int | None = option(
        None,
        "pruning",
        "rounds from one exchange to the next",
        least=1,
        needs=("method", ("feddst",)),
        fill=2,
    )
    update_density: float | None = option(
        None,
        "pruning",
        "share of the weights that travel in a message",
        above=0,
        most=1,
        needs=("method", ("stc",)),
        fill=0.01,
    )

    aggregator: str = option(
        "mean",
        "hostile clients and privacy",
        "what the updates become: their mean by samples, or a rule that few clients cannot own",
        choices=("mean", *robust.AGGREGATORS),
    )
    hostile: int | None = option(
        None,
        "hostile clients and privacy",
        "hostile clients that the rule has to bear",
        least=0,
        needs=BOUNDED,
        default_text="a fifth of the cohort, at least 1",
    )
    norm_times: float | None = option(
        None,
        "hostile clients and privacy",
        "differences from the broadcast are cut to this multiple of their median norm",
        above=0,
        needs=("aggregator", ("norm",)),
        default_text="2, without max_norm",
    )
    max_norm: float | None = option(
        None,
        "hostile clients and privacy",
        "L2 norm that each update's difference from the broadcast is cut to",
        above=0,
        needs=("aggregator", ("mean", "norm")),
    )
    dp_noise: float = option(
        0.0,
        "hostile clients and privacy",
        "Gaussian noise on the sum of the cut differences: its standard deviation / max_norm",
        least=0,
    )
    dp_where: str = option(
        "central",
        "hostile clients and privacy",
        "who adds the noise: the server once a round, or each client to its own update",
        choices=("central", "local"),
    )
    dp_delta: float = option(
        1e-5, "hostile clients and privacy", "delta that epsilon is told for", above=0, below=1
    )
    attack: str = option(
        "none",
        "hostile clients and privacy",
        "what hostile clients send",
        choices=("none", *attacks.ATTACKS),
    )
    attackers: int | None = option(
        None,
        "hostile clients and privacy",
        "number of hostile clients: those with the last numbers",
        least=0,
        needs=("attack", tuple(attacks.ATTACKS)),
        default_text="a fifth of the clients, at least 1",
    )
