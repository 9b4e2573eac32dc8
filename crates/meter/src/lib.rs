//! What was used, by whom: memory, time, bytes, energy, receipts.
