"""EleutherAI's lm-evaluation-harness in front of a model with a memory: its tasks and scorers, our memory.

Importing this registers the model type "latentmem" there. A memory stands in front of every request; long prompts of
generative tasks are written into it first, all but their end, and each request begins with the same memory again
(MemoryLLM section 4.5: "the last 512 tokens are the prompt").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmem.core.memory import Memory
from latentmem.core.presets import PAPER_PIECE
from latentmem.core.settings import MemorySettings, settings_of
from latentmem.disk import replace_bytes
from latentmem.evaluate.protocols.longbench import cut
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness is not installed: run `pip install 'latentmem[harness]'`.", name="lm_eval"
    ) from error

BATCH = 16  # requests in one pass
MAX_GEN = 256  # tokens of an answer, where a task says nothing; the harness's own default
WINDOW = 1024  # tokens that are read at once for the likelihood of a long text, fewer where there is no room


@register_model("latentmem")
class HarnessLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model with a memory, as the harness asks for one.

    Args:
        model: a loaded model, or its name for `latentmem.load`.
        memory: what stands in front of every request: a memory, the path of a snapshot, or None: the plain model.
        write: write what a generative prompt has beyond 512 tokens with its answer; the memory is by default an empty
            one then. Otherwise a prompt that does not fit is an error.
        max_length: tokens of prompt and answer that are kept, from the end.
        options: settings of the empty memory into which prompts are written, by default as trained, and further
            arguments of `latentmem.load`.

    Raises:
        ValueError: a memory of another model.
    """

    def __init__(
        self,
        model: MemoryModel | str = "smollm2-135m",
        memory: Memory | str | None = None,
        write: bool = False,
        max_length: int = 16_384,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        from latentmem.loading.load import load

        super().__init__()
        names = [one.name for one in settings_of(MemorySettings) if one.name in options]
        settings = MemorySettings.of({name: options.pop(name) for name in names})
        self.llm = load(model, **options) if isinstance(model, str) else model
        self.tokenizer = self.llm.prompts_or_raise().tokenizer
        self.write, self.max_length = write, int(max_length)
        if isinstance(memory, str):
            memory = Memory.load(memory)
        if memory is None and write:
            memory = self.llm.empty(settings=settings)
        if memory is not None:
            self.llm.check(memory)
        self.memory = memory
        self._context = self.llm.text_context([]) if memory is None else self.llm.context(memory)

    # --- text and tokens --------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token of the sink."""
        return self.llm.first_token

    @property
    def tokenizer_name(self) -> str:
        """What names the tokenizer in the harness's caches."""
        return self.llm.tokenizer_identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text of the harness; control tokens in it count, because chat templates put them there."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    # --- what the harness asks --------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding says it) of each continuation [(texts, context, continuation)]."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        logliks: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            prompts = [self._opened(requests[i][1]) for i in batch]
            scores = self.llm.score_rows(self._context, prompts, [requests[i][2] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                logliks[i] = (score.logprobs.double().sum().item(), bool(score.hits.all()))
        return logliks

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window after window; each token counts once."""
        size = min(WINDOW, self._context.room) - 1
        logliks = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, size, 1))
            logliks.append(sum(value for value, _ in self._loglikelihood_tokens([((), a, b) for a, b in windows])))
        return logliks

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first of the strings at which a task stops.

        Raises:
            ValueError: a task that samples, or a prompt that does not fit.
        """
        texts = []
        for request in requests:
            text, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ValueError("a task asks to sample, and answers are greedy here: give gen_kwargs do_sample=False.")
            new = int(options.get("max_gen_toks", MAX_GEN))
            context, ids = self._prompt(self.tok_encode(text), new)
            (output,) = self.llm.generate_rows(context, [ids], new)
            said = self.tokenizer.decode(output, skip_special_tokens=True)
            until = options.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                said = said.split(stop)[0] if stop else said
            texts.append(said)
        return texts

    def _opened(self, ids: list[int]) -> list[int]:
        """A prompt as it stands: the plain model's begins with what the model wants there, once."""
        opening = [] if self._context.length else self.llm.prompts_or_raise().opening
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def _prompt(self, ids: list[int], new: int) -> tuple[Context, list[int]]:
        """What a prompt is read behind, and the part of it that is not written."""
        ids = ids[-max(1, self.max_length - new) :]
        tail = max(1, PAPER_PIECE - new)
        if not self.write or self.memory is None or len(ids) <= tail:
            return self._context, self._opened(ids)
        memory = self.memory
        for piece in cut(ids[:-tail], memory.piece):
            memory = self.llm.write_ids(memory, piece, "text")
        return self.llm.context(memory), ids[-tail:]


def evaluate(lm: HarnessLM, tasks: Sequence[Any], out: Path, **options: Any) -> dict[str, Any]:
    """Run tasks of the harness and write what it found to `out`/results.json.

    Args:
        tasks: names of the harness, or configurations of tasks as dictionaries.
        options: of `lm_eval.simple_evaluate`, such as limit and num_fewshot.

    Returns:
        Task -> metric -> value.
    """
    from lm_eval import simple_evaluate

    output = simple_evaluate(model=lm, tasks=list(tasks), log_samples=False, **options)
    assert output is not None
    results: dict[str, Any] = output["results"]
    out.mkdir(parents=True, exist_ok=True)
    memory = lm.memory
    about = {"model": lm.llm.name, "sha256": lm.llm.identity, "M": 0 if memory is None else memory.M, "write": lm.write}
    about |= {"adapters": lm.llm.adapters.identity if lm.llm.adapters else "", "dtype": str(lm.llm.decoder.dtype)[6:]}
    everything = {"about": about, "n": output.get("n-samples", {}), "results": results}
    replace_bytes(out / "results.json", json.dumps(everything, indent=1, default=str) + "\n")
    return results
