"""One unit and one call of it: arguments, place among others, what earlier calls taught, the tier."""
