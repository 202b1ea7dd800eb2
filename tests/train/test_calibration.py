"""`latentmem calibrate`: which texts fill which memory, runs that stop and go on, what is refused, the command line."""

import gzip
import inspect
import json

import pytest
import torch
from typer.testing import CliRunner

import latentmem
from latentmem import cli
from latentmem.coding.coder import Coder
from latentmem.errors import DamagedError, OtherModelError
from latentmem.testing import byte_tokenizer, tiny_model
from latentmem.train import calibrate as calibrating
from latentmem.train import calibration, pieces

SLOTS = 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(calibration, "SLOTS", SLOTS)


def model_of(seed=0):
    return latentmem.MemoryModel(tiny_model(seed=seed), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def llm():
    return model_of()


@pytest.fixture
def files(tmp_path):
    rows = [json.dumps({"text": f"The mill {i} of Veld was built by Tessel {i} for Quill {i}."}) for i in range(40)]
    (tmp_path / "mills.jsonl").write_text("\n".join(rows))
    with gzip.open(tmp_path / "ships.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"Ship {i} lies in harbour {i * 7 % 13}.\n"}) + "\n" for i in range(40))
    (tmp_path / "notes.txt").write_text("".join(f"{i}: a note of one line, no longer than that\n" for i in range(60)))
    return [tmp_path / name for name in ("mills.jsonl", "ships.jsonl.gz", "notes.txt")]


def stop_after(memories):
    """A progress that presses Ctrl-C once so many memories are filled."""

    def progress(done, total):
        if done == memories * SLOTS:
            raise KeyboardInterrupt

    return progress


# --- texts ------------------------------------------------------------------------------------------------------------


def told(llm, files, count, slots=SLOTS):
    notes, stream = [], pieces.fillings(llm, files, slots, lambda sentence: notes.append(sentence))
    return [next(stream) for _ in range(count)], notes


def words(filling):
    return bytes((torch.cat(filling[0]) - 4).clamp(min=0).tolist())


def test_files_take_turns(llm, files):
    taken, notes = told(llm, files, 6)
    assert all(sum(map(len, texts)) == SLOTS and len(after) >= pieces.SHORT for texts, after in taken)
    alone = [told(llm, [file], 2)[0] for file in files]
    for number, (texts, after) in enumerate(taken):
        same = alone[number % 3][number // 3]
        assert torch.equal(torch.cat(texts), torch.cat(same[0])) and torch.equal(after, same[1])
    assert not notes


def test_a_file_that_has_ended_is_passed_over_until_all_have(llm, tmp_path):
    for name, count in (("short", 4), ("long", 16)):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{name} {i:02d}" * 4}) for i in range(count))
        )
    both = [tmp_path / "short.jsonl", tmp_path / "long.jsonl"]
    long = [torch.cat(texts) for texts, _ in told(llm, both[1:], 5)[0]]
    taken, notes = told(llm, both, 8)
    first = [torch.cat(texts) for texts, _ in taken]
    assert [notes[0].split(" has ended")[0], notes[1][:18]] == [str(both[0]), "All texts are read"]
    same = [[torch.equal(one, other) for other in first] for one in first[:2]]
    begin = min(one.index(True, i + 1) for i, one in enumerate(same))  # where all files begin anew
    assert begin > 3 and all(map(torch.equal, first[1:begin], long))
    assert sorted(one[begin : begin + 2].index(True) for one in same) == [0, 1]


def test_a_file_that_is_too_short_for_one_memory_is_said_once(llm, tmp_path):
    (tmp_path / "tiny.txt").write_text("far too short to fill a memory")
    (tmp_path / "long.txt").write_text("".join(f"line {i} of a text file\n" for i in range(60)))
    both = [tmp_path / "tiny.txt", tmp_path / "long.txt"]
    alone, _ = told(llm, both[1:], 40)
    taken, notes = told(llm, both, 40)
    assert notes[0].startswith(f"{both[0]} is too short: a memory takes {SLOTS} tokens") and "left out" in notes[0]
    assert len(notes) > 2 and all(note.startswith("All texts are read") for note in notes[1:])
    assert all(torch.equal(torch.cat(one[0]), torch.cat(other[0])) for one, other in zip(taken, alone, strict=True))


def test_short_pieces_and_blank_texts_are_left_out(llm, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["", "  \n", "a", "word " * 200]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sizes = [len(piece) for piece in pieces.pieces(llm, file)]
    assert sizes[:3] == [256, 256, 256] and all(size >= 8 for size in sizes)


def test_a_long_text_file_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 50)
    text = "".join(f"line {i} of a text file\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text)
    blocks = list(pieces.texts(tmp_path / "a.txt"))
    assert "".join(blocks) == text and len(blocks) > 5 and all(block.endswith("\n") for block in blocks)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.csv", b"a,b", r"\.jsonl, \.jsonl\.gz, \.txt"),
        ("a.jsonl", b'{"txt": "b"}', "row 1 of .* has no key 'text'"),
        ("a.jsonl", b"{", "can not be read after line 1"),
        ("a.txt", b"\xff\xff", "as UTF-8 text"),
        ("a.txt", b"too short to fill a memory", "the texts are too short"),
    ],
)
def test_files_that_can_not_be_used_are_named(llm, tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        calibrating.calibrate(llm, [tmp_path / name], tmp_path / "coder", 100)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(llm, files, tmp_path, monkeypatch):
    whole = calibrating.calibrate(llm, files, tmp_path / "whole", 5 * SLOTS)
    monkeypatch.setattr(calibrating, "EVERY", 0)
    for memories in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            calibrating.calibrate(model_of(), files, tmp_path / "parts", 5 * SLOTS, progress=stop_after(memories))
        assert calibration.Sums.load(tmp_path / "parts.sums").memories == memories
        assert not (tmp_path / "parts").exists()
    calibrating.calibrate(model_of(), files, tmp_path / "parts", 5 * SLOTS)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert Coder.load(tmp_path / "whole").identity == whole.coder.identity


def test_a_coder_says_what_it_was_made_of(llm, files, tmp_path):
    shown = []
    result = calibrating.calibrate(llm, files, tmp_path / "c", 200, progress=lambda *pair: shown.append(pair))
    assert shown == [(0, 200), (64, 200), (128, 200), (192, 200), (200, 200)]
    about = Coder.load(tmp_path / "c").about
    assert about.items() >= {**llm.identities, "name": "tiny", "tokens": "256", "memories": "4"}.items()
    assert about["texts"] == "mills.jsonl, ships.jsonl.gz, notes.txt" and int(about["answers"]) > 0
    assert result.size == (tmp_path / "c").stat().st_size and result.coefficients == len(result.coder.tables.kinds)
    assert 8 < result.nbytes < 64 * 4 and 0 < result.error < 1


def test_another_step_needs_no_text_again(llm, files, tmp_path, monkeypatch):
    rough = calibrating.calibrate(llm, files, tmp_path / "c", 200, step=0.05)
    monkeypatch.setattr(calibration.Calibration, "see", None)
    fine = calibrating.calibrate(llm, files, tmp_path / "c", 200, step=0.005, bits=8)
    assert fine.nbytes > rough.nbytes and fine.error < rough.error and fine.coder.sketch.bits == 8


def test_the_sample_is_bounded(llm, files, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MOST", 100)
    result = calibrating.calibrate(llm, files, tmp_path / "c", 200)
    sums = calibration.Sums.load(tmp_path / "c.sums")
    assert sums.tokens == 256 and len(sums.sample) == len(sums.searched) == 100 and result.nbytes > 8


def test_a_killed_run_keeps_the_sums_before(llm, files, tmp_path, monkeypatch):
    calibrating.calibrate(llm, files, tmp_path / "c", 100)
    before = (tmp_path / "c.sums").read_bytes()

    def killed(*_):
        raise OSError("no space left")

    monkeypatch.setattr("latentmem.disk.DISK.rename", killed)
    with pytest.raises(OSError, match="no space"):
        calibrating.calibrate(llm, files, tmp_path / "c", 300)
    assert (tmp_path / "c.sums").read_bytes() == before and len(list(tmp_path.iterdir())) == 5


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_sums_of_another_model_or_of_other_texts_are_refused(llm, files, tmp_path):
    calibrating.calibrate(llm, files, tmp_path / "c", 100)
    with pytest.raises(OtherModelError, match="belongs to another model"):
        calibrating.calibrate(model_of(seed=1), files, tmp_path / "c", 200)
    with pytest.raises(ValueError, match="belongs to other texts"):
        calibrating.calibrate(llm, files[::-1], tmp_path / "c", 200)
    files[0].write_text(files[0].read_text() + "\n" + json.dumps({"text": "one more"}))
    with pytest.raises(ValueError, match="belongs to other texts"):
        calibrating.calibrate(llm, files, tmp_path / "c", 200)


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_damaged_sums_are_refused(llm, files, tmp_path, place):
    calibrating.calibrate(llm, files, tmp_path / "c", 100)
    data = bytearray((tmp_path / "c.sums").read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / "c.sums").write_bytes(data)
    with pytest.raises(DamagedError, match="damaged"):
        calibrating.calibrate(llm, files, tmp_path / "c", 100)
    (tmp_path / "c.sums").write_bytes(data[:-9])
    with pytest.raises(DamagedError, match="not a complete"):
        calibrating.calibrate(llm, files, tmp_path / "c", 100)


def test_what_a_coder_can_not_be_made_of_is_refused(llm, files, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        calibrating.calibrate(llm, files, tmp_path / "none" / "c", 100)
    with pytest.raises(ValueError, match="one layer"):
        one = latentmem.MemoryModel(tiny_model(num_hidden_layers=1), byte_tokenizer())
        calibrating.calibrate(one, files, tmp_path / "c", 100)
    with pytest.raises(ValueError, match="without a tokenizer"):
        calibrating.calibrate(latentmem.MemoryModel(tiny_model(), first_token=1), files, tmp_path / "c", 100)
    for tokens, step, bits in (
        (100, 0, 192),
        (100, float("inf"), 192),
        (100, 0.005, 100),
        (100, 0.005, 0),
        (0, 0.005, 8),
    ):
        with pytest.raises(ValueError, match="multiple of 8"):
            calibrating.calibrate(llm, files, tmp_path / "c", tokens, step=step, bits=bits)
    assert not (tmp_path / "c.sums").exists()


def test_a_step_above_all_coefficients_is_refused_and_keeps_what_was_seen(llm, files, tmp_path, monkeypatch):
    for step in (1e3, 1e30):
        with pytest.raises(ValueError, match="no coefficient is as large as the step"):
            calibrating.calibrate(llm, files, tmp_path / "c", 100, step=step)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(calibration.Calibration, "see", None)
    steps, made = [0.005 * 1.3**i for i in range(60)], 0
    for step in steps:  # up to one that leaves few coefficients, none of some layers
        try:
            coder = calibrating.calibrate(llm, files, tmp_path / "c", 100, step=step).coder
        except ValueError as error:
            assert "no coefficient" in str(error)
            break
        made += 1
        assert Coder.load(tmp_path / "c").identity == coder.identity
    assert 3 < made < len(steps)


@pytest.mark.parametrize("name", ["notes.txt", "mills.jsonl", "model.safetensors", "folder", "empty"])
def test_a_file_that_is_no_coder_is_not_replaced(llm, tiny_folder, files, tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    out = tmp_path / name
    before = None if out.is_dir() else out.read_bytes()
    with pytest.raises(ValueError, match=f"{name} exists and is no coder of this version. Choose another file"):
        calibrating.calibrate(llm, files, out, 100)
    monkeypatch.setattr(latentmem, "load", None)  # nothing is loaded for it
    result = run(tiny_folder, "--texts", files[0], "--out", out)
    assert isinstance(result.exception, ValueError) and "is no coder" in str(result.exception)
    assert out.is_dir() if before is None else out.read_bytes() == before
    assert not (tmp_path / f"{name}.sums").exists()


def test_products_do_not_lose_small_differences_of_large_keys():
    generator = torch.Generator().manual_seed(0)
    bias = 1000 * torch.randn(12, generator=generator)
    total, exact = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    first = torch.zeros(12, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(64, 12, generator=generator) + bias
        calibration._add_products(total, x)
        exact += x.double().T @ x.double()
        first += x.double().sum(0)
    mean = first / 1280
    mine, theirs = (one / 1280 - torch.outer(mean, mean) for one in (total, exact))
    assert (mine - theirs).abs().max() < 1e-3 and (theirs - torch.eye(12)).abs().max() < 0.2


def test_the_sums_are_of_the_types_that_they_say(llm, files, tmp_path):
    calibrating.calibrate(llm, files, tmp_path / "c", 100)
    sums = calibration.Sums.load(tmp_path / "c.sums")
    wide = [*sums.first, *sums.second, sums.direction, sums.directions]
    assert {t.dtype for t in wide} == {torch.float64} and {t.dtype for t in sums.fisher} == {torch.float32}


# --- command line -----------------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli.app, ["calibrate", *map(str, args)])


def test_the_command_makes_a_coder_and_says_what_it_is(tiny_folder, files, tmp_path):
    texts = [word for file in files for word in ("--texts", file)]
    result = run(tiny_folder, *texts, "--out", tmp_path / "c", "--tokens", 150, "--bits", 16)
    assert result.exit_code == 0, result.output
    for part in ("coefficients", "192 tokens", "bytes", "%", "c.sums"):
        assert part in result.output, part
    coder = Coder.load(tmp_path / "c")
    assert coder.sketch.bits == 16 and coder.about["model"] == latentmem.load(str(tiny_folder)).identity


def test_ctrl_c_says_how_to_go_on(tiny_folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "EVERY", 0)
    see, seen = calibration.Calibration.see, []

    def stopped(self, *args):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        see(self, *args)

    monkeypatch.setattr(calibration.Calibration, "see", stopped)
    args = (tiny_folder, "--texts", files[0], "--out", tmp_path / "c", "--tokens", 150)
    result = run(*args)
    assert result.exit_code == 130 and "c.sums holds what was seen, but for the last 0 seconds" in result.output
    assert run(*args).exit_code == 0 and Coder.load(tmp_path / "c").about["tokens"] == "192"


def test_mistakes_are_one_sentence(tiny_folder, files, tmp_path):
    result = run(tiny_folder, "--texts", tmp_path / "none.jsonl", "--out", tmp_path / "c")
    assert isinstance(result.exception, ValueError) and "none.jsonl: no such file" in str(result.exception)
    assert run(tiny_folder, "--out", tmp_path / "c").exit_code == 2  # no texts


def test_the_command_has_the_defaults_of_the_function():
    command, function = (
        {name: one.default for name, one in inspect.signature(one).parameters.items()}
        for one in (cli.training.calibrate, calibrating.calibrate)
    )
    assert all(command[name] == function[name] for name in ("tokens", "step", "bits"))
