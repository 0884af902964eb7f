"""The model that a pool serves now, as far as requests are concerned: its name and its tokenizer."""

from __future__ import annotations

import array
import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from engines.api import Footprint, Grammar, Prompt, Vocab
from engines.errors import InvalidPrompt, InvalidSchema, LoadFailed, PromptTooLong
from orchd.errors import UNREADY_RETRY_S, InvalidParams, PoolUnavailable
from orchd.models import files, references
from orchd.models.prepared import Prepared
from orchd.schemas import TaskRequest

_log = logging.getLogger(__name__)

INLINE_CHARS = 2000
"""Prompts up to this length are tokenised on the event loop; longer ones on a thread, so that nobody's stream waits.
Never messages: their template is a stranger's program, which may take `engines.llamacpp.chat.TIME_LIMIT_S`."""

LONG_CHARS = 64 * 1024
"""Prompts and messages beyond this length take turns, on one thread: however many of them there are at once, they take
one thread's share of the processor and of Python's lock, and shorter ones pass them."""

TEMPLATE_THREADS = 2
"""How many conversations are rendered at the same time; others wait, and nothing else waits for them."""

SCHEMA_THREADS = 2
"""How many schemas are compiled at the same time; only tasks with a schema wait for them. The first of a model takes a
second for its vocabulary, a hostile one as long as `engines.llamacpp.schema_vet` lets it."""


@dataclass(frozen=True, eq=False)
class VettedModel:
    """A file that can be loaded.

    Attributes:
        id: In health, metrics and ``model_ref``.
        path: Its file.
        footprint: What one replica of it needs.
        fingerprint: Of its files as they were vetted.
    """

    id: str
    path: Path
    footprint: Footprint
    fingerprint: tuple[tuple[int, ...], ...]

    def check_unchanged(self) -> None:
        """Raise `LoadFailed` if its files are no longer those that were vetted: others could end the process."""
        if files.fingerprint(self.path) != self.fingerprint:
            raise LoadFailed(f"{self.path.name} was changed after it was vetted; reload it once it is complete")


@dataclass(frozen=True, eq=False)
class ActiveModel(VettedModel):
    """The model that a pool serves: its name, its file, its tokenizer and the threads that it is used on.

    Attributes:
        vocab: Its tokenizer, shared by every replica.
        long_prompts: The thread for them; it ends with the last reference to this.
        conversations: The threads for those that are not as long; likewise.
        schemas: The threads for tasks with a schema; likewise.
    """

    vocab: Vocab
    long_prompts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "long prompts"), repr=False)
    conversations: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TEMPLATE_THREADS, "conversations"), repr=False
    )

    schemas: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(SCHEMA_THREADS, "schemas"), repr=False
    )

    def end_threads(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        for threads in (self.long_prompts, self.conversations, self.schemas):
            threads.shutdown(wait=False, cancel_futures=True)

    def is_named(self, model_ref: str) -> bool:
        """Whether a reference (a name, a file name or a path) means this model."""
        return references.model_id(Path(model_ref)) == self.id

    def check_ref(self, request: TaskRequest) -> None:
        """Raise `PoolUnavailable` if the request pins another model."""
        if request.model_ref is not None and not self.is_named(request.model_ref):
            raise PoolUnavailable(
                f"the task asked for {request.model_ref!r}, but its pool now serves {self.id!r}",
                retry_after_s=UNREADY_RETRY_S,
            )

    async def prepare_aside(self, request: TaskRequest, *, ctx: int) -> Prepared:
        """As `prepare`, for the event loop, which goes on meanwhile unless it is soon done."""
        if is_short(request):
            return self.prepare(request, ctx=ctx)
        threads = None if request.messages is None else self.conversations
        if request.json_schema is not None:
            threads = self.schemas
        if request.prompt_chars > LONG_CHARS:
            threads = self.long_prompts
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: self.prepare(request, ctx=ctx))

    def prepare(self, request: TaskRequest, *, ctx: int) -> Prepared:
        """What the request is to this model.

        Raises:
            InvalidParams: The model refuses its prompt or its schema, or the prompt does not fit.
        """
        prompt = self.tokenize(request, ctx=ctx)
        return Prepared(prompt, self._grammar(request, prompt))

    def _grammar(self, request: TaskRequest, prompt: Prompt) -> Grammar | None:
        schema = request.json_schema
        if schema is None:
            return None
        if request.messages is not None and self.vocab.opens_thinking(prompt.tokens):
            raise InvalidParams(
                f"json_schema: {self.id} would think before it answers, and that is not JSON; turn its thinking off, "
                'often with chat_template_kwargs {"enable_thinking": false}'
            )
        try:
            return self.vocab.grammar(schema if isinstance(schema, dict) else True)
        except InvalidSchema as error:
            raise InvalidParams(f"json_schema: {error}") from None

    def tokenize(self, request: TaskRequest, *, ctx: int) -> Prompt:
        """The request's prompt in this model's tokens.

        Raises:
            InvalidParams: The model refuses it, or it does not fit into a slot together with its output.
        """
        if request.messages is not None and len(request.messages) > ctx:  # not worth a template's time
            raise InvalidParams(
                f"the {len(request.messages)} messages do not fit into a slot's context of {ctx} tokens; send fewer"
            )
        most = max(0, ctx - request.max_tokens)
        try:
            if request.messages is not None:
                prompt = self.vocab.tokenize_chat(
                    [{"role": message.role, "content": message.content} for message in request.messages],
                    arguments=request.chat_template_kwargs or {},
                    at_most=most,
                )
            else:
                prompt = Prompt(self.vocab.tokenize(request.prompt or "", at_most=most))
        except PromptTooLong as error:
            raise _too_long(f"more than {error.tokens}", request, ctx) from None
        except InvalidPrompt as error:
            if error.__cause__ is not None:
                _log.warning("%s: %s: %r", self.id, error, error.__cause__)
            raise InvalidParams(str(error)) from None
        if len(prompt.tokens) + request.max_tokens > ctx:
            raise _too_long(str(len(prompt.tokens)), request, ctx)
        return Prompt(array.array("i", prompt.tokens), prompt.reply)


def _too_long(tokens: str, request: TaskRequest, ctx: int) -> InvalidParams:
    return InvalidParams(
        f"the prompt's {tokens} tokens and max_tokens {request.max_tokens} do not fit into a slot's context of {ctx}; "
        "shorten the prompt, lower max_tokens, or raise the pool's ctx"
    )


def is_short(*requests: TaskRequest) -> bool:
    """Whether the prompts may be tokenised on the event loop, all together."""
    return all(request.messages is None and request.json_schema is None for request in requests) and (
        sum(request.prompt_chars for request in requests) <= INLINE_CHARS
    )
