"""Read, write and verify the basis file and the choices recorded in it."""
