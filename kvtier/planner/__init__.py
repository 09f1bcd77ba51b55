"""The control plane: what to keep, free, admit and move. Decides in memory, in microseconds, without I/O or threads.

Every journey has three steps: a verb plans (reserves, pins, and puts one Plan per rank into the outbox), the data
planes move, and ``complete`` commits what they report. The owner serialises the calls and passes the time.
"""

from kvtier.planner.leases import Lease
from kvtier.planner.planner import Planner
from kvtier.planner.tickets import Durability, Outcome, Ticket, TicketKind
from kvtier.planner.wishes import FlushWish, Held, LoadWish, PrefetchWish, StoreWish, Wish

__all__ = [
    "Durability",
    "FlushWish",
    "Held",
    "Lease",
    "LoadWish",
    "Outcome",
    "Planner",
    "PrefetchWish",
    "StoreWish",
    "Ticket",
    "TicketKind",
    "Wish",
]
