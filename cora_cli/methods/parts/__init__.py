"""Building blocks of several methods: starts, products of factors, PEFT's layers and configuration files."""
