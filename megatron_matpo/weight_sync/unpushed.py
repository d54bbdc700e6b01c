"""In place of a transaction: engines that get weights once, and runs without engines."""

from __future__ import annotations

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.transaction import Transaction


class PushOnce:
    """The control experiment `weight_sync.transport=none`: engines keep the run's first weights."""

    def __init__(self, sync: Transaction) -> None:
        """Wrap `sync`, whose first push is let through."""
        self._sync = sync
        self._served: PolicyVersion | None = None
        self.metrics: dict[str, float] = {}
        """Of the last push; nothing if that sent nothing."""

    def connect(self) -> None:
        """As `Transaction.connect`."""
        self._sync.connect()

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Push the first time; afterwards only say which version is served."""
        self.metrics = {}
        if self._served is None:
            self._served = self._sync.push(version)
            self.metrics = self._sync.metrics
        return self._served

    def refit(self, version: PolicyVersion) -> None:
        """It cannot be done.

        Raises:
            WeightSyncError: always.
        """
        raise WeightSyncError(
            "an engine lost the run's first weights, and with weight_sync.transport=none nobody "
            "can give them again; start the run again under another run.name"
        )

    def close(self) -> None:
        """As `Transaction.close`."""
        self._sync.close()


class NoEngines:
    """For runs without engines (replay): nothing to keep in step."""

    @property
    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def connect(self) -> None:
        """Nothing to form."""

    def push(self, version: PolicyVersion) -> PolicyVersion:
        """Nothing is sent."""
        return version

    def refit(self, version: PolicyVersion) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing to release."""
