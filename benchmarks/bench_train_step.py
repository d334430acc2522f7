"""Training steps of REMI: ours against the public code (github.com/Tokkiu/REMI), same users, same threads.

    $ distributed-mi prepare jobs/configs/beauty-remi.toml data.interactions=... data.items=... workspace=WORKSPACE
    $ python -m benchmarks.bench_train_step --source CHECKOUT/src --workspace WORKSPACE [--threads 2]

A step is 128 users, 1,280 shared negatives, 20 history items, width 64, 4 interests, lambda 100, beta 1, Adam, with
its batch: sampling users, forward, backward, update. Sides:
    ours               what `distributed-mi train` runs with one worker
    ours, bf16         the same with `train.engine.precision = "bf16"`, which the public code does not offer
    public, stubbed    the public code without two matrices that it builds for every sample and no model reads
    public, published  the public code as it is

`bench_engine` measures DeepSpeed. It has no side here because its mere import slows the other ones down by a tenth, and
`distributed-mi train` imports it only where a ZeRO stage asks for it.

No line of the public code is changed; a checkout of it is needed and nothing of it is kept here. From outside come a
module named `faiss` (it imports the GPU library; no index is asked here) and a `Tensor.cuda` that returns the tensor.
"""

import argparse
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.processes import OwnProcess
from distributed_mi.core.artifacts import Workspace
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.config import EngineConfig, ModelChoice, TrainConfig
from distributed_mi.training.loop import Trainer
from distributed_mi.training.worker import assemble

OURS = {"ours": "fp32", "ours, bf16": "bf16"}
"""Side -> precision."""
STUBBED, PUBLISHED = "public, stubbed", "public, published"


class OurSteps:
    """Steps of `distributed-mi train` in this process."""

    def __init__(self, workspace: Workspace, folder: str, precision: str) -> None:
        engine = EngineConfig.model_validate({"precision": precision})
        config = TrainConfig(model=ModelChoice(name="remi"), engine=engine, log_every=10**9)
        run = assemble(
            config, workspace, folder, WorkerGroup.alone(), lambda model, group: {}, harness.NoBar()
        )
        self.trainer = Trainer(config, run, fs=workspace.fs, metrics_path=f"{folder}/metrics.jsonl")

    def __call__(self) -> None:
        """One step."""
        self.trainer.step()


class PublicSteps:
    """Steps of the public training loop: its loader, its model, its loss, its optimizer, in its order."""

    def __init__(
        self, source: Path, data: Path, num_items: int, *, stub_matrices: bool, seed: int = 2021
    ) -> None:
        utils = load_public_code(source)
        self.device = torch.device("cpu")
        self.to_tensor = utils.to_tensor
        options = ["--model_type", "REMI", "--rlambda", "100", "--rbeta", "1", "--dataset", "beauty"]
        self.options = utils.get_parser().parse_args(options)
        utils.setup_seed(seed)
        loader = utils.get_DataLoader(str(data), 128, 20, train_flag=1, args=self.options)
        if stub_matrices:
            loader.dataset.compute_time_matrix = lambda times, n: 0
            loader.dataset.compute_adj_matrix = lambda mask, n: 0
        self.batches: Iterator[Any] = iter(loader)
        self.model = utils.get_model(
            "beauty", "REMI", num_items + 1, 128, 64, 4, 20, args=self.options, device=self.device
        )
        self.model.set_device(self.device)
        self.model.set_sampler(self.options, device=self.device)
        self.model.loss_fct = torch.nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.001, weight_decay=0)

    def __call__(self) -> None:
        """One step."""
        _, targets, items, mask, times = next(self.batches)
        self.model.train()
        self.optimizer.zero_grad()
        positives = self.to_tensor(targets, self.device)
        times = tuple(self.to_tensor(t, self.device) for t in times)
        interests, _, attention, read_out, selection = self.model(
            self.to_tensor(items, self.device),
            positives,
            self.to_tensor(mask, self.device),
            times,
            self.device,
        )
        loss = self.model.calculate_sampled_loss(read_out, positives, selection, interests)
        loss += self.options.rlambda * self.model.calculate_atten_loss(attention)
        loss.backward()
        self.optimizer.step()


def load_public_code(source: Path) -> Any:
    """The public `utils` module, importable on a CPU."""
    sys.modules.setdefault("faiss", types.ModuleType("faiss"))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    import utils

    return utils


def write_training_users(workspace: Workspace, path: Path) -> int:
    """Write the workspace's training users in the public loader's format; returns the number of items.

    The last column carries the position: the loader sorts by it, and so keeps our order of events of one day.
    """
    prepare = workspace.stage("prepare")
    table = prepare.read("sequences/train", "sequences", columns=["user_index", "item_indices"])
    with open(path, "w", encoding="utf-8") as stream:
        for user, items in zip(
            table["user_index"].to_pylist(), table["item_indices"].to_pylist(), strict=True
        ):
            stream.writelines(f"{user},{item},{n},{n}\n" for n, item in enumerate(items))
    return prepare.require().rows["items"]


def make_side(payload: dict[str, Any]) -> Callable[[], None]:
    """A call of some steps of one side."""
    torch.set_num_threads(payload["threads"])
    side, folder = payload["side"], payload["folder"]
    step: Callable[[], None]
    if side in OURS:
        step = OurSteps(Workspace(payload["workspace"]), f"{folder}/{OURS[side]}", OURS[side])
    else:
        data, stub = Path(folder) / "train.txt", side == STUBBED
        step = PublicSteps(Path(payload["source"]), data, payload["items"], stub_matrices=stub)
    return harness.repeated(step, payload["steps"])


def main() -> int:
    """Measure the sides in turn and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="the src folder of a checkout of Tokkiu/REMI"
    )
    parser.add_argument("--workspace", required=True, help="a workspace whose prepare stage is complete")
    parser.add_argument("--threads", type=int, default=1, help="of each side's process")
    parser.add_argument("--repeats", type=int, default=9, help="measured calls of each side")
    parser.add_argument("--steps", type=int, default=60, help="steps in one call")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        workspace = Workspace(args.workspace)
        num_items = write_training_users(workspace, Path(folder) / "train.txt")
        common = {"workspace": args.workspace, "source": str(args.source), "folder": folder}
        common |= {"items": num_items, "steps": args.steps, "threads": args.threads}
        sides = {}
        for name in (*OURS, STUBBED, PUBLISHED):
            side = OwnProcess("benchmarks.bench_train_step:make_side", common | {"side": name})
            sides[name] = processes.enter_context(side)
        result = harness.compare(
            sides,
            unit=f"{args.steps} steps of 128 users",
            repeats=args.repeats,
            warmup=2,
            extra={"items": num_items, "users": workspace.stage("prepare").require().rows["train"]},
        )
    one = args.threads == 1
    notes = (
        f"{'One thread' if one else f'{args.threads} threads'} and a process of its own for each side; the sides take "
        "turns. Lazy Adam on the item table here, dense Adam there."
    )
    name = "train_step" if one else f"train_step_{args.threads}_threads"
    print(harness.write(name, result, notes=notes, folder=args.results).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
