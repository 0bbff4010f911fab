"""Apply a plan to a module and its optimizer, and take it off again."""
