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
    """Loads are what replicas said last, what was sent to them since then, and what is on its way there."""

    def initialize_state(self, **options: Any) -> None:
        """most: requests that a replica gets; it takes more, from who asks it for numbers."""
        self._most = int(options.pop("most"))
        self._chosen: dict[str, ReplicaID] = {}  # for requests that are not sent yet: many may come at once
        super().initialize_state(num_fallback_replicas=1 << 16, **options)  # any may take the place of another

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Those that are not full in the order of the hash ring, but behind the others what has its share already."""
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None:
            return ranks
        name = pending_request.metadata.internal_request_id
        loads = Counter(replica for other, replica in self._chosen.items() if other != name)
        for replica in candidate_replicas:
            loads[replica.replica_id] += self._replica_queue_len_cache.get(replica.replica_id) or 0
        share = math.ceil(BOUND * (loads.total() + 1) / max(1, len(candidate_replicas)))
        ranks = [rank for rank in ranks if loads[rank[0].replica_id] < self._most]
        ranks.sort(key=lambda rank: loads[rank[0].replica_id] >= share)
        if ranks:
            if name not in self._chosen:
                pending_request.future.add_done_callback(lambda _: self._chosen.pop(name, None))
            self._chosen[name] = ranks[0][0].replica_id
        return ranks
