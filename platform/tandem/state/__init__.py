"""Shared state of a fleet: one `Store` interface, embedded (a file) or Redis."""

from tandem.state.store import Change, Entry, Store, StoreError, StoreLostError, open_store

__all__ = ["Change", "Entry", "Store", "StoreError", "StoreLostError", "open_store"]
