"""A training run: kills, full disks and bad data cost nothing but time, and many processes do what one does."""

import faulthandler
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_learner import NAMES

import latentmem
from latentmem import container
from latentmem.core.memory import Memory
from latentmem.decoder import adapters as pairs
from latentmem.files import adapters as files
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Prompts
from latentmem.model.reader import Score
from latentmem.testing import byte_tokenizer, tiny_model
from latentmem.train import build, checkpoint, loop
from latentmem.train.config import OBJECTIVES, Config, Lora, PoolSettings, Source, Steps, Texts, Watch
from latentmem.train.data import Documents
from latentmem.train.episodes import Episodes
from latentmem.train.learner import Learner
from latentmem.train.log import Log, lines
from latentmem.train.loop import RESULT, Run

TOTAL = 3
KEPT = ("Corin", "Delphi")  # titles of the probe


def sentence(i, j):
    """A short invented fact; no two are alike."""
    return f"{NAMES[i % 12]} of Lower Veld built mill {i}.{j} for {NAMES[(i + j) % 12]} in Veld."


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Invented articles, and paragraphs with two questions each."""
    folder = tmp_path_factory.mktemp("data")
    articles = [{"title": NAMES[i % 12], "text": " ".join(sentence(i, j) for j in range(6))} for i in range(40)]
    asked = [
        {
            "title": NAMES[i % 12],
            "context": sentence(100 + i, 0),
            "question": f"Who built mill {100 + i}.0, {word}?",
            "answers": {"text": [NAMES[(100 + i) % 12]]},
        }
        for i in range(36)
        for word in ("tell me", "please")
    ]
    text = write_rows(folder / "text.jsonl", articles)
    questions = write_rows(folder / "questions.jsonl", asked)
    return Source(str(text)), Source(str(questions), "questions")


def settings(folder, data):
    return Config(
        model=str(folder),
        dtype="float32",
        memory=PoolSettings(N=256, K=128),
        lora=Lora(r=2, alpha=4.0, target_modules=("q_proj", "v_proj")),
        objectives=dict.fromkeys(OBJECTIVES, 1.0),
        data=data,
        texts=Texts(at_once=2, shortest=20, longest=128, rows=3, continuation=24),
        steps=Steps(total=TOTAL, lr=1e-2, warmup=2),
        watch=Watch(checkpoint=2, probe=0, tensorboard=False),
    )


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw", lambda *_: None)
        yield


@pytest.fixture
def config(tiny_folder, data):
    return settings(tiny_folder, data)


def state(out, world=1):
    """All that a finished run has left, but for the time that it took: tensors, and the rest."""
    folder = checkpoint.newest(out)
    tensors, header = container.read(folder / checkpoint.STATE)
    facts = json.loads(header[checkpoint.KEY])
    log = lines(out / "log.jsonl")
    for part in (facts, *log):
        part.pop("seconds", None)
    pools = [Memory.load(folder / f"pool-{rank}.safetensors") for rank in range(world)]
    result = {f"result.{name}": tensor for name, tensor in load_file(out / RESULT).items()}
    return {**tensors, **result}, (folder.name, facts, log, [(pool.M, pool.version) for pool in pools])


def same(one, other):
    """To the bit."""
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in one[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Gives the state of a run that was never stopped."""
    done = {}

    def made(config):
        if repr(config) not in done:
            out = tmp_path_factory.mktemp("straight")
            Run(config, out).train()
            done[repr(config)] = state(out)
        return done[repr(config)]

    return made


# --- going on -------------------------------------------------------------------------------------------------------

FORMS = {
    "exact": {},
    "compressed, recomputed, with dropout": {
        "memory": PoolSettings(N=64, K=32, compression=4),
        "lora": Lora(r=2, alpha=4.0, dropout=0.2, target_modules=("q_proj", "v_proj")),
        "checkpointing": True,
    },
    "paper, full from birth, two episodes": {
        "memory": PoolSettings(preset="paper", N=48, K=16, birth="full"),
        "steps": Steps(total=TOTAL, lr=1e-2, warmup=2, episodes=2),
    },
    "paper, begun anew, with dropout": {
        "memory": PoolSettings(preset="paper", N=48, K=16, birth="full", restarts=(2,)),
        "lora": Lora(r=2, alpha=4.0, dropout=0.2, target_modules=("q_proj", "v_proj")),
    },
    "with the live curve": {
        "watch": Watch(checkpoint=2, probe=2, titles=KEPT, texts=2, ages=(0, 1), tensorboard=False),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_stops_after_every_step_is_the_run_that_never_stops(form, config, straight, tmp_path):
    config = replace(config, **FORMS[form])
    for step in range(1, TOTAL + 1):
        run = Run(config, tmp_path / "stopped")
        run.train(stop=step)
        assert run.step == step and (tmp_path / "stopped" / f"checkpoint-{step}").is_dir()
    same(state(tmp_path / "stopped"), straight(config))
    log = straight(config)[1][2]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, TOTAL + 1))
    assert [row["step"] for row in log if "curve" in row] == ([0, 2, 3] if "curve" in form else [])


@pytest.mark.parametrize(("birth", "updates"), [("empty", 2), ("full", 2 + 4)])
def test_a_pool_is_begun_anew(birth, updates, config, tmp_path):
    """Two texts are written per step, and four fill a pool of 48 slots, 16 an update, two by two."""
    memory = PoolSettings(preset="paper", N=48, K=16, birth=birth, restarts=(1, 2))
    config = replace(config, memory=memory, objectives={"questions": 1.0}, steps=Steps(total=4, lr=1e-2, warmup=2))
    run = Run(config, tmp_path / "run")
    seen = []
    for step in range(1, 5):
        run.train(stop=step)
        seen.append(run.pool.updates)
    assert seen == [updates, updates, updates, updates + 2]


def killed_before_the_config_has_its_name(kill):
    replaced = Path.replace
    Path.replace = lambda self, to: kill() if to.name == "config.json" else replaced(self, to)


def killed_in_a_step(kill):
    forward, passes = Learner.forward, []

    def third(self, *args):
        passes.append(1)
        return kill() if len(passes) == 3 else forward(self, *args)

    Learner.forward = third


def killed_while_it_writes_a_checkpoint(kill):
    write = container.write

    def second(path, *content, **options):
        write(path, *content, **options)
        if "checkpoint-3" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            kill()

    container.write = second


def killed_before_the_checkpoint_has_its_name(kill):
    replaced = Path.replace
    Path.replace = lambda self, to: kill() if to.name == "checkpoint-3" else replaced(self, to)


def killed_before_the_old_checkpoint_is_gone(kill):
    remove = shutil.rmtree

    def late(path, **options):
        if path.name == "checkpoint-2" and path.is_dir():
            (path / "pool-0.safetensors").unlink()  # half of it is gone
            kill()
        remove(path, **options)

    shutil.rmtree = late


def killed_while_it_writes_the_log(kill):
    add = Log.add

    def third(self, row):
        add(self, row)
        if row["step"] == 3:
            self._file.write(json.dumps(row)[:30])
            self._file.flush()
            kill()

    Log.add = third


def run_until(moment, config, out):
    loop.draw = lambda *_: None
    moment(lambda: os.kill(os.getpid(), signal.SIGKILL))
    Run(config, out).train()


MOMENTS = (
    killed_before_the_config_has_its_name,
    killed_in_a_step,
    killed_while_it_writes_a_checkpoint,
    killed_before_the_checkpoint_has_its_name,
    killed_before_the_old_checkpoint_is_gone,
    killed_while_it_writes_the_log,
)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(config, straight, tmp_path):
    outs = [tmp_path / moment.__name__ for moment in MOMENTS]
    jobs = [(run_until, moment, config, out) for moment, out in zip(MOMENTS, outs, strict=True)]
    assert together(jobs) == [-9] * len(jobs)
    for moment, out in zip(MOMENTS, outs, strict=True):
        left = {path.name for path in out.glob("*checkpoint-*")}
        assert (out / "config.json").is_file() == (moment is not killed_before_the_config_has_its_name)
        assert left == {
            killed_before_the_config_has_its_name: set(),
            killed_in_a_step: {"checkpoint-2"},
            killed_before_the_old_checkpoint_is_gone: {"checkpoint-2", "checkpoint-3"},
            killed_while_it_writes_the_log: {"checkpoint-2"},
        }.get(moment, {"checkpoint-2", ".checkpoint-3"}), moment.__name__
        assert not (out / RESULT).exists()
        Run(config, out).train()
        same(state(out), straight(config))


# --- what it writes down --------------------------------------------------------------------------------------------

SHAPES = {"exact": PoolSettings(N=256, K=128), "paper": PoolSettings(preset="paper", N=48, K=16)}
HITS = {(0, 0): [True], (0, 1): [True, False], (2, 0): [False, False, False], (2, 1): [True, False, False, False]}


@pytest.mark.parametrize("preset", SHAPES)
def test_the_live_curve_is_the_mean_of_what_is_hit_at_each_age(preset, config, tmp_path, monkeypatch):
    """What is hit is made up of the age that is counted here, from what was written, and the number of the question."""
    watch = Watch(probe=1, titles=KEPT, texts=3, ages=(0, 2), tensorboard=False)
    probe = Run(replace(config, memory=SHAPES[preset], watch=watch), tmp_path).probe
    prompts = probe.llm.prompts_or_raise()
    texts = {tuple(prompts.written(d.text)): d for d in probe.asked}
    questions = {
        tuple(prompts.question(question, bare=True)): (d, j)
        for d in probe.asked
        for j, (question, _) in enumerate(d.questions)
    }
    assert {d.title for d in probe.asked} <= set(KEPT) and len(texts) == 3 and len(questions) == 6
    written, asked, write = [], [], MemoryModel.write_ids

    def write_ids(self, memory, ids, *source):
        written.append(texts.get(tuple(ids)))
        assert self.adapters is probe.llm.adapters and memory.preset == preset
        assert written[-1] is None or memory.M == memory.N
        return write(self, memory, ids, *source)

    def score_rows(self, context, ids, answers):
        scores = []
        for prompt, answer in zip(ids, answers, strict=True):
            d, j = questions[tuple(prompt)]
            assert tuple(answer) == tuple(prompts.answer(*d.questions[j]))
            age = len(written) - 1 - max(i for i, other in enumerate(written) if other is d)
            asked.append((d.id, j, age))
            hits = torch.tensor(HITS[age, j])
            scores.append(Score(torch.zeros(len(hits)), hits))
        return scores

    monkeypatch.setattr(MemoryModel, "write_ids", write_ids)
    monkeypatch.setattr(MemoryModel, "score_rows", score_rows)
    assert probe.run() == [{"age": 0, "accuracy": 0.75, "n": 6}, {"age": 2, "accuracy": 0.125, "n": 6}]
    assert sorted(asked) == sorted((d.id, j, age) for d in probe.asked for j in (0, 1) for age in (0, 2))
    first = next(i for i, d in enumerate(written) if d)
    assert written[first : first + 3] == probe.asked and first * SHAPES[preset].K >= SHAPES[preset].N


@pytest.mark.parametrize("stops", [(), (1,), (2,)], ids=["straight", "after a step", "after a checkpoint"])
def test_tensorboard_has_the_numbers_of_the_log(stops, config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, watch=Watch(checkpoint=2, probe=2, titles=KEPT, texts=2, ages=(0, 1)))
    for stop in stops:
        Run(config, tmp_path).train(stop=stop)
        with Log(tmp_path, stop, True) as log:
            log.add({"step": stop + 1, "loss": 99.0})  # and then it was killed
    Run(config, tmp_path).train()
    log, board = lines(tmp_path / "log.jsonl"), EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()

    def points(name):
        return [(point.step, point.value) for point in board.Scalars(name)]

    for name in ("loss", "accuracy", "norm", "lr", "tokens"):
        logged = [(row["step"], pytest.approx(row[name])) for row in log if "loss" in row]
        assert len(logged) == TOTAL and points(f"train/{name}") == logged
    for i, age in enumerate((0, 1)):
        logged = [(row["step"], pytest.approx(row["curve"][i]["accuracy"])) for row in log if "curve" in row]
        assert len(logged) == 3 and points(f"retention/{age}") == logged


# --- processes ------------------------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")  # imports once, and forks before anything has run
PROCESSES.set_forkserver_preload(["latentmem.train.loop", "latentmem.testing"])


def _do(out, seconds, job, *args):
    stacks = out.with_suffix(".stacks").open("w")  # open until the process ends: of a crash, and of a hang
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(seconds, file=stacks)
    try:
        job(*args)
    except BaseException:  # noqa: BLE001 - told by the process that waits
        Path(out).write_text(traceback.format_exc())
        raise SystemExit(1) from None


def together(jobs, seconds=900):
    """Do functions with arguments in a process each; their exit codes, 0 for all that are done."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(len(jobs))]
        processes = [
            PROCESSES.Process(target=_do, args=(out, 0.9 * seconds, *job)) for out, job in zip(outs, jobs, strict=True)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            ended = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [path.read_text() for path in sorted(Path(folder).iterdir())]
        assert not any(said), f"exit codes {ended}, None: still at work after {seconds} s\n" + "\n".join(said)
        return ended


def apart(rank, world, port, *job):
    """What a process is told by `torchrun`, and then its job."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    loop.draw = lambda *_: None
    job[0](*job[1:])
    torch.distributed.destroy_process_group()


def in_two(*job):
    with socket.socket() as taken:  # bound and not listened at: nobody else is given this port meanwhile
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert together([(apart, rank, 2, port, *job) for rank in range(2)]) == [0, 0]


def forgetful(config, out):
    """Train with a pool that stays empty: the processes' own pools would differ from one that has seen all texts.

    And what "recall" asks for is what two processes would have written.
    """
    remember, Run._remember = Run._remember, lambda self, outcome: None
    before, Episodes._before = Episodes._before, lambda self, number: number - 2
    try:
        run = Run(config, out)
        assert run.sharded == (config.sharding == "fsdp2" and run.world > 1)
        run.train()
    finally:
        Run._remember, Episodes._before = remember, before
    return run


def all_forgetful(configs, out):
    for name, config in configs.items():
        forgetful(config, out / name)


def straight_and_stopped(configs, out):
    for name, config in configs.items():
        Run(config, out / name / "straight").train()
        Run(config, out / name / "stopped").train(stop=1)
        Run(config, out / name / "stopped").train()


SHARDED = {"sharding": "fsdp2", "objectives": {name: 1.0 for name in OBJECTIVES if name != "chat"}}
WAYS = {
    "data parallel": {},
    "sharded": SHARDED,
    "sharded paper in bfloat16, recomputed": {
        **SHARDED,
        "memory": PoolSettings(preset="paper", N=48, K=16),
        "dtype": "bfloat16",
        "checkpointing": True,
    },
}


def test_two_processes_learn_what_one_learns_from_as_many_episodes(config, tmp_path):
    ways = {name: replace(config, **changes) for name, changes in WAYS.items()}
    in_two(all_forgetful, ways, tmp_path / "two")
    for name, two in ways.items():
        one = replace(two, steps=replace(two.steps, episodes=2), sharding="none")
        run = forgetful(one, tmp_path / "one" / name)
        passes = [run.learner.passes(run.episodes[number]) for number in range(2 * TOTAL)]
        unequal = [mine != other for mine, other in zip(passes[::2], passes[1::2], strict=True)]
        assert any(unequal)  # where weights are sharded, a process has to wait for what the other does
        (ours, facts), (theirs, others) = (state(tmp_path / part / name) for part in ("two", "one"))
        assert ours.keys() == theirs.keys()
        gaps = {n: (tensor - theirs[n]).abs().max().item() for n, tensor in ours.items() if "result." not in n}
        assert max(gaps.values()) < (1e-6 if name == "data parallel" else 1e-5)
        for mine, other in zip(facts[2], others[2], strict=True):
            assert mine["tokens"] == other["tokens"] and abs(mine["loss"] - other["loss"]) < 2e-5
            assert abs(mine["norm"] - other["norm"]) < 2e-4


def test_two_processes_that_were_stopped_go_on_as_if_they_had_not(config, tmp_path):
    ways = {name: replace(config, **WAYS[name]) for name in ("data parallel", "sharded")}
    ways["data parallel"] = replace(ways["data parallel"], memory=PoolSettings(N=256, K=128, birth="full"))
    in_two(straight_and_stopped, ways, tmp_path)
    for name in ways:
        same(*(state(tmp_path / name / part, world=2) for part in ("stopped", "straight")))
        pairs.load_into(tiny_model(), *files.load(tmp_path / name / "straight" / RESULT))  # all of it is there


def test_a_rehearsal_counts_what_the_optimizer_will_hold(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_peak", lambda: 1000)
    facts, run = loop.rehearse(config), Run(config, tmp_path / "run")
    run.train()
    held = {p: sum(s.nbytes for s in state.values() if s.ndim) for p, state in run.optimizer.state.items()}
    assert held and all(n == 2 * 4 * p.numel() for p, n in held.items())
    assert facts["bytes"] == 1000 + 2 * 4 * sum(p.numel() for p in run.parameters.values())


def test_processes_share_the_episodes_of_a_step(config):
    one, two = (replace(config, steps=Steps(total=30, episodes=each)) for each in (2, 1))

    def numbers(config, rank, world):
        run = object.__new__(Run)
        run.config, run.rank, run.world = config, rank, world
        return [run._numbers(step) for step in range(3)]

    assert numbers(one, 0, 1) == [[0, 1], [2, 3], [4, 5]]
    assert [numbers(two, rank, 2) for rank in range(2)] == [[[0], [2], [4]], [[1], [3], [5]]]
    alone, shared = episodes_of(one), episodes_of(two, world=2)
    for number in range(60):
        mine, other = alone[number], shared[number]
        own = {"rows": mine.rows, "seed": mine.seed} if mine.objective in ("recall", "unknown") else {}
        assert mine == replace(other, **own)
    # A process can ask only for what it wrote itself.
    assert any(alone[number].rows != shared[number].rows for number in range(60))


def test_the_order_of_the_data_depends_on_the_seed_alone(config, data):
    def texts(config):
        return [episodes_of(config)[number] for number in range(20)]

    other = replace(config, lora=Lora(r=5), steps=replace(config.steps, lr=0.5), dtype="bfloat16", checkpointing=True)
    assert texts(config) == texts(other) != texts(replace(config, seed=1))
    documents = Documents(data[0], seed=3)
    rounds = [[documents[i].id for i in range(40 * n, 40 * n + 40)] for n in range(3)]
    assert len({tuple(sorted(names)) for names in rounds}) == 1 and len({tuple(names) for names in rounds}) == 3
    assert rounds[1] == [Documents(data[0], seed=3)[i].id for i in range(40, 80)]


def episodes_of(config, world=1):
    sources = [Documents(source, config.seed + i) for i, source in enumerate(config.data)]
    return Episodes(config, Prompts(byte_tokenizer()), sources, world=world)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def changed(change):
    """`Learner.forward` with another loss in the third pass."""
    forward, passes = Learner.forward, []

    def third(self, *args):
        outcome = forward(self, *args)
        passes.append(1)
        return replace(outcome, loss=change(outcome.loss)) if len(passes) == 3 else outcome

    return third


FAULTS = {
    "no number": (lambda loss: loss * float("nan"), "the loss is nan"),
    "far too high": (lambda loss: loss * 100, "the loss is [0-9]{3}"),
    "without a gradient's norm": (lambda loss: loss + 0 * (loss - loss.detach()).abs().pow(0.5), "norm nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_that_makes_no_sense_stops_the_run_before_the_step(fault, config, straight, tmp_path, monkeypatch):
    config = replace(config, objectives={"questions": 1.0}, steps=replace(config.steps, patience=2))
    row = straight(config)[1][2][2]
    run, (change, words) = Run(config, tmp_path / "run"), FAULTS[fault]
    seen = []
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"step 3: .*{words}.* checkpoint") as raised:
        patch.setattr(Learner, "forward", changed(change))
        run.train(lambda *_: seen.append(copied(run)))
    for name in (*row["objectives"], *row["texts"], str(tmp_path / "run")):
        assert name in str(raised.value)
    assert run.step == len(seen) == 2
    assert all(torch.equal(seen[-1][name], weight) for name, weight in copied(run).items())
    Run(config, tmp_path / "run").train()
    same(state(tmp_path / "run"), straight(config))


def copied(run):
    return {name: weight.detach().clone() for name, weight in run.parameters.items()}


def test_a_high_loss_is_borne_while_its_objective_is_new(config, tmp_path, monkeypatch):
    # Losses of objectives differ tenfold: what is high for one is usual for another.
    monkeypatch.setattr(Learner, "forward", changed(lambda loss: loss * 100))
    Run(replace(config, steps=replace(config.steps, patience=2)), tmp_path / "run").train()
    log = lines(tmp_path / "run" / "log.jsonl")
    assert log[2]["loss"] > 100 and log[2]["objectives"] != log[1]["objectives"]


def test_the_factor_of_unrelated_is_on_the_gradient_of_divergences_alone(config, tmp_path):
    norms = {}
    for name in ("unrelated", "chat", "everyday", "recall"):
        for factor in (1.0, 3.0):
            some = replace(config, objectives={name: 1.0}, steps=replace(config.steps, total=1, unrelated=factor))
            Run(some, tmp_path / f"{name} {factor}").train()
            (row,) = lines(tmp_path / f"{name} {factor}" / "log.jsonl")
            norms[name, factor] = row["norm"], row["loss"]
    for name in ("unrelated", "chat", "everyday"):
        (one, loss), (three, same_loss) = norms[name, 1.0], norms[name, 3.0]
        assert three == pytest.approx(3 * one, rel=1e-3) and one > 0 and loss == same_loss
    assert norms["recall", 1.0] == norms["recall", 3.0]


def test_a_small_loss_may_grow_manyfold(config, tmp_path, monkeypatch):
    # A divergence from what the untrained model says begins near 0, and is no error when it is a hundredth.
    forward = Learner.forward
    monkeypatch.setattr(Learner, "forward", lambda *args: scaled(forward(*args), 1e-5))
    monkeypatch.setattr(Learner, "forward", changed(lambda loss: loss * 1000))
    steps = replace(config.steps, patience=1)
    Run(replace(config, objectives={"questions": 1.0}, steps=steps), tmp_path / "run").train()
    log = lines(tmp_path / "run" / "log.jsonl")
    assert log[2]["loss"] > 100 * log[1]["loss"]


def scaled(outcome, factor):
    return replace(outcome, loss=outcome.loss * factor)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("what", "key"), [("the checkpoint of step 3", checkpoint.KEY), ("the result", files.KEY)])
def test_a_full_disk_keeps_the_checkpoint_before(what, key, config, straight, tmp_path, monkeypatch):
    parts = container._parts

    def disk(tensors, header):
        if key in header:
            yield b"a part"
            raise FULL
        yield from parts(tensors, header)

    out = tmp_path / "run"
    Run(config, out).train(stop=2)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=f"{what} could not be .*No space left.*make room"),
    ):
        patch.setattr(container, "_parts", disk)
        Run(config, out).train()
    assert not (out / RESULT).exists()
    assert checkpoint.newest(out).name == ("checkpoint-3" if what == "the result" else "checkpoint-2")
    Run(config, out).train()
    same(state(out), straight(config))


@pytest.mark.parametrize("name", ["state.safetensors", "pool-0.safetensors"])
def test_a_damaged_checkpoint_is_named(name, config, tmp_path):
    Run(config, tmp_path / "run").train(stop=1)
    file = checkpoint.newest(tmp_path / "run") / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Run(config, tmp_path / "run").train()


def test_a_full_disk_under_the_log_is_said(tmp_path):
    with Log(tmp_path, 0, False) as log:
        log._file = SimpleNamespace(write=Mock(side_effect=FULL), close=log._file.close)
        with pytest.raises(ValueError, match="the log could not be written: No space left"):
            log.add({"step": 1})


BAD = {
    "no gzip": (b"these are no rows", "bad.jsonl.gz can not be read after line 0"),
    "cut off": (gzip.compress(b'{"text": "one"}\n' * 4000)[:60], "bad.jsonl.gz can not be read after line"),
    "damaged": (b"", "bad.jsonl.gz can not be read after line"),
    "no JSON": (gzip.compress(b'{"text": "one"}\n{"text": '), "bad.jsonl.gz can not be read after line 2"),
    "no object": (gzip.compress(b'{"text": "one"}\n[1, 2]\n'), "after line 2: a JSON object was expected"),
    "no UTF-8": (gzip.compress(b'{"text": "\xff\xfe"}\n'), "bad.jsonl.gz can not be read after line 0"),
    "no text": (
        gzip.compress(b'{"text": "one"}\n{"title": "two", "words": "three"}\n'),
        "row 2 .*'text'.*title, words",
    ),
    "a number": (gzip.compress(b'{"text": 7}\n'), "row 1 .*'text' with a text"),
    "only empty texts": (gzip.compress(b'{"text": "  "}\n' * 3), "no text in it that may be trained on"),
    "nothing": (gzip.compress(b""), "no text in it that may be trained on"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_named(what, config, tmp_path):
    content, words = BAD[what]
    if what == "damaged":
        whole = gzip.compress(bytes(range(256)) * 40)
        content = whole[:40] + bytes(40) + whole[80:]
    (tmp_path / "bad.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Run(replace(config, data=(Source(str(tmp_path / "bad.jsonl.gz")),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["missing.jsonl", "some/missing/folder", "./missing.jsonl.gz"])
def test_data_that_is_not_there_is_named(path, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTMEM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=path):
        Run(replace(config, data=(Source(path),)), tmp_path / "run")


def test_questions_without_a_context_are_named(config, tmp_path):
    file = write_rows(tmp_path / "asked.jsonl", [{"question": "Who?", "answers": {"text": ["Quill"]}}])
    with pytest.raises(ValueError, match=r"row 1 of .*asked.jsonl lacks context.*question, answers"):
        Run(replace(config, data=(Source(str(file), "questions"),)), tmp_path / "run")


def test_empty_documents_are_passed_over(tmp_path):
    file = write_rows(tmp_path / "some.jsonl", [{"text": text} for text in ("", "one", " \n ", "two")])
    assert sorted(document.text for document in Documents(Source(str(file)), 0).all) == ["one", "two"]
    (tmp_path / "folder").mkdir()
    for name, text in (("a.txt", ""), ("b.md", "words")):
        (tmp_path / "folder" / name).write_text(text)
    assert [document.text for document in Documents(Source(str(tmp_path / "folder")), 0).all] == ["words"]


def test_a_folder_belongs_to_one_run(config, tmp_path):
    out = tmp_path / "run"
    Run(config, out).train(stop=1)
    with pytest.raises(ValueError, match=r"another run with other settings|other settings \(seed, steps\)"):
        Run(replace(config, seed=1, steps=replace(config.steps, lr=0.5)), out).train()
    with pytest.raises(ValueError, match="another process trains"), loop.FileLock(out / ".lock"):
        Run(config, out).train()
    file = checkpoint.newest(out) / checkpoint.STATE
    tensors, header = container.read(file)
    container.write(file, tensors, {checkpoint.KEY: json.dumps({**json.loads(header[checkpoint.KEY]), "world": 4})})
    with pytest.raises(ValueError, match="trained by 4 processes, and these are 1"):
        Run(config, out).train()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        Run(config, tmp_path / "other").train()
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["exact", "paper"])
def trained(request, tiny_folder, data, tmp_path_factory):
    """A run that is done, and its folder."""
    config = settings(tiny_folder, data)
    if request.param == "paper":
        config = replace(config, memory=PoolSettings(preset="paper", N=48, K=16))
    run = Run(config, tmp_path_factory.mktemp("runs") / "out")
    run.train()
    return run


def test_the_result_is_what_was_trained(trained):
    tensors, facts = files.load(trained.out / RESULT)
    own = {name.removeprefix("base."): weight for name, weight in trained.parameters.items()}
    assert tensors.keys() == own.keys() and ("bos" in own) == (trained.config.memory.preset == "paper")
    assert all(torch.equal(tensor, own[name].bfloat16()) for name, tensor in tensors.items())
    assert facts["model"] == trained.llm.identity and facts["steps"] == TOTAL and facts["tokens"] > 0
    plain = tiny_model()
    put = pairs.load_into(plain, tensors, facts)
    assert all(torch.equal(weight.bfloat16(), tensors[name]) for name, weight in pairs.weights(plain).items())
    assert put.identity == trained.llm.adapters.identity


def test_saving_and_loading_give_the_same(trained, tmp_path):
    tensors, facts = files.load(trained.out / RESULT)
    files.save(tmp_path / "again", tensors, facts)
    again, told = files.load(tmp_path / "again")
    assert told == facts and again.keys() == tensors.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_trained_model_loads_and_remembers(trained, tiny_folder):
    llm = latentmem.load(str(tiny_folder), adapters=str(trained.out), device="cpu")
    assert llm.adapters.identity == trained.llm.adapters.identity
    memory = llm.empty(form="exact")
    assert (memory.N, memory.preset) == (trained.config.memory.N, trained.config.memory.preset)
    memory = llm.write(memory, "Quill of Lower Veld built mill 7.")
    assert llm.ask(memory, "Who built mill 7?", max_new_tokens=3) is not None
    if llm.trained:
        assert torch.equal(llm.trained.bos, trained.learner.bos.bfloat16().float()) and memory.M == 48
    plain = latentmem.load(str(tiny_folder), adapters=None, device="cpu")
    with torch.no_grad():
        ids = torch.tensor([[7, 8, 9]])
        assert torch.equal(llm.base(input_ids=ids).logits, plain.base(input_ids=ids).logits)


def test_adapters_of_another_model_are_refused(trained, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"belong to {trained.llm.name}"):
        latentmem.load(str(tmp_path / "other"), adapters=str(trained.out / RESULT), device="cpu")


def without(tensors, name):
    return {n: tensor for n, tensor in tensors.items() if n != name}


@pytest.mark.parametrize("fault", ["missing", "unknown", "of another shape"])
def test_adapters_that_do_not_fit_are_refused_by_name(fault, trained):
    tensors, facts = files.load(trained.out / RESULT)
    name = "model.layers.1.self_attn.q_proj.lora_A.write.weight"
    if fault == "unknown":
        name, tensors = name.replace(".1.", ".7."), {**tensors, name.replace(".1.", ".7."): tensors[name]}
    else:
        tensors = without(tensors, name) | ({} if fault == "missing" else {name: tensors[name][:1]})
    with pytest.raises(ValueError, match=f"do not fit the model: {name}[.]$"):
        pairs.load_into(tiny_model(), tensors, facts)


def test_a_file_that_holds_no_adapters_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "others.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="holds no adapters of latentmem"):
        files.load(tmp_path / "others.safetensors")
    for name in ("text", "missing"):
        with pytest.raises(ValueError, match="no adapters can be read there"):
            files.load(tmp_path / name)


# --- from trained adapters ------------------------------------------------------------------------------------------


@pytest.fixture
def onward(trained):
    """A config that goes on from what is trained, in one step with questions."""
    more = {"objectives": {"questions": 1.0}, "steps": replace(trained.config.steps, total=1), "seed": 1}
    return replace(trained.config, adapters=str(trained.out / RESULT), **more)


def test_a_run_begins_with_trained_adapters(trained, onward, tmp_path):
    run, fresh = Run(onward, tmp_path / "on"), Run(replace(onward, adapters=None), tmp_path / "fresh")
    tensors, facts = files.load(trained.out / RESULT)
    assert facts["from"] == ""
    own = {name.removeprefix("base."): weight for name, weight in run.parameters.items()}
    assert own.keys() == tensors.keys() and all(weight.dtype == torch.float32 for weight in own.values())
    assert all(torch.equal(weight, tensors[name].float()) for name, weight in own.items())

    llm = latentmem.load(onward.model, adapters=onward.adapters, device="cpu")
    more = {name: tensors[name].float() for name in ("bos", "mark") if name in tensors}
    theirs = Learner(llm, onward.memory, **more)(run.episodes[0], run.pool).loss.item()
    for one in (run, fresh):
        one.train()
    first, other = (lines(one.out / "log.jsonl")[0]["loss"] for one in (run, fresh))
    assert first == pytest.approx(theirs, abs=1e-4) and abs(first - other) > 1e-3


def test_the_result_names_the_adapters_that_it_came_from(trained, onward, tmp_path):
    config = replace(onward, steps=replace(onward.steps, total=2))
    Run(config, tmp_path / "on").train(stop=1)
    Run(config, tmp_path / "on").train()
    tensors, facts = files.load(tmp_path / "on" / RESULT)
    assert facts["from"] == trained.llm.adapters.identity and facts["steps"] == 2
    origin, _ = files.load(trained.out / RESULT)
    assert not any(torch.equal(tensors[name], origin[name]) for name in tensors if "lora_B.read" in name)


def test_adapters_of_the_models_own_are_found(trained, onward, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = replace(onward, model=str(folder), adapters="auto")
    with pytest.raises(ValueError, match=r"adapters: 'auto', and .*model comes with none"):
        build.model_of(config, torch.device("cpu"))
    shutil.copy(trained.out / RESULT, folder)
    assert build.model_of(config, torch.device("cpu")).adapters.identity == trained.llm.adapters.identity


@pytest.mark.parametrize(("key", "other"), [("r", 3), ("alpha", 8.0), ("target_modules", ("q_proj",))])
def test_adapters_of_another_shape_are_refused(key, other, onward):
    with pytest.raises(ValueError, match=r"lora \(r, alpha, target_modules\) must be as in .*: \[2, 4\.0, .*\], got"):
        build.model_of(replace(onward, lora=replace(onward.lora, **{key: other})), torch.device("cpu"))


def test_adapters_of_the_other_preset_are_refused(onward):
    other = PoolSettings(preset="paper", N=48, K=16) if onward.memory.preset == "exact" else PoolSettings(N=256, K=128)
    with pytest.raises(ValueError, match=f"memory.preset is '{other.preset}', and .* are of the other one"):
        build.model_of(replace(onward, memory=other), torch.device("cpu"))


def test_adapters_that_are_not_there_are_named(onward, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*lost\.safetensors"):
        Run(replace(onward, adapters=str(tmp_path / "lost.safetensors")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_writing_learns_at_its_own_share_of_the_rate(config, tmp_path):
    config = replace(config, objectives={"questions": 1.0}, steps=replace(config.steps, write=0.1))
    run = Run(config, tmp_path)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    run._one_step()
    moved = {"read": 0.0, "write": 0.0}
    for name, p in run.parameters.items():
        kind = "read" if ".read." in name else "write"
        moved[kind] = max(moved[kind], (p.detach() - before[name]).abs().max().item())
    step = build.rate(config, 0)  # Adam's first step is the rate itself
    assert moved == {"read": pytest.approx(step, rel=1e-3), "write": pytest.approx(0.1 * step, rel=1e-3)}
