"""Model references and loading."""
