"""A plan and what people give to get one, as data: decisions, overrides, budgets, policies, profiles."""
