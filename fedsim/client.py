"""The client: batch → inspection → local update → defense → reply. It knows nothing of eavesdroppers."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.cores import one_thread
from fedsim.defense import State, hides_failures, hooks_of
from fedsim.files import read_tensors, write_json, write_tensors
from fedsim.inspection import Finding, Inspection, Refused
from fedsim.records import ARRAYS, CONFIG, METRICS, SENDER, client_of, record, reply_of, tensors_of
from fedsim.secure_aggregation import Secure
from fedsim.secure_rounds import answer_steps, masked_reply, shares_in
from fedsim.seeding import generator, global_stream, seed_of
from fedsim.setup import Config, Setup, model_of, setup_of
from fedsim.training import Trained, evaluate
from fedsim.updates import Update
from fedsim.wire import pack

log = logging.getLogger(__name__)


def client_app(
    config: Config, memory: str | None = None, ready: Callable[[int, int], Trained | None] = lambda round, client: None
) -> ClientApp:
    """The Flower ClientApp of a run.

    memory  a folder for the states of defenses that have any
    ready   what a client has trained in a round already, if it was trained along with others
    """
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return Message(RecordDict({SENDER: ConfigRecord({"client": client_of(context)})}), reply_to=message)

    answer_steps(app, config)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        one_thread()
        setup, client = setup_of(config), client_of(context)
        order = record(message.content, ConfigRecord, CONFIG)
        round = int(order["server-round"])  # type: ignore[arg-type]
        secure = isinstance(setup.aggregation, Secure)
        shares = shares_in(message, context, setup, round) if secure else {}
        model = model_of(setup)
        index = setup.protocol.batches(setup.shards[client], setup.seed, round, client)
        trained, inspects = ready(round, client), setup.inspection.action != "off"
        if trained is None or inspects or secure:  # whoever has been trained along with others has no use for the broadcast
            tensors = tensors_of(record(message.content, ArrayRecord, ARRAYS), setup.device)
            params = {name: tensors[name] for name, _ in model.named_parameters()}
            buffers = {name: tensors[name] for name, _ in model.named_buffers()}
            images, labels = setup.batch(index[0])
        if inspects:
            with chance_seeded(model, images, seed_of(setup.seed, "inspection", round, client)):
                found = setup.inspection(model, params, buffers, images, labels)
            if found:
                _tell(memory, client, round, setup.inspection, found)
        if trained is None:
            with chance_seeded(model, images, seed_of(setup.seed, "dropout", round, client)):
                trained = setup.protocol.train(
                    model,
                    params,
                    buffers,
                    (setup.batch(i) for i in index),
                    proximal=float(order.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
                    hooks=hooks_of(setup.defense, setup.dataset.num_classes, setup.seed, round, client),
                )
        if not all(t.isfinite().all() for t in trained.update.values()):
            # Some number formats would send a number in its place, and a memory would have it in all that is sent from then on.
            if not hides_failures(setup.defense):
                raise ValueError("its update has entries that are no finite numbers: lower federation.lr")
            trained = replace(trained, update={name: torch.zeros_like(t) for name, t in trained.update.items()})
        before = _recall(memory, client, round, setup, trained.update)
        packets, state = setup.defense(pack(trained.update), before, generator(setup.seed, "defense", round, client))
        if secure:
            reply = masked_reply(context, setup, shares, packets, trained, buffers)
        else:
            reply = reply_of(packets, trained.buffers, len(torch.cat(index).unique()), float(trained.loss), client)
        _remember(memory, client, round, state if all(t.isfinite().all() for t in state.values()) else before)
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate_on_shard(message: Message, context: Context) -> Message:
        one_thread()
        setup, client = setup_of(config), client_of(context)
        tensors = tensors_of(record(message.content, ArrayRecord, ARRAYS), setup.device)
        shard = setup.shards[client]
        accuracy, loss = evaluate(model_of(setup), tensors, {}, (setup.batch(i) for i in shard.split(500)))
        metrics = MetricRecord({"num-examples": len(shard), "accuracy": accuracy, "loss": loss})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return app


# A defense's memory is the client's own and lives on the client's own disk, one file for each round it took part in. Three are
# kept: the newest, the one before it, which is the right one again if the run is resumed from the round before, and one more for a
# run whose last checkpoint is damaged.


def _state_files(memory: str, client: int) -> list[Path]:
    return sorted(Path(memory, f"client_{client:05d}").glob("round_*.safetensors"))


def _recall(memory: str | None, client: int, round: int, setup: Setup, like: Update) -> State:
    fresh = setup.defense.init(like)
    if not fresh:
        return fresh
    if memory is None:
        raise ValueError(f"{setup.defense!r} has a memory, but the client was given no folder to keep it in")
    if not Path(memory).is_dir():
        raise ValueError(
            f"{setup.defense!r} has a memory, which is kept in {memory}, and there is no such folder on this client's machine: "
            "put out= where all machines of the cluster can write"
        )
    earlier = [path for path in _state_files(memory, client) if _round(path) < round]
    if not earlier:
        return fresh
    state, _ = read_tensors(earlier[-1])
    return {name: t.to(setup.device) for name, t in state.items()}


def _remember(memory: str | None, client: int, round: int, state: State) -> None:
    if not state or memory is None:
        return
    write_tensors(Path(memory, f"client_{client:05d}", f"round_{round:06d}.safetensors"), state, {})
    before = [old for old in _state_files(memory, client) if _round(old) < round]
    for old in before[:-2]:
        old.unlink()


def _tell(memory: str | None, client: int, round: int, inspection: Inspection, found: list[Finding]) -> None:
    """Logs what the client found, leaves it in the client's folder, and raises Refused if that is what it does about a trap."""
    refused = inspection.action == "refuse" and any(one.trap for one in found)
    for one in found:
        log.warning("round %d, client %d, inspection: %s", round, client, one)
    if memory is not None:
        about = {"round": round, "client": client, "refused": refused}
        rows = [{**about, **asdict(one), "trap": one.trap, "says": str(one)} for one in found]
        write_json(Path(memory, f"client_{client:05d}", f"findings_{round:06d}.json"), {"rows": rows})
    if refused:
        raise Refused(f"client {client} refuses: {next(one for one in found if one.trap)}")


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round_"))


_draws: weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def chance_seeded(model: nn.Module, images: Tensor, seed: int) -> Iterator[None]:
    """Inside, what `model` draws, fed batches such as `images`, is a function of the seed, whichever module draws it.

    Modules draw from torch's global stream, which threads share: clients of a model that draws train one at a time.
    """
    if not draws(model, images):
        yield
        return
    with global_stream, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def draws(model: nn.Module, images: Tensor) -> bool:
    """Whether a model in its mode draws from torch's global stream: tried once, since any module may."""
    known = _draws.setdefault(model, {})
    if model.training not in known:
        tensors = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}  # BatchNorm writes to them
        with global_stream, torch.random.fork_rng():
            before = _streams(images)
            functional_call(model, tensors, (images,))
            known[model.training] = not torch.equal(before, _streams(images))
    return known[model.training]


def _streams(images: Tensor) -> Tensor:
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(images.device)]) if images.is_cuda else cpu
