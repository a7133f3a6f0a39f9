"""The records that stages exchange on disk, and the units of budgets."""
