"""From a study and a budget to a plan whose step has been executed."""
