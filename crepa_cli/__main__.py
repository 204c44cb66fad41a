"""`python -m crepa_cli`, which launchers such as `accelerate launch -m` call."""

from crepa_cli.cli import main

if __name__ == "__main__":
    main()
