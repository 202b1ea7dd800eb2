"""The harness in front of a memory: likelihoods and answers that are known, and a task of its own, offline."""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from latentmem import cli
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

if find_spec("lm_eval") is None:
    pytestmark = pytest.mark.skip(reason="lm-evaluation-harness is not installed: pip install 'latentmem[harness]'")
else:
    from latentmem.evaluate.protocols import harness
    from latentmem.evaluate.protocols.harness import HarnessLM


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(max_position_embeddings=2048), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def memory(llm):
    return llm.write(llm.empty(128), "The harbour holds ten ships.", "text")


def request(*args):
    return SimpleNamespace(args=args)


def expected(llm, memory, prompt, answer):
    """Log-likelihood of an answer and whether it is greedy, from the logits of one pass."""
    logits = llm.logits(llm.blank() if memory is None else memory, [*prompt, *answer]).float().log_softmax(-1)
    rows = logits[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(answer)[:, None]).sum().item(), rows.argmax(-1).tolist() == answer


@pytest.mark.parametrize("front", [False, True])
def test_likelihoods_are_the_models_own_behind_the_memory(llm, memory, front):
    front = memory if front else None
    lm, text = HarnessLM(llm, front), llm.prompts.text
    pairs = [("How many?", " ten"), ("", "Ships sail"), ("A much longer question about ships?", " no")]
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (prompt, answer), (value, greedy) in zip(pairs, found, strict=True):
        ids = text(prompt) if prompt else [llm.first_token]
        value_expected, greedy_expected = expected(llm, front, ids, text(answer))
        assert value == pytest.approx(value_expected, abs=1e-3) and greedy == greedy_expected


def test_the_likelihood_of_a_long_text_counts_every_token_once(llm, memory, monkeypatch):
    monkeypatch.setattr(harness, "WINDOW", 9)
    lm, text = HarnessLM(llm, memory), "Ships sail far"
    (found,) = lm.loglikelihood_rolling([request(text)])
    ids, total = llm.prompts.text(text), 0.0
    for start in range(0, len(ids), 8):
        part = ids[start : start + 8]
        before = [llm.first_token] if not start else ids[:start][-(8 - len(part) + 1) :]
        total += expected(llm, memory, before, part)[0]
    assert found == pytest.approx(total, abs=1e-3)


def test_answers_are_greedy_and_stop_at_the_first_stop(llm, memory):
    lm, prompt = HarnessLM(llm, memory), "How many ships?"
    (output,) = llm.generate_rows(llm.context(memory), [llm.prompts.text(prompt)], 12)
    whole = llm.tokenizer.decode(output, skip_special_tokens=True)
    (said,) = lm.generate_until([request(prompt, {"max_gen_toks": 12, "until": []})])
    assert said == whole
    stop = whole[2]
    (cut,) = lm.generate_until([request(prompt, {"max_gen_toks": 12, "until": [stop]})])
    assert cut == whole.split(stop)[0]
    with pytest.raises(ValueError, match="asks to sample"):
        lm.generate_until([request(prompt, {"do_sample": True, "temperature": 0.7})])


def test_a_long_prompt_is_written_but_for_its_end_and_every_request_begins_anew(llm):
    lm = HarnessLM(llm, write=True, N=1000, max_length=900)
    ids = list(range(10, 250)) * 5
    context, prompt = lm._prompt(ids, 12)
    assert prompt == ids[-500:] and context.length == 1 + (900 - 12) - 500
    assert lm.memory.M == 0
    short, prompt = lm._prompt(ids[:30], 12)
    assert short.length == 0 and prompt == [*llm.prompts.opening, *ids[:30]]
    again, _ = lm._prompt(ids, 12)
    assert again.length == context.length


def test_a_memory_of_another_model_is_refused(memory):
    other = MemoryModel(tiny_model(seed=1), byte_tokenizer(), name="other")
    with pytest.raises(ValueError, match="written with another model"):
        HarnessLM(other, memory)


@pytest.fixture
def task(tmp_path):
    """A task with two choices of which the harness scores the likelier one, from a file."""
    rows = [{"q": f"ships {i}?", "a": " ten", "b": " a long wrong answer", "right": i % 2} for i in range(4)]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "made_up",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["ten", "a long wrong answer"],
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.filterwarnings("default")  # the harness's own
def test_the_harness_scores_a_task_of_its_own(llm, memory, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = harness.evaluate(HarnessLM(llm, memory), [task], tmp_path / "out", bootstrap_iters=0)
    accuracy = []
    for i in range(4):
        values = [expected(llm, memory, llm.prompts.text(f"ships {i}?"), llm.prompts.text(a))[0]
                  for a in (" ten", " a long wrong answer")]  # fmt: skip
        accuracy.append(float(values[i % 2] == max(values)))
    assert found["made_up"]["acc,none"] == pytest.approx(sum(accuracy) / 4)
    about = json.loads((tmp_path / "out" / "results.json").read_text())["about"]
    assert (about["M"], about["model"]) == (memory.M, "tiny")


def test_the_model_type_is_registered():
    from lm_eval.api.registry import get_model

    assert get_model("latentmem") is HarnessLM


def test_the_command_hands_over_tasks_and_memory(tiny_folder, tmp_path, monkeypatch, capsys):
    import latentmem

    llm = latentmem.load(str(tiny_folder), dtype="float32", device="cpu", adapters=None)
    llm.write(llm.empty(64), "Ten ships.", "text").save(tmp_path / "m.safetensors")
    seen = {}
    monkeypatch.setattr(
        harness, "evaluate", lambda lm, tasks, out, **more: seen.update(lm=lm, tasks=tasks) or {"blimp": {"acc": 0.5}}
    )
    args = ["latentmem", "eval", "harness", "--out", str(tmp_path / "run"), "--tasks=blimp,piqa", "--device=cpu"]
    args += ["--memory", str(tmp_path / "m.safetensors"), "--model", str(tiny_folder), "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", [*args, "--adapters=none"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "blimp: acc 0.5000" in capsys.readouterr().out
    assert seen["tasks"] == ["blimp", "piqa"] and seen["lm"].memory.tokens == 10
