"""The basis file and the choices recorded in it."""
