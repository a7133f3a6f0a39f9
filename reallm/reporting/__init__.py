"""HTML pages and figures that show one plan, or a sweep over many budgets."""
