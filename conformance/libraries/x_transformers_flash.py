# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "torch==2.15.0",
#     "numpy==2.5.5",
#     "x-transformers==2.31.10",
# ]
# ///
"""`x_transformers.attend.Attend(flash=True)`."""

from frameworks import main
from x_transformers_attend import XTransformers


class XTransformersFlash(XTransformers):
    name = "x-transformers (flash)"
    flash = True


if __name__ == "__main__":
    main(XTransformersFlash())
