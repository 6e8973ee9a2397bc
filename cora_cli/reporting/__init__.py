"""Finished directories -> tables, plots and one page. Nothing here trains, generates or changes what it reads."""
