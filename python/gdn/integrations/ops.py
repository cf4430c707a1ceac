"""What of an engine's layer goes through gdn on a GPU, and whether a call can.

`GDN_OPS` names it: any of `split`, `decode`, `verify` and `prefill`, with commas between them. Without it all do,
as each was measured to be faster than the engines' own kernels (docs/integrations.md).
"""

from __future__ import annotations

import logging
import os
from typing import Any

import gdn
from gdn.integrations.known import NOTHING_CHANGED

VARIABLE = "GDN_OPS"
OPS = ("split", "decode", "verify", "prefill")

SUPPORTED = {"decode": gdn.decode_supported, "verify": gdn.decode_supported, "prefill": gdn.prefill_supported}


def chosen() -> tuple[str, ...]:
    """The ops that `GDN_OPS` names, or all. Raises ValueError for a name that is none."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return OPS
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in OPS:
            raise ValueError(f"{VARIABLE} names {name!r}, it may name {', '.join(OPS)}. {NOTHING_CHANGED}")
    return names


class Core:
    """The core of one of an engine's layers.

    `tensors` are the engine's own weights, which the `gdn.Layer` was made of: where the engine has others now, another has to be
    made.
    """

    def __init__(self, layer: gdn.Layer, tensors: tuple[Any, ...], logger: logging.Logger) -> None:
        self.layer, self._tensors, self._logger = layer, tensors, logger
        self._refused: dict[Any, str | None] = {}

    def is_of(self, tensors: tuple[Any, ...]) -> bool:
        return len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors))

    def takes(self, op: str, projections: Any, *states: Any, **options: Any) -> bool:
        """Whether a call of `decode` ("decode", "verify") or `prefill` with these arguments can be made.

        Asked of gdn once for each op, dtypes and strides: these decide it, not how many rows there are. What stands against it is
        logged once.
        """
        key = (op, options.get("tokens_per_sequence"), options.get("checkpoint_every_n_tokens"))
        key += tuple((one.dtype, one.stride()) for one in projections)
        if key not in self._refused:
            why = self._refused[key] = SUPPORTED[op](self.layer, projections, *states, **options)
            if why is not None:
                self._logger.info("gdn leaves %s to the engine: %s", op, why)
        return self._refused[key] is None
