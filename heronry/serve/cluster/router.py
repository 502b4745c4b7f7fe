"""Chooses a replica: consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350).

Ray's own router holds a session to its replica whatever that has to do already. Here one that has more than its share
is passed over, so a prompt that everybody sends does not end up with one replica alone.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

BOUND = 1.25  # times the mean of all replicas; what HAProxy's hash-balance-factor 125 means


class BoundedHashRouter(ConsistentHashRouter):
    """The loads are those that come from here: other routers have loads of their own."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._ongoing: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """In the order of the hash ring; those that have their share stand at the end."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        replicas = [replica.replica_id for replica in candidate_replicas]
        share = math.ceil(BOUND * (sum(self._ongoing[replica] for replica in replicas) + 1) / max(1, len(replicas)))
        return sorted(ranks, key=lambda rank: self._ongoing[rank[0].replica_id] >= share)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._ongoing[replica_id] -= 1
        if self._ongoing[replica_id] <= 0:
            del self._ongoing[replica_id]
