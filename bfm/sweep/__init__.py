"""Spec, space, ledger, policy, driver: the sweep as a pure state machine."""
