"""Off until asked for, on once, undoable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

from gdn.integrations.known import UnknownEngine

Undo = Callable[[], None]


class Switch:
    """An integration that is off or on.

    `apply(any_release)` replaces something in an engine, or raises with nothing changed. It returns what
    undoes it. `told`, or what it returns, is the line that is logged when it is on. `caution()` is what
    somebody who calls `install` has to be warned of, or None.
    """

    def __init__(
        self,
        logger: logging.Logger,
        told: str | Callable[[], str],
        apply: Callable[..., Undo],
        caution: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._logger, self._told, self._apply, self._caution = logger, told, apply, caution
        self._undo: Undo | None = None
        self._on = ""
        self._lock = RLock()

    def install(self, any_release: bool = False) -> None:
        """Puts gdn in the engine. Does nothing where it is there already.

        Raises `UnknownEngine`, a RuntimeError, where the engine is not one this integration knows; nothing is
        changed then. `any_release=True` waives the release, where one is asked for, and nothing else.
        """
        self._turn_on(any_release)
        if warning := self._caution():
            self._logger.warning(warning)

    def uninstall(self) -> None:
        """Puts back what was there. Does nothing where nothing is installed."""
        with self._lock:
            if self._undo is not None:
                self._undo()
                self._undo = None
                self._logger.info("gdn is off, what was there is back; it was: %s", self._on)

    def is_installed(self) -> bool:
        """Whether gdn is in its place."""
        return self._undo is not None

    @contextmanager
    def installed(self, any_release: bool = False) -> Iterator[None]:
        """Installed inside the block; after it as before it."""
        before = self.is_installed()
        self.install(any_release)
        try:
            yield
        finally:
            if not before:
                self.uninstall()

    def install_if_known(self, **how: bool) -> None:
        """`install`, for a plugin: what stands against it goes to the log, and the engine runs without gdn.

        Engines run plugins before they set up their logs, where INFO would be lost: there it is a warning
        that gdn is on. `how` goes to `apply`.
        """
        try:
            self._turn_on(
                False, logging.INFO if self._logger.isEnabledFor(logging.INFO) else logging.WARNING, **how
            )
        except UnknownEngine as refused:
            self._logger.warning("gdn stays off: %s", refused)
        except Exception:
            self._logger.exception("gdn stays off")

    def _turn_on(self, any_release: bool, level: int = logging.INFO, **how: bool) -> None:
        with self._lock:
            if self._undo is None:
                self._undo = self._apply(any_release, **how)
                self._on = self._told if isinstance(self._told, str) else self._told()
                self._logger.log(level, "gdn is on: %s", self._on)
