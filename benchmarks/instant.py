"""A rank that answers every store at once and moves nothing: what is left is the control plane."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from benchmarks.suite import BenchmarkError
from kvtier.core.memory import GroupPages, KVMemory, PageTable
from kvtier.core.plan import COMPLETED, NOWHERE, Completion, Hello, Message, Plan, PlanKind, Status, Tier
from kvtier.metrics import Sample
from kvtier.models import KVLayout

NO_PAGES: Final = PageTable(0, (GroupPages(0, np.empty(0, np.int32)),))


class InstantChannel:
    """Implements ``kvtier.channel.Channel`` for one rank with ``host_pages`` pages that do not exist."""

    def __init__(self, layout: KVLayout, host_pages: int) -> None:
        self._outbox: deque[Message] = deque(
            [
                Hello(
                    rank=0,
                    incarnation=1,
                    placement=layout.placement,
                    block_tokens=layout.block_tokens,
                    record_pages=layout.record_pages,
                    host_pages=host_pages,
                    disk_bytes=0,
                    segment_bytes=0,
                )
            ]
        )

    def send(self, plans: Sequence[Plan]) -> None:
        """Every row of a store is in host memory."""
        for plan in plans:
            if plan.kind != PlanKind.STORE:
                raise BenchmarkError(f"a plan of kind {plan.kind.name}: only stores were expected")
            rows = np.zeros(len(plan.rows), COMPLETED)
            rows["row"] = np.arange(len(rows))
            rows["status"], rows["tier"], rows["segment"] = Status.OK, Tier.HOST, NOWHERE
            rows["page"], rows["pages"] = plan.rows["target_page"], plan.rows["target_pages"]
            self._outbox.append(Completion(plan.plan_id, 0, 1, rows, plan.chains, source_free=True, final=True))

    def call_back(self) -> bool:
        """There are no threads here."""
        return False

    def cancel(self, plan_id: int) -> None:
        """There is nothing under way."""

    def poll(self) -> list[Message]:
        """What was answered since the last call."""
        news = list(self._outbox)
        self._outbox.clear()
        return news

    def register(self, memory: KVMemory) -> int:
        """Any memory will do."""
        return 0

    def unregister(self, memory_id: int) -> None:
        """Nothing was kept."""

    def samples(self) -> list[Sample]:
        """Nothing is counted."""
        return []

    def close(self, timeout_s: float) -> bool:
        """There is nothing to stop."""
        return True
