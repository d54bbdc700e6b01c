"""What the server imports from which ranks are forked (see `tests.helpers.dist`)."""

import warnings

warnings.simplefilter("ignore")

import tests.helpers.learner_ranks  # noqa: E402, F401
import tests.helpers.megatron_ranks  # noqa: E402, F401
from megatron_matpo.megatron import cpu_backend  # noqa: E402

cpu_backend.install()
