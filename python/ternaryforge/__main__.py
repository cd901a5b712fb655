# SPDX-License-Identifier: Apache-2.0
"""`python -m ternaryforge` is the command `ternaryforge`."""

from ternaryforge.cli import main

if __name__ == "__main__":
    main()
