"""What other code does with an adopted table: as with `nn.Embedding` and the dense optimizer, or refused by name.

The names of the operations are the rows of the first table in docs/kernels.md, section 8.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import schedulefree
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from support.operations import Operations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.func import functional_call, functionalize, grad, hessian, jacrev, jvp, linearize, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding, RowSparseRAdamScheduleFree

ROWS, WIDTH = 12, 3
IDS = torch.tensor([1, 4, 4, 10])
OPTIMIZERS = ("AdamW", "Adam", "RAdamScheduleFree")
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
operations = Operations("operation on an adopted table", *OPTIMIZERS)
right, refused = operations.is_right, operations.is_refused


class Training(NamedTuple):
    """A model whose first layer is a table, and its optimizer."""

    model: nn.Sequential
    optimizer: Optimizer

    @property
    def table(self) -> nn.Embedding:
        return self.model[0]

    @property
    def weight(self) -> Tensor:
        return self.model[0].weight

    def loss(self, ids: Tensor = IDS, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return ((model or self.model)(ids) - ids[:, None] / ROWS).square().sum()

    def step(self, *ids: int, before: Callable[[], Any] = lambda: None) -> None:
        self.optimizer.zero_grad()
        self.loss(torch.tensor(ids, dtype=torch.int64)).backward()
        before()
        self.optimizer.step()

    def steps(self, before: Callable[[], Any] = lambda: None) -> None:
        for number in range(6):
            self.step(number, 3 * number % 5, before=before)

    def state(self) -> list[Tensor]:
        """All numbers of model and optimizer."""
        found = self.optimizer.state_dict()["state"]
        numbers = [value for place in sorted(found) for _, value in sorted(found[place].items())]
        return [part.detach().clone() for part in (*self.model.state_dict().values(), *map(torch.as_tensor, numbers))]


def make(optimizer: str, kind: type[nn.Embedding], dtype: torch.dtype = torch.float64, **options: Any) -> Training:
    torch.manual_seed(3)
    model = nn.Sequential(kind(ROWS, WIDTH, **options), nn.Linear(WIDTH, 1)).to(dtype)
    return Training(model, optimize(optimizer, model))


def optimize(name: str, model: nn.Sequential) -> Optimizer:
    is_free, is_row_sparse = name == "RAdamScheduleFree", isinstance(model[0], RowSparseEmbedding)
    options: dict[str, Any] = {"lr": 0.1} if is_free else {"lr": 0.1, "weight_decay": 0.1 if name == "AdamW" else 0.0}
    if is_row_sparse:
        options["tables"] = [model[0]]
        kind: Any = RowSparseRAdamScheduleFree if is_free else RowSparseAdamW
    else:
        kind = schedulefree.RAdamScheduleFree if is_free else torch.optim.AdamW
    made: Optimizer = kind(model.parameters(), **options)
    if is_free:
        made.train()  # type: ignore[attr-defined]
    return made


def both(optimizer: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Training, Training]:
    """The row-sparse training and the dense one, some steps old."""
    trainings = tuple(make(optimizer, kind, dtype, **options) for kind in (RowSparseEmbedding, nn.Embedding))
    for training in trainings:
        training.steps()
    return trainings[0], trainings[1]


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@right("any function reads the weight")
def reads(training: Training) -> Any:
    weight = training.weight
    found = [weight.sum(), weight[3], weight.T, torch.stack([weight, weight]), weight.detach(), weight.data + 1]
    found += [torch._foreach_norm([weight])[0], nn.functional.embedding(IDS, weight), torch.tensor(weight.tolist())]
    return [*found, torch.from_numpy(weight.detach().numpy().copy()), parameters_to_vector(training.model.parameters())]


@right("any function writes it")
def writes(training: Training) -> None:
    with torch.no_grad():
        training.weight[3] = 0.5
        training.weight.mul_(1.5)
        training.weight.data[5:7] += 1
        training.weight.detach()[10, 1:].zero_()
        training.weight.copy_(training.weight + torch.eye(ROWS)[:, :WIDTH])
        torch._foreach_add_([training.weight], 0.1)
        torch.add(training.weight, 0.1, out=training.weight)
    training.steps()
    nn.init.constant_(training.weight, 0.25)


@right("`weight.data = ...`, `vector_to_parameters`")
def replaces_the_memory(training: Training) -> None:
    vector = parameters_to_vector(training.model.parameters()).detach() * 0.5
    vector_to_parameters(vector, training.model.parameters())
    training.steps()
    training.weight.data = torch.arange(ROWS * WIDTH, dtype=torch.float64).view(WIDTH, ROWS).T / 9


@right("views and state_dicts that are kept while training goes on")
def keeps_views(training: Training) -> Any:
    kept = [training.weight.data, training.weight.detach()[2:6], training.weight.T, training.model.state_dict()]
    training.steps()
    found = [copy.deepcopy(kept[0]), kept[1] * 1, kept[2].detach().clone(), kept[3]["0.weight"].clone()]
    kept[0][0] = 7.0
    with torch.no_grad():
        kept[1].mul_(0.5)
    return found


@right("tied weights, dense gradients, gradients of zeros")
def ties(training: Training) -> None:
    for number in range(5):
        training.optimizer.zero_grad(set_to_none=number % 2 == 0)
        vectors = training.table(IDS + number % 2)
        (vectors @ training.weight.T).logsumexp(dim=1).sum().backward()
        training.optimizer.step()
    head = nn.Linear(WIDTH, ROWS, bias=False)
    head.weight = training.weight
    training.step(1, 2, before=lambda: head(torch.ones(1, WIDTH, dtype=torch.float64)).sum().backward())
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()


@right("averages of weights (`AveragedModel`)")
def averages(training: Training) -> Any:
    found = [AveragedModel(training.model), AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    for number in range(4):
        training.step(number, 7)
        for average in found:
            average.update_parameters(training.model)
    return [list(average.parameters()) for average in found]


@right("`functional_call`, stacked modules")
def calls(training: Training) -> Any:
    zeros = {name: torch.zeros_like(value) for name, value in training.model.named_parameters()}
    own = dict(training.model.named_parameters())
    stacked = stack_module_state([training.model, training.model])[0]
    return [functional_call(training.model, part, (IDS,)) for part in (zeros, own)], list(stacked.values())


@right("`load_state_dict`, `assign=True`")
def loads(training: Training) -> Any:
    state = {name: value + 1 for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(state)
    training.steps()
    training.model.load_state_dict(state, assign=True)
    return training.table(IDS), training.weight * 1


@right("checkpoints of model and optimizer in mid-training")
def saves(training: Training) -> None:
    file = io.BytesIO()
    torch.save([training.model.state_dict(), training.optimizer.state_dict()], file)
    file.seek(0)
    training.steps()
    weights, state = torch.load(file, weights_only=True)
    training.model.load_state_dict(weights)
    training.optimizer.load_state_dict(state)
    training.steps()


@right("copies and pickles of model and optimizer together")
def copies(training: Training) -> Any:
    found = []
    training.step(4, 5)
    shallow = copy.copy(training.optimizer)  # shares everything
    training.step(0, 1)
    assert_same(shallow.state_dict()["state"], training.optimizer.state_dict()["state"])
    for twin in (copy.deepcopy(training), pickle.loads(pickle.dumps(training))):
        twin.steps()
        found.append(twin.state())
    training.step(0, 2)
    return found


@right("copies and pickles of either alone")
def copies_apart(training: Training) -> Any:
    file = io.BytesIO()
    torch.save(training.model, file)
    file.seek(0)
    models = [copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))]
    models.append(torch.load(file, weights_only=False))
    for model in models:  # they belong to no optimizer: any will do
        optimizer = torch.optim.AdamW(model.parameters())
        training.loss(model=model).backward()
        optimizer.step()
    pickle.loads(pickle.dumps(training.optimizer)).step()
    return [list(model.parameters()) for model in models]


@right("`.to(dtype)` between float32 and float64")
def converts(training: Training) -> Any:
    training.model.float()
    found = training.weight.clone()
    training.model.double()
    return found


@right("one weight in several modules")
def shares(training: Training) -> Any:
    other = type(training.table)(ROWS, WIDTH)
    other.weight = training.weight
    training.step(1, 2, before=lambda: other(IDS).sum().backward())
    return other(IDS)


@right("parametrizations and pruning of the weight")
def parametrizes(training: Training) -> Any:
    register_parametrization(training.table, "weight", nn.Tanh())
    training.steps()
    prune.l1_unstructured(training.model[1], "weight", 1)
    return training.model(IDS)


@right("`clip_grad_norm_`, `clip_grad_value_`, `get_total_norm`")
def clips(training: Training) -> Any:
    parameters, found = list(training.model.parameters()), []
    for order in (2.0, 1.0, torch.inf, -1.0, 0.0):
        for foreach in (None, True, False):
            training.steps(
                before=lambda o=order, f=foreach: found.append(clip_grad_norm_(parameters, 0.01, o, foreach=f))
            )
    for foreach in (None, True, False):
        training.steps(before=lambda foreach=foreach: clip_grad_value_(parameters, 0.01, foreach=foreach))
    training.optimizer.zero_grad()
    training.loss().backward()
    return found, nn.utils.get_total_norm([parameter.grad for parameter in parameters])


@right("`GradScaler`")
def scales(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(4):
        training.optimizer.zero_grad()
        scaler.scale(training.loss(IDS - number // 2)).backward()
        scaler.unscale_(training.optimizer)
        clip_grad_norm_(training.model.parameters(), 0.5)
        scaler.step(training.optimizer)
        scaler.update()


@right("any function reads the gradient")
def reads_gradients(training: Training) -> Any:
    training.optimizer.zero_grad()
    training.loss().backward()
    gradient = training.weight.grad
    found = [gradient.norm(), gradient.data.norm(2), gradient.abs().max(), gradient.mean(), gradient.norm(dim=1)]
    return [*found, gradient.isnan().any(), torch.histc(gradient), copy.deepcopy(gradient).to_dense()]


@right("gradients set, scaled and added up by hand")
def changes_gradients(training: Training) -> None:
    training.optimizer.zero_grad()
    training.loss().backward()
    training.loss(IDS - 1).backward()
    training.weight.grad.mul_(0.5)
    training.weight.grad = training.weight.grad.to_dense() / 2
    training.loss().backward()
    training.optimizer.step()


@right("`torch.func`: grad, vmap, jvp, jacrev, hessian of the model")
def transforms(training: Training) -> Any:
    model, own = training.model, dict(training.model.named_parameters())
    loss = lambda parameters: training.loss(model=lambda ids: functional_call(model, parameters, ids))  # noqa: E731
    ones = {name: torch.ones_like(value) for name, value in own.items()}
    scaled = lambda factor: loss({name: value * factor for name, value in own.items()})  # noqa: E731
    closed = lambda factor: (training.weight * factor).square().sum() + (training.table(IDS) * factor).sum()  # noqa: E731
    one = torch.ones((), dtype=torch.float64)
    found = [list(grad(loss)(own).values()), jvp(loss, (own,), (ones,)), list(jacrev(loss)(own).values())]
    return [*found, vmap(model)(torch.stack([IDS, IDS - 1])), hessian(scaled)(one), grad(closed)(one)]


@right("the weight as an argument of `torch.func`: grad, vmap, jvp, hessian, functionalize")
def transforms_the_weight(training: Training) -> Any:
    function = lambda weight: (weight * weight).sum()  # noqa: E731
    pushed = lambda weight: jvp(function, (weight,), (torch.ones_like(weight),))[1]  # noqa: E731
    found = []
    for transformed in (grad(function), vmap(function), pushed, hessian(function), functionalize(function)):
        found.append(transformed(training.weight))
        training.step(2, 3)
    return found


@right("`make_fx`, `torch.func.linearize`")
def records(training: Training) -> Any:
    weight, ones = training.weight, torch.ones(WIDTH, dtype=torch.float64)
    found = [make_fx(lambda row: (weight * row).sum() + weight.T[0].sum())(ones)(ones)]
    training.step(1, 3)
    slope = linearize(lambda part: (part * part).sum(), training.weight)[1]
    return [*found, slope(torch.ones_like(training.weight)), make_fx(training.model)(IDS)(IDS)]


@right("steps of PyTorch's optimizers, also with a closure")
def steps_otherwise(training: Training) -> None:
    parameters = list(training.model.parameters())
    kinds: list[Any] = [
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        torch.optim.RMSprop(parameters, lr=0.01),
        *(torch.optim.AdamW(parameters, **{option: True}) for option in ("foreach", "fused")),
    ]
    for optimizer in kinds:
        training.step(1, 2, before=optimizer.step)

        def closure() -> Tensor:
            training.optimizer.zero_grad()
            loss = training.loss()
            loss.backward()
            return loss

        optimizer.step(closure)
        training.steps()
    torch.optim.LBFGS(parameters, lr=0.01, max_iter=2).step(closure)


@right("`create_graph`, batched gradients")
def differentiates_twice(training: Training) -> Any:
    parameters = list(training.model.parameters())
    slopes = torch.autograd.grad(training.loss(), parameters, create_graph=True)
    found = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), parameters)
    output, eye = training.model(IDS)[:, 0], torch.eye(len(IDS), dtype=torch.float64)
    once = torch.autograd.grad(training.loss(), parameters)
    found = [*found, *torch.autograd.grad(output, parameters, eye, is_grads_batched=True)]
    return [*(part.to_dense() for part in found), *(part * 2 for part in once[1:]), training.weight - 0.1 * once[0]]


@right("`torch.compile` around a training step")
def compiles(training: Training) -> Any:
    def step(ids: Tensor) -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(ids) + (training.table(ids) @ training.weight.T).square().mean()
        loss.backward()
        training.optimizer.step()
        return loss

    if isinstance(training.table, RowSparseEmbedding):  # a compiled AdamW counts its steps in float32
        torch._dynamo.reset()
        step = torch.compile(step, backend="aot_eager")
    return [step((IDS + number) % ROWS) for number in range(3)]


@right("`torch.export`, `torch.jit.trace`")
def exports(training: Training) -> Any:
    found = [torch.export.export(training.model, (IDS,), strict=is_strict).module() for is_strict in (False, True)]
    return [module(IDS) for module in (*found, torch.jit.trace(training.model, (IDS,)))]


@right("inference mode, fake tensors around a read")
def reads_in_modes(training: Training) -> Any:
    with torch.inference_mode():
        found = [training.weight.sum(), training.model(IDS)]
    training.step(0, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        training.weight.sum()
    training.step(4, 5)
    return [part.clone() for part in found]


@right("int32 ids, a frozen weight")
def reads_narrow_ids(training: Training) -> Any:
    training.model.requires_grad_(False)
    training.table.requires_grad_(True)
    training.step(1, 2)
    return training.table(IDS.int())


@pytest.mark.parametrize(("name", "optimizer"), list(operations.right))
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Sparse invariant checks", "ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # linearize, whatever the parameter is
def test_as_the_dense_optimizer(name: str, optimizer: str) -> None:
    ours, dense = both(optimizer)
    assert_same(
        operations.right[name, optimizer](ours),
        operations.right[name, optimizer](dense),
        1e-4 if "(dtype)" in name else 1e-9,
    )
    if "(dtype)" in name:  # the dense state keeps its dtype until it is loaded again
        return
    for training in (ours, dense):
        training.steps()
    assert_same(ours.state(), dense.state())


def changes_the_optimizer(training: Training, name: str) -> Training:
    twin = Training(training.model, optimize(name, training.model))
    twin.steps()
    return twin


@right("another optimizer of ours takes the table over")
@each_optimizer
def test_another_optimizer(optimizer: str) -> None:
    ours, dense = both(optimizer)
    kept = [training.weight.data for training in (ours, dense)]
    other = "Adam" if optimizer == "RAdamScheduleFree" else "RAdamScheduleFree"
    twins = [changes_the_optimizer(training, other) for training in (ours, dense)]
    assert_same(*(part * 1 for part in kept))
    assert_same(*(twin.state() for twin in twins))


@right("`padding_idx`, also of a tied weight")
@each_optimizer
def test_a_padding_row(optimizer: str) -> None:
    ours, dense = both(optimizer, padding_idx=1)
    for training in (ours, dense):
        ties(training)
        training.steps()
    assert_same(ours.state(), dense.state())


@right("`from_pretrained`, NumPy integers as sizes")
@each_optimizer
def test_pretrained_weights(optimizer: str) -> None:
    given = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    models = [
        nn.Sequential(kind.from_pretrained(given.clone(), freeze=False, padding_idx=np.int64(2)), head)
        for kind in (RowSparseEmbedding, nn.Embedding)
        for head in [nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)]
    ]
    models[1][1].load_state_dict(models[0][1].state_dict())
    ours, dense = (Training(model, optimize(optimizer, model)) for model in models)
    for training in (ours, dense):
        training.steps()
    assert_same(ours.state(), dense.state())
    assert not RowSparseEmbedding.from_pretrained(given).weight.requires_grad
    assert RowSparseEmbedding(np.int64(3), np.int32(2)).weight.shape == (3, 2)


@right("the meta device and fake tensors before adoption")
@each_optimizer
def test_fakes(optimizer: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(RowSparseEmbedding(ROWS, WIDTH), nn.Linear(WIDTH, 1))
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    Training(model, optimize(optimizer, model)).step(1, 2)
    with FakeTensorMode():
        assert RowSparseEmbedding(4, 2)(torch.tensor([1])).shape == (1, 2)


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])

def work(rank, folder):
    import warnings
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from optim.test_table_weight import Training, make, optimize, RowSparseEmbedding
    dist.init_process_group("gloo", init_method=f"file://{folder}/together", rank=rank, world_size=2)
    for optimizer in ("AdamW", "Adam", "RAdamScheduleFree"):
        found = []
        for kind, is_wrapped_first in ((RowSparseEmbedding, False), (RowSparseEmbedding, True), (nn.Embedding, False)):
            training = make(optimizer, kind)
            model = DistributedDataParallel(training.model)
            if is_wrapped_first:
                training = make(optimizer, nn.Embedding)  # never adopted
                table = RowSparseEmbedding.from_pretrained(training.weight.detach(), freeze=False)
                training.model[0] = table
                model = DistributedDataParallel(training.model)
                training = Training(training.model, optimize(optimizer, training.model))
            for number in range(6):
                training.optimizer.zero_grad()
                training.loss(torch.tensor([number, 3 * rank, rank]), model=model).backward()
                nn.utils.clip_grad_norm_(training.model.parameters(), 0.5)
                training.optimizer.step()
            found.append(training.state())
        for other in found[:2]:
            torch.testing.assert_close(other, found[2], rtol=1e-9, atol=1e-9)
        mine = training.model[0].weight.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, training.model[0].weight.detach())
        sharded = nn.Sequential(RowSparseEmbedding(12, 3), nn.Linear(3, 1))
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
        adopted = make(optimizer, RowSparseEmbedding).model
        mesh = dist.init_device_mesh("cpu", (2,))
        for refused in (lambda: optimize(optimizer, sharded), lambda: fully_shard(adopted, mesh=mesh)):
            try:
                refused()
            except ValueError as error:
                print(error, flush=True)
    dist.destroy_process_group()
    from support.ranks import end_at_once
    end_at_once()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[2],), nprocs=2)
"""


@right("`DistributedDataParallel`, made before or after the optimizer")
def test_several_processes(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, str(script), str(Path(__file__).parents[1]), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more would wait for each other
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RowSparseEmbedding: weight must be a parameter in one piece, got DTensor; ") == 6
    assert done.stdout.count("RowSparseEmbedding: an adopted table must stay in one piece, got DTensor; ") == 6


@refused("adoption on the meta device", "must be a [N, D] tensor of numbers in float32, float64 or bfloat16, got")
def adopts_meta(training: Training) -> None:
    optimize("AdamW", training.model.to("meta"))


@refused("adoption of fake tensors, of DTensors (FSDP), of parametrized weights", "must be a parameter in one piece")
def adopts_parts(training: Training) -> None:
    with FakeTensorMode():
        table = RowSparseEmbedding(4, 2)
        RowSparseAdamW(table.parameters(), [table])


@refused("sharding (FSDP, FSDP2) after adoption", "an adopted table must stay in one piece, got")
def shards(training: Training) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for is_original in (False, True):
            with pytest.raises(ValueError, match="must stay in one piece, got FullyShardedDataParallel; release"):
                FullyShardedDataParallel(training.model, device_id=torch.device("cpu"), use_orig_params=is_original)
            unadopted = nn.Sequential(RowSparseEmbedding(ROWS, WIDTH), nn.Linear(WIDTH, 1))
            FullyShardedDataParallel(unadopted, device_id=torch.device("cpu"), use_orig_params=is_original)
            with pytest.raises(ValueError, match="must be a parameter in one piece"):
                optimize("AdamW", unadopted)
        fully_shard(training.model, mesh=dist.init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


@refused("`.half()`", "must be a [N, D] tensor of numbers in float32, float64 or bfloat16, got [12, 3], torch.float16")
def halves(training: Training) -> None:
    training.model.half()


@refused("a weight of another shape", "must keep its shape [12, 3]")
def reshapes(training: Training) -> None:
    training.weight.data = torch.zeros(5, 3, dtype=torch.float64)


@refused("a step of an optimizer whose table was released or taken over", "tables must be its own")
def steps_twice(training: Training) -> None:
    changes_the_optimizer(training, "Adam")
    training.step(1)


@refused("`max_norm`, `scale_grad_by_freq`, `sparse=True`", "max_norm must be left out, got 1.0")
def limits(training: Training) -> None:
    for option in ({"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(ValueError, match="must be left out"):
            RowSparseEmbedding(4, 2, **option)
    RowSparseEmbedding(4, 2, max_norm=1.0)


@refused("ids that are no int64 or int32", "ids must have dtype torch.int64, torch.int32, got torch.float32")
def looks_up_floats(training: Training) -> None:
    training.table(torch.ones(2))


@refused("changes of the gradient other than scaling and clipping", "clip_gradient_norm to clip it")
def noises_gradients(training: Training) -> None:
    training.weight.grad.clamp_(min=0.1)


@refused("`nn.DataParallel`", "use DistributedDataParallel")
def replicates(training: Training) -> None:
    training.table._replicate_for_data_parallel()


@pytest.mark.parametrize(("name", "optimizer"), list(operations.refused))
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:The `NO_SHARD`")  # of one process
def test_refused_by_name(name: str, optimizer: str) -> None:
    operation, message = operations.refused[name, optimizer]
    ours, _ = both(optimizer)
    before = ours.state()
    with pytest.raises((ValueError, TypeError), match=rf"^RowSparse\w+: .*{re.escape(message)}") as caught:
        operation(ours)
    assert "\n" not in str(caught.value)
    if "taken over" not in name and "meta" not in name:
        assert_same(ours.state(), before)


@pytest.mark.parametrize("is_whole_graph", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's own, where a graph ends
def test_one_graph_is_refused_by_name(is_whole_graph: bool) -> None:
    torch._dynamo.reset()
    ours, dense = both("AdamW")
    model = torch.compile(ours.model, backend="eager", fullgraph=is_whole_graph)
    if is_whole_graph:
        with pytest.raises(Exception, match="leave fullgraph out"):
            model(IDS)
    else:
        assert_same(model(IDS), dense.model(IDS))


class Mixed(RuleBasedStateMachine):
    """Fifty random operations on a table and on `nn.Embedding`; what nobody reads stays behind until somebody does."""

    optimizer: str

    def __init__(self) -> None:
        super().__init__()
        self.pair = [make(self.optimizer, kind) for kind in (RowSparseEmbedding, nn.Embedding)]
        self.averages = [AveragedModel(part.model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for part in self.pair]
        self.saved = [(part.model.state_dict(), part.optimizer.state_dict()) for part in self.pair]
        self.kept = [part.weight.detach() for part in self.pair]
        self.save()

    def on_both(self, operation: Callable[[Training], Any]) -> list[Any]:
        return [operation(part) for part in self.pair]

    def compare(self, operation: Callable[[Training], Any]) -> None:
        found, wanted = self.on_both(operation)
        assert_same(found, wanted)

    ids = st.lists(st.integers(0, ROWS - 1), max_size=5)

    @rule(ids=ids, limit=st.sampled_from([None, 0.1]))
    def step(self, ids: list[int], limit: float | None) -> None:
        for part in self.pair:
            parameters = part.model.parameters()
            part.step(*ids, before=lambda p=parameters: limit and clip_grad_norm_(p, limit))

    @rule(ids=ids)
    def step_tied(self, ids: list[int]) -> None:
        for part in self.pair:
            part.step(*ids, before=lambda part=part: (part.table(IDS) @ part.weight.T).square().mean().backward())

    @rule(ids=ids)
    def read(self, ids: list[int]) -> None:
        self.compare(lambda part: part.table(torch.tensor(ids, dtype=torch.int64)))

    @rule()
    def read_all(self) -> None:
        self.compare(lambda part: part.weight.sum(dim=1))

    @rule()
    def read_what_was_kept(self) -> None:
        assert_same(*(kept * 1 for kept in self.kept))

    @rule(row=st.integers(0, ROWS - 1), is_kept=st.booleans())
    def write(self, row: int, is_kept: bool) -> None:
        for kept, part in zip(self.kept, self.pair, strict=True):
            with torch.no_grad():
                (kept if is_kept else part.weight)[row : row + 2] += 0.25

    @rule()
    def keep(self) -> None:
        self.kept = [part.weight.data for part in self.pair]

    @rule()
    def average(self) -> None:
        for average, part in zip(self.averages, self.pair, strict=True):
            average.update_parameters(part.model)

    @rule()
    def save(self) -> None:
        self.saved = self.on_both(lambda part: copy.deepcopy((part.model.state_dict(), part.optimizer.state_dict())))

    @rule(is_assigned=st.booleans(), has_state=st.booleans())
    def load(self, is_assigned: bool, has_state: bool) -> None:
        for number, (weights, state) in enumerate(self.saved):
            part = self.pair[number]
            part.model.load_state_dict(copy.deepcopy(weights), assign=is_assigned)
            if is_assigned:  # as always in PyTorch, the optimizer comes after
                self.pair[number] = part = Training(part.model, optimize(self.optimizer, part.model))
            if has_state:
                part.optimizer.load_state_dict(copy.deepcopy(state))

    @rule(is_pickled=st.booleans())
    def copy(self, is_pickled: bool) -> None:
        self.pair = self.on_both(lambda part: pickle.loads(pickle.dumps(part)) if is_pickled else copy.deepcopy(part))
        self.kept = [part.weight.detach() for part in self.pair]

    @rule()
    def copy_the_model(self) -> None:
        self.compare(lambda part: list(copy.deepcopy(part.model).parameters()))

    @rule(factor=st.sampled_from([0.0, 1.5]))
    def call_with_others(self, factor: float) -> None:
        scaled = self.on_both(lambda part: {name: value * factor for name, value in part.model.named_parameters()})
        assert_same(*(functional_call(part.model, own, (IDS,)) for part, own in zip(self.pair, scaled, strict=True)))

    @rule()
    def switch(self) -> None:
        for part in self.pair:
            if self.optimizer == "RAdamScheduleFree":
                part.optimizer.eval()  # type: ignore[attr-defined]
        self.compare(lambda part: part.model(IDS))
        for part in self.pair:
            if self.optimizer == "RAdamScheduleFree":
                part.optimizer.train()  # type: ignore[attr-defined]
            else:
                part.optimizer.param_groups[0]["lr"] = 0.15 - part.optimizer.param_groups[0]["lr"]

    def teardown(self) -> None:
        self.compare(Training.state)
        assert_same(*(list(average.parameters()) for average in self.averages))
        assert_same(*(kept * 1 for kept in self.kept))


def test_the_document_lists_these_operations() -> None:
    operations.assert_documented()


@pytest.mark.parametrize("sequences", [10, pytest.param(1000, marks=pytest.mark.slow)])
@each_optimizer
def test_mixed_operations(optimizer: str, sequences: int) -> None:
    machine = type("Mixed" + optimizer, (Mixed,), {"optimizer": optimizer})
    options = settings(
        max_examples=sequences,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
