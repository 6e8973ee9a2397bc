"""Run directory -> predictions -> metrics."""
