"""python train.py --config configs/demo.yaml: the same as `danceopd train`."""

import sys

from danceopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
