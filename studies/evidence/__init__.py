"""Tables of one-shot masks, budgets, patterns, priors, schedules, reordering and recovery."""
