"""Options and error handling that all loaders share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import diffusers
import transformers
from accelerate import init_empty_weights

from .check import ExportError
from .sources import cannot_load, check_place, is_file

Model = TypeVar("Model")

BASE_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Where the tokenizer and the settings of a single-file base come from by default."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load the sources.

    Attributes:
        base_config: a base in diffusers format whose tokenizer and settings go with a single-file base.
        variant: which weights to load from folders that hold several, such as `fp16`.
    """

    base_config: str = BASE_CONFIG
    variant: str | None = None

    def config_of(self, base: str) -> str:
        """Returns the source of the tokenizer and the settings of `base`."""
        return self.base_config if is_file(base) else base

    def config_field(self, base: str) -> str:
        """Returns the option that names `config_of(base)`."""
        return "base_config" if is_file(base) else "base"


DEFAULTS = LoadOptions()


def load(field: str, source: str, reader: Callable[[], Model]) -> Model:
    """Loads from a folder or a hub name; reports any failure as an ExportError of one line."""
    check_place(field, source)
    return attempt(field, source, reader)


def attempt(field: str, source: str, reader: Callable[[], Model]) -> Model:
    """Loads from anywhere; reports any failure as an ExportError of one line."""
    try:
        with quiet():
            return reader()
    except ExportError:
        raise
    except Exception as error:  # a damaged file can make the loaders raise anything
        raise cannot_load(field, source, error) from None


def unfilled(build: Callable[[], Model]) -> Model:
    """Builds a model whose weights take no memory and no time until they are assigned; buffers are as always."""
    with init_empty_weights(include_buffers=False):
        return build()


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off the libraries' progress bars and warnings: the export shows one bar of its own.

    The loaders check themselves what the warnings tell: missing and unexpected weights, and layers of LoRAs that do
    not fit.
    """
    before = diffusers.logging.get_verbosity(), transformers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before[0])
        transformers.logging.set_verbosity(before[1])
        diffusers.logging.enable_progress_bar()
        transformers.logging.enable_progress_bar()
