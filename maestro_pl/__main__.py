"""``python -m maestro_pl`` is ``maestro-pl``."""

from maestro_pl.cli import main

if __name__ == "__main__":
    main()
