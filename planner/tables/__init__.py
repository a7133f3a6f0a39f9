"""The records that the stages exchange as files, the exact size of what they describe, and the units of budgets."""
