"""What several methods are made of: starts, products of factors, PEFT's layers and configuration files. No method is here."""
