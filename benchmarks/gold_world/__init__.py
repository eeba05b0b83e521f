"""Controls of the gold world: plan the runs, judge their records, draw the results."""
