"""Coded updates in a file: there and back to the bit, and what does not fit is said."""

import contextlib
import json
from dataclasses import fields, replace

import pytest
import torch

from latentmem import container
from latentmem.coding import codec
from latentmem.core.memory import Memory, Update
from latentmem.errors import DamagedError
from latentmem.files import snapshot, updates
from latentmem.model.model import MemoryModel
from latentmem.store import delta
from latentmem.testing import byte_tokenizer, tiny_model
from latentmem.written import Written


@pytest.fixture(scope="module")
def llm(tiny_coder):
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    llm.coder = tiny_coder
    return llm


def written(llm, form="int8", **changes):
    memory = llm.empty(**{"N": 12, "K": 5, "form": form, "longterm": 4, "order": "best-only"} | changes)
    for i in range(4):
        memory = llm.write_ids(memory, list(range(10 + 9 * i, 15 + 9 * i)), f"s{i % 2}")
    return memory


@pytest.fixture
def file(llm, tmp_path):
    path = tmp_path / "memory.safetensors"
    written(llm).save(path)
    return path


def changed(path, tensors=None, **values):
    """The file of a memory with other tensors or values, and a checksum that fits them."""
    old, header = container.read(path)
    new = {name: tensor for name, tensor in {**old, **(tensors or {})}.items() if tensor is not None}
    text = json.dumps({**json.loads(header["memory"]), **values}, sort_keys=True)
    container.write(path, new, {**header, "memory": text, "checksum": snapshot._checksum(text, new)})


def refused(path, *words):
    with pytest.raises(DamagedError) as error:
        Memory.load(path)
    for word in (str(path), "Restore it from a copy", *words):
        assert word in str(error.value)


@pytest.mark.parametrize("form", ["int8", "coded"])
@pytest.mark.parametrize("longterm", [0, 4])
def test_every_field_of_a_coded_memory_comes_back_to_the_bit(llm, tmp_path, form, longterm):
    memory = written(llm, form, longterm=longterm)
    memory.save(tmp_path / "a")
    loaded = Memory.load(tmp_path / "a")
    for name in [field.name for field in fields(Memory) if field.name not in ("written", "longterm", "version")]:
        mine, theirs = getattr(memory, name), getattr(loaded, name)
        assert (torch.equal(mine, theirs) and mine.dtype == theirs.dtype) if torch.is_tensor(mine) else mine == theirs
    assert memory.coder and list(memory.written) == list(loaded.written)
    for mine, theirs in zip(memory.written.values(), loaded.written.values(), strict=True):
        assert mine.source == theirs.source and set(mine.tensors) == set(theirs.tensors)
        assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)
    assert (vars(memory.longterm) if longterm else None) == (vars(loaded.longterm) if longterm else None)
    assert snapshot.to_bytes(memory) == snapshot.to_bytes(replace(loaded, version=""))
    ids = [7, 8, 9]
    before = llm.logits(memory, ids)
    llm.prefixes.clear()
    llm.retriever.clear()
    assert torch.equal(llm.logits(loaded, ids), before)


def test_an_empty_coded_memory_comes_back(llm, tmp_path):
    for form in ("int8", "coded"):
        memory = llm.empty(N=12, K=4, form=form, longterm=4).save(tmp_path / "a")
        loaded = Memory.load(tmp_path / "a")
        assert (loaded.M, loaded.L, loaded.coder, loaded.version) == (0, memory.L, memory.coder, memory.version)
        assert loaded.is_empty and llm.write_ids(loaded, [5, 6, 7]).M == 3


def test_stands_that_do_not_fit_are_damage(file):
    stands = container.read(file)[0]["stands"]
    for other, words in (
        (stands[:, :-1].contiguous(), "`stands` is"),
        (torch.cat([stands, stands], 1), "`stands` is"),
        (stands.to(torch.int32), "`stands` is"),
        (stands[0], "`stands` is"),
        (torch.cat([stands[:1] * 0, stands[1:]]), "different numbers of slots"),
        (torch.full_like(stands, 255), "different numbers of slots"),
        (None, "stands"),
    ):
        data = file.read_bytes()
        changed(file, {"stands": other})
        refused(file, words)
        file.write_bytes(data)


def test_updates_that_do_not_fit_are_damage(file):
    tensors, header = container.read(file)
    values = json.loads(header["memory"])
    table, data = values["written"], file.read_bytes()

    def row(i, column, value):
        return [[value if (n, c) == (i, column) else old for c, old in enumerate(one)] for n, one in enumerate(table)]

    cases = {
        "not all there": {"written": row(0, 2, {**table[0][2], "ids": 4})},
        "its updates are not in their order": {"written": [*table[1:], table[0]]},
        "unknown source 'nobody'": {"written": row(0, 1, "nobody")},
        "lie elsewhere": {"written": [[*one[:3], ["a" * 64, i]] for i, one in enumerate(table)]},
        "an update has the tensors": {"written": row(0, 2, {"ids": 5})},
        "its long-term memory says None": {"longterm": None},
        "its header": {"written": None} | {"more": 1},
    }
    for words, change in cases.items():
        changed(file, None if words != "lie elsewhere" else dict.fromkeys(set(tensors) - {"stands"}), **change)
        refused(file, words)
        file.write_bytes(data)
    changed(file, {"ids": tensors["ids"][:-1].contiguous()})
    refused(file)


def places(value, at=()):
    """Where something stands in JSON."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*at, key))


def with_other(value, at, other):
    """The same JSON with something else at a place."""
    if not at:
        return other
    copy = value.copy()
    copy[at[0]] = with_other(value[at[0]], at[1:], other)
    return copy


@pytest.mark.parametrize("form", ["int8", "exact"])
@pytest.mark.parametrize("longterm", [0, 4])
def test_a_header_with_another_value_anywhere_is_refused_or_is_a_memory(llm, form, longterm):
    tensors, header = snapshot._parts(written(llm, form, longterm=longterm, order=None))
    values = json.loads(header["memory"])
    for at in places(values):
        for other in (None, -1, 0, 99, 10**30, 1.5, "x", [], [1], {}, True):
            text = json.dumps(with_other(values, at, other))
            new = {**header, "memory": text, "checksum": snapshot._checksum(text, tensors)}
            data = bytearray(container.to_bytes(tensors, new))
            with contextlib.suppress(DamagedError):
                snapshot.parts_of(data, "m")
            try:
                memory = snapshot.from_bytes(data, "m")
                if at[0] != "settings":
                    llm.check(memory)
            except ValueError:
                continue
            if at[0] != "settings":
                ids = [7, 8]
                llm.logits(llm.write_ids(memory, [5, 6, 7, 8, 9], "z"), ids)


def test_numbers_of_updates_that_the_memory_did_not_have_are_damage(file):
    data = file.read_bytes()
    for change, words in (
        ({"updates": 2}, "it has had 2 updates, and its newest has the number 4"),
        ({"updates": -1}, "it has had -1 updates"),
        ({"updates": 1 << 31}, "updates"),
        ({"longterm": {"first": 6}}, "begins with the update 6"),
        ({"longterm": {"first": 0}}, "begins with the update 0"),
        ({"longterm": {"first": 10**30}}, "damaged"),
    ):
        changed(file, **change)
        refused(file, words)
        file.write_bytes(data)


@pytest.mark.parametrize("place", [[], ["NAME"], ["NAME", 99], ["NAME", -1], ["NAME", "0"], ["NAME", 0, 0], "x", 5, {}])
def test_a_place_where_no_update_lies_is_damage(llm, place):
    class Files:
        def put_updates(self, updates):
            self.lie = list(updates)
            return [("NAME", i) for i in range(len(updates))]

        def updates(self, name):
            return self.lie

    files = Files()
    data = snapshot.to_bytes(written(llm), files)
    assert snapshot.from_bytes(bytearray(data), "m", parts=files).updates == 4
    tensors, header = container.from_bytes(bytearray(data), "m")
    values = json.loads(header["memory"])
    values["written"][-1][3] = place
    bytes_ = container.to_bytes(tensors, {**header, "memory": json.dumps(values)})
    with pytest.raises(DamagedError, match=r"^m was altered or damaged"):
        snapshot.from_bytes(bytearray(bytes_), "m", verified=True, parts=files)


def test_a_file_of_updates_that_is_damaged_is_said(llm):
    memory = written(llm)
    data = delta.written_to_bytes(list(memory.written.values()), [5] * len(memory.written))
    again = delta.written_from_bytes(bytearray(data), "x")
    assert [one.source for one in again] == [one.source for one in memory.written.values()]
    tensors, header = container.from_bytes(bytearray(data), "x")
    table = json.loads(header["updates"])
    for change in ([*table, table[0]], table[1:], [{**table[0], "tokens": "5"}, *table[1:]], {}, 5, [None]):
        bytes_ = container.to_bytes(tensors, {**header, "updates": json.dumps(change)})
        with pytest.raises(DamagedError, match=r"^the object x is a damaged delta"):
            delta.written_from_bytes(bytearray(bytes_), "the object x")
    with pytest.raises(DamagedError, match=r"^the object x"):
        delta.written_from_bytes(bytearray(data[:-3]), "the object x")
    with pytest.raises(DamagedError, match="holds no coded updates"):
        delta.written_from_bytes(bytearray(container.to_bytes(tensors, {"format": "other"})), "the object x")


def shorter(tensor):
    return tensor[:-1].contiguous()


def longer(tensor):
    return torch.cat([tensor, tensor[-1:]])


WRONG = {
    "a row less": shorter,
    "a row more": longer,
    "another type": lambda tensor: tensor.double(),
    "a dimension more": lambda tensor: tensor[:, None].contiguous(),
    "a number": lambda tensor: tensor.flatten()[0].clone(),
    "none": lambda tensor: tensor[:0],
}
PARTS = [(form, name) for form, layout in codec.LAYOUTS.items() for name in layout]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("form", "name"), PARTS)
def test_updates_whose_tensors_are_of_different_slots_are_refused_when_they_are_read(llm, tmp_path, form, name, wrong):
    memory = written(llm, form)
    tensors, accounts = updates.joined(list(memory.written.values()))
    if wrong in ("a row less", "a row more", "none") and codec.LAYOUTS[form][name][1] is None:
        return  # it has any number of rows; the code does not add up then, which decoding says
    tensors[name] = WRONG[wrong](tensors[name])
    if tensors[name].ndim:
        accounts[-1]["sizes"][name] += len(tensors[name]) - sum(one["sizes"][name] for one in accounts)
    table = json.dumps([account | {"tokens": 5} for account in accounts])
    data = container.to_bytes(tensors, {"format": "latentmem updates 1", "updates": table})
    with pytest.raises(DamagedError, match=r"the object x is a damaged delta .* Restore it from a copy"):
        delta.written_from_bytes(bytearray(data), "the object x")
    memory.save(tmp_path / "m")
    values = json.loads(container.read(tmp_path / "m")[1]["memory"])
    values["written"][-1][2] = accounts[-1]["sizes"]
    changed(tmp_path / "m", {name: tensors[name]}, written=values["written"])
    refused(tmp_path / "m")


@pytest.mark.parametrize(("form", "name"), PARTS)
def test_an_update_that_takes_rows_of_the_next_is_refused(llm, tmp_path, form, name):
    memory = written(llm, form)
    tensors, accounts = updates.joined(list(memory.written.values()))
    for i, step in ((0, 1), (1, -1)):
        accounts[i]["sizes"][name] += step
    table = json.dumps([account | {"tokens": 5} for account in accounts])
    data = bytearray(container.to_bytes(tensors, {"format": "latentmem updates 1", "updates": table}))
    if codec.LAYOUTS[form][name][1] is not None:
        with pytest.raises(DamagedError, match="the slots of an update are not all there"):
            delta.written_from_bytes(data, "x")
    else:
        with pytest.raises(DamagedError, match=r"a damaged delta|a code is damaged"):
            llm.retriever.decoding._decoded(memory, delta.written_from_bytes(data, "x"))


@pytest.mark.parametrize("form", ["int8", "coded"])
def test_updates_of_another_form_or_model_are_refused(llm, tmp_path, form):
    memory, other = written(llm, form), written(llm, "coded" if form == "int8" else "int8")
    with pytest.raises(DamagedError, match="its memory is of another form"):
        delta.Chain(memory).update(Update.drawn(memory, other.written[1], "s0", 5))
    exact = written(llm, "exact")
    for one, piece in ((exact, memory.written[1]), (memory, torch.zeros_like(memory.slots[:, :2]))):
        with pytest.raises(DamagedError, match="its memory is of another form"):
            delta.Chain(one).update(Update.drawn(one, piece, "s0", 5))
    replace(memory, written=other.written).save(tmp_path / "m")
    refused(tmp_path / "m", f"its updates are not all of its form {form}")
    for name, change in {"ids": lambda t: t + 5000, "sketch": lambda t: t[:, 1:], "heads": lambda t: t[:, 1:]}.items():
        if name in codec.LAYOUTS[form]:
            spoiled = {
                n: Written(one.source, one.tensors | {name: change(one.tensors[name])})
                for n, one in memory.written.items()
            }
            with pytest.raises(DamagedError, match="an update is damaged"):
                fresh = replace(memory, written=spoiled)
                llm.logits(fresh, [7, 8, 9])
