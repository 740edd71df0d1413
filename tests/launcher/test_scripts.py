"""Scripts that know nothing of dstrain, unchanged, on two hosts with two ranks each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.lab

RANKS = 4
PRELOADED_OR_NOT = pytest.mark.parametrize("mode", [[], ["--no-preload"]], ids=["preloaded", "plain"])

DDP = """
import os, sys
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.optim as optim
from torch.nn.parallel import DistributedDataParallel as DDP


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))


def demo_basic():
    dist.init_process_group("gloo", init_method="env://")
    rank = dist.get_rank()
    model = ToyModel()  # other weights on every rank: DDP broadcasts rank 0's
    ddp_model = DDP(model)
    loss_fn = nn.MSELoss()
    optimizer = optim.SGD(ddp_model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(100 * step + rank)
        outputs = ddp_model(torch.randn(20, 10))
        loss = loss_fn(outputs, torch.randn(20, 5))
        loss.backward()
        optimizer.step()
    dist.all_reduce(loss, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
    weights = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"{loss.item():.6f} {weights!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    demo_basic()
"""

FSDP2 = """
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(7)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
torch.manual_seed(7)
alone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
mine = torch.optim.AdamW(model.parameters(), lr=1e-2)
whole = torch.optim.AdamW(alone.parameters(), lr=1e-2)
for step in range(3):
    torch.manual_seed(step)
    batch = torch.randn(4 * dist.get_world_size(), 16)
    part = batch[4 * dist.get_rank() : 4 * dist.get_rank() + 4]
    for net, optimizer, data in ((model, mine, part), (alone, whole, batch)):
        optimizer.zero_grad()
        net(data).square().mean().backward()
        optimizer.step()
worst = max((a.full_tensor() - b).abs().max().item() for a, b in zip(model.parameters(), alone.parameters()))
print("sharded", next(model.parameters()).to_local().shape[0], "near", worst < 1e-5)
dist.destroy_process_group()
"""


def two_hosts(light):
    return ["-H", light.hostfile(names=["h1", "h2"])]


def lines_of(run, count=RANKS):
    """What each rank has printed on stdout."""
    return [run.log(f"h{rank // 2 + 1}", rank).decode().splitlines() for rank in range(count)]


@pytest.mark.slow
@PRELOADED_OR_NOT
def test_ddp_as_in_torchs_tutorial(light, start, script, mode):
    run = start(*two_hosts(light), *mode, script(DDP), env=light.env)
    assert run.wait() == 0, run.err
    found = lines_of(run)
    assert all(len(lines) == 1 for lines in found)
    assert len({lines[0] for lines in found}) == 1, found
    assert float(found[0][0].split()[0]) > 0


def test_nothing_is_imported_early_but_torch(start, script):
    """torch._dynamo before init_process_group makes DDP hang at its end: see makes_an_optimizer."""
    text = "import sys, torch\nprint('torch._dynamo' in sys.modules)\ntorch.optim.SGD([torch.zeros(1)])\n"
    run = start("-n", "1", script(text))
    assert run.wait() == 0, run.err
    assert run.out == "[localhost:0] False\n"


@pytest.mark.slow
def test_fsdp2_shards_over_both_hosts(light, start, script):
    run = start(*two_hosts(light), script(FSDP2), env=light.env)
    assert run.wait() == 0, run.err
    assert lines_of(run) == [["sharded 8 near True"]] * RANKS


TRANSFORMERS = """
import os, sys
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(1)
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
data = [{"input_ids": torch.arange(8) % 32, "labels": torch.arange(8) % 32} for _ in range(16)]
arguments = TrainingArguments(
    output_dir=sys.argv[1], use_cpu=True, max_steps=3, per_device_train_batch_size=1, report_to=[],
    save_strategy="no", disable_tqdm=True, learning_rate=0.01, logging_steps=1,
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
result = trainer.train()
weights = sum(p.detach().double().sum().item() for p in model.parameters())
print("world", arguments.world_size, arguments.process_index == int(os.environ["RANK"]), result.global_step, weights)
"""

LIGHTNING = """
import os, warnings
warnings.simplefilter("ignore")
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


trainer = L.Trainer(
    accelerator="cpu", strategy="ddp", devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=2, max_epochs=1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
model = Model()
trainer.fit(model, DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=2))
weights = sum(p.detach().double().sum().item() for p in model.parameters())
environment = type(trainer.strategy.cluster_environment).__name__
print(environment, trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank, weights)
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.arange(64.0).view(16, 4) / 64), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
steps = 0
for (batch,) in loader:
    optimizer.zero_grad()
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
    steps += 1
seen = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
weights = sum(p.detach().double().sum().item() for p in model.parameters())
print(accelerator.num_processes, accelerator.distributed_type.value, steps, seen, weights)
accelerator.end_training()
"""


@pytest.mark.slow
def test_transformers_trainer(light, start, script, tmp_path):
    run = start(*two_hosts(light), script(TRANSFORMERS), tmp_path / "out", env=light.env)
    assert run.wait(120) == 0, run.err
    found = [lines[-1].split() for lines in lines_of(run)]
    assert [words[:4] for words in found] == [["world", "4", "True", "3"]] * RANKS
    assert len({words[4] for words in found}) == 1


@pytest.mark.slow
def test_lightning_fit(light, start, script):
    run = start(*two_hosts(light), script(LIGHTNING), env=light.env)
    assert run.wait(120) == 0, run.err
    found = [lines[-1].split() for lines in lines_of(run)]
    for rank, words in enumerate(found):
        assert words[:5] == ["TorchElasticEnvironment", "4", str(rank), str(rank % 2), str(rank // 2)]
    assert len({words[5] for words in found}) == 1


@pytest.mark.slow
def test_accelerate(light, start, script):
    run = start(*two_hosts(light), script(ACCELERATE), env=light.env)
    assert run.wait(120) == 0, run.err
    found = {lines[-1] for lines in lines_of(run)}
    assert len(found) == 1
    assert found.pop().startswith("4 MULTI_CPU 2 [0, 1, 2, 3] ")


CHILDREN = """
import multiprocessing, os, pickle, sys
from dataclasses import dataclass


@dataclass
class Point:
    x: int


def square(point):
    return Point(point.x**2)


def tell(queue, value):
    queue.put((value, __name__, os.getpid()))


class Numbers:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        import torch

        return torch.tensor([index, os.getpid()])


if __name__ == "__main__":
    import torch
    from torch.utils.data import DataLoader

    assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
    for start_method, workers in (("fork", 2), ("spawn", 1)):
        loader = DataLoader(Numbers(), batch_size=2, num_workers=workers, multiprocessing_context=start_method)
        rows = torch.cat(list(loader))
        assert rows[:, 0].tolist() == list(range(8)), rows
        pids = set(rows[:, 1].tolist())
        assert len(pids) == workers and os.getpid() not in pids
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as pool:
        print([point.x for point in pool.map_async(square, [Point(2), Point(3)]).get(60)])
    queue = spawn.Queue()
    process = spawn.Process(target=tell, args=(queue, 5))
    process.start()
    value, name, pid = queue.get(timeout=60)
    process.join(60)
    print(value, name, pid == process.pid, process.exitcode)
"""


@pytest.mark.slow
def test_children_by_fork_and_spawn(start, script):
    run = start("-n", "2", script(CHILDREN))
    assert run.wait(120) == 0, run.err
    for rank in range(2):
        assert run.log("localhost", rank).decode().splitlines() == ["[4, 9]", "5 __mp_main__ True 0"]


LAST_WORDS = """
import atexit, multiprocessing, os, sys, threading, weakref

released = threading.Event()


class Last:
    def __del__(self):
        os.write(1, b"the object has gone\\n")


kept = Last()
proxy = weakref.proxy(threading.Event())  # of what has gone: torch.compile leaves such ones
handle = open(sys.argv[1] + os.environ["RANK"], "w")
handle.write("never closed")
atexit.register(lambda: print("atexit"))
threading.Thread(target=lambda: (released.wait(30), print("thread"))).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
threading.Timer(0.2, released.set).start()
sys.stdout.write("no newline: ")
print("main", file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ([], "7"),
        pytest.param([], "0", marks=pytest.mark.slow),
        pytest.param(["--no-preload"], "7", marks=pytest.mark.slow),
    ],
)
def test_an_interpreters_end(start, script, tmp_path, mode, code):
    path = script(LAST_WORDS)
    run = start("-n", "1", *mode, path, tmp_path / "ours-", code)
    assert run.wait() == int(code), run.err
    plain = subprocess.run(
        [sys.executable, path, tmp_path / "plain-", code],
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        check=False,
    )
    assert plain.returncode == int(code)
    assert plain.stdout == b"no newline: thread\natexit\nthe object has gone\n"
    assert run.log("localhost", 0) == plain.stdout
    assert run.log("localhost", 0, "err") == plain.stderr == b"main\n"
    assert (tmp_path / "ours-0").read_text() == (tmp_path / "plain-0").read_text() == "never closed"


RANDOM = """
import json, random, uuid
import numpy as np
import torch

free = [
    torch.nn.functional.dropout(torch.ones(64), 0.5).tolist(), torch.rand(2).tolist(), np.random.rand(2).tolist(),
    np.random.default_rng().random(), random.random(), str(uuid.uuid4()), torch.initial_seed(),
]
torch.manual_seed(1)
np.random.seed(1)
random.seed(1)
print(json.dumps({"free": free, "seeded": [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]}))
"""


def test_ranks_draw_their_own_random_numbers(light, start, script):
    path = script(RANDOM)
    run = start(*two_hosts(light), path, env=light.env)
    assert run.wait() == 0, run.err
    found = [json.loads(lines[0]) for lines in lines_of(run)]
    alone = json.loads(subprocess.run([sys.executable, path], capture_output=True, check=True).stdout)
    for number in range(len(alone["free"])):
        drawn = [json.dumps(one["free"][number]) for one in [*found, alone]]
        assert len(set(drawn)) == RANKS + 1, drawn
    assert [one["seeded"] for one in found] == [alone["seeded"]] * RANKS


FACTS = '''"""What a script can see of the interpreter that runs it."""
import dataclasses, inspect, json, os, pickle, signal, sys, threading


@dataclasses.dataclass
class Box:
    size: int = 1


def look():
    return 42


def named(name):
    return name if isinstance(name, str) else name.__name__


number: float = 1.0
print(json.dumps({
    "globals": {name: type(value).__name__ for name, value in sorted(globals().items())},
    "name": __name__, "doc": __doc__, "file": __file__, "annotations": str(__annotations__),
    "fields": str(Box.__annotations__), "source": inspect.getsource(look), "code": look.__code__.co_filename,
    "main": sys.modules["__main__"].__dict__ is globals(), "pickled": pickle.dumps(Box(2)).hex(),
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "flags": str(sys.flags), "cwd": os.getcwd(),
    "path": [entry for entry in sys.path if "dstrain" not in entry],
    "streams": [(s.encoding, s.errors) for s in (sys.stdin, sys.stdout, sys.stderr)], "stdin": sys.stdin.read(),
    "signals": [str(signal.getsignal(n)) for n in
                (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD)],
    "blocked": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "umask": os.umask(0o22),
    "thread": threading.current_thread().name, "threads": threading.active_count(),
    "limits": [sys.getrecursionlimit(), os.nice(0)], "builtins": __builtins__.len([1]),
    "variables": {n: v for n, v in os.environ.items() if n.startswith(("OPENBLAS", "MKL", "PYTORCH", "CUDA"))},
}))
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("relative", []), ("link", []), ("module", []), ("zip", []), ("relative", ["--no-preload"])],
)
def test_looks_like_a_plain_interpreter(start, script, tmp_path, kind, mode):
    path = script(FACTS)
    words = {"relative": ["job.py"], "link": ["folder/link.py"], "module": ["-m", "job"]}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.py").symlink_to(path)
    with zipfile.ZipFile(tmp_path / "job.pyz", "w") as archive:
        archive.writestr("__main__.py", FACTS.replace("inspect.getsource(look)", "0"))
    words["zip"] = ["job.pyz"]
    environment = {"OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    run = start("-n", "1", "--pass-env", "*", *mode, *words[kind], "a b", "*", env=environment)
    assert run.wait() == 0, run.err
    plain = subprocess.run(
        [sys.executable, *words[kind], "a b", "*"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    found, expected = json.loads(run.log("localhost", 0)), json.loads(plain.stdout)
    assert found == expected


THREADS = """
import json, os
import numpy as np
import torch

def threads():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("Threads")))

before = threads()
square = np.ones((600, 600))
square @ square
after_numpy = threads()
torch.ones(600, 600) @ torch.ones(600, 600)
print(json.dumps([before, after_numpy, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: every count is 1")
def test_numbers_of_threads_are_the_environments(start, script):
    path = script(THREADS)
    run = start("-n", "1", "--env", "OMP_NUM_THREADS=2", path)
    assert run.wait() == 0, run.err
    assert json.loads(run.log("localhost", 0)) == [1, 2, 2, "2"]
    run = start("-n", len(os.sched_getaffinity(0)), path, folder=path.parent / "default")
    assert run.wait() == 0, run.err
    assert json.loads(run.log("localhost", 0)) == [1, 1, 1, "1"]


def test_interrupt_and_broken_pipe_reach_a_program(start):
    """What the warden ignores is not ignored in what it starts."""
    body = "trap 'exit 41' INT; trap 'exit 42' HUP; kill -INT $$; exit 1"
    run = start("-n", "1", "--no-python", "sh", "-c", body)
    assert run.wait() == 41, run.err
