"""What the server imports from which ranks are forked (see `tests.helpers.dist`)."""

import gc
import importlib
import warnings

from megatron_matpo.megatron import cpu_backend

warnings.simplefilter("ignore")
cpu_backend.install()
for name in ("learner_ranks", "megatron_ranks"):
    importlib.import_module(f"tests.helpers.{name}")
# Ranks collect garbage after every function; what was imported here need not be looked at again.
gc.collect()
gc.freeze()
