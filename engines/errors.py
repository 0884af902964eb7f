"""What can go wrong inside an engine, sorted by what the owner may do next.

EngineError
├── InvalidPrompt        the input cannot be turned into tokens; refuse it, nothing was touched
│   └── PromptTooLong        it would be more tokens than are of use
├── InvalidSchema        no text can be held to it; refuse it, or end the sequence that cannot go on
├── LoadFailed           the model is not there; every handle made on the way has been closed
│   └── OutOfDeviceMemory    same, and a smaller ``slots`` or ``ctx`` may succeed
├── DecodeFailed         this step is lost; ``LoadedModel.reset`` brings the model back empty
└── EngineDead           the handle is unusable; only closing it is allowed
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything an engine raises on purpose. ``str(error)`` is one sentence for a person."""


class InvalidPrompt(EngineError):
    """Text or messages that this model's tokenizer or chat template refuses."""


class PromptTooLong(InvalidPrompt):
    """A prompt has more tokens than are of use.

    Args:
        tokens: It has more; they were not counted to the end.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        super().__init__(f"the prompt has more than {tokens} tokens")


class InvalidSchema(EngineError):
    """A JSON Schema that this model's output cannot be held to, or not for what it would cost."""


class LoadFailed(EngineError):
    """A model could not be loaded."""


class OutOfDeviceMemory(LoadFailed):
    """The model, its KV cache or its compute buffers do not fit on the device."""


class DecodeFailed(EngineError):
    """A step failed; the sequences it was stepping are lost, the model can be reset."""


class EngineDead(EngineError):
    """The model cannot be used again; close it and load another."""
