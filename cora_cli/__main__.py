"""`python -m cora_cli`, which is what torchrun and accelerate launch."""

from cora_cli.cli import main

if __name__ == "__main__":
    main()
