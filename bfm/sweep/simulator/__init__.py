"""Sweeps on a virtual clock: the same policies, driver and ledger as real ones, over known curves or planted laws."""
