"""Bounds of the settings by which engines are judged, started anew and refitted (docs/fleet.md)."""

from __future__ import annotations

FLEET_AT_LEAST: dict[str, float] = {
    "rollout.health.max_failed_probes": 1,
    "rollout.health.max_failed_requests": 1,
    "rollout.health.recovery_probes": 1,
    "rollout.max_engine_restarts": 0,
    "rollout.restart_backoff_s": 0,
    "rollout.restart_backoff_max_s": 0,
    "weight_sync.retries": 0,
}
FLEET_POSITIVE = (
    "rollout.health.probe_every_s",
    "rollout.health.probe_timeout_s",
    "rollout.health.no_engine_timeout_s",
    "weight_sync.answer_timeout_s",
)
