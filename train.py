"""python train.py --config configs/demo.yaml: the same as `danceopd train`."""

import argparse
import sys

from danceopd.cli.train import add_train_arguments, run_train
from danceopd.support.exits import guarded

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a student as a configuration says.")
    add_train_arguments(parser)
    sys.exit(guarded(run_train, parser.parse_args()))
