"""Pages and figures for people: of one plan, and of a sweep over many budgets."""
