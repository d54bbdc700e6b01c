"""What the server imports from which ranks are forked (see `tests.helpers.dist`)."""

import warnings

warnings.simplefilter("ignore")

from megatron_matpo.megatron import cpu_backend  # noqa: E402

cpu_backend.install()
