"""A plan, and the inputs to one, as data: decisions, overrides, budgets, policies, profiles."""
