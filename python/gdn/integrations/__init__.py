"""Integrations with engines: `gdn.integrations.sglang`, `.vllm`, `.vllm_ascend` and `.transformers`.

Each is off until asked for. Each has the same four names:

    install(any_release=False)   puts gdn in the engine; a second call does nothing
    uninstall()                  puts back what was there; does nothing where nothing is installed
    is_installed()               whether it is
    installed()                  a context manager: installed inside, as before outside

An engine that is not known, by its release and its source or by a trial, is refused with an `UnknownEngine`,
a RuntimeError that says what was found and what is known; nothing is changed then. `any_release=True` waives
the release, and nothing else.

docs/integrations.md says what is replaced in each engine, and what was verified.
"""

from gdn.integrations.known import UnknownEngine

__all__ = ["UnknownEngine"]
