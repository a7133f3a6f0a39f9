"""The terms that are added to the decoded codes: low-rank factors and sparse outliers."""
