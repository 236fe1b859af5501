"""`python -m batchnorm` prints what `batchnorm.show_config` does."""

import batchnorm

if __name__ == "__main__":
    batchnorm.show_config()
