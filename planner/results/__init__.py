"""Making plans, and comparing, explaining and summarising them."""
